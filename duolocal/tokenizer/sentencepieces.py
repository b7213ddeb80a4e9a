"""SentencePieceBackend: sentencepiece models, from a file or built from a GGUF's vocabulary.

Owns the little of protobuf's wire format that a sentencepiece model needs (sentencepiece_model.proto), so that no
protobuf package is wanted. Does not decide which tokens are special.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum

import sentencepiece

from duolocal.errors import TokenizerError
from duolocal.tokenizer.cuts import cut, find_safety
from duolocal.tokenizer.parts import PrefixMode, sentencepiece_bytes


class PieceType(IntEnum):
    """Kinds of token: GGUF's token types and sentencepiece's are the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _block(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


_BPE = 2  # TrainerSpec.ModelType


def build_model(
    tokens: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    add_space: bool,
    collapse_spaces: bool,
) -> bytes:
    """Return a serialized sentencepiece BPE model with these pieces, in order of their ids."""
    pieces = b"".join(
        _block(1, _block(1, token.encode()) + _float(2, score) + _number(3, kind))
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    )
    byte_fallback = PieceType.BYTE in kinds
    trainer = _number(3, _BPE) + _number(35, byte_fallback)
    normalizer = _block(1, b"identity") + _number(3, add_space) + _number(4, collapse_spaces) + _number(5, True)
    return pieces + _block(2, trainer) + _block(3, normalizer)


# A second normalizer block at the end is merged over the first (protobuf's rule for a repeated message):
# add_dummy_prefix and remove_extra_whitespaces off.
_GOES_ON = _block(3, _number(3, False) + _number(4, False))


def _load(proto: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = processor.LoadFromSerializedProto(proto)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise TokenizerError(f"{name}: not a sentencepiece model that can be read ({reason})") from error
    assert loaded
    return processor


class SentencePieceBackend:
    """Encodes ordinary text with a sentencepiece model; control pieces never come out of it."""

    def __init__(self, proto: bytes, *, name: str, prefix: PrefixMode) -> None:
        self.prefix = prefix
        self._first = _load(proto, name)
        self._later = _load(proto + _GOES_ON, name)
        size = self._first.GetPieceSize()
        # Spaces are kept one for one only by a model that neither maps characters nor collapses spaces.
        probe = " a  b\u00a0\ufb01 "
        faithful = self._later.Decode(self._first.Encode("x")) == "x" and _keeps(self._first, probe)
        ordinary = (sentencepiece_bytes(self._first.IdToPiece(i)) for i in range(size))
        self._safety = find_safety(ordinary, lines=True) if faithful else find_safety([b"a \na"], lines=False)

    def encode(self, text: str, *, prefix: bool) -> list[int]:
        """Return the ids of `text`, in parts where it is long (see `cuts`)."""
        ids: list[int] = []
        for part in cut(text, self._safety):
            processor = self._first if prefix and not ids else self._later
            ids += processor.EncodeAsIds(part)
        return ids


def _keeps(processor: sentencepiece.SentencePieceProcessor, text: str) -> bool:
    """Say whether normalising leaves `text` as it is, but for the prefix and the space character."""
    normal = processor.Normalize(text).replace("\u2581", " ")
    return normal in (text, " " + text)
