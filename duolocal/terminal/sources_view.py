"""`/sources`: the passages that were looked at while the last answer was written."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from duolocal.documents import Document
from duolocal.sources import STANDS_OUT, Source
from duolocal.terminal.clean import clean_line
from duolocal.terminal.reader_view import excerpt, place, score_bar
from duolocal.terminal.tables import bare_table

_EXCERPT = 280  # characters
_BAR = 10  # columns


def sources_view(found: Sequence[Source], files: Mapping[str, Document]) -> RenderableType:
    """List passages with where they stand; files: the documents by name, for their pages."""
    table = bare_table()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for source in found:
        table.add_row(
            Text(f"{100 * source.score:.0f}%"),
            Text(score_bar(source.score, _BAR)),
            Group(Text(clean_line(place(source, files)), "bold"), Text(excerpt(source, _EXCERPT), "dim")),
        )
    notes = [Text("how much the retrieval heads looked there while the answer was written (docs/sources.md)", "dim")]
    if not found or found[0].score < STANDS_OUT:
        notes.insert(0, Text("no passage stands out: the answer copies none of them, so check it", "yellow"))
    return Group(table, *notes)
