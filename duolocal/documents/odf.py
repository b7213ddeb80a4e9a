"""OpenDocument files to text: texts (odt), sheets as CSV (ods), presentations (odp), packed or as one XML file.

What changes the meaning is marked as in Word documents. Not read, and told: pictures, embedded files, headers, footers,
hidden text and what tracked changes deleted. Needs nothing but Python.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from duolocal.documents.blocks import TextBuilder
from duolocal.documents.converted import MAX_TEXT, Assembler, ConversionError, Converted
from duolocal.documents.inline import PLAIN, Style
from duolocal.documents.numbering import numbered
from duolocal.documents.sheets import SheetWriter, sparse_note
from duolocal.documents.xml_tree import attribute, child, local, parse_xml
from duolocal.documents.zipped import Archive, ArchiveError

_MAX_XML_BYTES = 96 * 2**20
_MAX_CELLS = 5_000_000  # filled ones
_MAX_REPEATED = 10_000  # filled rows or cells that are written once and stand for many
_MAX_COLUMNS = 100_000
_MAX_CHAIN = 20  # styles based on each other
_PARAGRAPHS_PER_REPORT = 2000
_BULLET = "- "
_NUMBER_STYLES = {"a": "lowerLetter", "A": "upperLetter", "i": "lowerRoman", "I": "upperRoman", "1": "decimal"}
_SKIPPED = frozenset(
    """forms sequence-decls variable-decls user-field-decls tracked-changes text-properties settings scripts
    event-listeners table-source index-source soft-page-break bibliography-configuration title desc shapes
    notes-configuration dde-connection-decls alphabetical-index-auto-mark-file annotation-end date-style""".split()  # noqa: SIM905
)
_TOLD = {
    "picture": "{} picture{s} not read",
    "object": "{} embedded file{s} or chart{s} not read",
    "hidden": "hidden text is not read ({} place{s})",
    "deleted": "text that tracked changes deleted is not read ({} place{s})",
    "running": "{} header{s} or footer{s} not read",
    "comment": "{} comment{s} not read",
    "computed": "{} formula{s} without a value stand{z} as formula{s}",
    "repeated": "{} repetition{s} of filled cells not written out",
}


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert an OpenDocument file; raises ConversionError."""
    if not data.startswith(b"PK"):
        root = parse_xml(data, "the document")
        return _read([root], report)
    try:
        with Archive(data) as archive:
            if "META-INF/manifest.xml" in archive and b"encryption-data" in archive.read("META-INF/manifest.xml"):
                raise ConversionError("is locked with a password: save it without one and load that")
            names = ("content.xml", "styles.xml")
            roots = [
                parse_xml(archive.read(name, most=_MAX_XML_BYTES), name)
                for name in names
                if name in archive or name == "content.xml"
            ]
    except ArchiveError as error:
        raise ConversionError(str(error)) from error
    return _read(roots, report)


def _read(roots: list[Element], report: Callable[[int, int], None]) -> Converted:
    body = child(roots[0], "body")
    kinds = {"text": _text, "spreadsheet": _sheets, "presentation": _slides, "drawing": _slides}
    for item in () if body is None else body:
        if local(item.tag) in kinds:
            return kinds[local(item.tag)](item, _Reader(roots, report))
    raise ConversionError("is an OpenDocument file without a body: it is damaged; open it elsewhere and save it anew")


def _text(body: Element, reader: "_Reader") -> Converted:
    text = reader.text_of(body)
    if not text:
        what = "; ".join(reader.notes())
        raise ConversionError(
            f"is an OpenDocument text without text{f' ({what[:200]})' if what else ''}: it may hold pictures only; run "
            "OCR over them first"
        )
    return Converted(text, (), reader.notes())


