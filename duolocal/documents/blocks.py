"""Text in the manner of Markdown, built block by block: headings, lists, tables, code and quotes keep their marks.

What HTML, Word and OpenDocument files have in common. Nesting costs no stack, and its depth is bounded where it would
cost time.
"""

import re
from dataclasses import dataclass, field

from duolocal.documents.converted import MAX_TEXT, ConversionError
from duolocal.documents.inline import PLAIN, Style, marked

SPACE = re.compile(r"[ \t\n\r\f\xa0]+")
_MAX_LISTS, _MAX_QUOTES, _MAX_TABLES = 8, 4, 12  # nesting beyond is shown flat
_MAX_SPAN = 1000  # columns, as in browsers
_MAX_AREA = 2_000_000  # columns that the cells of a table may span in all
_SPARSE = 20  # times as many places as cells, and _FEW more, are a page layout
_FEW = 10_000


@dataclass
class _Table:
    """A table being read; its cells are the texts of the frames that were closed in it."""

    rows: list[dict[int, str]] = field(default_factory=list)  # by column
    is_layout: bool = False  # it holds another table, or whole paragraphs
    column: int = 0  # where the next cell of the row begins, unless one from above reaches down to there
    started: set[int] = field(default_factory=set)  # columns in which cells begin
    reaching: dict[int, int] = field(default_factory=dict)  # columns whose cell reaches down, into how many rows more
    num_cells: int = 0
    area: int = 0
    _pending: dict[int, int] = field(default_factory=dict)  # what will reach down from this row

    def open_row(self) -> None:
        self.rows.append({})
        self.column = 0
        self.area += len(self.reaching)
        if self.area > _MAX_AREA:
            self.is_layout, self.reaching = True, {}
        self.reaching = {column: left - 1 for column, left in self.reaching.items() if left > 0}

    def open_cell(self, columns: int, rows: int) -> int:
        """Return the column in which a cell begins that spans so many columns and rows."""
        if not self.rows:
            self.open_row()
        while self.column in self.reaching:
            self.column += 1
        columns = max(1, min(columns, _MAX_SPAN))
        self.area += columns
        if self.area > _MAX_AREA:
            self.is_layout, columns, rows = True, 1, 1
        start = self.column
        self.column += columns
        if rows > 1:
            self._pending.update(dict.fromkeys(range(start, self.column), rows - 1))
        self.started.add(start)
        self.num_cells += 1
        return start

    def close_row(self) -> None:
        """Let the cells of the row reach into those below."""
        for column, left in self._pending.items():
            self.reaching[column] = max(left, self.reaching.get(column, 0))
        self._pending = {}


@dataclass
class _Frame:
    """Text being built: the document itself, or a cell of a table."""

    table: _Table | None = None  # the one that this is a cell of
    column: int = 0
    is_shown: bool = True
    blocks: list[tuple[str, bool]] = field(default_factory=list)  # (text, whether the next follows closely)


