"""The tables of the terminal: no frames, headings in bold, figures to the right."""

from rich.table import Table
from rich.text import Text


def new_table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table; a column is its heading behind a mark.

    `<` is for words and `>` for figures, both kept in one line; `~` is for words that may wrap.
    """
    shown = None if title is None else Text(title)
    table = Table(box=None, pad_edge=False, header_style="bold", title=shown, title_justify="left")
    add_columns(table, *columns)
    return table


def add_columns(table: Table, *columns: str) -> None:
    """Add columns, written as for `new_table`."""
    for column in columns:
        mark, heading = column[0], Text(column[1:])
        assert mark in "<>~", column
        if mark == "~":
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right" if mark == ">" else "left", no_wrap=True)


def bare_table() -> Table:
    """Return an empty table without headings or columns."""
    return Table(box=None, pad_edge=False, show_header=False)


def fact_table() -> Table:
    """Return an empty table of names and what is said of each, which may wrap."""
    table = bare_table()
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table
