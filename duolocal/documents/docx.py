"""Word documents to text, as Word shows them: numbers of lists, ticks, columns, what is struck, raised or hidden.

What wraps text (fields, links, tags, directions, content controls) is looked through; text boxes follow their
paragraph; footnotes, endnotes and comments stand at the end. Not read, and told: headers, footers, pictures, charts,
embedded files, hidden text and what tracked changes deleted. Needs nothing but Python.
"""

import re
from collections.abc import Callable
from typing import Literal
from xml.etree.ElementTree import Element

from duolocal.documents.blocks import TextBuilder
from duolocal.documents.converted import ConversionError, Converted
from duolocal.documents.formulas import formula
from duolocal.documents.inline import PLAIN
from duolocal.documents.package import Package, Relation, alternative, has_text, unflattened
from duolocal.documents.symbols import in_symbols, is_symbol_font, symbol
from duolocal.documents.told import Told
from duolocal.documents.word_numbering import BULLET, Numbering
from duolocal.documents.word_styles import RunFormat, Styles, paragraph_format, run_format
from duolocal.documents.word_ticks import field_tick, show_tick, tick
from duolocal.documents.xml_tree import attribute, child, local, val, whole
from duolocal.documents.zipped import Archive

_MAX_XML_BYTES = 96 * 2**20  # a tree of it takes many times that size
_MAX_NESTED = 2  # documents within documents
_PARAGRAPHS_PER_REPORT = 2000
_SKIPPED = frozenset(
    """pPr rPr tblPr tblGrid tblPrEx trPr tcPr sectPr sdtPr sdtEndPr customXmlPr smartTagPr rubyPr fldData instrText
    delText delInstrText footnoteRef endnoteRef annotationRef separator continuationSeparator lastRenderedPageBreak
    softHyphen proofErr binData""".split()  # noqa: SIM905
)
_BLOCKS = frozenset(("p", "tbl", "altChunk"))
# A reading above its base as old versions of Word write it: EQ \* jc2 … \o\ad(\s\up 9(reading),base).
_READING = re.compile(r"\\s\\up\s*[\d.]+\s*\((.*?)\)\s*[,;]\s*(.*?)\)")


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert a Word document; raises ConversionError."""
    return _convert(data, report, _MAX_NESTED)


def _convert(data: bytes, report: Callable[[int, int], None], nested: int) -> Converted:
    with Archive(unflattened(data)) as archive:
        package = Package(archive, most=_MAX_XML_BYTES)
        reader = _Reader(package, package.main("word/document.xml"), report, nested)
        return reader.convert()


class _Field:
    """A field that is open: its instruction is not shown, its result is."""

    def __init__(self) -> None:
        self.shows = False
        self.is_done = False  # what it shows stands there already: a tick, a choice
        self.instruction: list[str] = []


class _Reader:
    def __init__(self, package: Package, main: str, report: Callable[[int, int], None], nested: int) -> None:
        self._package, self._main, self._report, self._nested = package, main, report, nested
        self._relations = package.relations(main)
        self._by_key = {relation.key: relation for relation in self._relations}
        self._styles = Styles(self._part("styles"))
        self._numbering = Numbering(self._part("numbering"), self._styles.lists())
        self._out = TextBuilder()
        self._told = Told()
        self._fields: list[_Field] = []
        self._boxes: list[Element] = []  # text boxes of the paragraph that is read
        self._notes: list[tuple[str, Element]] = []  # what stands at the end, with its mark
        self._noted: dict[tuple[str, str], str] = {}  # marks by kind and key
        self._parts: dict[str, dict[str, Element]] = {}
        self._prefix = ""  # before the next paragraph
        self._goes_on = False  # the end of the last paragraph was deleted
        self._was_hidden = False
        self._count = 0

    def _part(self, kind: str) -> Element | None:
        name = next((relation.target for relation in self._relations if relation.kind == kind), "")
        return self._package.tree(name) if name in self._package else None

    def convert(self) -> Converted:
        self._blocks(self._package.tree(self._main))
        self._out.set_depth(0)
        done = 0
        while done < len(self._notes):  # notes may hold further ones
            self._prefix, element = self._notes[done]
            self._blocks(element)
            self._out.set_depth(0)
            if self._prefix:
                self._out.add(self._prefix.strip())
                self._prefix = ""
            done += 1
        for relation in self._relations:
            if relation.kind in ("header", "footer") and relation.target in self._package:
                words = "".join(item.text or "" for item in self._package.tree(relation.target).iter())
                self._told["running"] += bool(re.search(r"[^\W\d]", words))
        text = self._out.text()
        notes = self._told.notes()
        if not text:
            what = f" ({'; '.join(notes)[:200]})" if notes else ""
            pictures, anew = "it may hold pictures only; run OCR over them first", "open it in Word and save it anew"
            advice = anew if self._told["chunk"] else pictures
            raise ConversionError(f"is a Word document without text{what}: {advice}")
        return Converted(text, (), notes)

    # --- blocks ----------------------------------------------------------------------------------------------------

    def _blocks(self, element: Element) -> None:
        for item in element:
            match name := local(item.tag):
                case "p":
                    self._paragraph(item)
                case "tbl":
                    self._table(item)
                case "altChunk":
                    self._chunk(item)
                case "sdt" if (mark := tick(item)) is not None:
                    self._out.begin()
                    self._out.push(mark)
                case "del" | "moveFrom":
                    self._deleted(item)
                case "AlternateContent":
                    self._blocks(alternative(item))
                case "r" | "hyperlink" | "fldSimple":  # outside a paragraph, where they should not be
                    self._inline_child(item, RunFormat())
                case "oMath" | "oMathPara":
                    self._out.begin()
                    self._formula(item)
                case _ if name not in _SKIPPED:
                    self._blocks(item)

    def _paragraph(self, item: Element) -> None:
        self._count += 1
        if self._count % _PARAGRAPHS_PER_REPORT == 0:
            self._report(0, 1)
        properties = child(item, "pPr")
        key = val(properties, "pStyle")
        of_style, own = self._styles.paragraph(key), paragraph_format(properties)
        outline = of_style.outline if own.outline is None else own.outline
        list_key = of_style.list_key if own.list_key is None else own.list_key
        level = own.list_level if own.list_level is not None else of_style.list_level
        if level is None:
            level = self._numbering.level_of_style(list_key or "", key)
        is_joined = child(properties, "rPr", "del") is not None
        number = None
        if list_key and list_key != "0" and not (is_joined and not has_text(item)):
            number = self._numbering.count(list_key, level)
        if not self._goes_on:
            self._begin(outline or 0, number, level)
        self._goes_on = is_joined
        boxes, self._boxes = self._boxes, []
        self._inline(item, of_style.run.over(self._styles.default))
        self._fields = [field for field in self._fields if field.shows]
        if not is_joined:
            self._out.end()
        inner, self._boxes = self._boxes, boxes
        for box in inner:
            depth = self._out.lists
            self._out.end()
            self._out.lists = 0
            self._blocks(box)
            self._out.end()
            self._out.lists = depth

    def _begin(self, outline: int, number: str | None, level: int) -> None:
        self._out.end()
        self._was_hidden = False
        if outline:
            self._out.set_depth(0)
            self._out.begin("#" * min(outline, 6) + " ")
            if number and number != BULLET:
                self._out.push(f"{number} ")
        elif not number:
            self._out.set_depth(0)
            self._out.begin()
        else:
            self._out.set_depth(level + 1)
            self._out.begin(number if number == BULLET else f"{number} ")
        if self._prefix and not outline:
            self._out.mark = self._prefix + self._out.mark
            self._prefix = ""

    def _table(self, table: Element) -> None:
        self._goes_on = False
        self._out.set_depth(0)
        self._out.begin()
        self._out.open_table()
        above: set[int] = set()  # columns in which a merged cell may go on
        for row in _flattened(table, "tr"):
            properties = child(row, "trPr")
            if child(properties, "del") is not None:
                self._deleted(row)
                continue
            self._out.open_row()
            column = whole(val(properties, "gridBefore"))
            self._out.skip_columns(column)
            merged: set[int] = set()
            for cell in _flattened(row, "tc"):
                about = child(cell, "tcPr")
                vertical, across = child(about, "vMerge"), child(about, "hMerge")
                goes_on = vertical is not None and attribute(vertical, "val", "continue") == "continue"
                is_shown = not (goes_on and column in above)
                if across is not None and attribute(across, "val", "continue") == "continue":
                    is_shown = False
                if vertical is not None:
                    merged.add(column)
                span = max(1, whole(val(about, "gridSpan")))
                self._out.open_cell(columns=span, is_shown=is_shown)
                if is_shown:
                    self._blocks(cell)
                self._out.set_depth(0)
                column += span
            above = merged
        self._out.close_table()

    def _chunk(self, item: Element) -> None:
        """Read a document of another format that Word would show in this place."""
        self._out.set_depth(0)
        key = next((value for name, value in item.attrib.items() if local(name) == "id"), "")
        relation = self._by_key.get(key)
        text = ""
        if relation is not None and relation.target in self._package and self._nested:
            text = self._converted(self._package.read(relation.target), relation)
        if text:
            self._out.add(text)
        else:
            self._told["chunk"] += 1

    def _converted(self, data: bytes, relation: Relation) -> str:
        from duolocal.documents.child import convert_bytes
        from duolocal.documents.formats import HEAD, format_of
        from duolocal.documents.text import decode

        try:
            found = format_of(data[:HEAD], relation.target, lambda: Archive(data))
            if found.kind == "docx":
                return _convert(data, self._report, self._nested - 1).text
            if found.how == "convert" and found.kind in ("html", "mhtml", "rtf"):
                return convert_bytes(data, found.kind).text
            return decode(data).text.strip() if found.how == "decode" else ""
        except ConversionError:
            return ""

    # --- text ------------------------------------------------------------------------------------------------------

    def _inline(self, element: Element, inherited: RunFormat) -> None:
        for item in element:
            self._inline_child(item, inherited)

    def _inline_child(self, item: Element, inherited: RunFormat) -> None:
        match name := local(item.tag):
            case "r":
                self._run(item, inherited)
            case "del" | "moveFrom":
                self._deleted(item)
            case "sdt" if (mark := tick(item)) is not None:
                self._out.push(mark)
            case "AlternateContent":
                self._inline(alternative(item), inherited)
            case "oMath" | "oMathPara":
                self._formula(item)
            case _ if name in _BLOCKS:  # where it should not be
                self._boxes.append(_wrapped(item))
            case _ if name not in _SKIPPED:
                self._inline(item, inherited)

    def _run(self, run: Element, inherited: RunFormat) -> None:
        properties = child(run, "rPr")
        look = inherited
        if properties is not None:
            named = val(properties, "rStyle")
            of_style = self._styles.paragraph(named).run if named else RunFormat()
            look = run_format(properties).over(of_style).over(inherited)
        self._out.style = look.style
        self._pieces(run, look)
        self._out.style = PLAIN

    def _pieces(self, element: Element, look: RunFormat) -> None:
        for item in element:
            name = local(item.tag)
            if name == "fldChar":
                self._field(item)
            elif name in ("instrText", "delInstrText"):
                if self._fields:
                    self._fields[-1].instruction.append(item.text or "")
            elif not all(field.shows and not field.is_done for field in self._fields) or name in _SKIPPED:
                continue
            elif look.is_hidden:
                if not self._was_hidden and has_text(element):
                    self._told["hidden"] += 1
                    self._was_hidden = True
                continue
            else:
                self._piece(item, name, look)

    def _piece(self, item: Element, name: str, look: RunFormat) -> None:
        out = self._out
        match name:
            case "t":
                self._was_hidden = False
                text = item.text or ""
                if look.font is not None and is_symbol_font(look.font):
                    text = in_symbols(text, look.font)
                    self._told["sign"] += text.count("\ufffd")
                out.push(text)
            case "tab" | "ptab":
                out.push("\t", raw=True)
            case "br" | "cr":
                out.break_line()
            case "noBreakHyphen":
                out.push("-")
            case "sym":
                sign = symbol(_code(attribute(item, "char")), attribute(item, "font"))
                self._told["sign"] += sign == "\ufffd"
                out.push(sign)
            case "footnoteReference" | "endnoteReference" | "commentReference":
                self._note(name.removesuffix("Reference"), attribute(item, "id"))
            case "ruby":
                base, reading = child(item, "rubyBase"), child(item, "rt")
                self._inline(base if base is not None else Element("none"), look)
                out.push("(")
                self._inline(reading if reading is not None else Element("none"), look)
                out.close_bracket()
            case "drawing" | "pict" | "object":
                self._drawing(item)
            case "AlternateContent":
                self._pieces(alternative(item), look)
            case _:
                self._pieces(item, look)

    def _field(self, item: Element) -> None:
        match attribute(item, "fldCharType"):
            case "begin":
                field = _Field()
                self._fields.append(field)
                data = child(item, "ffData")
                choices = child(data, "ddList")
                if (mark := field_tick(data)) is not None:
                    self._out.push(mark)
                    field.is_done = True
                elif choices is not None:
                    names = [attribute(entry, "val") for entry in choices if local(entry.tag) == "listEntry"]
                    at = whole(val(choices, "result", default=val(choices, "default")))
                    self._out.push(names[at] if at < len(names) else "")
                    field.is_done = True
            case "separate" if self._fields:
                self._fields[-1].shows = True
            case "end" if self._fields:
                field = self._fields.pop()
                instruction = "".join(field.instruction).strip()
                if instruction.upper().startswith("EQ ") and all(other.shows for other in self._fields):
                    reading = _READING.search(instruction)
                    if reading:
                        self._out.push(f"{reading[2]}({reading[1]})")
                    elif not field.shows:
                        self._told["formula"] += 1

    def _formula(self, item: Element) -> None:
        text = formula(item)
        self._told["written" if text else "formula"] += 1
        self._out.push(f" {text} ")

    def _deleted(self, item: Element) -> None:
        self._told["deleted"] += any(local(inner.tag) in ("delText", "t") and inner.text for inner in item.iter())

    def _note(self, kind: str, key: str) -> None:
        """Put the mark of a footnote, endnote or comment, and its text at the end."""
        if (kind, key) not in self._noted:
            texts = self._note_texts(kind)
            if key not in texts:
                return
            number = sum((found == "comment") == (kind == "comment") for found, _ in self._noted) + 1
            mark = f"[comment {number}]" if kind == "comment" else f"[{number}]"
            self._noted[kind, key] = mark
            author = attribute(texts[key], "author") if kind == "comment" else ""
            self._notes.append((f"{mark} {author}: " if author else f"{mark} ", texts[key]))
        style, self._out.style = self._out.style, PLAIN
        self._out.push(self._noted[kind, key])
        self._out.style = style

    def _note_texts(self, kind: str) -> dict[str, Element]:
        if kind not in self._parts:
            root = self._part(f"{kind}s")
            self._parts[kind] = {attribute(item, "id"): item for item in root} if root is not None else {}
        return self._parts[kind]

    def _drawing(self, element: Element) -> None:
        """Take the text of a drawing: its boxes follow the paragraph."""
        has_text, pictures = False, 0
        described = ""
        stack = [element]
        while stack:
            item = stack.pop()
            match local(item.tag):
                case "AlternateContent":
                    stack.append(alternative(item))
                    continue
                case "txbxContent" | "txBody":
                    self._boxes.append(item)
                    has_text = True
                    continue
                case "textpath" if item.get("string"):
                    self._out.push(f" {item.get('string')} ")
                    has_text = True
                case "docPr":
                    described = attribute(item, "descr") or described
                case "shape" if item.get("alt"):
                    described = item.get("alt", "")
                case "blip" | "imagedata":
                    pictures = 1
                    described = described or attribute(item, "title")
                case "chart" if attribute(item, "id"):
                    self._told["chart"] += 1
                case "OLEObject" | "control":
                    self._told["object"] += 1
                    pictures = -1  # what is seen of it
                case "relIds":
                    has_text = self._diagram(item) or has_text
            stack.extend(reversed(item))
        if pictures > 0:
            self._told["picture"] += 1
        if described and not has_text:
            self._out.push(f"[image: {' '.join(described.split())}]")

    def _diagram(self, item: Element) -> bool:
        relation = self._by_key.get(attribute(item, "dm"))
        if relation is None or relation.target not in self._package:
            return False
        self._boxes += [
            part for part in self._package.tree(relation.target).iter() if local(part.tag) == "t" and len(part)
        ]
        return True


Kind = Literal["tr", "tc"]


def _flattened(element: Element, name: Kind) -> list[Element]:
    """Return the rows of a table or the cells of a row, whatever they are wrapped in."""
    found = []
    for item in element:
        tag = local(item.tag)
        if tag == name:
            found.append(item)
        elif tag == "AlternateContent":
            found += _flattened(alternative(item), name)
        elif tag not in _SKIPPED and tag not in ("p", "tbl", "tc", "del", "moveFrom"):
            mark = tick(item) if tag == "sdt" else None
            if mark is not None:
                show_tick(item, mark)
            found += _flattened(item, name)
    return found


def _wrapped(item: Element) -> Element:
    wrapper = Element("body")
    wrapper.append(item)
    return wrapper


def _code(text: str) -> int:
    return int(text, 16) if re.fullmatch("[0-9A-Fa-f]{1,5}", text) else 0
