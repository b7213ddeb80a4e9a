"""The bytes of a context file: header, description, arrays; reading and checking them. Knows no model and no torch.

    0       magic (16 bytes), version (u32)
    512     slot A     which description is the valid one: sequence, offset, length (u64 each), SHA-256 of the
    1024    slot B     description, SHA-256 of the slot up to here; a slot that is not in use is zeros
    4096    arrays and descriptions, each at a multiple of 4096 bytes, in any order

The description is JSON. It says what the context is (`description`) and where its arrays lie (`index`): token ids
(int32), columns of blocks (one column is the records of all retrieval heads for one block of tokens, the very bytes of
the pool), rings. Every array and every column has a CRC-32. All numbers are little-endian.

A file is changed without ever being invalid: new arrays and a new description are written where nothing valid lies,
then the other slot is written, then the old one zeroed. Two valid slots are those of a process that was killed between
these; the higher sequence counts.
"""

import hashlib
import json
import mmap
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from duolocal.errors import SessionError
from duolocal.sessions.fields import Fields

MAGIC = b"\x89duolocal\r\n\x1a\n\0\0\0"
VERSION = 1
ALIGNMENT = 4096  # bytes
SLOTS = (512, 1024)
_SLOT = struct.Struct("<QQQ32s")
SLOT_BYTES = _SLOT.size + 32
MAX_DESCRIPTION = 1 << 30  # bytes; a million tokens of text and their checksums take some 5 MB
_MAX_OFFSET = 1 << 56
_PIECE = 32 << 20  # bytes of columns handed on at a time
_HINT = "remove it and read the documents again"


@dataclass(frozen=True)
class Extent:
    """Bytes of the file, and their CRC-32."""

    offset: int
    nbytes: int
    crc32: int = 0


@dataclass(frozen=True)
class StoredRing:
    """A ring in the file: the sink and recent tokens at one position."""

    position: int  # tokens in the cache
    extent: Extent


@dataclass(frozen=True)
class Index:
    """Where everything lies."""

    num_tokens: int
    tokens: Extent  # int32: those of the context, then those of turns that are not on its way
    columns: tuple[Extent, ...]
    rings: tuple[StoredRing, ...]  # by position, rising

    def extents(self) -> Iterator[Extent]:
        yield self.tokens
        yield from self.columns
        yield from (ring.extent for ring in self.rings)


def index_to_json(index: Index) -> dict[str, Any]:
    """Return what `index_from_json` reads; neighbouring columns are one run."""
    runs: list[list[int]] = []
    end = -1
    for column in index.columns:
        if column.offset == end:
            runs[-1][1] += 1
        else:
            runs.append([column.offset, 1])
        end = column.offset + column.nbytes
    return {
        "num_tokens": index.num_tokens,
        "tokens": vars(index.tokens),
        "blocks": {
            "column_bytes": index.columns[0].nbytes if index.columns else 0,
            "runs": runs,
            "crc32": [column.crc32 for column in index.columns],
        },
        "rings": [{"position": ring.position, **vars(ring.extent)} for ring in index.rings],
    }


def index_from_json(raw: Fields, file_bytes: int) -> Index:
    """Return the index; raises SessionError where anything lies outside the file."""

    def extent(fields: Fields) -> Extent:
        offset, nbytes = (fields.integer(name, most=_MAX_OFFSET) for name in ("offset", "nbytes"))
        if offset < ALIGNMENT or offset % ALIGNMENT or offset + nbytes > file_bytes:
            raise fields.wrong("an array", "inside the file")
        return Extent(offset, nbytes, fields.integer("crc32", most=0xFFFF_FFFF))

    num_tokens = raw.integer("num_tokens", most=1 << 40)
    tokens = extent(raw.inner("tokens"))
    if tokens.nbytes % 4 or tokens.nbytes < 4 * num_tokens:
        raise raw.wrong("tokens", "as long as the context")
    blocks = raw.inner("blocks")
    column_bytes = blocks.integer("column_bytes", most=1 << 40)
    checksums = blocks.integers("crc32", most=0xFFFF_FFFF, longest=1 << 26)
    columns: list[Extent] = []
    for run in blocks.array("runs", longest=1 << 26):
        if not (isinstance(run, list) and len(run) == 2 and all(type(value) is int for value in run)):
            raise blocks.wrong("blocks.runs", "a list of pairs of numbers")
        offset, count = run
        if not 0 < count <= len(checksums) - len(columns) or not ALIGNMENT <= offset <= _MAX_OFFSET:
            raise blocks.wrong("blocks.runs", "as long as its checksums")
        if offset + count * column_bytes > file_bytes:
            raise blocks.wrong("blocks.runs", "inside the file")
        for at in range(count):
            columns.append(Extent(offset + at * column_bytes, column_bytes, checksums[len(columns)]))
    if len(columns) != len(checksums):
        raise blocks.wrong("blocks.crc32", "as long as the blocks")
    rings = [
        StoredRing(ring.integer("position", most=num_tokens), extent(ring))
        for ring in raw.inners("rings", longest=10_000)
    ]
    positions = [ring.position for ring in rings]
    if positions != sorted(set(positions)):
        raise raw.wrong("rings", "in rising order")
    return Index(num_tokens, tokens, tuple(columns), tuple(rings))


def header() -> bytes:
    """Return the first 512 bytes of a file."""
    return (MAGIC + struct.pack("<I", VERSION)).ljust(SLOTS[0], b"\0")


def slot_bytes(sequence: int, offset: int, description: bytes) -> bytes:
    """Return a slot that points to `description` at `offset`."""
    body = _SLOT.pack(sequence, offset, len(description), hashlib.sha256(description).digest())
    return body + hashlib.sha256(body).digest()


