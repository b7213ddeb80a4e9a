"""One saved context: a folder of segments, each written once, and a manifest that names them.

    NAME.duo/manifest.json      what the context is, its segments and their checksums; replaced in one step
    NAME.duo/<16 hex>.<kind>    bytes that never change

A save writes new segments, then the manifest, then removes what the manifest no longer names. A kill at any point
leaves the manifest before or the new one, with all of its segments; what else is there goes when a writer opens the
folder. Owns locks, checksums, fsync, and what is said about a full disk. Knows no model and no torch.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from duolocal.errors import SessionError
from duolocal.files import Lock, replacing, sync_folder
from duolocal.sessions.fields import HINT, Fields
from duolocal.sessions.names import MANIFEST

FORMAT = 2
MARGIN = 16 << 20  # bytes of a disk that a save leaves free

# blocks: columns of records, in order; turns: JSON records of turns, in order; rings: one each, by position;
# tokens: int32 ids of the context that belong to no turn.
SegmentKind = Literal["blocks", "turns", "rings", "tokens"]
KINDS: tuple[SegmentKind, ...] = get_args(SegmentKind)
_NAME = re.compile(rf"[0-9a-f]{{16}}\.({'|'.join(KINDS)})")
_MOST = 1 << 56
_OLDER = b"\x89duolocal\r\n"  # begins a file of format 1


@dataclass(frozen=True)
class Segment:
    """A file that is written. count: of the columns, turns or ids in it; of a ring, the tokens before its end."""

    name: str
    count: int
    nbytes: int
    crc32: int


@dataclass(frozen=True)
class NewSegment:
    """A segment that is not written yet; `read` returns its bytes, as uint8 or bytes."""

    count: int
    nbytes: int
    read: Callable[[], np.ndarray | bytes]


Segments = Mapping[SegmentKind, Sequence[Segment | NewSegment]]


class ContextFolder:
    """A saved context that is open. `saved` is False for one that is not written yet.

    Invariant: `description` and `segments` are on the disk; a commit that fails leaves them so.
    """

    def __init__(self, path: Path, lock: Lock | None) -> None:
        self.path = path
        self.saved = False
        self.description: Mapping[str, Any] = {}
        self.segments: dict[SegmentKind, list[Segment]] = {kind: [] for kind in KINDS}
        self._lock = lock
        self._manifest_bytes = 0

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> "ContextFolder":
        """Open a context that exists; raises SessionError, in one line, where it is no valid one or in use."""
        if path.is_file():
            raise _refused_file(path)
        found = cls(path, _lock(path) if writable else None)
        try:
            found._read_manifest()
            if writable:
                found._collect()
        except BaseException:
            found.close()
            raise
        return found

    @classmethod
    def create(cls, path: Path) -> "ContextFolder":
        """Begin a context that is there after its first commit; one that is at `path` is replaced then."""
        lock = _lock(path)
        for other in path.parent.glob(f"*{path.suffix}"):  # of writers that were killed before their first commit
            if other != path and other.is_dir() and not (other / MANIFEST).exists():
                with contextlib.suppress(OSError, SessionError):  # a writer that lives has the lock
                    remove(other, unless=other / MANIFEST)
        return cls(path, lock)

    @property
    def nbytes(self) -> int:
        """What it takes on the disk."""
        return self._manifest_bytes + sum(segment.nbytes for segment in self._all())

    def kind_bytes(self, kind: SegmentKind) -> int:
        """What the segments of one kind take on the disk."""
        return sum(segment.nbytes for segment in self.segments[kind])

    def fields(self) -> Fields:
        """Return the description for reading."""
        return Fields(self.description, str(self.path), "description")

    def read(self, segment: Segment) -> np.ndarray:
        """Return a segment as uint8, checked; raises SessionError where it is damaged."""
        path = self.path / segment.name
        try:
            data = np.fromfile(path, np.uint8)
        except OSError as error:
            raise SessionError(f"{path} cannot be read ({error.strerror or error}): {HINT}") from error
        if len(data) != segment.nbytes:
            raise SessionError(f"{path} is cut off ({len(data):,} of {segment.nbytes:,} bytes): {HINT}")
        if zlib.crc32(data.data) != segment.crc32:
            raise SessionError(f"{path} is damaged: {HINT}")
        return data

    def close(self) -> None:
        """Let others write to it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check_space(self, segments: Segments) -> None:
        """Raise SessionError, with the numbers, where the disk has no room for what is new."""
        needed = new_bytes(segments) + MARGIN
        try:
            free = shutil.disk_usage(self.path.parent).free
        except OSError:
            return  # what cannot be known is found out by writing
        if needed > free:
            raise SessionError(
                f"{self.path.name} needs {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free in "
                f"{self.path.parent}: make room, or choose another place with --sessions-folder"
            )

    def commit(self, description: Mapping[str, Any], segments: Segments) -> None:
        """Make it `description` with `segments`, writing those that are new. Raises SessionError, nothing changed."""
        assert self._lock is not None
        self.check_space(segments)
        try:
            if not self.path.is_dir():
                self.path.mkdir(mode=0o700)
                sync_folder(self.path.parent)
            written = {
                kind: [part if isinstance(part, Segment) else self._write(kind, part) for part in segments[kind]]
                for kind in KINDS
            }
            sync_folder(self.path)
            with replacing(self.path / MANIFEST, durable=True, mode=0o600, locked=True) as temporary:
                temporary.write_bytes(_manifest_bytes(description, written))
        except OSError as error:
            raise SessionError(
                f"{self.path} cannot be written ({error.strerror or error}): make room on the disk, or choose another "
                "place with --sessions-folder"
            ) from error
        finally:
            self._follow_disk()

    def _follow_disk(self) -> None:
        """Take over what the manifest says by now, whether a commit failed before or after it was replaced."""
        with contextlib.suppress(SessionError, OSError):
            if (self.path / MANIFEST).exists():
                self._read_manifest()
            self._collect()

    def _write(self, kind: SegmentKind, part: NewSegment) -> Segment:
        name = f"{secrets.token_hex(8)}.{kind}"
        data = part.read()
        view = memoryview(data) if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1).data
        assert view.nbytes == part.nbytes
        with open(self.path / name, "xb", opener=_for_the_owner) as file:
            file.write(view)
            file.flush()
            os.fsync(file.fileno())
        return Segment(name, part.count, part.nbytes, zlib.crc32(view))

    def _read_manifest(self) -> None:
        path = self.path / MANIFEST
        try:
            data = path.read_bytes()
        except OSError as error:
            raise SessionError(f"{path} cannot be read ({error.strerror or error}): {HINT}") from error
        try:
            raw = json.loads(data)
            digest = _digest(raw.get("description"), raw.get("segments")) if isinstance(raw, dict) else ""
        except (ValueError, RecursionError):
            raise SessionError(f"{path} is damaged or cut off: {HINT}") from None
        fields = Fields(raw, str(path), "the manifest")
        if (version := fields.raw("format")) != FORMAT:
            raise SessionError(
                f"{path} is of format {version!r:.40}, not {FORMAT}: use the duolocal that wrote it, or {HINT}"
            )
        if fields.raw("sha256") != digest:
            raise SessionError(f"{path} is damaged: {HINT}")
        fields.inner("description")
        listed = fields.inner("segments")
        self.segments = {
            kind: [_segment(listed, kind, entry) for entry in listed.array(kind, longest=_MOST)] for kind in KINDS
        }
        self.description, self.saved, self._manifest_bytes = raw["description"], True, len(data)

    def _all(self) -> Iterator[Segment]:
        for kind in KINDS:
            yield from self.segments[kind]

    def _collect(self) -> None:
        """Remove the segments that the manifest does not name, and a manifest that was not finished."""
        named = {segment.name for segment in self._all()}
        with contextlib.suppress(OSError):
            for path in list(self.path.iterdir()):
                unfinished = path.name.startswith(f".{MANIFEST}")
                if unfinished or (_NAME.fullmatch(path.name) and path.name not in named):
                    path.unlink()
            if not self.saved:
                self.path.rmdir()


