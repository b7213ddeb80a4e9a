"""Workbooks as one XML file, as Excel 2003 wrote them and other programs still do."""

from collections.abc import Callable
from xml.etree.ElementTree import Element

from duolocal.documents.converted import Assembler, ConversionError, Converted
from duolocal.documents.inline import PLAIN, Style, marked
from duolocal.documents.sheets import SheetWriter, empty_note
from duolocal.documents.told import Told
from duolocal.documents.xml_tree import attribute, child, local, whole


def read_xml_workbook(root: Element, report: Callable[[int, int], None]) -> Converted:
    """Convert a workbook; its parts are its sheets. Raises ConversionError."""
    assembler, told = Assembler(), Told()
    sheets = [item for item in root if local(item.tag) == "Worksheet"]
    empty = []
    for number, sheet in enumerate(sheets, 1):
        title = attribute(sheet, "Name") or f"Sheet{number}"
        writer = SheetWriter()
        row = 0
        table = child(sheet, "Table")
        for item in () if table is None else table:
            if local(item.tag) == "Row":
                row = whole(attribute(item, "Index")) or row + 1
                writer.write(row, _cells(item))
        told["sparse"] += writer.num_sparse
        if not writer.length:
            empty.append(title)
        assembler.add(f"sheet {title}", f"# {title}\n\n{writer.text()}" if writer.length else "")
        report(number, len(sheets))
    if len(empty) == len(sheets):
        raise ConversionError("is an Excel workbook without a filled cell: load another")
    return Converted(assembler.text(), assembler.parts, (*empty_note(empty, len(sheets)), *told.notes()))


def _cells(row: Element) -> dict[int, str]:
    cells: dict[int, str] = {}
    column = 0
    for cell in row:
        if local(cell.tag) != "Cell":
            continue
        column = whole(attribute(cell, "Index")) or column + 1
        data = child(cell, "Data")
        if data is not None:
            text = marked(_runs(data, PLAIN))
            match attribute(data, "Type"):
                case "DateTime":
                    text = text.replace("T", " ").removesuffix(".000").removesuffix(" 00:00:00")
                case "Boolean":
                    text = {"1": "TRUE", "0": "FALSE"}.get(text, text)
            cells |= {column: text} if text else {}
        column += whole(attribute(cell, "MergeAcross"))
    return cells


def _runs(item: Element, style: Style) -> list[tuple[str, Style]]:
    match local(item.tag).lower():
        case "s":
            style = style._replace(is_struck=True)
        case "sup" | "sub":
            style = style._replace(level=1 if local(item.tag).lower() == "sup" else -1)
    runs = [(item.text or "", style)]
    for inner in item:
        runs += [*_runs(inner, style), (inner.tail or "", style)]
    return runs
