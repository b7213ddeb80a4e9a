"""What `--reader retrieve` shows: what it does with documents, and the passages that an answer was given."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from duolocal.documents import Document
from duolocal.reader.session import Picked
from duolocal.sources import Source
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line

EXPLAINED = (
    "documents are read in full for each question, and the model is given only the passages that its attention picks, "
    "not the whole text: good for looking things up, not for summaries (docs/reader.md)"
)
_EXCERPT = 160  # characters
_BAR = 8  # columns


def place(source: Source, files: Mapping[str, Document]) -> str:
    """Say where a passage stands: document, page, line."""
    document = files.get(source.document)
    part = document.part_at(source.start) if document is not None else None
    page = "" if part is None else f"{part.label}, "
    return f"{source.document}, {page}line {source.line}"


def headline(picked: Picked) -> str:
    """Say in one line how much of what was read the model is given."""
    count = len(picked.passages)
    given = f"{count} passage{'' if count == 1 else 's'} ({figures.tokens(picked.num_tokens)})"
    return f"read {figures.tokens(picked.tokens_read)}; the answer is made of {given if count else 'no passage'}"


def picked_view(picked: Picked, files: Mapping[str, Document]) -> RenderableType:
    """List the passages in the order of the documents, with how much the question looked at them."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="cyan", min_width=_BAR)
    table.add_column(overflow="fold", style="dim")
    most = max((source.score for source in picked.passages), default=1.0)
    for source in picked.passages:
        excerpt = source.excerpt
        if len(excerpt) > _EXCERPT:
            excerpt = f"{excerpt[:_EXCERPT].rstrip()}…"
        bar = "█" * max(1, round(_BAR * source.score / most))
        table.add_row(Text(bar), Text(f"{clean_line(place(source, files))}: {clean_line(excerpt)}"))
    return Group(Text(headline(picked), "dim"), table)


def picked_report(picked: Picked, files: Mapping[str, Document]) -> dict[str, Any]:
    """Return the same for JSON; characters count from the beginning of a document's text."""
    rows = []
    for source in picked.passages:
        document = files.get(source.document)
        part = document.part_at(source.start) if document is not None else None
        rows.append(
            {
                "document": source.document,
                "part": None if part is None else part.label,
                "line": source.line,
                "start": source.start,
                "stop": source.stop,
                "score": round(source.score, 4),
                "text": source.text[source.start : source.stop],
            }
        )
    return {"tokens_read": picked.tokens_read, "passage_tokens": picked.num_tokens, "passages": rows}


def by_name(documents: Iterable[Document]) -> dict[str, Document]:
    """Return documents by names of their own: a name that is taken becomes the path, and then a number is added."""
    named: dict[str, Document] = {}
    for document in documents:
        name, count = document.name, 2
        if name in named:
            name = str(document.path)
        while name in named:
            name, count = f"{document.path} ({count})", count + 1
        named[name] = document
    return named
