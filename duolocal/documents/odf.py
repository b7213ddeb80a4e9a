"""OpenDocument files to text: texts (odt), sheets as CSV (ods), presentations (odp), packed or as one XML file.

What changes the meaning is marked as in Word documents. Not read, and told: pictures, embedded files, headers, footers,
hidden text and what tracked changes deleted. Needs nothing but Python.
"""

from collections.abc import Callable
from xml.etree.ElementTree import Element

from duolocal.documents.converted import Assembler, ConversionError, Converted
from duolocal.documents.odf_sheets import read_sheets
from duolocal.documents.odf_text import OpenReader
from duolocal.documents.told import blank_slides
from duolocal.documents.xml_tree import attribute, child, local, parse_xml
from duolocal.documents.zipped import Archive

_MAX_XML_BYTES = 96 * 2**20


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert an OpenDocument file; raises ConversionError."""
    if not data.startswith(b"PK"):
        root = parse_xml(data, "the document")
        return _read([root], report)
    with Archive(data) as archive:
        if "META-INF/manifest.xml" in archive and b"encryption-data" in archive.read("META-INF/manifest.xml"):
            raise ConversionError("is locked with a password: save it without one and load that")
        names = ("content.xml", "styles.xml")
        roots = [
            parse_xml(archive.read(name, most=_MAX_XML_BYTES), name)
            for name in names
            if name in archive or name == "content.xml"
        ]
    return _read(roots, report)


def _read(roots: list[Element], report: Callable[[int, int], None]) -> Converted:
    body = child(roots[0], "body")
    kinds = {"text": _text, "spreadsheet": read_sheets, "presentation": _slides, "drawing": _slides}
    for item in () if body is None else body:
        if local(item.tag) in kinds:
            return kinds[local(item.tag)](item, OpenReader(roots, report))
    raise ConversionError("is an OpenDocument file without a body: it is damaged; open it elsewhere and save it anew")


def _text(body: Element, reader: OpenReader) -> Converted:
    text = reader.text_of(body)
    if not text:
        what = "; ".join(reader.told.notes())
        raise ConversionError(
            f"is an OpenDocument text without text{f' ({what[:200]})' if what else ''}: it may hold pictures only; run "
            "OCR over them first"
        )
    return Converted(text, (), reader.told.notes())


def _slides(body: Element, reader: OpenReader) -> Converted:
    assembler = Assembler()
    pages = [item for item in body if local(item.tag) == "page"]
    empty = []
    for number, page in enumerate(pages, 1):
        is_shown = reader.styles.is_shown(attribute(page, "style-name"))
        notes = [item for item in page if local(item.tag) == "notes"]
        for item in notes:
            page.remove(item)
        text = reader.text_of(page)
        for item in notes:
            spoken = reader.text_of(item)
            text += f"\n\nSpeaker notes: {spoken}" if spoken else ""
        if not text.strip():
            empty.append(str(number))
        elif not is_shown:
            text = f"[hidden slide]\n\n{text}"
        assembler.add(f"slide {number}{'' if is_shown else ' (hidden)'}", text)
        reader.report(number, len(pages))
    if len(empty) == len(pages):
        raise ConversionError("is a presentation without text: it may hold pictures only; run OCR over them first")
    return Converted(assembler.text(), assembler.parts, (*blank_slides(empty, len(pages)), *reader.told.notes()))
