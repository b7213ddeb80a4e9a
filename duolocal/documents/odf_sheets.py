"""Sheets of an OpenDocument file as CSV, with the values that were last computed."""

import re
from xml.etree.ElementTree import Element

from duolocal.documents.converted import MAX_TEXT, Assembler, ConversionError, Converted
from duolocal.documents.inline import PLAIN, marked
from duolocal.documents.odf_text import OpenReader, rows_of
from duolocal.documents.sheets import SheetWriter, empty_note
from duolocal.documents.xml_tree import attribute, local, whole

_MAX_CELLS = 5_000_000  # filled ones
_MAX_COLUMNS = 100_000
_MAX_REPEATED = 10_000  # filled rows or cells that are written once and stand for many


def read_sheets(body: Element, reader: OpenReader) -> Converted:
    assembler = Assembler()
    tables = [item for item in body if local(item.tag) == "table"]
    empty, num_cells = [], 0
    for number, table in enumerate(tables, 1):
        title = attribute(table, "name") or f"Sheet{number}"
        hidden = "" if reader.styles.is_shown(attribute(table, "style-name")) else " (hidden)"
        writer = SheetWriter()
        num_cells = _write_sheet(table, reader, writer, num_cells)
        reader.told["sparse"] += writer.num_sparse
        if writer.length:
            assembler.add(f"sheet {title}{hidden}", f"# {title}{hidden}\n\n{writer.text()}")
        else:
            assembler.add(f"sheet {title}{hidden}", "")
            empty.append(title)
        reader.report(number, len(tables))
    if len(empty) == len(tables):
        raise ConversionError("is an OpenDocument sheet without a filled cell: load another")
    return Converted(assembler.text(), assembler.parts, (*empty_note(empty, len(tables)), *reader.told.notes()))


def _write_sheet(table: Element, reader: OpenReader, writer: SheetWriter, num_cells: int) -> int:
    reader.told["collapsed"] += sum(
        attribute(item, "visibility") in ("collapse", "filter") for item in table.iter() if _is_line(item)
    )
    row = 0
    for item in rows_of(table):
        cells: dict[int, str] = {}
        column = 0
        for cell in item:
            if local(cell.tag) not in ("table-cell", "covered-table-cell"):
                continue
            times = max(1, whole(attribute(cell, "number-columns-repeated", "1")))
            text = _cell(cell, reader) if local(cell.tag) == "table-cell" else ""
            if text:
                written = min(times, _MAX_REPEATED)
                reader.told["repeated"] += times > written
                cells.update(dict.fromkeys(range(column + 1, column + written + 1), text))
                if len(cells) > _MAX_COLUMNS:
                    raise ConversionError(f"is an OpenDocument sheet of more than {_MAX_COLUMNS:,} columns: cut it up")
            column += times
        times = max(1, whole(attribute(item, "number-rows-repeated", "1")))
        written = min(times, _MAX_REPEATED) if cells else 0
        reader.told["repeated"] += bool(cells) and times > written
        for at in range(written):
            num_cells += len(cells)
            if num_cells > _MAX_CELLS or writer.length > MAX_TEXT:
                raise ConversionError(f"is an OpenDocument sheet of more than {_MAX_CELLS:,} cells: cut it up")
            writer.write(row + at + 1, cells)
        row += times
    return num_cells


def _is_line(item: Element) -> bool:
    return local(item.tag) in ("table-row", "table-column")


def _cell(cell: Element, reader: OpenReader) -> str:
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
    style, _ = reader.styles.look(attribute(cell, "style-name"), PLAIN, is_hidden=False)
    if shown:
        return marked([(shown, style)])
    formula = attribute(cell, "formula")
    if len(cell) == 0 and not kind and not formula:
        return ""
    texts = Element("cell")
    for item in cell:
        if local(item.tag) == "annotation":
            reader.told["comment"] += 1
        else:
            texts.append(item)
    text = reader.text_of(texts, style=style).replace("\n\n", "\n")
    if not text and formula and not kind:
        reader.told["computed"] += 1
        return formula.partition(":")[2] or formula
    return text


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
