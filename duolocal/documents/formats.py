"""What a file is, judged by its first bytes, the directory of a zip and its name, and what to do with what is not read.

Converts nothing. What a zip archive is, its directory decides: Office files of every kind, books and archives alike.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from duolocal.documents.packed import PACKINGS, is_tar, unpack_head
from duolocal.documents.zipped import Archive, ArchiveError

HEAD = 8192  # bytes of a file that are enough to judge it by, unless it is a zip

_OLE = b"\xd0\xcf\x11\xe0"  # an Office file that is locked stands inside one of these, too
# (first bytes, what it is, what to do).
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (_OLE, "an old Office file", "save it in its new format (docx, xlsx, pptx) or as plain text"),
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
)
_ZIPPED_KINDS = {
    "docx": "docx docm dotx dotm",
    "xlsx": "xlsx xlsm xltx xltm xlam",
    "pptx": "pptx pptm potx potm ppsx ppsm",
    "epub": "epub",
    "odt": "odt ott",
    "ods": "ods ots",
    "odp": "odp otp odg",
}
_ZIPPED = {f".{suffix}": kind for kind, suffixes in _ZIPPED_KINDS.items() for suffix in suffixes.split()}
_OFFICE_FOLDERS = (("word/", "docx"), ("xl/", "xlsx"), ("ppt/", "pptx"))
_OPEN_DOCUMENTS = {"text": "odt", "spreadsheet": "ods", "presentation": "odp", "graphics": "odp"}
_XLSB = ("a binary Excel workbook (xlsb)", "save it as xlsx and load that")
_ZIPPED_REFUSED = {
    ".xlsb": _XLSB,
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
    "json": "json jsonl ndjson geojson",
    "html": "html htm xhtml xht shtml",
    "mail": "eml emlx mbox",
    "mhtml": "mhtml mht",
    "notebook": "ipynb",
    "odt": "fodt",
    "ods": "fods",
    "odp": "fodp",
    "xml": "xml rss atom xsd xsl",
    "svg": "svg",
    "rst": "rst",
    "code": "py pyi pyx c h cc cpp cxx hpp hh cu cuh java kt kts scala go rs js mjs cjs jsx ts tsx rb php pl pm sh "
    "bash zsh fish ps1 bat lua r jl swift m mm cs fs hs ml mli clj ex exs erl sql css scss less vue toml yaml yml ini "
    "cfg conf cmake mk dockerfile proto asm s f f90 vb dart zig nim tex bib",
}
_BY_SUFFIX = {f".{suffix}": kind for kind, suffixes in _TEXT_KINDS.items() for suffix in suffixes.split()}
CONVERTED = ("html", "pdf", "docx", "epub", "xlsx", "pptx", "mail", "mhtml", "notebook", "rtf", "odt", "ods", "odp")
# Names under which web servers, mail programs and Office itself hand out something else.
_MISNAMED = frozenset(
    (*".doc .dot .xls .xlt .ppt .pot .pps .pdf .rtf .wps .csv .tsv".split(), *_ZIPPED, ".xlsb")  # noqa: SIM905
)
# Before the first tag; possessive, since comments could be divided in more ways than there is time.
_BEFORE = r"\s*+(?:<\?xml[^>]{0,200}>\s*+)?+(?:<!--.{0,2000}?-->\s*+)*+"
_HTML = re.compile(
    _BEFORE
    + r"<(?:!doctype\s+html|(?:html|head|body|table|meta|style|title|div|p|h[1-6]|span|center|font|script|base)\b)",
    re.IGNORECASE | re.DOTALL,
)
_PAGE = re.compile(_BEFORE + r"<(?:!doctype\s+html|html)\b", re.IGNORECASE | re.DOTALL)
_HEADER = re.compile(r"(?:[A-Za-z][A-Za-z0-9-]{1,60}:[^\n]*\n(?:[ \t][^\n]*\n)*)+", re.MULTILINE)
WORKBOOK_2003 = b"urn:schemas-microsoft-com:office:spreadsheet"
_FLAT = "http://schemas.microsoft.com/office/2006/xmlPackage"
_PROGRAMS = {"Word.Document": "docx", "Excel.Sheet": "xlsx", "PowerPoint.Show": "pptx"}


@dataclass(frozen=True)
class Format:
    """What a file is: `kind` as a Document has it, "zip" for an archive to look into, or None with the refusal."""

    kind: str | None
    how: Literal["decode", "convert", "archive", "unpack", "refuse"]
    what: str = ""  # "a PDF", for a sentence
    advice: str = ""
    note: str = ""  # where the name says something else


def format_of(head: bytes, name: str, archive: Callable[[], Archive] | None = None) -> Format:
    """Judge a file by its first bytes (`HEAD` of them are enough) and its name. "decode" may still be no text.

    `archive` opens it as a zip; without it a zip is judged by its name.
    """
    suffix = PurePath(name).suffix.lower()
    if _is_pdf(head, suffix):
        return Format("pdf", "convert")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"PK00PK\x03\x04")):
        return _zipped(head, suffix, archive)
    if head.startswith((b"MZ", b"\x7fELF")) or (head.startswith(b"#!") and b"PK\x03\x04" in head):
        found = _self_extracting(archive)
        if found is not None:
            return found
    for packing in PACKINGS:
        if head.startswith(packing.magic):
            return _packed(head, name, packing.name)
    if head.startswith(_OLE) and suffix in _ZIPPED:
        return Format(
            None,
            "refuse",
            "locked with a password, or an old Office file",
            "save it without one, in its new format",
        )
    if head.startswith(_OLE) and suffix == ".msg":
        return Format(None, "refuse", "an Outlook message", "save it as eml or plain text and load that")
    for magic, what, advice in _MAGIC:
        if head.startswith(magic):
            return Format(None, "refuse", what, advice)
    if is_tar(head):
        return Format(None, "refuse", "a tar archive", "unpack it and load the text inside")
    if head.startswith(b"{\\rtf"):
        return _converted("rtf", suffix, "rich text (RTF)", (".rtf",))
    return _text(head, suffix)


def is_zipped_name(name: str) -> bool:
    """Tell whether a name says which kind of zipped document a file is."""
    return PurePath(name).suffix.lower() in _ZIPPED


def _converted(kind: str, suffix: str, what: str, suffixes: tuple[str, ...] = ()) -> Format:
    note = "" if not suffix or suffix in suffixes else f"named {suffix}, but by its content {what}: read as that"
    return Format(kind, "convert", note=note)


def _text(head: bytes, suffix: str) -> Format:
    kind = _BY_SUFFIX.get(suffix)
    if b"progid=" in head[:400] and (flat := _flat(_as_text(head))) is not None:
        return _converted(flat, suffix, "an Office file as XML")
    if kind is None or suffix in _MISNAMED:
        start = _as_text(head)
        if (suffix in _MISNAMED and _HTML.match(start)) or (not suffix and _PAGE.match(start)):
            return _converted("html", suffix, "a web page")
        if (found := _mail(start)) is not None and (suffix in _MISNAMED or kind is None):
            return _converted(found, suffix, "a mail" if found == "mail" else "a saved web page")
    kind = kind or "text"
    return Format(kind, "convert" if kind in CONVERTED else "decode")


def _flat(start: str) -> str | None:
    """Return the kind of an Office file that was saved as one XML file."""
    program = re.search(r"""<\?mso-application\s+progid=["']([A-Za-z.]+)""", start[:400])
    kind = _PROGRAMS.get(program[1]) if program else None
    if kind == "xlsx" and WORKBOOK_2003.decode() in start:
        return kind
    return kind if _FLAT in start else None


