"""The text of an OpenDocument file: paragraphs, headings, lists, tables, notes, text boxes, form fields."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from duolocal.documents.blocks import TextBuilder
from duolocal.documents.inline import PLAIN, Style
from duolocal.documents.odf_styles import BULLET, Level, OpenStyles, list_mark
from duolocal.documents.told import Told
from duolocal.documents.xml_tree import attribute, child, local, whole

_MAX_REPEATED = 1_000  # cells
_PARAGRAPHS_PER_REPORT = 2000
_SKIPPED = frozenset(
    """forms sequence-decls variable-decls user-field-decls tracked-changes text-properties settings scripts
    event-listeners table-source index-source soft-page-break bibliography-configuration title desc shapes
    notes-configuration dde-connection-decls alphabetical-index-auto-mark-file annotation-end date-style""".split()  # noqa: SIM905
)


@dataclass
class _List:
    """A list that is open, or was and may go on."""

    style: str
    counts: dict[int, int]


class OpenReader:
    """Reads paragraphs, lists and tables of a file, and counts what it does not read."""

    def __init__(self, roots: list[Element], report: Callable[[int, int], None]) -> None:
        self.styles = OpenStyles(roots)
        self.report = report
        self.told = Told()
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
        is_text = child(roots[0], "body", "text") is not None  # sheets have headers that no one wrote
        for root in roots:
            for item in root.iter():
                if local(item.tag) == "changed-region":
                    self.told["deleted"] += any(local(inner.tag) == "deletion" for inner in item)
                elif is_text and local(item.tag) in ("header", "footer", "header-left", "footer-left"):
                    self.told["running"] += bool(re.search(r"[^\W\d_]", "".join(item.itertext())))

    def text_of(self, element: Element, *, style: Style = PLAIN) -> str:
        """Return all text of an element, with its notes at the end; `style` is how it looks."""
        self._out, self._style = TextBuilder(), style
        self._blocks(element)
        done = 0
        while done < len(self._notes):
            self._mark, note = self._notes[done]
            self._out.set_depth(0)
            self._blocks(note)
            done += 1
        self._notes = []
        return self._out.text()

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
            self._out.set_depth(0)
            level = max(1, whole(attribute(item, "outline-level", "1")))
            number = self._heading_number(level) if attribute(item, "is-list-header") != "true" else ""
            mark = "#" * min(level, 6) + f" {number or ('' if mark == BULLET else mark)}"
        elif self._depth == 0:
            self._out.set_depth(0)
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
        self._outline[level] = self._outline.get(level, self.styles.outline.get(level, Level()).start - 1) + 1
        for deeper in [other for other in self._outline if other > level]:
            del self._outline[deeper]
        shown = list_mark(self.styles.outline, level, self._outline)
        return f"{shown} " if shown and shown != BULLET else ""

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
        self._out.set_depth(min(self._out.lists, self._depth))

    def _entry(self, entry: Element, found: _List) -> None:
        self._out.set_depth(self._depth)
        levels = self.styles.lists.get(found.style, {})
        starts_with_list = len(entry) > 0 and local(entry[0].tag) == "list"
        if local(entry.tag) == "list-item" and not starts_with_list:
            level = levels.get(self._depth, Level(is_bullet=True))
            first = attribute(entry, "start-value")
            count = found.counts.get(self._depth, level.start - 1) + 1
            found.counts[self._depth] = whole(first) if first else count
            for deeper in [other for other in found.counts if other > self._depth]:
                del found.counts[deeper]
            shown = list_mark(levels, self._depth, found.counts)
            self._mark = shown if shown == BULLET else f"{shown} " if shown else ""
        self._blocks(entry)
        self._mark = ""

    def _table(self, table: Element) -> None:
        depth, self._depth = self._depth, 0
        self._out.set_depth(0)
        out = self._out
        out.begin()
        out.open_table()
        for row in rows_of(table):
            out.open_row()
            for cell in row:
                name = local(cell.tag)
                times = min(max(1, whole(attribute(cell, "number-columns-repeated", "1"))), _MAX_REPEATED)
                if name == "covered-table-cell":
                    out.skip_columns(times)
                elif name == "table-cell":
                    if len(cell) == 0:  # blank ones up to the edge of the sheet
                        out.skip_columns(times - 1)
                        times = 1
                    for _ in range(times):
                        out.open_cell()
                        self._blocks(cell)
                        self._out.set_depth(0)
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


def rows_of(table: Element) -> list[Element]:
    """Return the rows of a table, not those of tables inside it."""
    rows = []
    for item in table:
        if local(item.tag) == "table-row":
            rows.append(item)
        elif local(item.tag) in ("table-rows", "table-header-rows", "table-row-group"):
            rows += rows_of(item)
    return rows
