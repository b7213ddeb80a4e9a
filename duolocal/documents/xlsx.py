"""Excel workbooks to text: every sheet as CSV under its name, with the values that were last computed.

All cells that are filled count, whatever the sheet says of its size. Dates are written as ISO 8601, struck text and
superscripts as `inline` does. Not read: pictures, charts, comments and other formats. Needs nothing but Python.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from duolocal.documents.converted import MAX_TEXT, Assembler, ConversionError, Converted
from duolocal.documents.formats import HEAD, WORKBOOK_2003
from duolocal.documents.inline import PLAIN, Style, marked
from duolocal.documents.numbering import letters
from duolocal.documents.package import Package, Relation, unflattened
from duolocal.documents.sheets import SheetWriter, empty_note
from duolocal.documents.told import Told
from duolocal.documents.xlsx_2003 import read_xml_workbook
from duolocal.documents.xlsx_styles import LEVELS, CellStyles, date_of, duration
from duolocal.documents.xml_tree import DamagedXmlError, attribute, child, local, parse_xml, scan_xml, whole
from duolocal.documents.zipped import Archive

_MAX_XML_BYTES = 256 * 2**20  # sheets are read as a stream
_MAX_CELLS = 20_000_000  # filled ones
_MAX_ELEMENTS = 4 * _MAX_CELLS
_ROWS_PER_REPORT = 5_000
_SHOWN = 5  # cells that a note lists

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
_ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")
_ADDRESS = re.compile(r"\$?([A-Za-z]{1,3})\$?(\d{1,7})")
_REFERENCE = re.compile(r"""("[^"]*"|'[^']*')|(?<![A-Za-z0-9_.])(\$?)([A-Z]{1,3})(\$?)(\d{1,7})(?![A-Za-z0-9_(.])""")


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert a workbook; its parts are its sheets. Raises ConversionError."""
    if not data.startswith(b"PK") and WORKBOOK_2003 in data[:HEAD]:
        return read_xml_workbook(parse_xml(data, "the workbook"), report)
    with Archive(unflattened(data)) as archive:
        return _workbook(Package(archive, most=_MAX_XML_BYTES), report)


@dataclass
class _Cells:
    """Cells that a note counts, the first of them by name."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.names) < _SHOWN:
            self.names.append(name[:60])

    def __str__(self) -> str:
        more = self.count - len(self.names)
        return ", ".join(self.names) + (f" and {more:,} more" if more else "")


@dataclass
class _Faults:
    """What is told of cells, over all sheets."""

    told: Told = field(default_factory=Told)
    lost: _Cells = field(default_factory=_Cells)  # their text is missing
    unstyled: _Cells = field(default_factory=_Cells)
    hidden: list[str] = field(default_factory=list)  # sheets with hidden rows or columns
    broken: list[str] = field(default_factory=list)  # what is said of sheets that cannot be read
    other: set[str] = field(default_factory=set)  # what sheets have besides cells

    def notes(self, empty: list[str], num_sheets: int) -> tuple[str, ...]:
        notes = [*empty_note(empty, num_sheets), *self.told.notes()]
        if self.lost.count:
            notes.append(f"U+FFFD stands for text that the file has lost: {self.lost}")
        if self.unstyled.count:
            notes.append(f"the format is broken, a date may stand as a number: {self.unstyled}")
        if self.hidden:
            names = ", ".join(name[:60] for name in self.hidden[:_SHOWN])
            more = f" and {len(self.hidden) - _SHOWN:,} more" if len(self.hidden) > _SHOWN else ""
            notes.append(f"hidden rows or columns are read too, in {names}{more}")
        notes += [note[:390] for note in self.broken[:10]]
        if self.other:
            notes.append(f"not read: {', '.join(sorted(self.other))}")
        return tuple(notes)


def _workbook(package: Package, report: Callable[[int, int], None]) -> Converted:
    main = package.main("xl/workbook.xml")
    if main.lower().endswith(".bin"):
        raise ConversionError("is a binary Excel workbook (xlsb): save it as xlsx and load that")
    workbook = package.tree(main)
    relations = package.relations(main)
    faults = _Faults()
    strings = _strings(package, relations, faults)
    styles = CellStyles(package, relations)
    if styles.fault:
        faults.broken.append(styles.fault)
    is_1904 = attribute(child(workbook, "workbookPr"), "date1904") in ("1", "true")
    sheets = [item for item in workbook.iter() if local(item.tag) == "sheet"]
    by_key = {relation.key: relation for relation in relations}
    assembler = Assembler()
    empty, num_cells = [], 0
    for number, sheet in enumerate(sheets, 1):
        title = attribute(sheet, "name") or f"Sheet{number}"
        key = next((value for name, value in sheet.attrib.items() if name.endswith("}id")), "")
        relation = by_key.get(key)
        hidden = " (hidden)" if attribute(sheet, "state", "visible") != "visible" else ""
        text = ""
        if relation is None or relation.target not in package:
            faults.broken.append(f"sheet {title} is missing from the file")
        elif relation.kind == "chartsheet":
            faults.other.add("charts")
            empty.append(title)
        else:
            reader = _Sheet(title, strings, styles, faults, is_1904=is_1904, num_cells=num_cells)

            def on_row(number: int = number) -> None:
                report(number - 1, len(sheets))

            text = reader.read(package.read(relation.target), relation.target, on_row)
            num_cells = reader.num_cells
            _other(package.relations(relation.target), faults)
            if not text:
                empty.append(title)
        assembler.add(f"sheet {title}{hidden}", f"# {title}{hidden}\n\n{text}" if text else "")
        report(number, len(sheets))
    if not assembler.text().strip():
        if faults.broken:
            raise ConversionError(f"is a damaged Excel workbook ({faults.broken[0][:200]}): open it and save it anew")
        raise ConversionError("is an Excel workbook without a filled cell: load another")
    return Converted(assembler.text(), assembler.parts, faults.notes(empty, len(sheets)))


