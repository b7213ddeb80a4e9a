"""PowerPoint files to text, slide by slide: titles, lists, tables and speaker notes. Needs nothing but Python.

Not read: pictures, charts and diagrams.
"""

import posixpath
from collections.abc import Callable
from xml.etree.ElementTree import Element

from duolocal.documents.converted import Assembler, ConversionError, Converted
from duolocal.documents.xml_tree import local, parse_xml
from duolocal.documents.zipped import Archive, ArchiveError

MAX_SLIDES = 5_000
_MAX_XML_BYTES = 64 * 2**20
_PRESENTATION = "ppt/presentation.xml"


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert a presentation; its parts are its slides. Raises ConversionError."""
    try:
        with Archive(data) as archive:
            return _presentation(archive, report)
    except ArchiveError as error:
        raise ConversionError(str(error)) from error


def _presentation(archive: Archive, report: Callable[[int, int], None]) -> Converted:
    root = _tree(archive, _PRESENTATION)
    targets = {key: target for key, _, target in _relations(archive, _PRESENTATION)}
    slides = [_attribute(item, "id", last=True) for item in root.iter() if local(item.tag) == "sldId"]
    if len(slides) > MAX_SLIDES:
        raise ConversionError(f"is a PowerPoint file of {len(slides):,} slides, more than {MAX_SLIDES:,}: cut it up")
    assembler = Assembler()
    empty = []
    for number, key in enumerate(slides, 1):
        name = targets.get(key, "")
        text = ""
        if name in archive:
            text = _text(_tree(archive, name))
            for _, kind, target in _relations(archive, name):
                if kind.endswith("/notesSlide") and target in archive:
                    spoken = _text(_tree(archive, target))
                    text += f"\n\nSpeaker notes: {spoken}" if spoken and not spoken.isdigit() else ""
        if not text.strip():
            empty.append(str(number))
        assembler.add(f"slide {number}", text)
        report(number, len(slides))
    if len(empty) == len(slides):
        raise ConversionError("is a PowerPoint file without text: it may hold pictures only; run OCR over them first")
    notes = []
    if empty:
        shown = ", ".join(empty[:20]) + (" …" if len(empty) > 20 else "")
        notes.append(f"{len(empty):,} of {len(slides):,} slides yield no text (pictures, charts or blank): {shown}")
    return Converted(assembler.text(), assembler.parts, tuple(notes))


def _tree(archive: Archive, name: str) -> Element:
    return parse_xml(archive.read(name, most=_MAX_XML_BYTES), name)


def _attribute(item: Element, name: str, *, last: bool = False) -> str:
    """Return an attribute whatever its namespace; `id` is there twice, the relation's with a namespace."""
    found = [value for key, value in item.attrib.items() if local(key) == name and (not last or "}" in key)]
    return found[0] if found else ""


def _relations(archive: Archive, name: str) -> list[tuple[str, str, str]]:
    """Return (id, kind, member) of what a member refers to."""
    folder, base = posixpath.split(name)
    relations = f"{folder}/_rels/{base}.rels"
    if relations not in archive:
        return []
    return [
        (
            item.get("Id", ""),
            item.get("Type", ""),
            posixpath.normpath(posixpath.join("/", folder, item.get("Target", ""))).lstrip("/"),
        )
        for item in _tree(archive, relations)
        if local(item.tag) == "Relationship" and item.get("TargetMode") != "External"
    ]


def _text(root: Element) -> str:
    """Return the paragraphs of a slide in the order of the file, tables row by row."""
    lines: list[str] = []
    in_tables: set[int] = set()
    for item in root.iter():
        tag = local(item.tag)
        if tag == "tr":
            cells = [" ".join(_words(cell).split()) for cell in item if local(cell.tag) == "tc"]
            in_tables.update(id(inner) for inner in item.iter() if local(inner.tag) == "p")
            lines.append("| " + " | ".join(cells) + " |")
        elif tag == "p" and "drawingml" in item.tag and id(item) not in in_tables:
            words = _words(item).strip()
            if words:
                lines.append(words)
    return "\n".join(lines)


def _words(item: Element) -> str:
    pieces = []
    for inner in item.iter():
        tag = local(inner.tag)
        if tag == "t":
            pieces.append(inner.text or "")
        elif tag in ("br", "p"):
            pieces.append("\n")
        elif tag == "tab":
            pieces.append("\t")
    return "".join(pieces)