class TextBuilder:
    """Takes text and its structure in the order of the document. A block is what stands on lines of its own."""

    def __init__(self, *, max_cell: int | None = None) -> None:
        """Build a text; a table with a cell of more than `max_cell` characters, or one inside it, is a page layout.

        Without `max_cell` every table is one, and one inside a cell is written in a line.
        """
        self.style: Style = PLAIN  # of the text that comes
        self.mark = ""  # before the first line of the block: "# ", "- "
        self.is_tight = False  # no blank line after the block
        self.lists = 0  # open ones
        self.quotes = 0
        self.preformatted = 0
        self._max_cell = max_cell
        self._frames = [_Frame()]
        self._tables: list[_Table] = []
        self._line: list[tuple[str, Style]] = []  # the block being read
        self._spaced = True  # whether it ends with white space (or is empty)
        self._length = 0

    @property
    def in_table(self) -> bool:
        return bool(self._tables)

    @property
    def is_blank(self) -> bool:
        """Whether the block has no text so far."""
        return not any(text.strip() for text, _ in self._line)

    # --- text ------------------------------------------------------------------------------------------------------

    def push(self, text: str, *, raw: bool = False) -> None:
        """Add text to the block; white space counts as one space, unless `raw`."""
        text = text.replace("\xad", "")
        if not raw:
            text = SPACE.sub(" ", text)
            if self._spaced:
                text = text.removeprefix(" ")
        if not text:
            return
        self._length += len(text)
        if self._length > MAX_TEXT:
            raise ConversionError(f"holds more than {MAX_TEXT:,} characters of text: cut it up")
        self._line.append((text, self.style))
        self._spaced = text[-1] in " \n"

    def break_line(self) -> None:
        """Go on in a new line of the same block."""
        if self._line and not self.preformatted:
            text, style = self._line[-1]
            self._line[-1] = (text.rstrip(" "), style)
        self.push("\n", raw=True)

    def close_bracket(self) -> None:
        """End what a "(" began; one without text is taken back."""
        if self._line and self._line[-1][0] == "(":
            self._line.pop()
        else:
            self.push(")")

    def begin(self, mark: str = "", *, is_tight: bool = False) -> None:
        """Begin a block."""
        self.end()
        self.mark, self.is_tight = mark, is_tight

    def end(self) -> None:
        """End the block; a mark without text waits for the next one."""
        if not self._line:
            return
        text = marked(self._line)
        self._line, self._spaced = [], True
        mark, self.mark = self.mark, ""
        if self.preformatted:
            text = text.strip("\n").rstrip()
            if text:
                fence = "```" if "```" not in text else "~~~~"
                self.add(f"{mark}{fence}\n{text}\n{fence}")
            return
        text = text.strip()
        if not text.strip("`"):
            self.mark = mark
            return
        if mark.startswith("#"):
            text = " ".join(text.split("\n"))
        indent = "  " * max(0, min(self.lists, _MAX_LISTS) - 1)
        if self.lists and not mark:
            indent += "  "  # a further paragraph of an item
        text = (f"{indent}{mark}" if self.lists else mark) + text.replace("\n", f"\n{indent}" if indent else "\n")
        self.add(text, is_tight=self.is_tight or self.lists > 0)

    def add(self, text: str, *, is_tight: bool = False) -> None:
        """Add a block that is complete."""
        quotes = min(self.quotes, _MAX_QUOTES)
        if quotes:
            text = "> " * quotes + text.replace("\n", "\n" + "> " * quotes)
        self._frames[-1].blocks.append((text, is_tight))

    def close_list(self) -> None:
        """End a list; a blank line follows the outermost one."""
        self.lists -= 1
        if not self.lists:
            self.loosen()

    def set_depth(self, depth: int) -> None:
        """End the block and go on within so many lists."""
        self.end()
        was, self.lists = self.lists, depth
        if was and not depth:
            self.loosen()

    def loosen(self) -> None:
        """Let a blank line follow the last block."""
        blocks = self._frames[-1].blocks
        if blocks and not self.lists:
            blocks[-1] = (blocks[-1][0], False)

    # --- tables ----------------------------------------------------------------------------------------------------

    def open_table(self) -> None:
        """Begin a table."""
        if len(self._tables) >= _MAX_TABLES:
            return
        if self._tables and self._max_cell is not None:
            self._tables[-1].is_layout = True
        self._tables.append(_Table())

    def open_row(self) -> None:
        """Begin a row."""
        self.close_cell()
        self._tables[-1].close_row()
        self._tables[-1].open_row()

    def skip_columns(self, count: int) -> None:
        """Leave columns of the row empty."""
        self._tables[-1].column += min(count, _MAX_SPAN)

    def close_rows(self) -> None:
        """End a group of rows: no cell reaches beyond it."""
        self.close_cell()
        self._tables[-1].close_row()
        self._tables[-1].reaching = {}

    def open_cell(self, *, columns: int = 1, rows: int = 1, is_shown: bool = True) -> None:
        """Begin a cell that spans so many columns and rows; what is in one that is not shown is left out."""
        self.close_cell()
        table = self._tables[-1]
        self._frames.append(_Frame(table, table.open_cell(columns, rows), is_shown))

    def close_cell(self) -> None:
        """End the cell, if one is open in the innermost table."""
        self.end()
        if len(self._frames) == 1 or self._frames[-1].table is not self._tables[-1]:
            return
        frame = self._frames.pop()
        table = self._tables[-1]
        text = _joined(frame.blocks) if frame.is_shown else ""
        if self._max_cell is not None and len(text) > self._max_cell:
            table.is_layout = True
        table.rows[-1][frame.column] = text

    def close_table(self) -> None:
        """End the table and add it as a block; one that is a page layout adds its cells."""
        self.close_cell()
        table = self._tables.pop()
        rows = [row for row in table.rows if any(row.values())]
        columns = sorted(table.started)
        if not rows:
            return
        is_sparse = len(rows) * len(columns) > _SPARSE * table.num_cells + _FEW
        if table.is_layout or is_sparse or len(columns) < 2:
            for row in rows:
                for cell in row.values():
                    if cell:
                        self.add(cell)
            return
        if self._tables and self._max_cell is None:
            written = (", ".join(" ".join(cell.split()) for cell in row.values() if cell) for row in rows)
            self.add("; ".join(written))
            return
        lines = []
        for at, row in enumerate(rows):
            cells = [" ".join(row.get(column, "").split()).replace("|", "\\|") for column in columns]
            lines.append("| " + " | ".join(cells).rstrip() + " |")
            if at == 0:
                lines.append("|" + " --- |" * len(columns))
        self.add("\n".join(lines))

    def text(self) -> str:
        """Close whatever is open and return the text."""
        self.end()
        while self._tables:
            self.close_table()
        return _joined(self._frames[0].blocks).strip("\n")


def _joined(blocks: list[tuple[str, bool]]) -> str:
    pieces: list[str] = []
    for at, (text, _) in enumerate(blocks):
        if at:
            pieces.append("\n" if blocks[at - 1][1] else "\n\n")
        pieces.append(text)
    return "".join(pieces)