def _other(relations: list[Relation], faults: _Faults) -> None:
    names = {
        "comments": "comments",
        "threadedComment": "comments",
        "drawing": "drawings (pictures, charts, text boxes)",
        "ctrlProp": "form controls",
    }
    faults.other.update(names[relation.kind] for relation in relations if relation.kind in names)


# --- strings and styles ---------------------------------------------------------------------------------------------


def _strings(package: Package, relations: list[Relation], faults: _Faults) -> list[str]:
    """Return the texts that cells refer to by number, as many as can be read."""
    name = next((relation.target for relation in relations if relation.kind == "sharedStrings"), "")
    if name not in package:
        return []
    strings: list[str] = []
    reader = _Text()

    def start(tag: str, attributes: dict[str, str]) -> None:
        reader.start(local(tag), attributes)

    def end(tag: str) -> None:
        name = local(tag)
        reader.end(name)
        if name == "si":
            strings.append(reader.take())

    try:
        scan_xml(
            package.read(name), name, start=start, end=end, characters=reader.characters, max_elements=_MAX_ELEMENTS
        )
    except DamagedXmlError as error:
        faults.broken.append(f"of its texts only {len(strings):,} can be read: it {error}")
    return strings


class _Text:
    """Collects a text of runs (`si` or `is`): phonetic guides are left out, as Excel leaves them out."""

    def __init__(self) -> None:
        self._runs: list[tuple[str, Style]] = []
        self._style = PLAIN
        self._phonetic = False
        self._inside = False

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "r":
            self._style = PLAIN
        elif name == "rPh":
            self._phonetic = True
        elif name == "t":
            self._inside = not self._phonetic
        elif name == "strike":
            self._style = self._style._replace(is_struck=attributes.get("val", "1") not in ("0", "false"))
        elif name == "vertAlign":
            self._style = self._style._replace(level=LEVELS.get(attributes.get("val", ""), 0))

    def end(self, name: str) -> None:
        if name == "rPh":
            self._phonetic = False
        elif name == "t":
            self._inside = False
        elif name == "r":
            self._style = PLAIN

    def characters(self, text: str) -> None:
        if self._inside:
            self._runs.append((text, self._style))

    def take(self) -> str:
        if not self._runs:
            return ""
        text = _unescaped(marked(self._runs))
        self._runs, self._style = [], PLAIN
        return text


def _unescaped(text: str) -> str:
    """Return the text with what XML cannot hold, as Excel writes it: _x000D_ is a carriage return."""
    if "_x" in text:
        text = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text)
    return text.replace("\r\n", "\n").replace("\r", "\n")


# --- a sheet ---------------------------------------------------------------------------------------------------------