def _sheets(body: Element, reader: "_Reader") -> Converted:
    assembler = Assembler()
    tables = [item for item in body if local(item.tag) == "table"]
    empty, sparse, num_cells = [], 0, 0
    for number, table in enumerate(tables, 1):
        title = attribute(table, "name") or f"Sheet{number}"
        hidden = "" if reader.styles.is_shown(attribute(table, "style-name")) else " (hidden)"
        writer = SheetWriter()
        num_cells = _write_sheet(table, reader, writer, num_cells)
        sparse += writer.num_sparse
        if writer.length:
            assembler.add(f"sheet {title}{hidden}", f"# {title}{hidden}\n\n{writer.text()}")
        else:
            assembler.add(f"sheet {title}{hidden}", "")
            empty.append(title)
        reader.report(number, len(tables))
    if len(empty) == len(tables):
        raise ConversionError("is an OpenDocument sheet without a filled cell: load another")
    notes = [f"{len(empty):,} of {len(tables):,} sheets are empty: {', '.join(empty[:10])[:200]}"] if empty else []
    return Converted(assembler.text(), assembler.parts, (*notes, *sparse_note(sparse), *reader.notes()))


def _write_sheet(table: Element, reader: "_Reader", writer: SheetWriter, num_cells: int) -> int:
    row = 0
    for item in _rows(table):
        cells: dict[int, str] = {}
        column = 0
        for cell in item:
            if local(cell.tag) not in ("table-cell", "covered-table-cell"):
                continue
            times = max(1, _whole(attribute(cell, "number-columns-repeated", "1")))
            text = reader.cell(cell) if local(cell.tag) == "table-cell" else ""
            if text:
                written = min(times, _MAX_REPEATED)
                reader.told["repeated"] += times > written
                cells.update(dict.fromkeys(range(column + 1, column + written + 1), text))
                if len(cells) > _MAX_COLUMNS:
                    raise ConversionError(f"is an OpenDocument sheet of more than {_MAX_COLUMNS:,} columns: cut it up")
            column += times
        times = max(1, _whole(attribute(item, "number-rows-repeated", "1")))
        written = min(times, _MAX_REPEATED) if cells else 0
        reader.told["repeated"] += bool(cells) and times > written
        for at in range(written):
            num_cells += len(cells)
            if num_cells > _MAX_CELLS or writer.length > MAX_TEXT:
                raise ConversionError(f"is an OpenDocument sheet of more than {_MAX_CELLS:,} cells: cut it up")
            writer.write(row + at + 1, cells)
        row += times
    return num_cells


def _slides(body: Element, reader: "_Reader") -> Converted:
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
    shown = ", ".join(empty[:20]) + (" …" if len(empty) > 20 else "")
    told = (
        [f"{len(empty):,} of {len(pages):,} slides yield no text (pictures, charts or blank): {shown}"] if empty else []
    )
    return Converted(assembler.text(), assembler.parts, (*told, *reader.notes()))


# --- styles -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """What a style says of text; None: as the one that it is based on."""

    is_struck: bool | None = None
    level: int | None = None
    is_hidden: bool | None = None
    is_shown: bool = True  # of a sheet or slide
    base: str = ""
    list_name: str = ""


@dataclass(frozen=True)
class _Level:
    style: str = "decimal"  # "": no number
    prefix: str = ""
    suffix: str = ""
    start: int = 1
    num_levels: int = 1  # how many of the numbers are shown
    is_bullet: bool = False


class _Styles:
    def __init__(self, roots: list[Element]) -> None:
        self._looks: dict[str, _Look] = {}
        self.lists: dict[str, dict[int, _Level]] = {}
        self.outline: dict[int, _Level] = {}
        for root in reversed(roots):
            for item in root.iter():
                match local(item.tag):
                    case "style":
                        self._looks[attribute(item, "name")] = _look(item)
                    case "list-style":
                        self.lists[attribute(item, "name")] = _levels(item)
                    case "outline-style":
                        self.outline = _levels(item)

    def is_shown(self, name: str) -> bool:
        return self._looks.get(name, _Look()).is_shown

    def list_of(self, name: str) -> str:
        return self._looks.get(name, _Look()).list_name

    def look(self, name: str, style: Style, *, is_hidden: bool) -> tuple[Style, bool]:
        """Return how text looks that has a style in the midst of other text."""
        struck = level = hidden = None
        for _ in range(_MAX_CHAIN):
            found = self._looks.get(name)
            if found is None:
                break
            struck = found.is_struck if struck is None else struck
            level = found.level if level is None else level
            hidden = found.is_hidden if hidden is None else hidden
            name = found.base
        style = Style(style.is_struck if struck is None else struck, style.level if level is None else level)
        return style, is_hidden if hidden is None else hidden


