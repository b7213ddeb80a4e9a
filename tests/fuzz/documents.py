"""Damaged documents: PDF, Word, Excel, PowerPoint, EPUB, HTML, plain text and zip archives of them.

Read in the reading process itself, not in the one that `duolocal.documents` starts to be safe from them: so what is
found here are the bounds of the converters, not those of that process.
"""

import bz2
import gzip
import io
import lzma
import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from duolocal.documents import Document, decode_document, gather
from duolocal.documents.child import convert_bytes
from duolocal.documents.converted import Converted
from duolocal.documents.converter import Converter, Progress
from tests.document_files import docx, epub, paragraph, pdf, pptx, xlsx, zipped
from tests.fuzz.base import Target, Wrong, copy_seed, pick
from tests.fuzz.damage import damaged_bytes, damaged_text, flipped_bits, set_number

_PAGE = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>A title</title><style>p {}</style></head><body>
<h1>Heading</h1><p>Text with <b>bold</b>, <a href="x">a link</a> &amp; caf&eacute;.</p><ul><li>one<li>two<ul><li>deep
</ul></ul><table><tr><th>a<th>b</tr><tr><td>1<td>2</tr></table><pre>code
  more</pre><blockquote>said</blockquote><script>x()</script><!-- comment --><p>end</body></html>"""


class _InProcess(Converter):
    """Converts here."""

    def convert(self, data: bytes, kind: str, *, on_progress: Progress | None = None) -> Converted:
        return convert_bytes(data, kind, on_progress or (lambda done, total: None))


_MAIL = b"""From: a@example.org
Subject: =?utf-8?B?R3LDvMOfZQ==?=
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=X

--X
Content-Type: multipart/alternative; boundary=Y

--Y
Content-Type: text/plain; charset=iso-8859-1
Content-Transfer-Encoding: quoted-printable

caf=E9
--Y
Content-Type: text/html; charset=utf-8
Content-Transfer-Encoding: base64

PHA+Y2Fmw6k8L3A+
--Y--
--X
Content-Type: application/pdf; name=a.pdf
Content-Transfer-Encoding: base64

JVBERi0=
--X--
"""
_SAVED_PAGE = b"""MIME-Version: 1.0
Content-Type: multipart/related; boundary=X

--X
Content-Type: text/html; charset=utf-8

