"""Excel workbooks to text: every sheet as CSV under its name, with the values that were last computed (openpyxl).

Not read: pictures, charts, comments and formats; dates are written as ISO 8601.
"""

import csv
import datetime
import io
import warnings
from collections.abc import Callable
from itertools import repeat

from duolocal.documents.converted import MAX_TEXT, Assembler, ConversionError, Converted, missing_extra
from duolocal.documents.docx import check_office
from duolocal.documents.zipped import Archive

_MAX_XML_BYTES = 256 * 2**20  # it is read as a stream
_MAX_CELLS = 20_000_000


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert a workbook; its parts are its sheets. Raises ConversionError."""
    try:
        import openpyxl
    except ImportError:
        raise missing_extra("an Excel workbook") from None
    check_office(data, "xl/", most=_MAX_XML_BYTES)
    warnings.simplefilter("ignore")  # about styles and extensions, which are of no concern here
    values = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
    formulas = None
    if _has_formulas(data):
        formulas = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=False)
    assembler = Assembler()
    empty, computed, num_cells = [], 0, 0
    for number, sheet in enumerate(values.worksheets, 1):
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        other = formulas.worksheets[number - 1].iter_rows(values_only=True) if formulas else repeat(())
        for row, written in zip(sheet.iter_rows(values_only=True), other, strict=False):
            num_cells += len(row)
            if num_cells > _MAX_CELLS or out.tell() > MAX_TEXT:
                raise ConversionError(f"is an Excel workbook of more than {_MAX_CELLS:,} cells: cut it up")
            cells = [_written(value) for value in row]
            for at, formula in enumerate(written):
                formula = str(getattr(formula, "text", formula))  # a formula over a range is an object
                if formula.startswith("=") and at < len(cells) and row[at] is None:
                    cells[at] = formula
                    computed += 1
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                writer.writerow(cells)
        label = f"sheet {sheet.title}" + (" (hidden)" if sheet.sheet_state != "visible" else "")
        if out.tell():
            assembler.add(label, f"# {sheet.title}\n\n{out.getvalue()}")
        else:
            empty.append(sheet.title)
            assembler.add(label, "")
        report(number, len(values.worksheets))
    if len(empty) == len(values.worksheets):
        raise ConversionError("is an Excel workbook without a filled cell: load another")
    notes = []
    if empty:
        notes.append(f"{len(empty):,} of {len(values.worksheets):,} sheets are empty: {', '.join(empty[:10])}")
    if computed:
        notes.append(f"{computed:,} formulas were never computed and stand as formulas: open and save it in Excel")
    return Converted(assembler.text(), assembler.parts, tuple(notes))


def _has_formulas(data: bytes) -> bool:
    with Archive(data) as archive:
        for name in archive.names():
            if name.startswith("xl/worksheets/"):
                content = archive.read(name)
                if b"<f>" in content or b"<f " in content:
                    return True
    return False


def _written(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, datetime.datetime) and not (value.hour or value.minute or value.second or value.microsecond):
        return value.date().isoformat()
    return str(value)
