"""One context file: opened, created and brought up to date; never half-written, whatever happens.

Owns locks, temporary files, free places inside a file, fsync, and what is said about a full disk. The bytes are
`layout`'s.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from duolocal.errors import SessionError
from duolocal.files import Lock, replacing, unfinished
from duolocal.sessions.layout import (
    ALIGNMENT,
    SLOT_BYTES,
    SLOTS,
    Arrays,
    Extent,
    Index,
    Opened,
    StoredRing,
    gaps,
    header,
    index_to_json,
    read_description,
    slot_bytes,
)

MARGIN = 16 << 20  # bytes of a disk that a save leaves free
_WRITE_BYTES = 32 << 20  # columns are copied out of the cache in pieces of this size


@dataclass(frozen=True)
class Wanted:
    """What a file shall hold.

    kept_columns: so many of the file's columns stay; the further ones, up to `num_columns`, come from
    `read_columns(first, last)`: uint8 [last - first, column_bytes]. rings: by position, rising, each as bytes or as one
    that is in the file.
    """

    description: Mapping[str, Any]
    num_tokens: int
    tokens: np.ndarray  # int32
    num_columns: int
    column_bytes: int
    kept_columns: int
    read_columns: Callable[[int, int], np.ndarray]
    rings: Sequence[tuple[int, np.ndarray | StoredRing]]

    def new_bytes(self) -> int:
        """Return the bytes that writing it adds, not counting the description."""
        fresh = sum(ring.nbytes for _, ring in self.rings if isinstance(ring, np.ndarray))
        return fresh + self.tokens.nbytes + (self.num_columns - self.kept_columns) * self.column_bytes


class ContextFile:
    """A file that is open. `opened` is None for one that is not written yet.

    Invariant: what `opened` says is on the disk; a commit that fails leaves it so.
    """

    def __init__(self, path: Path, file: BinaryIO | None, opened: Opened | None, lock: Lock | None) -> None:
        self.path = path
        self.opened = opened
        self._file = file
        self._lock = lock
        self._arrays: Arrays | None = None

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> "ContextFile":
        """Open a file that exists; raises SessionError, in one line, where it is no valid one or in use."""
        lock = _lock(path) if writable else None
        try:
            try:
                file = path.open("r+b" if writable else "rb", buffering=0)
            except OSError as error:
                raise SessionError(f"{path}: cannot be opened ({error.strerror or error})") from error
            try:
                return cls(path, file, read_description(file, path), lock)
            except BaseException:
                file.close()
                raise
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    @classmethod
    def create(cls, path: Path) -> "ContextFile":
        """Begin a file that is there, whole, after its first commit; one that is at `path` is replaced then."""
        for left, wanted in unfinished(path.parent):
            with contextlib.suppress(OSError, SessionError), _lock(wanted):  # its writer, where one lives, has the lock
                left.unlink()
        return cls(path, None, None, _lock(path))

    @property
    def writable(self) -> bool:
        return self._lock is not None

    @property
    def nbytes(self) -> int:
        return 0 if self.opened is None else self.opened.file_bytes

    def arrays(self) -> Arrays:
        """Return the arrays as they were at the last commit."""
        assert self.opened is not None and self._file is not None
        if self._arrays is None:
            self._arrays = Arrays(self._file, self.opened)
        return self._arrays

    def close(self) -> None:
        """Let go of the file; the arrays that were returned stay valid."""
        self._arrays = None
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check_space(self, wanted: Wanted) -> None:
        """Raise SessionError, with the numbers, where the disk has no room for `wanted`."""
        needed = wanted.new_bytes() + MARGIN
        try:
            free = shutil.disk_usage(self.path.parent).free
        except OSError:
            return  # what cannot be known is found out by writing
        if needed > free:
            raise SessionError(
                f"{self.path.name} needs {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free in "
                f"{self.path.parent}: make room, or choose another place with --sessions-folder"
            )

    def commit(self, wanted: Wanted) -> None:
        """Write what is new of `wanted` and make it what the file says. Raises SessionError, with nothing changed."""
        assert self.writable
        self.check_space(wanted)
        self._arrays = None
        try:
            if self._file is None:
                self._create(wanted)
            else:
                self._update(self._file, wanted)
        except OSError as error:
            raise SessionError(
                f"{self.path} cannot be written ({error.strerror or error}): make room on the disk, or choose another "
                "place with --sessions-folder"
            ) from error

    def _create(self, wanted: Wanted) -> None:
        try:
            with replacing(self.path, durable=True, mode=0o600, locked=True) as temporary:
                self._file = file = temporary.open("r+b", buffering=0)
                _write(file, 0, header().ljust(ALIGNMENT, b"\0"))
                self._put(file, wanted, None)
                if os.name == "nt":
                    file.close()  # an open file cannot be renamed there
        except BaseException:
            if self._file is not None:
                self._file.close()
            self._file = self.opened = None
            raise
        if self._file.closed:
            self._file = self.path.open("r+b", buffering=0)

    def _update(self, file: BinaryIO, wanted: Wanted) -> None:
        before = self.opened
        assert before is not None
        try:
            self._put(file, wanted, before)
        except BaseException:
            if self.opened is before:
                with contextlib.suppress(OSError):
                    _write(file, SLOTS[1 - before.slot], bytes(SLOT_BYTES))
                    file.truncate(before.file_bytes)
            raise

    def _put(self, file: BinaryIO, wanted: Wanted, before: Opened | None) -> None:
        """Write what is new of `wanted`, then the description, then the slot that makes it valid."""
        held = [] if before is None else [before.place, *before.index.extents()]
        place = _Places(held)
        columns = [] if before is None else list(before.index.columns[: wanted.kept_columns])
        columns += self._put_columns(file, wanted, place)
        rings = []
        for position, ring in wanted.rings:
            if isinstance(ring, np.ndarray):
                ring = StoredRing(position, place.write(file, ring))
            rings.append(ring)
        index = Index(wanted.num_tokens, place.write(file, wanted.tokens), tuple(columns), tuple(rings))
        description = dict(wanted.description)
        data = json.dumps({"index": index_to_json(index), "description": description}).encode()
        at = place.write(file, np.frombuffer(data, np.uint8))
        os.fsync(file.fileno())
        sequence, slot = (1, 0) if before is None else (before.sequence + 1, 1 - before.slot)
        _write(file, SLOTS[slot], slot_bytes(sequence, at.offset, data))
        os.fsync(file.fileno())
        end = max(extent.offset + extent.nbytes for extent in (at, *index.extents()))
        self.opened = Opened(self.path, slot, sequence, replace(at, crc32=0), description, index, end)
        if before is not None:
            # From here on the old description may be overwritten, so it must not be taken for a valid one.
            _write(file, SLOTS[before.slot], bytes(SLOT_BYTES))
        file.truncate(end)

    def _put_columns(self, file: BinaryIO, wanted: Wanted, place: "_Places") -> list[Extent]:
        first, count, nbytes = wanted.kept_columns, wanted.num_columns - wanted.kept_columns, wanted.column_bytes
        if not count * nbytes:
            return [Extent(ALIGNMENT, 0)] * count
        offset = place.take(count * nbytes)
        piece = max(1, _WRITE_BYTES // nbytes)
        columns = []
        for at in range(first, wanted.num_columns, piece):
            data = wanted.read_columns(at, min(at + piece, wanted.num_columns))
            for number, column in enumerate(data, start=at - first):
                columns.append(Extent(offset + number * nbytes, nbytes, zlib.crc32(column.data)))
            _write(file, offset + (at - first) * nbytes, data)
        return columns


class _Places:
    """Hands out what is free in a file: nothing of what it says now is ever overwritten."""

    def __init__(self, held: Sequence[Extent]) -> None:
        self._free = gaps(held)

    def take(self, nbytes: int) -> int:
        for number, (begin, end) in enumerate(self._free):
            if end < 0 or end - begin >= nbytes:
                after = begin + -(-nbytes // ALIGNMENT) * ALIGNMENT
                self._free[number : number + 1] = [(after, end)] if end < 0 or after < end else []
                return begin
        raise AssertionError("the last free place has no end")

    def write(self, file: BinaryIO, data: np.ndarray) -> Extent:
        offset = self.take(data.nbytes)
        flat = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        _write(file, offset, flat)
        return Extent(offset, data.nbytes, zlib.crc32(flat.data))


def _write(file: BinaryIO, offset: int, data: bytes | np.ndarray) -> None:
    view = memoryview(data) if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1).data
    file.seek(offset)
    while view.nbytes:
        written = file.write(view)
        view = view[written:]


def _lock(path: Path) -> Lock:
    try:
        return Lock(path.with_name(f".{path.name}.lock"), mode=0o600)
    except TimeoutError:
        raise SessionError(f"{path} is in use by another duolocal: end that one, or choose another name") from None
    except OSError as error:
        raise SessionError(
            f"{path.parent} cannot be written ({error.strerror or error}): choose another place with --sessions-folder"
        ) from error


def remove(path: Path) -> None:
    """Remove a context file that nobody has open; raises SessionError."""
    lock = _lock(path)
    try:
        path.unlink()
    except OSError as error:
        raise SessionError(f"{path} cannot be removed: {error.strerror or error}") from error
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            path.with_name(f".{path.name}.lock").unlink()