def _refused_file(path: Path) -> SessionError:
    """Return the error for a file where a folder should be: of format 1, or anything else."""
    try:
        with path.open("rb") as file:
            older = file.read(len(_OLDER)) == _OLDER
    except OSError as error:
        return SessionError(f"{path} cannot be read ({error.strerror or error})")
    if not older:
        return SessionError(f"{path} is no saved context of duolocal: name another")
    return SessionError(
        f"{path} was saved by an older duolocal: open it with that one, or remove it (`duolocal sessions rm`) and read "
        "the documents again"
    )


def new_bytes(segments: Segments) -> int:
    """Return the bytes that writing `segments` adds."""
    return sum(part.nbytes for parts in segments.values() for part in parts if isinstance(part, NewSegment))


def bytes_on_disk(path: Path) -> int:
    """Return what a saved context takes, also one that cannot be read; raises OSError."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def remove(path: Path, *, unless: Path | None = None) -> None:
    """Remove a saved context that nobody has open; raises SessionError. unless: a file that keeps it."""
    lock = _lock(path)
    try:
        if unless is not None and unless.exists():
            return
        if path.is_dir():
            (path / MANIFEST).unlink(missing_ok=True)  # first: from here on it is not there
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise SessionError(f"{path} cannot be removed: {error.strerror or error}") from error
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            _lock_file(path).unlink()


def _segment(listed: Fields, kind: SegmentKind, entry: object) -> Segment:
    fits = isinstance(entry, list) and len(entry) == 4 and isinstance(entry[0], str)
    if not fits or not all(type(value) is int and 0 <= value < _MOST for value in entry[1:]):  # type: ignore[index]
        raise listed.wrong(kind, "a list of segments")
    segment = Segment(*entry)  # type: ignore[misc]
    if not _NAME.fullmatch(segment.name):
        raise listed.wrong(kind, "a list of names of segments")
    return segment


def _manifest_bytes(description: Mapping[str, Any], segments: Mapping[SegmentKind, Sequence[Segment]]) -> bytes:
    listed = {kind: [astuple(segment) for segment in parts] for kind, parts in segments.items()}
    content = {"description": description, "segments": listed}
    return json.dumps({"format": FORMAT, "sha256": _digest(description, listed), **content}).encode()


def _digest(description: object, segments: object) -> str:
    return hashlib.sha256(json.dumps([description, segments]).encode()).hexdigest()


def _for_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _lock(path: Path) -> Lock:
    try:
        return Lock(_lock_file(path), mode=0o600)
    except TimeoutError:
        raise SessionError(f"{path} is in use by another duolocal: end that one, or choose another name") from None
    except OSError as error:
        raise SessionError(
            f"{path.parent} cannot be written ({error.strerror or error}): choose another place with --sessions-folder"
        ) from error
