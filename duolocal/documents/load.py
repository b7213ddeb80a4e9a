"""One file to a Document: read it within bounds, see what it is, decode or convert it.

Owns what is said of a file that cannot be read. Converting happens in another process (`converter`).
"""

import difflib
import hashlib
import re
import stat
from pathlib import Path

from duolocal.documents.converted import ConversionError, Converted
from duolocal.documents.converter import Converter, Progress
from duolocal.documents.embedded import without_pictures
from duolocal.documents.formats import HEAD, Format, format_of, inner_name
from duolocal.documents.model import Document
from duolocal.documents.packed import unpack
from duolocal.documents.text import decode, is_blank
from duolocal.documents.zipped import Archive
from duolocal.errors import DocumentError
from duolocal.paths import user_path

# A million tokens are about 4 MB of English; no context holds a file of this size.
MAX_BYTES = 256 * 2**20

# Python, Ruby, Emacs and Vim agree on this one: a comment in the first two lines.
_SOURCE_ENCODING = re.compile(rb"\A(?:[^\n]*\n)?[ \t]*#[^\n]*?coding[:=][ \t]*([A-Za-z0-9_.-]{2,40})")
_XML_ENCODING = re.compile(rb"""\A\s*<\?xml[^>]{0,100}?encoding\s*=\s*["']([A-Za-z0-9_:.-]{2,40})""")


def load_document(
    path: str | Path,
    *,
    name: str | None = None,
    converter: Converter | None = None,
    on_progress: Progress | None = None,
) -> Document:
    """Read one file, whatever its format; raises DocumentError with one line that says what to do.

    `converter` lets several files share a process; `on_progress` gets the pages done, and of how many.
    """
    path = user_path(path)
    return decode_document(read_bytes(path), path, name, converter=converter, on_progress=on_progress)


def decode_document(
    data: bytes,
    path: Path,
    name: str | None = None,
    *,
    converter: Converter | None = None,
    shown: str | None = None,
    on_progress: Progress | None = None,
) -> Document:
    """Make a Document of bytes that were read, or raise DocumentError: what the file is and what to do.

    `shown` is what messages call the file (default: its path).
    """
    shown = shown or str(path)
    notes: list[str] = []
    content, inner = data, path.name
    found = format_of(content[:HEAD], inner, lambda: Archive(content))
    try:
        if found.how == "unpack":
            notes.append(f"unpacked from {found.what}")
            content, inner = unpack(content), inner_name(inner)
            found = format_of(content[:HEAD], inner, lambda: Archive(content))
            if found.how == "unpack":
                raise ConversionError("is packed more than once: unpack it and load the text inside")
        refuse(found, shown)
        kind = found.kind or "text"
        if is_blank(content):
            raise DocumentError(f"{shown} is empty: load a file that has text in it")
        if found.how == "decode":
            decoded = decode(content, declared=_declared(content, kind))
            read = without_pictures(Converted(decoded.text, (), decoded.notes, decoded.encoding, decoded.num_replaced))
        elif converter is not None:
            read = converter.convert(content, kind, on_progress=on_progress)
        else:
            with Converter() as own:
                read = own.convert(content, kind, on_progress=on_progress)
    except ConversionError as error:
        raise DocumentError(f"{shown} {error}") from error
    if not read.text.strip():
        raise DocumentError(f"{shown} is empty: load a file that has text in it")
    if found.note:
        notes.append(found.note)
    return Document(
        name=name or path.name,
        path=path,
        text=read.text,
        encoding=read.encoding,
        num_bytes=len(data),
        num_replaced=read.num_replaced,
        kind=kind,
        parts=read.parts,
        notes=(*notes, *read.notes),
        digest=hashlib.sha256(data).hexdigest(),
    )


def _declared(data: bytes, kind: str) -> str | None:
    """Return the encoding that a source file or an XML file says it is in."""
    pattern = {"code": _SOURCE_ENCODING, "xml": _XML_ENCODING, "svg": _XML_ENCODING}.get(kind)
    match = pattern.search(data[:400]) if pattern else None
    return match[1].decode("ascii") if match else None


def refuse(found: Format, shown: str) -> None:
    """Raise DocumentError for a format that is not read."""
    if found.how == "refuse":
        raise DocumentError(f"{shown} is {found.what}: {found.advice}")
    if found.how == "archive":
        raise DocumentError(f"{shown} is a zip archive: unpack it and load the text inside")


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file or pipe, at most MAX_BYTES of them; raises DocumentError."""
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise DocumentError(f"{path} is a folder: name its files, for example {path / '*.md'}")
        if not (stat.S_ISREG(info.st_mode) or stat.S_ISFIFO(info.st_mode)):
            raise DocumentError(f"{path} is a device, not a file: load a text file instead")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise DocumentError(f"{path} does not exist: {nearest(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL inside the path
        raise DocumentError(f"{path} cannot be read: {why(error)}") from error
    if len(data) > MAX_BYTES:
        raise DocumentError(
            f"{path} is larger than {MAX_BYTES // 2**20} MiB: cut it up (a million tokens are about 4 MB of text)"
        )
    return data


def why(error: OSError | ValueError) -> str:
    """Return what the system says, without its number and the path."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def nearest(path: Path) -> str:
    """Suggest what was meant by a path that is not there."""
    folder = path.parent
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return f"there is no folder {folder}"
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {folder / close[0]}?" if close else "check the name and the folder"
