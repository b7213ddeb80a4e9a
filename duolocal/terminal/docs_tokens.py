"""`duolocal docs tokens`: opens the tokenizer, loads and counts file after file, prints a table or JSON."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from duolocal.documents import Gathered, Skipped
from duolocal.documents.loading import iter_load
from duolocal.documents.tokens import Counted, count_document
from duolocal.engine.fitting import Fit
from duolocal.engine.resolve import default_context
from duolocal.engine.session import ROOM_TO_ASK
from duolocal.models.loader import open_model
from duolocal.sizes import format_tokens
from duolocal.terminal import docs_view, figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.fetching import fetch
from duolocal.terminal.progress import bar
from duolocal.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Report:
    """All that was counted for one model and context."""

    model: str
    context: int
    trained: int  # tokens that the model was trained for
    counted: tuple[Counted, ...]
    skipped: tuple[Skipped, ...]

    @property
    def fit(self) -> Fit:
        """Whether it fits, and what could be done."""
        sizes = tuple((item.name, item.num_tokens) for item in self.counted)
        return Fit(sizes, self.context, kept=ROOM_TO_ASK, trained=self.trained)


def count_gathered(gathered: Gathered, *, model: str, context: int | None, progress: Console) -> Report:
    """Load and count what was gathered, one text in memory at a time; bars go to `progress`. Raises DuoLocalError."""
    tokenizer, default, trained = _open(model, progress)
    counted: list[Counted] = []
    skipped = list(gathered.skipped)
    with bar(progress, "reading files", "files") as shown:

        def on_progress(done: int, total: int, name: str) -> None:
            shown.describe(f"reading {clean_line(name)}")
            shown.update(done, total)

        for item in iter_load(gathered, on_progress=on_progress):
            if isinstance(item, Skipped):
                skipped.append(item)
            else:
                shown.describe(f"counting {clean_line(item.name)}")
                counted.append(count_document(item, tokenizer, first=not counted))
    return Report(model, context or default, trained, tuple(counted), tuple(skipped))


def _open(model: str, progress: Console) -> tuple[Tokenizer, int, int]:
    """Return the tokenizer of a model, its default context and the one it was trained for; loads no weights."""
    path = fetch(model, progress)
    with bar(progress, f"opening the tokenizer of {clean_line(model)}", ""):
        source = open_model(path)
        return load_tokenizer(source), default_context(source.config), source.config.max_positions


def print_table(report: Report, console: Console) -> None:
    """Print the documents, their notes, what was left out, the total and, where it does not fit, the choices."""
    rows = [(item.name, item.kind, item.pages, item.num_tokens) for item in report.counted]
    console.print(docs_view.tokens_view(rows, context=report.context, columns=console.width))
    for item in report.counted:
        for note in item.notes:
            console.print(Text(f"* {clean_line(item.name)}: {clean_line(note)}", style="yellow"))
    if report.skipped:
        console.print(docs_view.skipped_view(report.skipped, columns=console.width))
    fit = report.fit
    share = 100 * fit.total / report.context
    count = f"{len(report.counted):,} document" + ("" if len(report.counted) == 1 else "s")
    total = f"{count}, {figures.tokens(fit.total)}: {share:.1f}% of a context of {format_tokens(report.context)}"
    console.print(Text(total, style="bold"))
    if not fit.fits:
        console.print(Text(clean_line(fit.refusal()), style="red"))


def print_json(report: Report) -> None:
    """Print one JSON object."""
    fit = report.fit
    documents: list[dict[str, Any]] = [
        asdict(item) | {"share": round(item.num_tokens / report.context, 6)} for item in report.counted
    ]
    print(
        json.dumps(
            {
                "model": report.model,
                "context": report.context,
                "trained_context": report.trained,
                "documents": documents,
                "skipped": [asdict(item) for item in report.skipped],
                "total_tokens": fit.total,
                "share": round(fit.total / report.context, 6),
                "kept_for_a_question": fit.kept,
                "fits": fit.fits,
                "leave_out": [] if fit.fits else [name for name, _ in fit.to_drop()],
                "context_needed": fit.needed,
            },
            ensure_ascii=False,
        )
    )