def _look(item: Element) -> _Look:
    struck, level, hidden, shown = None, None, None, True
    for properties in item:
        line = attribute(properties, "text-line-through-style") or attribute(properties, "text-line-through-type")
        if line:
            struck = line != "none"
        position = attribute(properties, "text-position").split(" ")[0]
        if position:
            raised = position.rstrip("%")
            level = 1 if position == "super" else -1 if position == "sub" else _sign(raised)
        if attribute(properties, "display") in ("none", "true") and local(properties.tag) == "text-properties":
            hidden = attribute(properties, "display") == "none"
        if attribute(properties, "display") == "false" or attribute(properties, "visibility") == "hidden":
            shown = False
    base, list_name = attribute(item, "parent-style-name"), attribute(item, "list-style-name")
    return _Look(struck, level, hidden, shown, base, list_name)


def _sign(text: str) -> int:
    number = float(text) if re.fullmatch(r"-?\d{1,4}(\.\d{1,4})?", text) else 0.0
    return (number > 0) - (number < 0)


def _levels(item: Element) -> dict[int, _Level]:
    levels = {}
    for level in item:
        style = attribute(level, "num-format")
        levels[_whole(attribute(level, "level", "1"))] = _Level(
            style=_NUMBER_STYLES.get(style, "decimal" if style else ""),
            prefix=attribute(level, "num-prefix"),
            suffix=attribute(level, "num-suffix"),
            start=_whole(attribute(level, "start-value", "1")),
            num_levels=max(1, _whole(attribute(level, "display-levels", "1"))),
            is_bullet=local(level.tag) in ("list-level-style-bullet", "list-level-style-image"),
        )
    return levels


