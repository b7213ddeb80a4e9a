"""Zip archives of strangers: members read within bounds that are checked while reading, not by what headers say.

Nothing is ever written to disk, so a name such as ../../x leads nowhere.
"""

import io
import struct
import threading
import weakref
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath

from duolocal.documents.converted import ConversionError
from duolocal.documents.guess import guess_names

MAX_MEMBERS = 50_000
MAX_MEMBER_BYTES = 256 * 2**20  # unpacked
MAX_ALL_BYTES = 512 * 2**20  # unpacked, of the members read through one Archive
_MAX_DIRECTORY_BYTES = 32 * 2**20  # zipfile makes an object of every entry before anyone can count them
_ENTRY_BYTES = 46  # the least that an entry of the directory takes
_PIECE = 1 << 20


class ArchiveError(ConversionError):
    """An archive that cannot be read; `str()` goes on after the name of the file."""


class Archive:
    """The members of a zip archive, by name. A context manager; raises ArchiveError only.

    Of members with the same name the last has it, and another has it with a number: "a (2).txt". Those that are the
    same are one; `duplicates` has their names.
    """

    def __init__(self, source: Path | bytes) -> None:
        self._left = MAX_ALL_BYTES
        try:
            # A handle of our own: zipfile would close a path's only when it is done with it, and we look at it first.
            self._file = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
        except OSError as error:
            raise ArchiveError(f"cannot be read: {error.strerror or error}") from error
        try:
            _check_directory(self._file)
            self._zip = zipfile.ZipFile(self._file)
            self.members, self.duplicates = _by_name(self._zip.infolist())
        except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as error:
            self._file.close()
            raise ArchiveError(f"is a damaged zip archive ({error}): pack it anew") from error
        except ArchiveError:
            self._file.close()
            raise

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def close(self) -> None:
        """Close the file."""
        self._zip.close()
        self._file.close()

    def renew(self) -> None:
        """Allow as much to be unpacked as at the start."""
        self._left = MAX_ALL_BYTES

    def names(self) -> list[str]:
        """Return the names of all members that are files, as the archive has them."""
        return [name for name in self.members if not name.endswith("/")]

    def head(self, name: str, num_bytes: int) -> bytes:
        """Return the first bytes of a member."""
        return self._read(name, num_bytes, whole=False)

    def read(self, name: str, *, most: int = MAX_MEMBER_BYTES) -> bytes:
        """Return a member, unpacked."""
        return self._read(name, most, whole=True)

    def _read(self, name: str, most: int, *, whole: bool) -> bytes:
        info = self.members.get(name)
        if info is None:
            raise ArchiveError(f"holds no {name}: it is damaged; pack it anew")
        if info.flag_bits & 1:
            raise ArchiveError("is locked with a password: unpack it and load the text inside")
        pieces, length = [], 0
        try:
            with self._zip.open(info) as file:
                while length <= most and (piece := file.read(min(_PIECE, most + 1 - length))):
                    pieces.append(piece)
                    length += len(piece)
                    self._left -= len(piece)
                    if self._left < 0:
                        raise ArchiveError(
                            f"unpacks to more than {MAX_ALL_BYTES // 2**20} MiB: unpack it and load what you need"
                        )
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, struct.error) as error:
            raise ArchiveError(f"is damaged ({name}: {error}): pack it anew") from error
        except (NotImplementedError, RuntimeError) as error:  # a method of packing or locking that Python has not
            raise ArchiveError(f"is packed in a way that is not read ({error}): pack it anew as plain zip") from error
        if whole and length > most:
            raise ArchiveError(f"holds {name}, which unpacks to more than {most // 2**20} MiB: unpack it and cut it up")
        return b"".join(pieces)[:most]