<p>caf\xc3\xa9<table><tr><td colspan=2>a<tr><td>b<td>c</table>
--X--
"""
_NOTEBOOK = b"""{"cells": [{"cell_type": "markdown", "source": ["# T"], "attachments": {"a": {"image/png": "AA"}}},
{"cell_type": "code", "source": "x", "outputs": [{"output_type": "stream", "text": ["y"]}, {"output_type": "error",
"traceback": ["z"]}, {"output_type": "display_data", "data": {"image/png": "AAAA", "text/plain": "f"}}]}]}"""
_RICH = rb"""{\rtf1\ansi\ansicpg1252{\fonttbl{\f0\fcharset204 A;}{\f1\fcharset2 Symbol;}}{\stylesheet{\s1 heading 1;}}
\pard\s1 Gr\'fc\'dfe\par{\listtext 1.\tab}a{\super 2}{\v h}\u8364?{\footnote note}\par\trowd\cellx1\cellx2\clvmrg\cellx3
\intbl a\cell b\cell c\cell\row\pard{\shp{\*\shpinst{\shptxt box}}}{\field{\*\fldinst x}{\fldrslt r}}
{\pict 00}\bin2 xx}"""
_OPEN = (
    '<d xmlns:t="t" xmlns:s="s" xmlns:b="b"><styles><list-style s:name="L"><list-level-style-number t:level="1" '
    's:num-format="1" s:num-suffix="."/></list-style></styles><body><{0}>{1}</{0}></body></d>'
)
_OPEN_TEXT = (
    '<h t:outline-level="1">T</h><list t:style-name="L"><list-item><p>a<note><note-body><p>n</p></note-body></note></p>'
    '</list-item></list><table><table-row><table-cell b:number-columns-spanned="2"><p>w</p></table-cell>'
    "<covered-table-cell/></table-row></table><p>a<frame><text-box><p>x</p></text-box></frame></p>"
)
_OPEN_SHEET = (
    '<table b:name="S"><table-row b:number-rows-repeated="3"><table-cell b:number-columns-repeated="2" '
    'o:value-type="float" o:value="3" xmlns:o="o"/><table-cell><p>x</p></table-cell></table-row></table>'
)


def make_documents(place: Path) -> None:
    """Write the seeds of all targets, one folder each."""
    chapters = {"a.xhtml": "<h1>One</h1><p>first</p>", "b.xhtml": "<img/>", "c.xhtml": "<p>third &lt;</p>"}
    table = f"<w:tbl><w:tr><w:tc>{paragraph('cell')}</w:tc></w:tr></w:tbl>"
    files = {
        "pdf/a.pdf": pdf(["one\ntwo (2)", None, "three"]),
        "pdf/b.pdf": pdf(["a page"], extra=b"/AcroForm << /Fields [] >> "),
        "docx/a.docx": docx(paragraph("Title", "Heading1") + paragraph("text") + table + "<w:p/>"),
        "epub/a.epub": epub(chapters, titles={"c.xhtml": "Third"}),
        "xlsx/a.xlsx": xlsx({"S": [["x", "<v>1.5</v>"], ["", "<f>B1</f><v>2</v>"]], "Empty": []}),
        "mail/a.eml": _MAIL,
        "mail/b.mhtml": _SAVED_PAGE,
        "mail/c.mbox": 2 * (b"From a@b Tue Dec  1 10:00:00 2026\n" + _MAIL),
        "notebook/a.ipynb": _NOTEBOOK,
        "rtf/a.rtf": _RICH,
        "odf/a.odt": zipped({"content.xml": _OPEN.format("text", _OPEN_TEXT)}),
        "odf/b.ods": zipped({"content.xml": _OPEN.format("spreadsheet", _OPEN_SHEET)}),
        "odf/c.odp": zipped({"content.xml": _OPEN.format("presentation", f"<page>{_OPEN_TEXT}</page>")}),
        "odf/d.fodt": _OPEN.format("text", _OPEN_TEXT).encode(),
        "packed/a.txt.gz": gzip.compress(b"text " * 99),
        "packed/b.html.xz": lzma.compress(_PAGE.encode()),
        "packed/c.csv.bz2": bz2.compress(b"a,b\n" * 99),
        "pptx/a.pptx": pptx(["One\nfirst", "Two"], notes={1: "say"}),
        "html/a.html": _PAGE.encode(),
        "html/b.html": _PAGE.replace("utf-8", "koi8-r").encode("koi8-r", "ignore"),
        "text/a.txt": "Grüße – “quoted”\n".encode() * 20,
        "text/b.txt": "Все люди рождаются свободными\n".encode("cp1251") * 10,
        "text/c.csv": "a,b\n1,ü\n".encode("utf-16-le") * 10,
        "zip/a.zip": zipped(
            {"a.txt": "text", "d/b.md": "# more", "c.pdf": pdf(["in"]), "d.html": _PAGE, "e.zip": "PK"}
        ),
    }
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _damage(seeds: Path, out: Path, rng: random.Random) -> Path:
    path = copy_seed(pick(seeds, rng), out)
    content = path.read_bytes()
    packed = content.startswith(b"PK") and rng.random() < 0.7
    path.write_bytes(_damaged_member(content, rng) if packed else _damaged(content, rng))
    return path


def _damaged(content: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(5)
    # A field of the directory at the end, or of a member's header: sizes, counts, offsets, methods, flags.
    marks = [at for at in range(len(content) - 4) if content[at : at + 4] in (b"PK\1\2", b"PK\3\4", b"PK\5\6")]
    if kind == 0 and marks:
        return set_number(content, rng.choice(marks) + 4 + 2 * rng.randrange(20), rng.choice((2, 4)), rng)
    if kind == 1:
        return flipped_bits(content, rng)
    if kind <= 3:
        return damaged_text(content.decode("latin-1"), rng).encode("latin-1", "replace")
    return damaged_bytes(content, rng)


def _damaged_member(content: bytes, rng: random.Random) -> bytes:
    """Damage what is inside a zip archive, and pack it again."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    if rng.random() < 0.08:
        del members[name]
    elif rng.random() < 0.08:
        members[rng.choice(("../" * 5 + "x", "/etc/x", "a\0b", "x" * 3000, "\x1b[2J", "d/" * 80 + "x"))] = members.pop(
            name
        )
    else:
        members[name] = _damaged(members[name], rng)
    return zipped(members)


def _check(document: Document) -> None:
    starts = [part.start for part in document.parts]
    if starts != sorted(starts) or (starts and (starts[0] != 0 or starts[-1] > len(document.text))):
        raise Wrong(f"parts at {starts[:9]} of a text of {len(document.text)} characters")
    if not document.text.strip() or "\r" in document.text or ("\0" in document.text and document.encoding == ""):
        raise Wrong("a text that is blank, or with characters that no text has")
    document.text.encode()  # raises for what UTF-8 cannot hold
    if len(document.digest) != 64 or any(len(note) > 400 for note in document.notes):
        raise Wrong(f"digest {document.digest!r}, notes {document.notes!r}"[:300])


def _read_document(path: Path) -> None:
    _check(decode_document(path.read_bytes(), path, converter=_InProcess()))


def _read_archive(path: Path) -> None:
    for found in gather([path]).found:
        found.name.encode()
        if not found.name.isprintable() or found.name.startswith("/") or ".." in found.name.split("/"):
            raise Wrong(f"a file named {found.name!r}")
        _check(replace(found, converter=_InProcess()).load())


def _target(kind: str, *, read: Callable[[Path], None] = _read_document, least_refused: float = 0.25) -> Target:
    return Target(kind, f"documents/{kind}", _damage, read, least_refused)


# A book is read with the chapters that it has left, an archive with its other members; any bytes are some web page, and
# most are some text.
DOCUMENTS = (
    *map(_target, ("pdf", "docx", "xlsx", "pptx", "odf", "packed")),
    _target("epub", least_refused=0.1),
    *(_target(kind, least_refused=0.01) for kind in ("mail", "notebook", "rtf")),
    _target("html", least_refused=0.01),
    _target("text", least_refused=0.05),
    _target("zip", read=_read_archive, least_refused=0.05),
)
