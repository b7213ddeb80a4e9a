"""What `--reader retrieve` shows: what it does with documents, and the passages that an answer was given."""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from duolocal.documents import Document
from duolocal.documents.formats import CONVERTED
from duolocal.reader.session import Picked
from duolocal.sources import Source
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import drawn
from duolocal.terminal.tables import bare_table

EXPLAINED = (
    "documents are read in full for each question, and the model is given only the passages that its attention picks, "
    "not the whole text: good for looking things up, not for summaries (docs/reader.md)"
)
_HEADING = re.compile(r"^#{1,6} +(.*\S)", re.MULTILINE)
_EXCERPT = 160  # characters
_BAR = 8  # columns


def place(source: Source, files: Mapping[str, Document]) -> str:
    """Say where a person finds a passage: document, page or chapter, heading, and line of a file that is text."""
    heading, line = heading_of(source, files), line_of(source, files)
    lies = (
        source.document,
        part_label(source, files),
        None if heading is None else f"“{heading}”",
        None if line is None else f"line {line}",
    )
    return ", ".join(word for word in lies if word is not None)


def line_of(source: Source, files: Mapping[str, Document]) -> int | None:
    """Return the line of the file, from 1; None where the text is not the file's own but was converted from it."""
    return None if _is_converted(source, files) else source.line


def heading_of(source: Source, files: Mapping[str, Document]) -> str | None:
    """Return the last heading before the end of a passage's first line, within its part, of a converted document."""
    if not _is_converted(source, files):
        return None
    document = files.get(source.document)
    part = None if document is None else document.part_at(source.start)
    first = len(source.text[source.start : source.stop]) - len(source.text[source.start : source.stop].lstrip())
    end = source.text.find("\n", source.start + first)
    before = source.text[0 if part is None else part.start : len(source.text) if end < 0 else end]
    found = _HEADING.findall(before)
    return found[-1] if found else None


def _is_converted(source: Source, files: Mapping[str, Document]) -> bool:
    document = files.get(source.document)
    kind = PurePath(source.document).suffix[1:].lower() if document is None else document.kind
    return {"htm": "html", "ipynb": "notebook", "eml": "mail"}.get(kind, kind) in CONVERTED


def part_label(source: Source, files: Mapping[str, Document]) -> str | None:
    """Return the page, section or sheet that a passage begins in; None where the document has no parts."""
    document = files.get(source.document)
    part = document.part_at(source.start) if document is not None else None
    return None if part is None else part.label


def excerpt(source: Source, most: int) -> str:
    """Return the beginning of a passage in one line of at most `most` characters."""
    text = source.excerpt
    return clean_line(text if len(text) <= most else f"{text[:most].rstrip()}…")


def score_bar(share: float, columns: int) -> str:
    """Draw a share in whole columns; a small one is still seen."""
    return drawn("█" * max(1, round(share * columns)))


def headline(picked: Picked) -> str:
    """Say in one line how much of what was read the model is given."""
    count = len(picked.passages)
    given = f"{count} passage{'' if count == 1 else 's'} ({figures.tokens(picked.num_tokens)})"
    return f"read {figures.tokens(picked.tokens_read)}; the answer is made of {given if count else 'no passage'}"


def picked_view(picked: Picked, files: Mapping[str, Document]) -> RenderableType:
    """List the passages in the order of the documents, with how much the question looked at them."""
    table = bare_table()
    table.add_column(no_wrap=True, style="cyan", min_width=_BAR)
    table.add_column(overflow="fold", style="dim")
    most = max((source.score for source in picked.passages), default=1.0)
    for source in picked.passages:
        text = f"{clean_line(place(source, files))}: {excerpt(source, _EXCERPT)}"
        table.add_row(Text(score_bar(source.score / most, _BAR)), Text(text))
    return Group(Text(headline(picked), "dim"), table)


def picked_report(picked: Picked, files: Mapping[str, Document]) -> dict[str, Any]:
    """Return the same for JSON; characters count from the beginning of a document's text."""
    rows = [
        {
            "document": source.document,
            "part": part_label(source, files),
            "heading": heading_of(source, files),
            "line": line_of(source, files),
            "start": source.start,
            "stop": source.stop,
            "score": round(source.score, 4),
            "text": source.text[source.start : source.stop],
        }
        for source in picked.passages
    ]
    return {"tokens_read": picked.tokens_read, "passage_tokens": picked.num_tokens, "passages": rows}
