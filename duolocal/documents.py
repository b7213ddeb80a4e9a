"""Documents: files read as text, with the encoding found and said.

Reads plain text, Markdown and code. Formats that hold their text inside (PDF, Word, …) are refused with the
way to convert them. Knows nothing of tokens or models.
"""

import codecs
import difflib
import stat
from dataclasses import dataclass
from pathlib import Path

from duolocal.errors import DocumentError

# A million tokens are about 4 MB of English; no context holds a file of this size.
MAX_BYTES = 256 * 2**20

_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"%PDF-", "a PDF", "convert it (for example: pdftotext FILE) and load the text"),
    (b"{\\rtf", "a rich-text (RTF) file", "save it as plain text and load that"),
    (b"\xd0\xcf\x11\xe0", "an old Office file", "save it as plain text and load that"),
    (b"\x1f\x8b", "a gzip archive", "unpack it and load the text inside"),
    (b"BZh", "a bzip2 archive", "unpack it and load the text inside"),
    (b"\xfd7zXZ\x00", "an xz archive", "unpack it and load the text inside"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it and load the text inside"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it and load the text inside"),
    (b"\x89PNG", "an image", "load a text file instead"),
    (b"\xff\xd8\xff", "an image", "load a text file instead"),
    (b"GIF8", "an image", "load a text file instead"),
    (b"\x7fELF", "a program", "load its source instead"),
    (b"GGUF", "a model file", "choose it with --model"),
    (b"SQLite format 3\x00", "a database", "export it as text and load that"),
)
_ZIPPED = {
    ".docx": "a Word document",
    ".xlsx": "an Excel workbook",
    ".pptx": "a PowerPoint file",
    ".odt": "an OpenDocument text",
    ".ods": "an OpenDocument sheet",
    ".odp": "an OpenDocument presentation",
    ".epub": "an EPUB book",
}
_UTF16_SAMPLE = 4096
# Control characters that do occur in text: tab, newlines, form feed, escape (in logs), backspace (man pages).
_TEXT_CONTROLS = frozenset(b"\t\n\r\x0b\x0c\x1b\x08")


@dataclass(frozen=True)
class Document:
    """A file as text; newlines are `\\n`, a byte-order mark is gone."""

    name: str
    path: Path
    text: str
    encoding: str  # "utf-8", "utf-16-le", "cp1252", "latin-1" …
    num_bytes: int
    num_replaced: int = 0  # bytes that fit no character and stand as U+FFFD

    @property
    def note(self) -> str | None:
        """A line worth telling when the encoding was guessed."""
        if self.encoding in ("cp1252", "latin-1"):
            return f"{self.name} is not UTF-8: read as {self.encoding}; look at its accents before you rely on it"
        if self.num_replaced:
            return f"{self.name} is not quite UTF-8: {self.num_replaced:,} times U+FFFD stands for what was unreadable"
        return None


def load_document(path: str | Path) -> Document:
    """Read one file as text; raises DocumentError with one line that says what to do."""
    path = Path(path).expanduser()
    data = _read(path)
    return decode_document(data, path)


def decode_document(data: bytes, path: Path, name: str | None = None) -> Document:
    """Make a Document of bytes that were read, or raise DocumentError: what `path` is and what to do."""
    if not data.strip(b" \t\r\n\x0b\x0c\0"):
        raise DocumentError(f"{path} is empty: load a file that has text in it")
    _refuse_known_formats(data, path)
    encoding = _detect(data)
    if encoding is None:
        raise DocumentError(f"{path} is a binary file, not text: load a text file instead")
    try:
        text = data.decode(encoding)
        num_replaced = 0
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise DocumentError(
                f"{path} starts like {encoding} but breaks off at byte {error.start:,}: save it as UTF-8"
            ) from error
        text = data.decode(encoding, errors="replace")
        num_replaced = text.count("\ufffd")
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise DocumentError(f"{path} is empty: load a file that has text in it")
    encoding = "utf-8" if encoding == "utf-8-sig" else encoding
    return Document(name or path.name, path, text, encoding, len(data), num_replaced)


def _read(path: Path) -> bytes:
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise DocumentError(f"{path} is a folder: name its files, for example {path / '*.md'}")
        if not (stat.S_ISREG(info.st_mode) or stat.S_ISFIFO(info.st_mode)):
            raise DocumentError(f"{path} is a device, not a file: load a text file instead")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise DocumentError(f"{path} does not exist: {_nearest(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL inside the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DocumentError(f"{path} cannot be read: {reason}") from error
    if len(data) > MAX_BYTES:
        raise DocumentError(
            f"{path} is larger than {MAX_BYTES // 2**20} MiB: cut it up (a million tokens are about 4 MB of text)"
        )
    return data


def _nearest(path: Path) -> str:
    folder = path.parent
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return f"there is no folder {folder}"
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {folder / close[0]}?" if close else "check the name and the folder"


def _refuse_known_formats(data: bytes, path: Path) -> None:
    for magic, what, advice in _MAGIC:
        if data.startswith(magic):
            raise DocumentError(f"{path} is {what}: {advice.replace('FILE', str(path))}")
    if data.startswith(b"PK\x03\x04"):
        kind = _ZIPPED.get(path.suffix.lower())
        if kind:
            raise DocumentError(f"{path} is {kind}: save or convert it as plain text and load that")
        raise DocumentError(f"{path} is a zip archive: unpack it and load the text inside")


def _detect(data: bytes) -> str | None:
    """Name the codec of `data`, or None when it is no text."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16: its mark begins with the same two bytes
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            return encoding
    if b"\0" in data:
        return _utf16_without_mark(data)
    controls = sum(1 for byte in data[:65536] if byte < 32 and byte not in _TEXT_CONTROLS)
    if controls > len(data[:65536]) * 0.02:
        return None
    if _mostly_utf8(data):
        return "utf-8"
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return "latin-1"
    return "cp1252"


def _mostly_utf8(data: bytes) -> bool:
    """Tell whether `data` is UTF-8, allowing a few stray bytes among many valid characters."""
    text = data.decode("utf-8", errors="replace")
    stray = text.count("\ufffd")
    if not stray:
        return True
    # In an 8-bit encoding next to no accent happens to form a valid UTF-8 sequence.
    accented = sum(1 for character in text if character > "\x7f") - stray
    return accented >= 10 * stray


def _utf16_without_mark(data: bytes) -> str | None:
    # Text in Latin letters has a zero in every second byte, and hardly any in the others.
    sample = data[:_UTF16_SAMPLE]
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    half = len(sample) // 2
    for zeros, others, encoding in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):
        if half and zeros > 0.7 * half and others < 0.05 * half and len(data) % 2 == 0:
            return encoding
    return None
