"""Single files in gzip, bzip2 or xz, unpacked within bounds that are checked while unpacking."""

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

from duolocal.documents.converted import ConversionError

_MAX_BYTES = 64 * 2**20  # unpacked
_PIECE = 1 << 20
_LZMA_BYTES = 128 * 2**20  # memory of the decoder


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Packing(NamedTuple):
    name: str
    magic: bytes
    decoder: Callable[[], _Decoder]


PACKINGS = (
    _Packing("gzip", b"\x1f\x8b", lambda: zlib.decompressobj(zlib.MAX_WBITS | 16)),
    _Packing("bzip2", b"BZh", bz2.BZ2Decompressor),
    _Packing("xz", b"\xfd7zXZ\x00", lambda: lzma.LZMADecompressor(memlimit=_LZMA_BYTES)),
)


def is_tar(head: bytes) -> bool:
    """Tell whether bytes begin a tar archive."""
    return head[257:262] == b"ustar"


def unpack_head(head: bytes, most: int) -> bytes:
    """Return the first bytes of what is packed; empty where they cannot be read."""
    try:
        return _unpacked(head, most, is_whole=False)
    except ConversionError:
        return b""


def unpack(data: bytes) -> bytes:
    """Return what is packed, all members of it; raises ConversionError."""
    return _unpacked(data, _MAX_BYTES, is_whole=True)


def _unpacked(data: bytes, most: int, *, is_whole: bool) -> bytes:
    packing = next(packing for packing in PACKINGS if data.startswith(packing.magic))
    pieces, length = [], 0
    try:
        while data.startswith(packing.magic):
            decoder = packing.decoder()
            piece = decoder.decompress(data, _PIECE)
            while True:
                pieces.append(piece)
                length += len(piece)
                if length > most:
                    if is_whole:
                        raise ConversionError(f"unpacks to more than {most // 2**20} MiB: unpack it and cut it up")
                    return b"".join(pieces)[:most]
                if decoder.eof:
                    data = decoder.unused_data
                    break
                rest = getattr(decoder, "unconsumed_tail", b"")
                piece = decoder.decompress(rest, _PIECE)
                if not piece and not decoder.eof:
                    if is_whole:
                        raise EOFError("it breaks off")
                    return b"".join(pieces)
    except (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError) as error:
        if is_whole:
            raise ConversionError(f"is a damaged {packing.name} file ({error}): pack it anew") from None
    return b"".join(pieces)
