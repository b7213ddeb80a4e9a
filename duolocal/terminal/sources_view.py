"""`/sources`: the passages that were looked at while the last answer was written."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from duolocal.documents import Document
from duolocal.errors import SettingsError
from duolocal.sources import STANDS_OUT, Source, find_sources
from duolocal.terminal.clean import clean_line

if TYPE_CHECKING:
    from duolocal.terminal.chat import Chat

_COUNT = 3
_MOST = 20
_EXCERPT = 280  # characters
_BAR = 10  # columns


def sources(chat: "Chat", rest: str) -> None:
    """Show the passages looked at most for the last answer; `rest` may say how many."""
    count = _COUNT
    if rest:
        if not (rest.isascii() and rest.isdigit() and 1 <= int(rest[:4]) <= _MOST):
            raise SettingsError(f"/sources takes a number from 1 to {_MOST}, not {rest!r}: /sources 5")
        count = int(rest)
    with chat.console.status("looking up what was read"):
        found = find_sources(chat.session, count=count)
    chat.show(sources_view(found, chat.files))


def sources_view(found: Sequence[Source], files: Mapping[str, Document]) -> RenderableType:
    """List passages with where they stand; files: the documents by name, for their pages."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for source in found:
        document = files.get(source.document)
        part = document.part_at(source.start) if document is not None else None
        page = "" if part is None else f"{part.label}, "
        where = f"{source.document}, {page}line {source.line}"
        excerpt = source.excerpt
        if len(excerpt) > _EXCERPT:
            excerpt = f"{excerpt[:_EXCERPT].rstrip()}…"
        table.add_row(
            Text(f"{100 * source.score:.0f}%"),
            Text("█" * max(1, round(source.score * _BAR))),
            Group(Text(clean_line(where), "bold"), Text(clean_line(excerpt), "dim")),
        )
    notes = [Text("how much the retrieval heads looked there while the answer was written (docs/sources.md)", "dim")]
    if not found or found[0].score < STANDS_OUT:
        notes.insert(0, Text("no passage stands out: the answer copies none of them, so check it", "yellow"))
    return Group(table, *notes)