class _Sheet:
    """Reads the cells of one sheet as a stream and writes its rows as CSV."""

    def __init__(
        self, title: str, strings: list[str], styles: CellStyles, faults: _Faults, *, is_1904: bool, num_cells: int
    ) -> None:
        self.num_cells = num_cells  # filled, in this sheet and those before
        self._title, self._strings, self._styles, self._faults = title, strings, styles, faults
        self._is_1904 = is_1904
        self._out = SheetWriter()
        self._text = _Text()
        self._row = self._column = 0  # counted from 1
        self._cells: dict[int, str] = {}
        self._attributes: dict[str, str] = {}
        self._value: list[str] | None = None
        self._formula: list[str] | None = None
        self._formula_attributes: dict[str, str] = {}
        self._inside = ""  # v or f
        self._shared: dict[str, tuple[str, int, int]] = {}  # formulas that several cells share

    def read(self, data: bytes, name: str, on_row: Callable[[], None]) -> str:
        self._on_row = on_row
        try:
            scan_xml(
                data,
                name,
                start=self._start,
                end=self._end,
                characters=self._characters,
                max_elements=_MAX_ELEMENTS,
            )
        except DamagedXmlError as error:
            self._end_row()
            self._faults.broken.append(f"sheet {self._title} is read only up to row {self._row:,}: it {error}")
        self._faults.told["sparse"] += self._out.num_sparse
        return self._out.text()

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        match name := local(tag):
            case "c":
                self._attributes = attributes
                self._value = self._formula = None
                self._column += 1
                if match := _ADDRESS.fullmatch(attributes.get("r", "")):
                    self._column = _column(match[1])
            case "v" | "f":
                self._inside = name
                if name == "v":
                    self._value = []
                else:
                    self._formula, self._formula_attributes = [], attributes
            case "row":
                self._cells, self._column = {}, 0
                self._row = whole(attributes.get("r", "")) or self._row + 1
                if attributes.get("hidden") in ("1", "true"):
                    self._has_hidden()
            case "col" if attributes.get("hidden") in ("1", "true"):
                self._has_hidden()
            case _:
                self._text.start(name, attributes)

    def _end(self, tag: str) -> None:
        match name := local(tag):
            case "c":
                self._end_cell()
            case "v" | "f":
                self._inside = ""
            case "row":
                self._end_row()
            case _:
                self._text.end(name)

    def _characters(self, text: str) -> None:
        if not self._inside:
            self._text.characters(text)
        elif self._inside == "v" and self._value is not None:
            self._value.append(text)
        elif self._formula is not None:
            self._formula.append(text)

    def _has_hidden(self) -> None:
        if self._title not in self._faults.hidden:
            self._faults.hidden.append(self._title)

    def _end_cell(self) -> None:
        inline = self._text.take()
        value = inline if self._value is None else "".join(self._value)
        text = self._shown(value, self._attributes.get("t", "n"))
        if self._formula is not None:
            formula = self._written_formula("".join(self._formula))
            # A text may be computed to nothing; a number is never, and some writers leave its place empty.
            is_computed = self._value is not None and self._attributes.get("t", "n") == "str"
            if formula and not text and not is_computed:
                text = formula
                self._faults.told["computed"] += 1
        if not text:
            return
        style = whole(self._attributes.get("s", "0"))
        styles = self._styles.styles
        if style < len(styles):
            text = marked([(text, styles[style])]) if styles[style] != PLAIN else text
        elif (styles or style) and not self._styles.fault:
            self._faults.unstyled.add(self._address())
        self._cells[self._column] = text
        self.num_cells += 1
        if self.num_cells > _MAX_CELLS or self._out.length > MAX_TEXT:
            raise ConversionError(f"is an Excel workbook of more than {_MAX_CELLS:,} cells: cut it up")

    def _address(self) -> str:
        return f"{self._title}!{_letters(self._column)}{self._row}"

    def _shown(self, value: str, kind: str) -> str:
        match kind:
            case "s":
                number = value.strip()
                if not number.isdecimal() or len(number) > 9 or int(number) >= len(self._strings):
                    if not number:
                        return ""
                    self._faults.lost.add(self._address())
                    return "\ufffd"
                return self._strings[int(number)]
            case "b":
                return {"1": "TRUE", "0": "FALSE"}.get(value.strip(), value)
            case "n":
                return self._number(value.strip())
            case "d":
                return value.strip().replace("T", " ").removesuffix(" 00:00:00")
            case "str":
                return _unescaped(value)
            case _:
                return value

    def _number(self, value: str) -> str:
        if not _NUMBER.fullmatch(value):
            return value
        style = whole(self._attributes.get("s", "0"))
        kind = self._styles.kinds[style] if style < len(self._styles.kinds) else "number"
        number = float(value)
        if kind == "duration":
            return duration(number)
        if kind == "date" and (date := date_of(number, is_1904=self._is_1904)):
            return date
        return repr(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)

    def _written_formula(self, formula: str) -> str:
        key = self._formula_attributes.get("si", "")
        if self._formula_attributes.get("t") == "shared":
            if formula:
                self._shared[key] = (formula, self._row, self._column)
            elif key in self._shared:
                formula, row, column = self._shared[key]
                formula = _moved(formula, self._row - row, self._column - column)
        return f"={formula}" if formula else ""

    def _end_row(self) -> None:
        cells, self._cells = self._cells, {}
        if self._row % _ROWS_PER_REPORT == 0:
            self._on_row()
        self._out.write(self._row, cells)


def _column(name: str) -> int:
    number = 0
    for letter in name.upper():
        number = 26 * number + ord(letter) - 64
    return number


def _letters(column: int) -> str:
    return letters(column, "ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def _moved(formula: str, rows: int, columns: int) -> str:
    """Return a formula as a cell so many rows and columns further has it; what has a $ stays."""

    def moved(match: re.Match[str]) -> str:
        if match[1]:
            return match[1]
        column = match[3] if match[2] else _letters(_column(match[3]) + columns)
        row = match[5] if match[4] else str(int(match[5]) + rows)
        return f"{match[2]}{column}{match[4]}{row}"

    return _REFERENCE.sub(moved, formula)
