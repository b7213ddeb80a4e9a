"""Which files are meant: folders, patterns and zip archives to a list of what can be loaded and what is left out.

Cheap: of every file at most its first bytes are read, nothing is converted. The order depends on names alone, and every
file has a name of its own, relative and short: it is what the model will call it.
"""

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from duolocal.documents.converter import Converter, Progress
from duolocal.documents.formats import HEAD, format_of, is_zipped_name
from duolocal.documents.ignore import Ignored, ignored_above
from duolocal.documents.load import MAX_BYTES, decode_document, load_document, nearest, read_bytes, why
from duolocal.documents.model import Document
from duolocal.documents.text import is_blank, looks_binary
from duolocal.documents.zipped import Archive, ArchiveCache, ArchiveError
from duolocal.errors import DocumentError
from duolocal.files import free_name
from duolocal.paths import user_path

MAX_FILES = 50_000  # seen, taken or not; no context holds so many
_LONGEST_ARCHIVE = 40  # characters of its name
_MAX_DEPTH = 64  # folders within folders
_MAX_LOOKED_INTO = 64 * 2**20  # bytes of zips in archives whose names do not say what they are; of others they must
_MADE = ("__pycache__", "node_modules")  # folders that nobody writes by hand
_NESTED = "a zip archive inside another: unpack it first"
_DIGITS = re.compile(r"([0-9]{1,18})")
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Found:
    """A file that looks as if it can be loaded; `member` is its name inside the zip archive at `path`."""

    name: str  # relative, unique among all that was gathered
    path: Path
    member: str | None = None
    named: bool = True  # by the user; False for what was found in a folder or an archive, or by a pattern
    num_bytes: int = 0
    converter: Converter | None = field(default=None, repr=False, compare=False)
    archives: ArchiveCache = field(default_factory=ArchiveCache, repr=False, compare=False)

    @property
    def source(self) -> str:
        """Where it is, as messages say it."""
        return str(self.path) if self.member is None else f"{self.path}/{self.member}"

    def load(self, *, on_progress: Progress | None = None) -> Document:
        """Read and convert it; raises DocumentError. `on_progress` gets the pages done, and of how many."""
        if self.member is None:
            return load_document(self.path, name=self.name, converter=self.converter, on_progress=on_progress)
        document = decode_document(
            self.read_bytes(),
            Path(PurePosixPath(self.member.replace("\\", "/")).name),
            self.name,
            converter=self.converter,
            shown=self.source,
            on_progress=on_progress,
        )
        return replace(document, path=self.path)

    def read_bytes(self) -> bytes:
        """Return its bytes, not converted; raises DocumentError."""
        if self.member is None:
            return read_bytes(self.path)
        try:
            return self.archives.read(self.path, self.member, most=MAX_BYTES)
        except ArchiveError as error:
            raise DocumentError(f"{self.path} {error}") from error


