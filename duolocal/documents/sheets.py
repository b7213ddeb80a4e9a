"""Rows of sheets as CSV, and how columns are called; what Excel and OpenDocument have in common."""

import csv
import io
from collections.abc import Mapping, Sequence

from duolocal.documents.numbering import letters

_MAX_GAP = 64  # columns; a row with a longer gap is written cell by cell


class SheetWriter:
    """Writes the filled cells of a sheet, row after row; blank rows are left out."""

    def __init__(self) -> None:
        self.num_sparse = 0  # rows written cell by cell, each with its address
        self._out = io.StringIO()
        self._writer = csv.writer(self._out, lineterminator="\n")

    def write(self, row: int, cells: Mapping[int, str]) -> None:
        """Write a row: column -> text, both counted from 1."""
        if not cells:
            return
        columns = sorted(cells)
        gaps = (right - left for left, right in zip([0, *columns], columns, strict=False))
        if max(gaps) > _MAX_GAP:
            self.num_sparse += 1
            alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
            self._writer.writerow(f"{letters(column, alphabet)}{row}: {cells[column]}" for column in columns)
        else:
            self._writer.writerow(cells.get(column, "") for column in range(1, columns[-1] + 1))

    @property
    def length(self) -> int:
        """Characters written so far."""
        return self._out.tell()

    def text(self) -> str:
        """Return all rows."""
        return self._out.getvalue()


def empty_note(empty: Sequence[str], total: int) -> tuple[str, ...]:
    """Return what is told of sheets without a filled cell."""
    return (f"{len(empty):,} of {total:,} sheets are empty: {', '.join(empty[:10])[:200]}",) if empty else ()
