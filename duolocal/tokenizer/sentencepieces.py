"""SentencePieceBackend: sentencepiece models, from a file or built from a GGUF's vocabulary.

Owns the little of protobuf's wire format that a sentencepiece model needs (sentencepiece_model.proto), so that no
protobuf package is wanted. Does not decide which tokens are special.
"""

import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import IntEnum

import sentencepiece

from duolocal.errors import TokenizerError
from duolocal.tokenizer.cuts import CutSafety, cut, find_safety
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

    def __init__(self, proto: bytes, *, name: str, prefix: PrefixMode, added: Mapping[str, int] | None = None) -> None:
        """Load `proto`; `added` are tokens beside the model that ordinary text may hold, with their ids."""
        self.prefix: PrefixMode = prefix
        self._added = dict(added or {})
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if added else None
        self._first = _load(proto, name)
        self._later = _load(proto + _GOES_ON, name)
        size = self._first.GetPieceSize()
        # Spaces are kept one for one only by a model that neither maps characters nor collapses spaces.
        probe = " a  b\u00a0\ufb01 "
        pieces = (sentencepiece_bytes(self._first.IdToPiece(i)) for i in range(size))
        self._safety = find_safety(pieces, lines=True) if _keeps(self._first, probe) else CutSafety()

    def encode(self, text: str, *, prefix: bool) -> list[int]:
        """Return the ids of `text`, in parts where it is long (see `cuts`)."""
        if self._split is None:
            return self._encode(text, prefix=prefix)
        ids: list[int] = []
        for index, section in enumerate(self._split.split(text)):
            if index % 2:
                ids.append(self._added[section])
            elif section:
                after_token = index > 0 and self.prefix == "sections"
                ids += self._encode(section, prefix=after_token or (prefix and index == 0))
        return ids

    def _encode(self, text: str, *, prefix: bool) -> list[int]:
        ids: list[int] = []
        for part in cut(text, self._safety):
            ids += (self._first if prefix else self._later).EncodeAsIds(part)
            prefix = False
        return ids


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int | bytes]]:
    """Yield field number, start, end and value of each field of a protobuf message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        start = at
        key = varint()
        wire = key & 7
        value: int | bytes
        if wire == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}[wire] if wire != 2 else varint()
            value = data[at : at + size]
            if len(value) != size:
                raise IndexError
            at += size
        yield key >> 3, start, at, value


def read_pieces(proto: bytes, *, name: str) -> list[tuple[str, int]]:
    """Return text and type (`PieceType`) of each piece of a serialized model, in order of ids."""
    pieces = []
    try:
        for field, _, _, value in _fields(proto):
            if field == 1:
                assert isinstance(value, bytes)
                inner = {number: content for number, _, _, content in _fields(value)}
                text, kind = inner.get(1, b""), inner.get(3, PieceType.NORMAL)
                assert isinstance(text, bytes)
                assert isinstance(kind, int)
                pieces.append((text.decode(), kind))
    except (IndexError, KeyError, AssertionError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{name}: not a sentencepiece model (tokenizer.json would do as well)") from error
    if not pieces:
        raise TokenizerError(f"{name}: a sentencepiece model without pieces (tokenizer.json would do as well)")
    return pieces


def as_control(proto: bytes, ids: Collection[int]) -> bytes:
    """Return the model with the pieces `ids` made control pieces, which no text can produce."""
    out = []
    index = -1
    for field, start, end, value in _fields(proto):
        index += field == 1
        if field == 1 and index in ids:
            assert isinstance(value, bytes)
            out.append(_block(1, value + _number(3, PieceType.CONTROL)))  # the last value of a field holds
        else:
            out.append(proto[start:end])
    return b"".join(out)


def _keeps(processor: sentencepiece.SentencePieceProcessor, text: str) -> bool:
    """Say whether normalising leaves `text` as it is, but for the prefix and the space character."""
    normal = processor.Normalize(text).replace("\u2581", " ")
    return normal in (text, " " + text)
