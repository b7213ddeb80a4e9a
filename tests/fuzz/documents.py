"""Damaged documents: PDF, Word, Excel, PowerPoint, EPUB, HTML, plain text and zip archives of them.

Read in the reading process itself, not in the one that `duolocal.documents` starts to be safe from them: so what is
found here are the bounds of the converters, not those of that process.
"""

import io
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


# Any bytes are some web page, most are some text, and of an archive the other members are still read.
DOCUMENTS = (
    *map(_target, ("pdf", "docx", "epub", "xlsx", "pptx")),
    _target("html", least_refused=0.01),
    _target("text", least_refused=0.05),
    _target("zip", read=_read_archive, least_refused=0.05),
)
