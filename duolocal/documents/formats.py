"""What a file is, judged by its first bytes and its name, and what to do with what is not read.

Reads nothing and converts nothing.
"""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

HEAD = 8192  # bytes of a file that are enough to judge it by

_OLE = b"\xd0\xcf\x11\xe0"  # an Office file that is locked stands inside one of these, too
# (first bytes, what it is, what to do); FILE stands for the path.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (_OLE, "an old Office file", "save it in its new format (docx, xlsx, pptx) or as plain text"),
    (b"\x1f\x8b", "a gzip archive", "unpack it and load the text inside"),
    (b"BZh91AY&SY", "a bzip2 archive", "unpack it and load the text inside"),
    (b"\xfd7zXZ\x00", "an xz archive", "unpack it and load the text inside"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it and load the text inside"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it and load the text inside"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it and load the text inside"),
    (b"\x89PNG", "an image", "load a text file instead"),
    (b"\xff\xd8\xff", "an image", "load a text file instead"),
    (b"GIF87a", "an image", "load a text file instead"),
    (b"GIF89a", "an image", "load a text file instead"),
    (b"II*\0", "an image", "load a text file instead"),
    (b"MM\0*", "an image", "load a text file instead"),
    (b"ID3\x03\x00", "a sound file", "load a text file instead"),
    (b"OggS\x00", "a sound file", "load a text file instead"),
    (b"\x7fELF", "a program", "load its source instead"),
    (b"GGUF\x02\x00", "a model file", "choose it with --model"),
    (b"GGUF\x03\x00", "a model file", "choose it with --model"),
    (b"SQLite format 3\x00", "a database", "export it as text and load that"),
    (b"{\\rtf", "a rich-text (RTF) file", "save it as docx or plain text and load that"),
)
_ZIPPED = {".docx": "docx", ".xlsx": "xlsx", ".pptx": "pptx", ".epub": "epub"}
_ZIPPED_REFUSED = {
    ".odt": ("an OpenDocument text", "save it as docx or plain text and load that"),
    ".ods": ("an OpenDocument sheet", "save it as xlsx or csv and load that"),
    ".odp": ("an OpenDocument presentation", "save it as pptx or plain text and load that"),
    ".jar": ("a Java archive", "load its source instead"),
    ".apk": ("an Android program", "load its source instead"),
    ".npz": ("an array file", "load a text file instead"),
    ".pt": ("a model file", "load a text file instead"),
    ".pages": ("a Pages document", "save it as docx or plain text and load that"),
    ".numbers": ("a Numbers sheet", "save it as xlsx or csv and load that"),
    ".key": ("a Keynote presentation", "save it as pptx or plain text and load that"),
}
_TEXT_KINDS = {
    "markdown": "md markdown mdown mkd",
    "csv": "csv",
    "tsv": "tsv tab",
    "json": "json jsonl ndjson geojson ipynb",
    "html": "html htm xhtml",
    "xml": "xml rss atom xsd xsl",
    "svg": "svg",
    "rst": "rst",
    "code": "py pyi pyx c h cc cpp cxx hpp hh cu cuh java kt kts scala go rs js mjs cjs jsx ts tsx rb php pl pm sh "
    "bash zsh fish ps1 bat lua r jl swift m mm cs fs hs ml mli clj ex exs erl sql css scss less vue toml yaml yml ini "
    "cfg conf cmake mk dockerfile proto asm s f f90 vb dart zig nim tex bib",
}
_BY_SUFFIX = {f".{suffix}": kind for kind, suffixes in _TEXT_KINDS.items() for suffix in suffixes.split()}
CONVERTED = ("html", "pdf", "docx", "epub", "xlsx", "pptx")


@dataclass(frozen=True)
class Format:
    """What a file is: `kind` as a Document has it, "zip" for an archive to look into, or None with the refusal."""

    kind: str | None
    how: Literal["decode", "convert", "archive", "refuse"]
    what: str = ""  # "a PDF", for a sentence
    advice: str = ""


def format_of(head: bytes, name: str) -> Format:
    """Judge a file by its first bytes (`HEAD` of them are enough) and its name. "decode" may still be no text."""
    suffix = PurePath(name).suffix.lower()
    if _is_pdf(head, suffix):
        return Format("pdf", "convert")
    if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
        return _zipped(head, suffix)
    if head.startswith(_OLE) and suffix in (".docx", ".xlsx", ".pptx"):
        return Format(
            None,
            "refuse",
            "locked with a password, or an old Office file",
            "save it without one, in its new format",
        )
    for magic, what, advice in _MAGIC:
        if head.startswith(magic):
            return Format(None, "refuse", what, advice)
    kind = _BY_SUFFIX.get(suffix)
    if kind is None:
        kind = "html" if not suffix and _is_html(head) else "text"
    return Format(kind, "convert" if kind == "html" else "decode")


def _is_pdf(head: bytes, suffix: str) -> bool:
    # Readers look for the mark within the first kilobyte: some producers put a line before it.
    return head.startswith(b"%PDF-") or (suffix == ".pdf" and b"%PDF-" in head[:1024])


def _is_html(head: bytes) -> bool:
    start = head[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return start.startswith((b"<!doctype html", b"<html"))


def _zipped(head: bytes, suffix: str) -> Format:
    if suffix in _ZIPPED_REFUSED:
        return Format(None, "refuse", *_ZIPPED_REFUSED[suffix])
    # An EPUB begins with a member named mimetype, stored; so does an OpenDocument file.
    stored = head[30:200]
    if stored.startswith(b"mimetypeapplication/epub+zip"):
        return Format("epub", "convert")
    if stored.startswith(b"mimetypeapplication/vnd.oasis.opendocument"):
        return Format(None, "refuse", "an OpenDocument file", "save it as docx, xlsx or plain text and load that")
    if suffix in _ZIPPED:
        return Format(_ZIPPED[suffix], "convert")
    for folder, kind in ((b"word/", "docx"), (b"xl/", "xlsx"), (b"ppt/", "pptx")):
        if b"[Content_Types].xml" in head and folder in head:
            return Format(kind, "convert")
    return Format("zip", "archive")