@dataclass(frozen=True)
class Skipped:
    """A file or folder that is left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Gathered:
    """What was found, in the order in which it is loaded, and what was left out."""

    found: tuple[Found, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Seen:
    """A file before it has its name: the last `depth` of `words` are it, more where that is not unique."""

    found: Found
    words: tuple[str, ...]
    depth: int


def gather(
    paths: Sequence[str | Path],
    *,
    on_found: Callable[[int], None] = lambda count: None,
    on_failure: Callable[[DocumentError], None] | None = None,
) -> Gathered:
    """Expand files, folders, patterns and zip archives; raises DocumentError.

    A named file is taken whatever it is: whether it can be read is seen when it is loaded. Of what a pattern picks and
    of what is in folders and archives, that which cannot be a document is skipped, with the reason; in folders so are
    hidden and ignored files, and links that lead out of the folder. Raises for a path that is not there, a pattern that
    nothing matches, and where nothing at all is found.
    `on_found` gets the files and folders seen so far; `on_failure` what is wrong with one path, so that the rest is
    taken.
    """
    walk, failed = _Walk(on_found), False
    for path in paths:
        try:
            walk.add(path)
        except DocumentError as error:
            if on_failure is None:
                raise
            on_failure(error)
            failed = True
    found = _named(walk.seen)
    if paths and not found and not failed:
        raise DocumentError(_nothing(paths, walk.skipped))
    return Gathered(found, tuple(walk.skipped))


def _nothing(paths: Sequence[str | Path], skipped: Sequence[Skipped]) -> str:
    where = ", ".join(str(path) for path in paths[:3]) + (" …" if len(paths) > 3 else "")
    if not skipped:
        return f"{where} holds no file: name one that does"
    shown = "; ".join(f"{item.name}: {item.reason}" for item in skipped[:3])
    more = f"; and {len(skipped) - 3:,} more" if len(skipped) > 3 else ""
    return f"{where} holds nothing that can be loaded ({shown}{more}): name the files themselves"


class _Walk:
    """Goes through what was named, in order."""

    def __init__(self, on_found: Callable[[int], None]) -> None:
        self._on_found = on_found
        self.seen: list[_Seen] = []
        self.skipped: list[Skipped] = []
        self._names: dict[tuple[str, str | None], str] = {}  # real path and member: what it was called first
        self._count = 0
        self._converter = Converter()  # shared by all files; its process starts when one needs it
        self._archives = ArchiveCache()  # shared, too
        self._looked_into = 0  # bytes

    def add(self, path: str | Path) -> None:
        word, path = str(path), user_path(path)
        try:
            info = path.stat()
        except FileNotFoundError:
            if glob.has_magic(word) and self._pattern(word):
                return
            if "*" in word or "?" in word:
                raise DocumentError(f"no file matches {word}: check the pattern and the folder") from None
            raise DocumentError(f"{path} does not exist: {nearest(path)}") from None
        except (OSError, ValueError) as error:
            raise DocumentError(f"{path} cannot be read: {why(error)}") from error
        if stat.S_ISDIR(info.st_mode):
            self._named_folder(path)
        else:
            self._named_file(path, info)

    def _pattern(self, word: str) -> bool:
        """Take the files that a pattern picks; False where there is none."""
        matches = glob.glob(os.path.expanduser(word), recursive=True)
        paths = sorted(map(Path, matches), key=lambda path: natural_key(path.as_posix()))
        files = [path for path in paths if not path.is_dir()]
        if "**" not in word:
            for path in paths:
                if path.is_dir():
                    self._skip(f"{path.name}/", "a folder: a pattern picks files; name the folder to load all in it")
        for path in files:
            try:
                info = path.stat()
                if stat.S_ISREG(info.st_mode) and _is_archive(path):
                    self._archive(path)
                else:
                    self._file(path, info, words=_words(path), depth=1)
            except OSError as error:
                self._skip(path.name, f"cannot be read: {why(error)}")
        return bool(files)

    def _named_file(self, path: Path, info: os.stat_result) -> None:
        if stat.S_ISREG(info.st_mode) and _is_archive(path):
            self._archive(path)
        else:
            self._take(path, None, words=_words(path), depth=1, num_bytes=info.st_size, named=True)

    # --- folders ---------------------------------------------------------------------------------------------------

    def _named_folder(self, folder: Path) -> None:
        real = Path(os.path.realpath(folder))
        words = _words(real)
        depth = 0 if folder in (Path(), Path(".")) or not words else 1
        self._folder(folder, real, ignored_above(real), words=words, depth=depth, root=real)

    def _folder(
        self, folder: Path, real: Path, ignored: Ignored, *, words: tuple[str, ...], depth: int, root: Path
    ) -> None:
        shown = "/".join(words[len(words) - depth :])
        if len(real.parts) - len(root.parts) > _MAX_DEPTH:
            self._skip(f"{shown}/", f"more than {_MAX_DEPTH} folders deep: name it itself")
            return
        ignored = ignored.inside(real)
        try:
            with os.scandir(folder) as listed:
                entries = sorted(listed, key=lambda entry: natural_key(entry.name))
        except OSError as error:
            self._skip(f"{shown}/", f"cannot be read: {why(error)}")
            return
        for entry in entries:
            self._entry(entry, real / entry.name, ignored, words=(*words, entry.name), depth=depth + 1, root=root)

    def _entry(
        self, entry: os.DirEntry[str], real: Path, ignored: Ignored, *, words: tuple[str, ...], depth: int, root: Path
    ) -> None:
        shown = "/".join(words[len(words) - depth :])
        try:
            is_folder = entry.is_dir()
            slash = "/" if is_folder else ""
            if entry.name == ".git":  # git's own; it is not worth a line
                return
            if entry.name.startswith("."):
                self._skip(shown + slash, "hidden")
            elif ignored.hides(real, is_folder=is_folder):
                self._skip(shown + slash, "ignored by .gitignore")
            elif entry.is_symlink() and is_folder:
                self._skip(shown + slash, "a link to a folder: name it itself")
            elif is_folder and entry.name in _MADE:
                self._skip(shown + slash, "made by a program")
            elif is_folder:
                self._folder(Path(entry.path), real, ignored, words=words, depth=depth, root=root)
            elif entry.is_symlink() and not Path(os.path.realpath(real)).is_relative_to(root):
                self._skip(shown, "a link that leads out of the folder: name the file itself")
            else:
                self._file(Path(entry.path), entry.stat(), words=words, depth=depth)
        except (OSError, ValueError) as error:
            self._skip(shown, f"cannot be read: {why(error)}")

    def _file(self, path: Path, info: os.stat_result, *, words: tuple[str, ...], depth: int) -> None:
        shown = "/".join(words[len(words) - depth :])
        if not stat.S_ISREG(info.st_mode):
            self._skip(shown, "a device, not a file")
            return
        if info.st_size > MAX_BYTES:
            self._skip(shown, f"larger than {MAX_BYTES // 2**20} MiB")
            return
        with path.open("rb") as file:
            reason = _unfit(file.read(HEAD), path.name, num_bytes=info.st_size, archive=lambda: Archive(path))
        if reason == _NESTED:
            reason = "a zip archive: name it itself to load what is in it"
        if reason:
            self._skip(shown, reason)
        else:
            self._take(path, None, words=words, depth=depth, num_bytes=info.st_size, named=False)

    # --- archives --------------------------------------------------------------------------------------------------

    def _archive(self, path: Path) -> None:
        words = _words(path)
        if len(path.name) > _LONGEST_ARCHIVE:  # it stands before every name
            words = (*words[:-1], f"{path.name[: _LONGEST_ARCHIVE - 12]}…{path.suffix[:10]}")
        try:
            archive = self._archives.get(path)
            archive.renew()
            names = sorted(archive.names(), key=natural_key)
            if not names:
                self._skip(path.name, "an empty zip archive")
            for name in archive.duplicates:
                self._skip(f"{words[-1]}/{name}", "stands in the archive twice, with the same content")
            for name in names:
                self._member(archive, path, name, words=words)
        except ArchiveError as error:
            raise DocumentError(f"{path} {error}") from error

    def _member(self, archive: Archive, path: Path, name: str, *, words: tuple[str, ...]) -> None:
        inner = _member_words(name)
        shown = _printable("/".join((words[-1], *inner)))
        if not inner:
            self._skip(shown, "a member without a name")
            return
        if any(word.startswith(".") for word in inner) or inner[:1] == ("__MACOSX",):
            self._skip(shown, "hidden")
            return
        info = archive.members[name]
        if info.file_size > MAX_BYTES:
            self._skip(shown, f"larger than {MAX_BYTES // 2**20} MiB unpacked")
            return
        try:
            inside = None
            if not is_zipped_name(inner[-1]) and self._looked_into < _MAX_LOOKED_INTO:

                def inside() -> Archive:
                    data = archive.read(name, most=_MAX_LOOKED_INTO - self._looked_into)
                    self._looked_into += len(data)
                    archive.renew()
                    return Archive(data)

            reason = _unfit(archive.head(name, HEAD), inner[-1], num_bytes=info.file_size, archive=inside)
        except ArchiveError as error:
            reason = str(error)
        if reason:
            self._skip(shown, reason)
        else:
            depth = 1 + len(inner)
            self._take(path, name, words=(*words, *inner), depth=depth, num_bytes=info.file_size, named=False)

    # --- both ------------------------------------------------------------------------------------------------------

    def _take(
        self, path: Path, member: str | None, *, words: tuple[str, ...], depth: int, num_bytes: int, named: bool
    ) -> None:
        shown = _printable("/".join(words[len(words) - depth :]))
        key = (os.path.realpath(path), member)
        if key in self._names:
            same = self._names[key]
            self._skip(shown, "named already" if same == shown else f"the same file as {same}")
            return
        self._names[key] = shown
        self._tally()
        found = Found(
            shown,
            path,
            member,
            named=named,
            num_bytes=num_bytes,
            converter=self._converter,
            archives=self._archives,
        )
        self.seen.append(_Seen(found, words, depth))

    def _skip(self, name: str, reason: str) -> None:
        self._tally()
        self.skipped.append(Skipped(_printable(name), reason))

    def _tally(self) -> None:
        self._count += 1
        self._on_found(self._count)
        if self._count > MAX_FILES:
            raise DocumentError(
                f"there are more than {MAX_FILES:,} files in what was named: name fewer, or a folder further in"
            )


def _is_archive(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return format_of(file.read(HEAD), path.name, lambda: Archive(path)).how == "archive"
    except OSError:
        return False  # said when it is loaded


def _unfit(head: bytes, name: str, *, num_bytes: int, archive: Callable[[], Archive] | None) -> str | None:
    """Return why a file is no document, judged by its first bytes; None where it may be one. `archive` opens a zip."""
    if num_bytes == 0 or (num_bytes <= len(head) and is_blank(head)):
        return "empty"
    found = format_of(head, name, archive)
    if found.how == "archive":
        return _NESTED
    if found.how == "refuse":
        return found.what
    if found.kind == "svg":
        return "a drawing (SVG): name it itself to load its code"
    # A file cut in the middle of a character is still that text: only what is certain counts here.
    if found.how == "decode" and looks_binary(head[: len(head) - len(head) % 4]):
        return "a binary file"
    return None


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts `chapter 2` before `chapter 10`, folder by folder, whatever the system's order is."""
    key: list[tuple[int, int, str]] = []
    for word in name.replace("\\", "/").split("/"):
        for part in _DIGITS.split(word):
            if part:
                key.append((1, int(part), part) if part[0] in "0123456789" else (2, 0, part))
        key.append((0, 0, ""))
    return key


