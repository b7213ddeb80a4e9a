"""Records as CSV and Markdown, for people. What is exact is in the JSON lines; these can be made again from them."""

import csv
import io
import re
from collections.abc import Iterable

from duolocal.summarize.records import Record

_COLUMNS = (
    "name",
    "source",
    "kind",
    "tokens",
    "parts",
    "levels",
    "summary",
    "finish_reason",
    "error",
    "notes",
    "prompt_tokens",
    "completion_tokens",
    "seconds",
    "digest",
    "finished_at",
)
_FORMULA = re.compile(r"[=+@\t\r]|-(?! )")
_MARKS = re.compile(r"([\\`*_{}\[\]<>#|])")


def to_csv(records: Iterable[Record]) -> bytes:
    """Return a table with a head line, one row per record, line breaks inside quotes (RFC 4180).

    A text that a spreadsheet would take for a formula gets an apostrophe before it: documents come from strangers.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(_COLUMNS)
    for record in records:
        value = {
            **vars(record),
            "seconds": round(record.timings.total_s, 2),
            "notes": "; ".join(record.notes),
        }
        writer.writerow([_cell(value[column]) for column in _COLUMNS])
    return out.getvalue().encode("utf-8", "backslashreplace")


def _cell(value: object) -> object:
    if isinstance(value, str) and _FORMULA.match(value):
        return f"'{value}"
    return "" if value is None else value


def to_markdown(records: Iterable[Record]) -> bytes:
    """Return a heading and the summary for every record; summaries stand as the model wrote them."""
    blocks = ["# Summaries"]
    for record in records:
        blocks.append(f"## {_escaped(record.name)}")
        blocks.append(f"*{_escaped('; '.join(_facts(record)))}*")
        blocks.append(f"**Not summarised:** {_escaped(record.error)}" if record.error else record.summary or "")
    return ("\n\n".join(blocks) + "\n").encode("utf-8", "backslashreplace")


def _facts(record: Record) -> list[str]:
    facts = [record.source]
    if record.tokens is not None:
        facts.append(f"{record.tokens:,} tokens")
    if record.parts > 1:
        merged = f", merged in {record.levels} levels" if record.levels > 1 else ""
        facts.append(f"read in {record.parts} parts{merged}")
    if record.cut_off:
        facts.append("cut off")
    if record.finish_reason == "repeat":
        facts.append("ended where it began to repeat itself")
    return [*facts, *record.notes]


def _escaped(text: str) -> str:
    return _MARKS.sub(r"\\\1", " ".join(text.split()))


RENDERERS = {"csv": to_csv, "md": to_markdown}