def _as_text(head: bytes) -> str:
    """Return the first bytes as text, only to look for marks in it."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return head[: len(head) & ~1].decode("utf-16", errors="replace").lstrip("\ufeff")
    return head.removeprefix(b"\xef\xbb\xbf").decode("latin-1").replace("\r\n", "\n")


def _mail(start: str) -> str | None:
    """Tell a mail from a saved web page by its headers; None for what is neither."""
    headers = _HEADER.match(start.removeprefix("\n"))
    if headers is None:
        return None
    names = {line.partition(":")[0].lower() for line in headers[0].split("\n") if line[:1].strip()}
    if "mime-version" not in names:
        return None
    if "multipart/related" in headers[0].lower():
        return "mhtml"
    return "mail" if {"from", "subject"} <= names or "received" in names else None


def _is_pdf(head: bytes, suffix: str) -> bool:
    # Readers look for the mark within the first kilobyte: some producers put a line before it.
    return head.startswith(b"%PDF-") or (suffix == ".pdf" and b"%PDF-" in head[:1024])


def _packed(head: bytes, name: str, packing: str) -> Format:
    inner = unpack_head(head, HEAD)
    if is_tar(inner) or PurePath(name).suffix.lower() in (".tgz", ".tbz", ".tbz2", ".txz"):
        return Format(None, "refuse", f"a tar archive in {packing}", "unpack it and load the text inside")
    found = format_of(inner, inner_name(name))
    if found.how in ("refuse", "unpack"):
        what = found.what or "a packed file"
        return Format(None, "refuse", f"{what}, packed in {packing}", found.advice or "unpack it and load the text")
    return Format(found.kind, "unpack", what=packing)


def inner_name(name: str) -> str:
    """Return what a packed file is called unpacked: notes.csv of notes.csv.gz."""
    return f"{name[:-5]}.svg" if name.lower().endswith(".svgz") else name.removesuffix(PurePath(name).suffix) or name


def _self_extracting(archive: Callable[[], Archive] | None) -> Format | None:
    """Return the format of a program that has a zip archive behind it; None for any other."""
    if archive is None:
        return None
    try:
        with archive() as opened:
            return Format("zip", "archive") if opened.names() else None
    except ArchiveError:
        return None


def _zipped(head: bytes, suffix: str, archive: Callable[[], Archive] | None) -> Format:
    names: set[str] = set()
    stored = head[30:200]  # a book or an OpenDocument file begins with a member named mimetype
    if archive is not None:
        try:
            with archive() as opened:
                names = {name.lower().replace("\\", "/") for name in opened.names()}
                if "mimetype" in opened:
                    stored = b"mimetype" + opened.head("mimetype", 100).strip()
        except ArchiveError:
            names = set()  # said by what reads it
    if suffix in _ZIPPED_REFUSED:
        return Format(None, "refuse", *_ZIPPED_REFUSED[suffix])
    kind = _kind_of_names(names) or _kind_of_type(stored)
    if "xl/workbook.bin" in names:
        return Format(None, "refuse", *_XLSB)
    if any(name.endswith(".iwa") for name in names):
        return Format(None, "refuse", "a Pages, Numbers or Keynote file", "save it as docx, xlsx or pptx and load that")
    if "fixeddocseq.fdseq" in names or "fixeddocumentsequence.fdseq" in names:
        return Format(None, "refuse", "an XPS document", "save it as PDF and load that")
    if "[content_types].xml" in names and any(name.startswith("visio/") for name in names):
        return Format(None, "refuse", "a Visio drawing", "save it as PDF and load that")
    kind = kind or _ZIPPED.get(suffix)
    if kind is None:
        return Format("zip", "archive")
    return Format(kind, "convert")


def _kind_of_names(names: set[str]) -> str | None:
    if "[content_types].xml" in names:
        return next((kind for folder, kind in _OFFICE_FOLDERS if any(name.startswith(folder) for name in names)), None)
    if "meta-inf/container.xml" in names and any(name.endswith(".opf") for name in names):
        return "epub"
    return None


def _kind_of_type(stored: bytes) -> str | None:
    if stored.startswith(b"mimetypeapplication/epub+zip"):
        return "epub"
    match = re.match(rb"mimetypeapplication/vnd\.oasis\.opendocument\.([a-z]+)", stored)
    return _OPEN_DOCUMENTS.get(match[1].decode()) if match else None
