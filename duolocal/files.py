"""Files that are there whole or not at all, locks between processes, JSON that may be lost, and names of their own.

Owns how these are done, once for the whole package. Not: where files lie (`paths`), nor what a user is told when
something fails: everything here raises OSError. Imports nothing but the standard library until a lock is taken.
"""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

_LOCKED = ".new.tmp"  # ends the name of a file that is written under a lock
_PATIENCE_S = 2.0  # how long a cache waits for another process that writes to it; that takes milliseconds


@contextmanager
def replacing(path: Path, *, durable: bool = False, mode: int = 0o666, locked: bool = False) -> Iterator[Path]:
    """Yield an empty file beside `path`; it takes its place when the block ends, and is removed when that raises.

    durable: content and name are on the disk when this returns. mode: before the umask. locked: the caller holds a
    lock, so that one name serves and what a kill leaves behind is overwritten by the next writer.
    """
    temporary = path.with_name(f".{path.name}{_LOCKED if locked else f'.{secrets.token_hex(6)}.tmp'}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if locked else os.O_EXCL), mode))
    try:
        yield temporary
        move(temporary, path, durable=durable)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_file(path: Path, data: bytes | str, *, durable: bool = False, locked: bool = False) -> None:
    """Put `data`, text as UTF-8, in the place of what is at `path`; the keywords are those of `replacing`."""
    with replacing(path, durable=durable, locked=locked) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def move(source: Path, path: Path, *, durable: bool = False) -> None:
    """Put the file `source` in the place of `path` in one step; `durable` as for `replacing`."""
    if durable:
        with source.open("rb+") as file:
            os.fsync(file.fileno())
    os.replace(source, path)
    if durable:
        sync_folder(path.absolute().parent)


def sync_folder(folder: Path) -> None:
    """See the names in a folder onto the disk; a system that opens no folders does so itself."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder`, absent or empty by then, when the block ends.

    When the block raises, nothing is left of it. Parents of `folder` are made.
    """
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True) as made:
        work = Path(made) / folder.name  # inside, since the outer one is its owner's alone
        work.mkdir()
        yield work
        work.replace(folder)


class Lock:
    """A lock between processes, held from its making to `release` or the end of the process. A context manager.

    The file is `path`; its folder is made. Raises TimeoutError, an OSError, when another process holds it for
    `timeout_s` on.
    """

    def __init__(self, path: Path, *, timeout_s: float = 0.0, mode: int | None = None) -> None:
        from filelock import FileLock

        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path) if mode is None else FileLock(path, mode=mode)
        self._lock.acquire(timeout=timeout_s)  # filelock.Timeout is a TimeoutError

    def release(self) -> None:
        """Let other processes in; a second call does nothing."""
        self._lock.release()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def read_json(path: Path, **fields: Any) -> dict[str, Any] | None:
    """Return the JSON object in a file, None where it is missing or damaged, or where `fields` differ in it."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(value, dict) and all(value.get(name) == wanted for name, wanted in fields.items())
    return value if known else None


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write `value` as JSON in the place of what is at `path`."""
    write_file(path, json.dumps(value, indent=indent) + "\n")


class JsonCache:
    """Entries by key in one JSON file, which anyone may lose or damage at any time.

    What cannot be read is absent and what cannot be written is not kept: neither ever raises. Processes that write
    at once keep each other's entries.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, key: str) -> Any:
        """Return an entry, None where there is none."""
        return (read_json(self.path) or {}).get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep an entry."""
        with suppress(OSError), ExitStack() as stack:
            with suppress(OSError):  # where nothing can be locked, the last writer wins
                stack.enter_context(Lock(self.path.with_name(f".{self.path.name}.lock"), timeout_s=_PATIENCE_S))
            write_json(self.path, (read_json(self.path) or {}) | {key: value})


def free_bytes(place: Path) -> int:
    """Return what is free on the disk of `place`, which need not exist yet."""
    place = place.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def free_name(*names: str, taken: Callable[[str], bool], form: str = "{} ({})") -> str:
    """Return the first of `names` that is not taken, or else the last of them with a number: "name (2)"."""
    number = 1
    for name in names:
        if not taken(name):
            return name
    while taken(numbered := form.format(names[-1], number := number + 1)):
        pass
    return numbered