def _whole(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0


# --- text -------------------------------------------------------------------------------------------------------------


@dataclass
class _List:
    """A list that is open, or was and may go on."""

    style: str
    counts: dict[int, int]


class _Reader:
    def __init__(self, roots: list[Element], report: Callable[[int, int], None]) -> None:
        self.styles = _Styles(roots)
        self.report = report
        self.told: Counter[str] = Counter()
        self._out = TextBuilder()
        self._style, self._is_hidden = PLAIN, False
        self._list: _List | None = None
        self._depth = 0  # lists within each other
        self._before: dict[str, _List] = {}  # the last list of every style, and of every key
        self._outline: dict[int, int] = {}
        self._notes: list[tuple[str, Element]] = []
        self._mark = ""
        self._count = 0
        self._boxes: list[Element] = []
        self._controls = {
            attribute(item, "id"): item
            for item in roots[0].iter()
            if local(item.tag) in ("checkbox", "radio", "text", "textarea", "listbox", "combobox")
            and attribute(item, "id")
        }
        for root in roots:
            for item in root.iter():
                if local(item.tag) == "changed-region":
                    self.told["deleted"] += any(local(inner.tag) == "deletion" for inner in item)
                elif local(item.tag) in ("header", "footer", "header-left", "footer-left"):
                    self.told["running"] += bool(re.search(r"[^\W\d_]", "".join(item.itertext())))

    def notes(self) -> tuple[str, ...]:
        return tuple(
            text.replace("{s}", "" if self.told[kind] == 1 else "s")
            .replace("{z}", "s" if self.told[kind] == 1 else "")
            .format(f"{self.told[kind]:,}")
            for kind, text in _TOLD.items()
            if self.told[kind]
        )

    def text_of(self, element: Element) -> str:
        """Return all text of an element, with its notes at the end."""
        self._out = TextBuilder()
        self._blocks(element)
        done = 0
        while done < len(self._notes):
            self._mark, note = self._notes[done]
            self._set_depth(0)
            self._blocks(note)
            done += 1
        self._notes = []
        return self._out.text()

    def _set_depth(self, depth: int) -> None:
        self._out.end()
        was, self._out.lists = self._out.lists, depth
        if was and not depth:
            self._out.loosen()

    def _blocks(self, element: Element) -> None:
        for item in element:
            match name := local(item.tag):
                case "p" | "h":
                    self._paragraph(item, name)
                case "list":
                    self._list_of(item)
                case "table":
                    self._table(item)
                case "section" if attribute(item, "display") in ("none", "condition"):
                    self._hide(item)
                case "annotation":
                    self._note(item, f"[comment {self._count_of('comment')}]")
                case "image" | "object" | "object-ole" | "plugin" | "control":
                    self._inline_child(item)
                case _ if name not in _SKIPPED:
                    self._blocks(item)

    def _paragraph(self, item: Element, name: str) -> None:
        self._count += 1
        if self._count % _PARAGRAPHS_PER_REPORT == 0:
            self.report(0, 1)
        out = self._out
        out.end()
        mark, self._mark = self._mark, ""
        if name == "h":
            self._set_depth(0)
            level = max(1, _whole(attribute(item, "outline-level", "1")))
            number = self._heading_number(level) if attribute(item, "is-list-header") != "true" else ""
            mark = "#" * min(level, 6) + f" {number or ('' if mark == _BULLET else mark)}"
        elif self._depth == 0:
            self._set_depth(0)
        out.begin(mark)
        style, hidden = self._style, self._is_hidden
        self._style, self._is_hidden = self.styles.look(attribute(item, "style-name"), style, is_hidden=hidden)
        boxes, self._boxes = self._boxes, []
        self._inline(item)
        out.end()
        self._style, self._is_hidden = style, hidden
        inner, self._boxes = self._boxes, boxes
        for box in inner:
            self._blocks(box)

    def _heading_number(self, level: int) -> str:
        self._outline[level] = self._outline.get(level, self.styles.outline.get(level, _Level()).start - 1) + 1
        for deeper in [other for other in self._outline if other > level]:
            del self._outline[deeper]
        shown = _shown(self.styles.outline, level, self._outline)
        return f"{shown} " if shown and shown != _BULLET else ""

    def _list_of(self, item: Element) -> None:
        name = attribute(item, "style-name") or (self._list.style if self._list else "")
        outer, self._depth = self._list, self._depth + 1
        if self._depth > 1 and outer is not None:
            found = outer if name == outer.style else _List(name, outer.counts)
            found.counts.pop(self._depth, None)
        else:
            before = self._before.get(attribute(item, "continue-list"))
            if before is None and attribute(item, "continue-numbering") == "true":
                before = self._before.get(name)
            found = _List(name, before.counts if before else {})
        self._list = found
        self._before[name] = found
        if key := attribute(item, "id"):
            self._before[key] = found
        for entry in item:
            if local(entry.tag) in ("list-item", "list-header"):
                self._entry(entry, found)
        self._list, self._depth = outer, self._depth - 1
        self._set_depth(min(self._out.lists, self._depth))

    def _entry(self, entry: Element, found: _List) -> None:
        self._set_depth(self._depth)
        levels = self.styles.lists.get(found.style, {})
        starts_with_list = len(entry) > 0 and local(entry[0].tag) == "list"
        if local(entry.tag) == "list-item" and not starts_with_list:
            level = levels.get(self._depth, _Level(is_bullet=True))
            first = attribute(entry, "start-value")
            count = found.counts.get(self._depth, level.start - 1) + 1
            found.counts[self._depth] = _whole(first) if first else count
            for deeper in [other for other in found.counts if other > self._depth]:
                del found.counts[deeper]
            shown = _shown(levels, self._depth, found.counts)
            self._mark = shown if shown == _BULLET else f"{shown} " if shown else ""
        self._blocks(entry)
        self._mark = ""

    def _table(self, table: Element) -> None:
        depth, self._depth = self._depth, 0
        self._set_depth(0)
        out = self._out
        out.begin()
        out.open_table()
        for row in _rows(table):
            out.open_row()
            for cell in row:
                name = local(cell.tag)
                times = min(max(1, _whole(attribute(cell, "number-columns-repeated", "1"))), _MAX_REPEATED)
                if name == "covered-table-cell":
                    out.skip_columns(times)
                elif name == "table-cell":
                    if len(cell) == 0:  # blank ones up to the edge of the sheet
                        out.skip_columns(times - 1)
                        times = 1
                    for _ in range(times):
                        out.open_cell()
                        self._blocks(cell)
                        self._set_depth(0)
        out.close_table()
        self._depth = depth

    # --- inside paragraphs -------------------------------------------------------------------------------------------

    def _inline(self, element: Element) -> None:
        self._push(element.text)
        for item in element:
            self._inline_child(item)
            self._push(item.tail)

    def _inline_child(self, item: Element) -> None:
        out = self._out
        match name := local(item.tag):
            case "span":
                style, hidden = self._style, self._is_hidden
                self._style, self._is_hidden = self.styles.look(attribute(item, "style-name"), style, is_hidden=hidden)
                self._inline(item)
                self._style, self._is_hidden = style, hidden
            case "s":
                self._push(" ")
            case "tab":
                out.push("\t", raw=True)
            case "line-break":
                out.break_line()
            case "note":
                citation, body = child(item, "note-citation"), child(item, "note-body")
                if body is not None:
                    mark = "".join(citation.itertext()).strip() if citation is not None else ""
                    self._note(body, f"[{mark or self._count_of('note')}]")
            case "annotation":
                self._note(item, f"[comment {self._count_of('comment')}]")
            case "ruby":
                base, reading = child(item, "ruby-base"), child(item, "ruby-text")
                if base is not None:
                    self._inline(base)
                out.push("(")
                if reading is not None:
                    self._inline(reading)
                out.close_bracket()
            case "hidden-text" | "hidden-paragraph":
                self._hide(item)
            case "text-box" | "list" | "table" | "p" | "h":
                wrapper = Element("box")
                wrapper.append(item)
                self._boxes.append(item if name == "text-box" else wrapper)
            case "frame" | "custom-shape" | "rect" | "ellipse" | "connector" | "g" | "line" | "path":
                self._frame(item)
            case "image":
                self.told["picture"] += 1
            case "object" | "object-ole" | "plugin":
                self.told["object"] += 1
            case "control":
                self._control(attribute(item, "control"))
            case _ if name not in _SKIPPED:
                self._inline(item)

    def _push(self, text: str | None) -> None:
        if not text:
            return
        if self._is_hidden:
            self.told["hidden"] += bool(text.strip())
            return
        self._out.style = self._style
        self._out.push(text)
        self._out.style = PLAIN

    def _hide(self, item: Element) -> None:
        self.told["hidden"] += bool("".join(item.itertext()).strip() or attribute(item, "string-value"))

    def _frame(self, item: Element) -> None:
        """Take what a drawing holds: of several forms of the same the first, and its alternative text."""
        title = next((inner for inner in item if local(inner.tag) in ("desc", "title") and inner.text), None)
        contents = [inner for inner in item if local(inner.tag) not in _SKIPPED]
        if local(item.tag) == "frame":
            contents = contents[:1]
        for inner in contents:
            self._inline_child(inner)
        if title is not None and any(local(inner.tag) == "image" for inner in contents):
            self._out.push(f"[image: {' '.join((title.text or '').split())}]")

    def _control(self, key: str) -> None:
        control = self._controls.get(key)
        if control is None:
            return
        label = attribute(control, "label")
        if local(control.tag) in ("checkbox", "radio"):
            state = attribute(control, "current-state") or attribute(control, "state")
            is_on = state == "checked" or attribute(control, "current-selected") == "true"
            self._out.push(f"{'[x]' if is_on else '[ ]'} {label} ")
        else:
            self._out.push(f"{label} {attribute(control, 'current-value') or attribute(control, 'value')} ")

    def _count_of(self, kind: str) -> int:
        return sum(mark.startswith("[comment") == (kind == "comment") for mark, _ in self._notes) + 1

    def _note(self, body: Element, mark: str) -> None:
        author = "".join(next((inner.text or "" for inner in body if local(inner.tag) == "creator"), ""))
        for item in [
            inner for inner in body if local(inner.tag) in ("creator", "date", "date-string", "creator-initials")
        ]:
            body.remove(item)
        self._notes.append((f"{mark} {author}: " if author else f"{mark} ", body))
        self._out.push(mark)

    # --- cells of sheets ---------------------------------------------------------------------------------------------

    def cell(self, cell: Element) -> str:
        """Return the value of a cell of a sheet as text."""
        kind = attribute(cell, "value-type")
        shown = ""
        if kind in ("float", "percentage", "currency"):
            shown = _plain_number(attribute(cell, "value"))
        elif kind == "date":
            shown = attribute(cell, "date-value").replace("T", " ").removesuffix(" 00:00:00")
        elif kind == "time":
            shown = _time(attribute(cell, "time-value"))
        elif kind == "boolean":
            shown = attribute(cell, "boolean-value").upper()
        style, _ = self.styles.look(attribute(cell, "style-name"), PLAIN, is_hidden=False)
        if shown:
            out = TextBuilder()
            out.style = style
            out.push(shown)
            return out.text()
        formula = attribute(cell, "formula")
        if len(cell) == 0 and not kind and not formula:
            return ""
        texts = Element("cell")
        for item in cell:
            if local(item.tag) == "annotation":
                self.told["comment"] += 1
            else:
                texts.append(item)
        outer, self._out = self._out, TextBuilder()
        before, self._style = self._style, style
        self._blocks(texts)
        text, self._out, self._style = self._out.text().replace("\n\n", "\n"), outer, before
        if not text and formula and not kind:
            self.told["computed"] += 1
            return formula.partition(":")[2] or formula
        return text


def _rows(table: Element) -> list[Element]:
    """Return the rows of a table, not those of tables inside it."""
    rows = []
    for item in table:
        if local(item.tag) == "table-row":
            rows.append(item)
        elif local(item.tag) in ("table-rows", "table-header-rows", "table-row-group"):
            rows += _rows(item)
    return rows


def _shown(levels: dict[int, _Level], at: int, counts: dict[int, int]) -> str:
    """Return what stands before an item of a level."""
    level = levels.get(at, _Level(is_bullet=True) if not levels else _Level())
    if level.is_bullet:
        return _BULLET
    if not level.style:
        return (level.prefix + level.suffix).strip()
    shown = []
    for other in range(max(1, at - level.num_levels + 1), at + 1):
        style = levels.get(other, _Level()).style if other != at else level.style
        if style:
            shown.append(numbered(counts.get(other, levels.get(other, _Level()).start), style))
    return f"{level.prefix}{'.'.join(shown)}{level.suffix}".strip()


def _plain_number(text: str) -> str:
    return text.removesuffix(".0") if re.fullmatch(r"-?\d+\.0", text) else text


def _time(text: str) -> str:
    match = re.fullmatch(r"(-?)P(?:(\d+)D)?T?(?:(\d+)H)?(?:(\d+)M)?(?:(\d+)(?:[.,](\d+))?S)?", text)
    if match is None:
        return text
    hours = int(match[3] or 0) + 24 * int(match[2] or 0)
    fraction = (match[6] or "").rstrip("0")
    return f"{match[1]}{hours:02}:{int(match[4] or 0):02}:{int(match[5] or 0):02}" + (
        f".{fraction}" if fraction else ""
    )
