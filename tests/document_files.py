"""Small documents of every format, written by hand: what is in them is known without the readers."""

import io
import zipfile
from collections.abc import Mapping, Sequence


def zipped(members: Mapping[str, str | bytes], *, stored: Sequence[str] = ()) -> bytes:
    """Return a zip archive; the members in `stored` are not compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            kind = zipfile.ZIP_STORED if name in stored else zipfile.ZIP_DEFLATED
            archive.writestr(zipfile.ZipInfo(name, (2024, 1, 2, 3, 4, 6)), content, kind)
    return out.getvalue()


def pdf(pages: Sequence[str | None], *, encrypt: bool = False, extra: bytes = b"") -> bytes:
    """Return a PDF; a page is its lines of Latin-1 text, or None for one that only has a picture (a filled box)."""
    objects = [b"", b""]  # catalog and page tree, filled in below
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>")
    kids = []
    for page in pages:
        if page is None:
            content = b"0.5 g 100 100 200 200 re f"
        else:
            lines = [line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)") for line in page.split("\n")]
            content = b"BT /F1 12 Tf 14 TL 72 720 Td " + b" ".join(
                b"(" + line.encode("cp1252") + b") Tj T*" for line in lines
            )
            content += b" ET"
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content))
        kids.append(len(objects) + 1)
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % (len(objects))
        )
    objects[0] = b"<< /Type /Catalog /Pages 2 0 R %s>>" % extra
    objects[1] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(kids), b" ".join(b"%d 0 R" % kid for kid in kids))
    trailer = b"/Root 1 0 R /Size %d" % (len(objects) + 2)
    if encrypt:
        objects.append(b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>" % (b"11" * 32, b"22" * 32))
        trailer += b" /Encrypt %d 0 R /ID [<00> <00>]" % len(objects)
    return _numbered(objects, trailer)


def _numbered(objects: Sequence[bytes], trailer: bytes) -> bytes:
    out, offsets = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return bytes(out + b"trailer << %s >>\nstartxref\n%d\n%%%%EOF\n" % (trailer, start))


_TYPES = '<?xml version="1.0"?><Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">{}</Types>'
_TYPE = '<Override PartName="/{}" ContentType="application/vnd.openxmlformats-officedocument.{}+xml"/>'
_DEFAULTS = (
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="xml" ContentType="application/xml"/>'
)
_RELATIONS = '<?xml version="1.0"?><Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">{}</Relationships>'
_KIND = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/"


def _relations(*targets: tuple[str, str, str]) -> str:
    return _RELATIONS.format(
        "".join(f'<Relationship Id="{key}" Type="{_KIND}{kind}" Target="{target}"/>' for key, kind, target in targets)
    )


_WORD = {
    "w": "http://schemas.openxmlformats.org/wordprocessingml/2006/main",
    "m": "http://schemas.openxmlformats.org/officeDocument/2006/math",
    "r": _KIND[:-1],
    "mc": "http://schemas.openxmlformats.org/markup-compatibility/2006",
    "wp": "http://schemas.openxmlformats.org/drawingml/2006/wordprocessingDrawing",
    "a": "http://schemas.openxmlformats.org/drawingml/2006/main",
    "wps": "http://schemas.microsoft.com/office/word/2010/wordprocessingShape",
    "w14": "http://schemas.microsoft.com/office/word/2010/wordml",
    "v": "urn:schemas-microsoft-com:vml",
}


def docx(
    body: str,
    *,
    more: Mapping[str, str] | None = None,
    chunks: Mapping[str, str | bytes] | None = None,
    strict: bool = False,
) -> bytes:
    """Return a Word document around the XML of its body (the prefixes of `_WORD`).

    `more` are parts by the kind of their relation, such as "numbering": what is inside their root. `chunks` are files
    that it takes in; their relations have their names.
    """
    names = dict(_WORD, w="http://purl.oclc.org/ooxml/wordprocessingml/main") if strict else _WORD
    spaces = " ".join(f'xmlns:{prefix}="{address}"' for prefix, address in names.items())
    main = _TYPE.format("word/document.xml", "wordprocessingml.document.main")
    parts = {f"word/{kind}.xml": f"<w:{kind} {spaces}>{content}</w:{kind}>" for kind, content in (more or {}).items()}
    return zipped(
        {
            "[Content_Types].xml": _TYPES.format(_DEFAULTS + main),
            "_rels/.rels": _relations(("rId1", "officeDocument", "word/document.xml")),
            "word/document.xml": f"<w:document {spaces}><w:body>{body}</w:body></w:document>",
            "word/_rels/document.xml.rels": _relations(
                *((kind, kind, f"{kind}.xml") for kind in more or {}),
                *((name, "aFChunk", f"/word/{name}") for name in chunks or {}),
            ),
            **parts,
            **{f"word/{name}": content for name, content in (chunks or {}).items()},
        }
    )


def paragraph(text: str, style: str = "") -> str:
    """Return the XML of a paragraph of a Word document."""
    properties = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f'<w:p>{properties}<w:r><w:t xml:space="preserve">{text}</w:t></w:r></w:p>'


def epub(
    chapters: Mapping[str, str],
    *,
    titles: Mapping[str, str] | None = None,
    more: Mapping[str, str] | None = None,
    links: Mapping[str, str] | None = None,
) -> bytes:
    """Return a book: member name -> XHTML of its body, in order; titles by member name go into its contents.

    links: how the book's list writes the name of a member, where that is not its name.
    """
    items = "".join(
        f'<item id="c{at}" href="{(links or {}).get(name, name)}" media-type="application/xhtml+xml"/>'
        for at, name in enumerate(chapters)
    )
    spine = "".join(f'<itemref idref="c{at}"/>' for at in range(len(chapters)))
    entries = "".join(f'<li><a href="{name}#start">{title}</a></li>' for name, title in (titles or {}).items())
    members = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<?xml version="1.0"?>'
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>',
        "OEBPS/book.opf": '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0"><manifest>'
        '<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>'
        f"{items}</manifest><spine>{spine}</spine></package>",
        "OEBPS/nav.xhtml": f'<html xmlns="http://www.w3.org/1999/xhtml"><body><nav><ol>{entries}</ol></nav></body></html>',
    }
    for name, body in chapters.items():
        members[f"OEBPS/{name}"] = (
            f'<html xmlns="http://www.w3.org/1999/xhtml"><head><title>Book</title></head><body>{body}</body></html>'
        )
    return zipped(members | dict(more or {}), stored=["mimetype"])


def pptx(
    slides: Sequence[str],
    *,
    notes: Mapping[int, str] | None = None,
    hidden: Sequence[int] = (),
    more: Mapping[str, str] | None = None,
) -> bytes:
    """Return a presentation; a slide is its paragraphs, one per line, or the XML of its shapes (prefixes p, a, r).

    Slides are stored in the opposite order. `more` are parts that every slide refers to by the kind of the relation,
    such as "slideLayout": the XML inside their root.
    """
    p, a = (
        "http://schemas.openxmlformats.org/presentationml/2006/main",
        "http://schemas.openxmlformats.org/drawingml/2006/main",
    )
    r = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    spaces = f'xmlns:p="{p}" xmlns:a="{a}" xmlns:r="{r}" xmlns:mc="{_WORD["mc"]}" xmlns:m="{_WORD["m"]}"'

    def slide(text: str, show: str = "") -> str:
        if not text.startswith("<"):
            paragraphs = "".join(f"<a:p><a:r><a:t>{line}</a:t></a:r></a:p>" for line in text.split("\n") if line)
            text = f"<p:sp><p:txBody>{paragraphs}</p:txBody></p:sp>"
        return f"<p:sld {spaces}{show}><p:cSld><p:spTree>{text}</p:spTree></p:cSld></p:sld>"

    count = len(slides)
    ids = "".join(f'<p:sldId id="{256 + at}" r:id="rId{at}"/>' for at in range(count))
    members = {
        "[Content_Types].xml": _TYPES.format(_DEFAULTS),
        "ppt/presentation.xml": f"<p:presentation {spaces}><p:sldIdLst>{ids}</p:sldIdLst></p:presentation>",
        "ppt/_rels/presentation.xml.rels": _relations(
            *((f"rId{at}", "slide", f"slides/slide{count - at}.xml") for at in range(count))
        ),
        **{f"ppt/{kind}.xml": f"<p:{kind} {spaces}>{content}</p:{kind}>" for kind, content in (more or {}).items()},
    }
    for at, text in enumerate(slides):
        members[f"ppt/slides/slide{count - at}.xml"] = slide(text, ' show="0"' if at in hidden else "")
        target = f"notesSlide{at}.xml"
        spoken = [("rId1", "notesSlide", f"../notesSlides/{target}")] if notes and at in notes else []
        members[f"ppt/slides/_rels/slide{count - at}.xml.rels"] = _relations(
            *spoken, *((kind, kind, f"../{kind}.xml") for kind in more or {})
        )
        if notes and at in notes:
            members[f"ppt/notesSlides/{target}"] = slide(notes[at])
    return zipped(members)


def xlsx(sheets: Mapping[str, Sequence[Sequence[str]] | str], *, more: Mapping[str, str] | None = None) -> bytes:
    """Return a workbook; a cell is the XML inside its <c>, such as <v>3</v>, or text without a `<`.

    A sheet may be the XML inside its <worksheet> instead; `more` are parts that the workbook refers to by their names,
    such as "styles".
    """
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    names = "".join(f'<sheet name="{name}" sheetId="{at}" r:id="rId{at}"/>' for at, name in enumerate(sheets, 1))
    types = _TYPE.format("xl/workbook.xml", "spreadsheetml.sheet.main")
    members = {
        "_rels/.rels": _relations(("rId1", "officeDocument", "xl/workbook.xml")),
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{_KIND[:-1]}"><sheets>{names}</sheets></workbook>',
        "xl/_rels/workbook.xml.rels": _relations(
            *((f"rId{at}", "worksheet", f"worksheets/sheet{at}.xml") for at in range(1, len(sheets) + 1)),
            *((name, name, f"{name}.xml") for name in more or {}),
        ),
        **{f"xl/{name}.xml": content for name, content in (more or {}).items()},
    }
    for at, rows in enumerate(sheets.values(), 1):
        types += _TYPE.format(f"xl/worksheets/sheet{at}.xml", "spreadsheetml.worksheet")
        lines = []
        for number, row in enumerate([] if isinstance(rows, str) else rows, 1):
            cells = [
                f'<c r="{chr(65 + column)}{number}">{cell}</c>'
                if cell.startswith("<")
                else f'<c r="{chr(65 + column)}{number}" t="inlineStr"><is><t>{cell}</t></is></c>'
                for column, cell in enumerate(row)
                if cell
            ]
            lines.append(f'<row r="{number}">{"".join(cells)}</row>')
        content = rows if isinstance(rows, str) else f"<sheetData>{''.join(lines)}</sheetData>"
        members[f"xl/worksheets/sheet{at}.xml"] = f'<worksheet xmlns="{main}">{content}</worksheet>'
    members["[Content_Types].xml"] = _TYPES.format(_DEFAULTS + types)
    return zipped(members)
