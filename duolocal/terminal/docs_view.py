"""Tables of documents: what they are, and what they take of the context."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from duolocal.documents import Document, Skipped
from duolocal.sizes import format_tokens
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.tables import add_columns, new_table
from duolocal.terminal.views import BAR_COLUMNS, share_bar

_WIDE = 72  # columns; below there is no bar
_WITH_SOURCE = 110  # columns; below, sources are listed under the table
_MOST_SKIPPED = 30  # lines; the rest is counted, and in --json


def tokens_view(rows: Sequence[tuple[str, str, int | None, int]], *, context: int, columns: int) -> RenderableType:
    """List documents before they are loaded: (name, kind, pages, tokens)."""
    table = new_table()
    room = columns - (10 + 7 + 11 + 6) - (BAR_COLUMNS + 2 if columns >= _WIDE else 0)
    table.add_column("name", overflow="ellipsis", no_wrap=True, max_width=max(12, room))
    add_columns(table, "<kind", ">pages", ">tokens", *_share_columns(context, columns))
    for name, kind, pages, num_tokens in rows:
        cells = [
            Text(_fitted(clean_line(name), max(12, room))),
            Text(kind, "dim"),
            Text(f"{pages:,}" if pages else "", "dim"),
            Text(f"{num_tokens:,}"),
        ]
        table.add_row(*cells, *_share(num_tokens, context, columns))
    return table


def loaded_view(rows: Sequence[tuple[str, int, Document | None]], *, context: int, columns: int) -> RenderableType:
    """List documents in the context: (name, tokens, the file where it is known)."""
    if not rows:
        return Text("no documents in the context; /load PATH adds some")
    beside = columns >= _WITH_SOURCE
    table = new_table("~document", ">pages", ">tokens", *_share_columns(context, columns), *["~source"] * beside)
    below: list[Text] = []
    for name, num_tokens, document in rows:
        about = ""
        if document is not None:
            details = ", ".join(filter(None, (document.kind, figures.size(document.num_bytes), document.encoding)))
            about = f"{document.path} ({details})"
        pages = f"{document.pages:,}" if document is not None and document.pages else ""
        source = Text(clean_line(about), "dim")
        cells = [Text(clean_line(name)), Text(pages), Text(f"{num_tokens:,}"), *_share(num_tokens, context, columns)]
        table.add_row(*cells, *[source] * beside)
        if about and not beside:
            below.append(Text(f"  {clean_line(name)}: ", "dim").append(source))
    notes = [document.note for _, _, document in rows if document is not None and document.note]
    return Group(table, *below, *(Text(f"* {clean_line(note)}", "yellow") for note in notes))


def _share_columns(context: int, columns: int) -> list[str]:
    return [">share", f"<of {format_tokens(context)}"] if columns >= _WIDE else [">share"]


def _share(num_tokens: int, context: int, columns: int) -> list[Text]:
    over = num_tokens > context
    cells = [Text(f"{100 * num_tokens / context:.1f}%", "red" if over else "")]
    if columns >= _WIDE:
        cells.append(Text(share_bar(num_tokens, context), "red" if over else "cyan"))
    return cells


def _fitted(name: str, room: int) -> str:
    """Shorten a path at its beginning: its end tells files apart."""
    return name if len(name) <= room else "…" + name[len(name) - room + 1 :]


def skipped_view(skipped: Sequence[Skipped], *, columns: int) -> RenderableType:
    """List what was left out, with the reason."""
    shown = [
        Text(f"  {clean_line(item.name)}: {clean_line(item.reason)}", style="dim", overflow="fold")
        for item in skipped[:_MOST_SKIPPED]
    ]
    more = len(skipped) - _MOST_SKIPPED
    if more > 0:
        shown.append(Text(f"  and {more:,} more (--json lists all)", style="dim"))
    return Group(Text(f"left out: {len(skipped):,}"), *shown)