class ArchiveCache:
    """Keeps the archive that was used last open, so that one is opened once for all of its members."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Path, Archive] = {}
        weakref.finalize(self, _close_all, self._open)

    def get(self, path: Path) -> Archive:
        """Return the archive at a path, open; raises ArchiveError."""
        if path not in self._open:
            _close_all(self._open)
            self._open[path] = Archive(path)
        return self._open[path]

    def read(self, path: Path, name: str, *, most: int) -> bytes:
        """Return a member of the archive at a path; may be called by several threads. Raises ArchiveError."""
        with self._lock:
            archive = self.get(path)
            archive.renew()
            return archive.read(name, most=most)


def _close_all(archives: dict[Path, Archive]) -> None:
    for archive in archives.values():
        archive.close()
    archives.clear()


_UNICODE_NAME = 0x7075  # a field of a member: its name in UTF-8
_IS_UTF8 = 0x800  # a flag of a member


def _by_name(infos: list[zipfile.ZipInfo]) -> tuple[dict[str, zipfile.ZipInfo], tuple[str, ...]]:
    names = _decoded_names(infos)
    last = dict(zip(names, infos, strict=True))
    members: dict[str, zipfile.ZipInfo] = {}
    duplicates = []
    numbers = Counter(dict.fromkeys(last, 1))
    for name, info in zip(names, infos, strict=True):
        if info is last[name]:
            members[name] = info
        elif (info.CRC, info.file_size) == (last[name].CRC, last[name].file_size):
            duplicates.append(name)
        else:
            suffix = PurePosixPath(name).suffix
            while True:
                numbers[name] += 1
                other = f"{name.removesuffix(suffix)} ({numbers[name]}){suffix}"
                if other not in last and other not in members:
                    break
            members[other] = info
    return members, tuple(duplicates)


def _decoded_names(infos: list[zipfile.ZipInfo]) -> list[str]:
    """Return the names of members: those that are not said to be UTF-8 in the encoding that all of them suggest."""
    names = [info.filename for info in infos]
    raw: dict[int, bytes] = {}
    for at, info in enumerate(infos):
        if info.flag_bits & _IS_UTF8 or info.filename.isascii():
            continue
        encoded = info.filename.encode("cp437", errors="replace")
        unicode_name = _unicode_name(info.extra, encoded)
        if unicode_name is not None:
            names[at] = unicode_name
        else:
            raw[at] = encoded
    encoding = guess_names(list(raw.values())) if raw else ""
    for at, encoded in raw.items():
        names[at] = encoded.decode(encoding, errors="replace")
    return names


def _unicode_name(extra: bytes, encoded: bytes) -> str | None:
    while len(extra) >= 4:
        key, size = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if key == _UNICODE_NAME and len(field) > 5 and struct.unpack_from("<I", field, 1)[0] == zlib.crc32(encoded):
            return field[5:].decode("utf-8", errors="replace")
    return None


def _check_directory(file: io.BufferedIOBase | io.BufferedReader | io.BytesIO) -> None:
    """Refuse a directory that is too large before zipfile reads it whole."""
    size = file.seek(0, io.SEEK_END)
    start = max(0, size - 22 - 0xFFFF)
    file.seek(start)
    tail = file.read()
    file.seek(0)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise ArchiveError("is a damaged zip archive (its directory is missing): pack it anew")
    count, directory_bytes = struct.unpack("<HI", tail[at + 10 : at + 16])
    locator = tail.rfind(b"PK\x06\x07", 0, at)
    if locator >= 0 and at - locator == 20:  # zip64: the counts stand in a record of their own
        (record,) = struct.unpack("<Q", tail[locator + 8 : locator + 16])
        if record < size:
            file.seek(record)
            head = file.read(56)
            file.seek(0)
            if len(head) == 56 and head.startswith(b"PK\x06\x06"):
                count, directory_bytes = struct.unpack("<32xQQ8x", head)
    if (
        directory_bytes > _MAX_DIRECTORY_BYTES
        or directory_bytes // _ENTRY_BYTES > 20 * MAX_MEMBERS
        or (count > MAX_MEMBERS)
    ):
        raise ArchiveError(f"holds more than {MAX_MEMBERS:,} files: unpack it and load what you need")