def _words(path: Path) -> tuple[str, ...]:
    """Return the folders and the name of a path, from the root on."""
    absolute = Path(os.path.abspath(path))
    return absolute.parts[1:]


def _member_words(name: str) -> tuple[str, ...]:
    """Return the folders and the name of a member; what would lead out of the archive is left out."""
    return tuple(word for word in name.replace("\\", "/").split("/") if word not in ("", ".", ".."))


def _printable(name: str) -> str:
    """Make a name that a model and a terminal can be shown."""
    return _UNPRINTABLE.sub("\ufffd", name)


def _named(seen: Sequence[_Seen]) -> tuple[Found, ...]:
    """Give every file the shortest name that is its own: folders further out are added, then a number."""
    depths = [item.depth for item in seen]
    while True:
        names = [_printable("/".join(item.words[-depth:])) for item, depth in zip(seen, depths, strict=True)]
        counts = Counter(names)
        growing = [at for at, name in enumerate(names) if counts[name] > 1 and depths[at] < len(seen[at].words)]
        if not growing:
            break
        for at in growing:
            depths[at] += 1
    # What still clashes differs only in characters that cannot be shown.
    given: set[str] = set()
    found = []
    for item, name in zip(seen, names, strict=True):
        if name in given:
            name = free_name(name, taken=lambda name: name in given or name in counts)
        given.add(name)
        found.append(replace(item.found, name=name))
    return tuple(found)
