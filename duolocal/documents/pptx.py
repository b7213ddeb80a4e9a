"""PowerPoint files to text, slide by slide: titles, text with its numbers, tables, diagrams and speaker notes.

Not read, and told: pictures, charts, comments, hidden shapes. Needs nothing but Python.
"""

import re
from collections.abc import Callable, Iterator
from xml.etree.ElementTree import Element

from duolocal.documents.converted import Assembler, ConversionError, Converted
from duolocal.documents.formulas import formula
from duolocal.documents.inline import PLAIN, Style, marked
from duolocal.documents.numbering import numbered
from duolocal.documents.package import Package, Relation, alternative, unflattened
from duolocal.documents.told import Told, blank_slides, listed
from duolocal.documents.xml_tree import attribute, child, local
from duolocal.documents.zipped import Archive

MAX_SLIDES = 5_000
_MAX_XML_BYTES = 256 * 2**20
_LEVELS = 9
_NUMBER = re.compile(
    r"(arabic|alphaLc|alphaUc|romanLc|romanUc|circleNum|ea1|hindi|thai|hebrew)\w*?(Period|ParenR|ParenBoth|Plain|Minus)"
)
_STYLES = {"arabic": "decimal", "alphaLc": "lowerAlpha", "alphaUc": "upperAlpha", "romanLc": "lowerRoman"}
_STYLES |= {
    "romanUc": "upperRoman",
    "circleNum": "decimalEnclosedCircle",
    "ea1": "chineseCounting",
    "hebrew": "hebrew1",
}
_AROUND = {"Period": "{}.", "ParenR": "{})", "ParenBoth": "({})", "Plain": "{}", "Minus": "{} -"}
_BULLETS = ("buNone", "buChar", "buAutoNum", "buBlip")
_NOT_SPOKEN = ("sldNum", "sldImg", "dt", "hdr", "ftr")  # placeholders of a page of notes


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert a presentation; its parts are its slides. Raises ConversionError."""
    with Archive(unflattened(data)) as archive:
        return _presentation(Package(archive, most=_MAX_XML_BYTES), report)


def _presentation(package: Package, report: Callable[[int, int], None]) -> Converted:
    main = package.main("ppt/presentation.xml")
    targets = {relation.key: relation.target for relation in package.relations(main)}
    items = [item for item in package.tree(main).iter() if local(item.tag) == "sldId"]
    if len(items) > MAX_SLIDES:
        raise ConversionError(f"is a PowerPoint file of {len(items):,} slides, more than {MAX_SLIDES:,}: cut it up")
    assembler = Assembler()
    reader = _Reader(package)
    empty, hidden, missing = [], [], []
    for number, item in enumerate(items, 1):
        # `id` is there twice: the relation's has a namespace.
        key = next((value for name, value in item.attrib.items() if name.endswith("}id")), "")
        name = targets.get(key, "")
        text, is_shown = reader.slide(name) if name in package else ("", True)
        if name not in package:
            missing.append(str(number))
        elif not text:
            empty.append(str(number))
        if not is_shown:
            hidden.append(str(number))
            text = f"[hidden slide]\n{text}" if text else ""
        assembler.add(f"slide {number}{'' if is_shown else ' (hidden)'}", text)
        report(number, len(items))
    if len(empty) + len(missing) == len(items):
        raise ConversionError("is a PowerPoint file without text: it may hold pictures only; run OCR over them first")
    notes = [*blank_slides(empty, len(items))]
    if missing:
        of = f"{len(missing):,} of {len(items):,} slides"
        notes.append(f"{of} missing from the file, which is damaged: {listed(missing)}")
    if hidden:
        notes.append(f"hidden slides are read too: {listed(hidden)}")
    return Converted(assembler.text(), assembler.parts, (*notes, *reader.told.notes()))


class _Reader:
    def __init__(self, package: Package) -> None:
        self._package = package
        self.told = Told()
        self._above: dict[str, list[Element]] = {}  # of a slide: its layout and what that is based on
        self._relations: list[Relation] = []

    def slide(self, name: str) -> tuple[str, bool]:
        """Return the text of a slide with its notes, and whether it is shown."""
        root = self._package.tree(name)
        relations = self._relations = self._package.relations(name)
        text = "\n".join(self._lines(root, self._layouts(relations)))
        self.told["commented"] += any(relation.kind.lower().endswith(("comments", "comment")) for relation in relations)
        for relation in relations:
            if relation.kind == "notesSlide" and relation.target in self._package:
                self._relations = []
                spoken = "\n".join(self._lines(self._package.tree(relation.target), [], is_notes=True))
                text += f"\n\nSpeaker notes: {spoken}" if spoken else ""
        return text.strip(), attribute(root, "show", "1") not in ("0", "false")

    def _layouts(self, relations: list[Relation]) -> list[Element]:
        name = next((relation.target for relation in relations if relation.kind == "slideLayout"), "")
        if name not in self._above:
            self._above[name] = []
            if name in self._package:
                self._above[name].append(self._package.tree(name))
                masters = (relation.target for relation in self._package.relations(name))
                self._above[name] += [
                    self._package.tree(master)
                    for master in masters
                    if "slidemaster" in master.lower() and master in self._package
                ]
        return self._above[name]

    def _lines(self, element: Element, above: list[Element], *, is_notes: bool = False) -> Iterator[str]:
        """Yield the paragraphs of a slide in the order of the file, tables row by row."""
        for item in element:
            match name := local(item.tag):
                case "AlternateContent":
                    yield from self._lines(alternative(item), above, is_notes=is_notes)
                case "sp" | "pic" | "graphicFrame" | "grpSp" | "cxnSp" if _is_hidden(item):
                    self.told["shape"] += any(local(inner.tag) == "t" and inner.text for inner in item.iter())
                case "sp":
                    place = next((inner for inner in item.iter() if local(inner.tag) == "ph"), None)
                    if is_notes and place is not None and attribute(place, "type") in _NOT_SPOKEN:
                        continue
                    yield from self._shape(item, place, above)
                case "pic":
                    self.told["picture"] += 1
                    about = next((inner for inner in item.iter() if local(inner.tag) == "cNvPr"), None)
                    described = " ".join(attribute(about, "descr").split())
                    if described:
                        yield f"[image: {described}]"
                case "tr":
                    cells = (inner for inner in item if local(inner.tag) == "tc")
                    yield "| " + " | ".join(" ".join(" ".join(self._body(cell, [])).split()) for cell in cells) + " |"
                case "chart" if attribute(item, "id"):
                    self.told["chart"] += 1
                case "relIds":
                    yield from self._diagram(attribute(item, "dm"))
                case "oleObj":
                    self.told["object"] += 1
                case "txBody":
                    yield from self._body(item, [])
                case _ if name not in ("extLst", "timing", "transition"):
                    yield from self._lines(item, above, is_notes=is_notes)

    def _diagram(self, key: str) -> Iterator[str]:
        name = next((relation.target for relation in self._relations if relation.key == key), "")
        if name not in self._package:
            return
        for item in self._package.tree(name).iter():
            if local(item.tag) == "t" and len(item):
                yield from self._body(item, [])

    def _shape(self, shape: Element, place: Element | None, above: list[Element]) -> Iterator[str]:
        styles = [_list_style(shape)]
        if place is not None:
            for layout in above:
                styles.append(_list_style(_placeholder(layout, place)))
                kind = {"title": "titleStyle", "ctrTitle": "titleStyle"}.get(attribute(place, "type"), "bodyStyle")
                styles.append(child(layout, "txStyles", kind))
        for item in shape:
            if local(item.tag) == "txBody":
                yield from self._body(item, [style for style in styles if style is not None])

    def _body(self, body: Element, styles: list[Element]) -> Iterator[str]:
        """Yield the paragraphs of a text, numbered as they are shown."""
        counts: dict[int, tuple[str, int]] = {}  # by level: kind and number of the last paragraph
        for item in body.iter():
            if local(item.tag) != "p" or "drawingml" not in item.tag:
                continue
            text = self._paragraph(item).strip()
            if not text:
                continue
            properties = child(item, "pPr")
            level = attribute(properties, "lvl", "0")
            at = int(level) if level in "012345678" and level else 0
            bullet = _bullet([properties, *(child(style, f"lvl{at + 1}pPr") for style in styles)])
            for deeper in [other for other in counts if other > at]:
                del counts[deeper]
            if bullet is None:
                counts.pop(at, None)
                yield text
                continue
            kind, start = attribute(bullet, "type"), attribute(bullet, "startAt", "1")
            first = int(start) if start.isdecimal() and len(start) < 6 else 1
            before, number = counts.get(at, ("", 0))
            number = number + 1 if before == f"{kind} {first}" else first
            counts[at] = (f"{kind} {first}", number)
            yield f"{_shown(number, kind)} {text}"

    def _paragraph(self, paragraph: Element) -> str:
        runs: list[tuple[str, Style]] = []
        for item in paragraph:
            match local(item.tag):
                case "r" | "fld":
                    text = child(item, "t")
                    runs.append((text.text or "" if text is not None else "", _style(child(item, "rPr"))))
                case "br":
                    runs.append(("\n", PLAIN))
                case "AlternateContent" | "m" | "oMath" | "oMathPara":
                    inner = alternative(item) if local(item.tag) == "AlternateContent" else item
                    text_of = formula(inner)
                    self.told["written"] += bool(text_of)
                    runs.append((f" {text_of} ", PLAIN))
        return marked(runs)


def _is_hidden(shape: Element) -> bool:
    about = next((inner for inner in shape.iter() if local(inner.tag) == "cNvPr"), None)
    return attribute(about, "hidden") in ("1", "true")


def _style(properties: Element | None) -> Style:
    if properties is None:
        return PLAIN
    baseline = attribute(properties, "baseline").rstrip("%")
    level = 0 if not baseline.strip("-0.") else -1 if baseline.startswith("-") else 1
    return Style(attribute(properties, "strike", "noStrike") not in ("noStrike", ""), level)


def _list_style(shape: Element | None) -> Element | None:
    return child(shape, "txBody", "lstStyle")


def _placeholder(layout: Element, place: Element) -> Element | None:
    """Return the shape of a layout that a placeholder is based on: of the same number, else of the same kind."""
    shapes = [item for item in layout.iter() if local(item.tag) == "sp"]
    found = [(next((inner for inner in shape.iter() if local(inner.tag) == "ph"), None), shape) for shape in shapes]
    for name in ("idx", "type"):
        wanted = attribute(place, name)
        for other, shape in found:
            if wanted and other is not None and attribute(other, name) == wanted:
                return shape
    return None


def _bullet(properties: list[Element | None]) -> Element | None:
    """Return the automatic number that the first of these says, None where it says something else."""
    for item in properties:
        for inner in () if item is None else item:
            if local(inner.tag) in _BULLETS:
                return inner if local(inner.tag) == "buAutoNum" else None
    return None


def _shown(number: int, kind: str) -> str:
    match = _NUMBER.fullmatch(kind)
    if match is None:
        return f"{number}."
    return _AROUND[match[2]].format(numbered(number, _STYLES.get(match[1], "decimal")))