@dataclass(frozen=True)
class Opened:
    """A file whose header and description are checked; its arrays are not read yet."""

    path: Path
    slot: int  # 0 or 1
    sequence: int
    place: Extent  # of the JSON
    description: Mapping[str, Any]
    index: Index
    file_bytes: int

    def fields(self) -> Fields:
        """Return the description for reading."""
        return Fields(self.description, str(self.path), "description")


def read_description(file: BinaryIO, path: Path) -> Opened:
    """Read and check header and description. Raises SessionError with one line."""
    try:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(ALIGNMENT)
        if head[: len(MAGIC)] != MAGIC:
            raise SessionError(f"{path}: is no saved context of duolocal: name another file")
        (version,) = struct.unpack_from("<I", head.ljust(ALIGNMENT, b"\0"), len(MAGIC))
        if version != VERSION:
            raise SessionError(
                f"{path}: is version {version} of the format, this duolocal reads {VERSION}: use the duolocal that "
                f"wrote it, or {_HINT}"
            )
        found = max((slot for slot in (_read_slot(head, 0), _read_slot(head, 1)) if slot), default=None)
        if found is None:
            raise SessionError(f"{path}: the header is damaged or cut off: {_HINT}")
        sequence, number, offset, length, digest = found
        if offset < ALIGNMENT or length > MAX_DESCRIPTION or offset + length > size:
            raise SessionError(f"{path}: is cut off ({size:,} bytes): {_HINT}")
        file.seek(offset)
        data = file.read(length)
    except OSError as error:
        raise SessionError(f"{path}: cannot be read ({error.strerror or error})") from error
    if hashlib.sha256(data).digest() != digest:
        raise SessionError(f"{path}: the description is damaged: {_HINT}")
    try:
        raw = Fields(json.loads(data), str(path), "the file")
    except (ValueError, RecursionError):
        raise SessionError(f"{path}: the description is no JSON: {_HINT}") from None
    index = index_from_json(raw.inner("index"), size)
    raw.inner("description")
    description: Any = raw.raw("description")
    return Opened(path, number, sequence, Extent(offset, length), description, index, size)


def _read_slot(head: bytes, number: int) -> tuple[int, int, int, int, bytes] | None:
    data = head[SLOTS[number] : SLOTS[number] + SLOT_BYTES]
    if len(data) < SLOT_BYTES or hashlib.sha256(data[: _SLOT.size]).digest() != data[_SLOT.size :]:
        return None
    sequence, offset, length, digest = _SLOT.unpack_from(data)
    return sequence, number, offset, length, digest


class Arrays:
    """The arrays of an opened file, blocks through a memory map; every one is checked when it is read."""

    def __init__(self, file: BinaryIO, opened: Opened) -> None:
        self._path, self._index, self._file = opened.path, opened.index, file
        try:
            # A private map: arrays made over it count as writable, which torch wants, and the file never changes.
            self._map = mmap.mmap(file.fileno(), opened.file_bytes, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise SessionError(f"{self._path}: cannot be read ({error})") from error

    def tokens(self) -> np.ndarray:
        """Return all token ids, int32."""
        return self._checked(self._index.tokens, "the token ids").view("<i4")

    def columns(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Yield columns first..last-1 in pieces: uint8 [n, column_bytes], views of the map."""
        at = first
        while at < last:
            extents = [self._index.columns[at]]
            limit = max(1, _PIECE // max(1, extents[0].nbytes))
            while at + len(extents) < last and len(extents) < limit:
                following = self._index.columns[at + len(extents)]
                if following.offset != extents[-1].offset + extents[-1].nbytes:
                    break
                extents.append(following)
            for number, extent in enumerate(extents):
                self._checked(extent, f"block {at + number:,}")
            nbytes = extents[0].nbytes
            flat = np.frombuffer(self._map, np.uint8, len(extents) * nbytes, extents[0].offset)
            yield flat.reshape(len(extents), nbytes)
            at += len(extents)

    def ring(self, ring: StoredRing) -> np.ndarray:
        """Return the bytes of a ring, uint8, in memory of its own: through the map it would take as much again."""
        data = np.empty(ring.extent.nbytes, np.uint8)
        left = data.data
        try:
            self._file.seek(ring.extent.offset)
            while left and (count := self._file.readinto(left)):  # type: ignore[attr-defined]
                left = left[count:]
        except OSError as error:
            raise SessionError(f"{self._path}: cannot be read ({error.strerror or error})") from error
        return self._check(data, ring.extent, "the recent tokens")

    def _checked(self, extent: Extent, what: str) -> np.ndarray:
        data = np.frombuffer(self._map, np.uint8, extent.nbytes, extent.offset) if extent.nbytes else _EMPTY
        return self._check(data, extent, what)

    def _check(self, data: np.ndarray, extent: Extent, what: str) -> np.ndarray:
        if zlib.crc32(data.data) != extent.crc32:
            raise SessionError(f"{self._path}: {what} is damaged: {_HINT}")
        return data


_EMPTY = np.zeros(0, np.uint8)


def gaps(extents: Sequence[Extent]) -> list[tuple[int, int]]:
    """Return the free ranges (begin, end) between extents, at multiples of ALIGNMENT; the last one has no end (-1)."""
    free, at = [], ALIGNMENT
    for extent in sorted(extents, key=lambda extent: extent.offset):
        if extent.offset > at:
            free.append((at, extent.offset))
        end = extent.offset + extent.nbytes
        at = max(at, -(-end // ALIGNMENT) * ALIGNMENT)
    free.append((at, -1))
    return free
