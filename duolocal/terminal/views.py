"""What the chat shows about itself: welcome, status line, /context, /docs, /stats. Builds, prints nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from duolocal.engine.engine import EngineMemory
from duolocal.engine.session import ContextItem, Finished
from duolocal.engine.speculation import Speculation
from duolocal.sizes import format_tokens
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import drawn
from duolocal.terminal.tables import add_columns, fact_table, new_table

BAR_COLUMNS = 20
_KIND_STYLES = {"document": "cyan", "user": "green", "assistant": "yellow"}


@dataclass(frozen=True)
class Facts:
    """What is known of a loaded model and its engine; the views need no engine to be tested."""

    model: str
    weight_format: str
    kv_format: str
    context: int  # tokens
    num_retrieval: int  # KV heads in all layers
    num_heads: int  # KV heads in all layers
    sink_size: int
    recent_size: int
    plan_source: str
    notes: tuple[str, ...] = ()
    load_s: float = 0.0

    @property
    def heads(self) -> str:
        """Say how the KV heads are split."""
        if self.num_retrieval == self.num_heads:
            return f"all {self.num_heads} KV heads retrieval"
        return f"{self.num_retrieval} of {self.num_heads} KV heads retrieval"


def welcome(facts: Facts, documents: int) -> Text:
    """Say in two lines what is loaded and what to type."""
    first = (
        f"{clean_line(facts.model)} ({facts.weight_format}), context {facts.context:,} tokens, "
        f"KV {facts.kv_format}, {facts.heads}"
    )
    about = "" if not documents else " about the document" if documents == 1 else " about the documents"
    load = "" if documents else "/load FILE adds a document, "
    second = f"Ask a question{about}; {load}/help shows more, Ctrl-D leaves."
    return Text.assemble((first, "bold"), "\n", second)


def status_line(facts: Facts, position: int, memory: EngineMemory, last: Finished | None, columns: int) -> str:
    """Build the bottom line; on a narrow terminal the last parts are left out, never cut in the middle."""
    wide = f"{position:,}/{facts.context:,} tokens"
    parts = [wide if columns >= 50 else f"{position:,}/{format_tokens(facts.context)}"]
    if last is not None and last.completion_tokens:
        parts.append(figures.speed(last.completion_tokens, last.decode_s))
    if facts.num_retrieval < facts.num_heads:
        retrieval, streaming = figures.size(retrieval_bytes(memory)), figures.size(streaming_bytes(memory))
        parts.append(f"KV {retrieval} retrieval + {streaming} streaming")
    else:
        parts.append(f"KV {figures.size(memory.cache.total)}")
    parts += [facts.kv_format, clean_line(facts.model)]
    line = " " + parts[0]
    for part in parts[1:]:
        if len(line) + len(part) + 4 <= columns:
            line += " · " + part
    return line + " "


def answer_line(finished: Finished, *, context: int) -> Text:
    """Summarise an answer in one dim line; say so when it is not complete."""
    parts = [figures.tokens(finished.completion_tokens)]
    if finished.completion_tokens and finished.decode_s:
        parts.append(figures.speed(finished.completion_tokens, finished.decode_s))
    parts.append(f"first after {figures.duration(finished.prefill_s)}")
    line = Text(" · ".join(parts), style="dim")
    reasons = {
        "cancelled": "stopped by Ctrl-C; what is there stays in the context",
        "length": "cut off by max_tokens; /set max_tokens none lifts it",
        "context": f"cut off: the context of {context:,} tokens is full; /undo or /reset makes room",
    }
    if finished.reason in reasons:
        line.append("\n" + reasons[finished.reason], style="yellow")
    return line


def context_view(items: Sequence[ContextItem], position: int, context: int, columns: int) -> RenderableType:
    """List everything in the context with its tokens and its share of the limit."""
    table = new_table("<what")
    wide = columns >= 60
    # A question can be longer than the screen; the counts must not shrink for it.
    room = columns - (10 + 9 + 2) - (BAR_COLUMNS + 2 if wide else 0)
    table.add_column("name", overflow="ellipsis", no_wrap=True, max_width=max(8, room))
    add_columns(table, ">tokens", *([f"<share of {format_tokens(context)}"] if wide else []))
    for item in items:
        style = _KIND_STYLES.get(item.kind, "dim")
        cells: list[RenderableType] = [
            Text(item.kind, style),
            Text(" ".join(clean_line(item.name[: 4 * columns]).split())),
            f"{item.num_tokens:,}",
        ]
        if wide:
            cells.append(Text(share_bar(item.num_tokens, context), style))
        table.add_row(*cells)
    free = context - position
    percent = 100 * position / context
    total = Text(f"{figures.tokens(position)} of {context:,} in the context ({percent:.1f}%), {free:,} free", "bold")
    return Group(table, total) if items else total


def share_bar(part: int, whole: int) -> str:
    """Draw the share of `part` in `whole`, in eighths of a column; a small one is still seen, a large one ends."""
    eighths = min(round(part / whole * BAR_COLUMNS * 8), BAR_COLUMNS * 8)
    if part and not eighths:
        eighths = 1
    full, rest = divmod(eighths, 8)
    return drawn("█" * full + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[rest])


def stats_view(
    facts: Facts,
    position: int,
    memory: EngineMemory,
    last: Finished | None,
    load: Finished | None,
    speculation: Speculation | None,
) -> RenderableType:
    """Show speeds, memory by head class beside the dense 16-bit figure, head plan, KV format, notes."""
    table = fact_table()
    table.add_row("model", f"{clean_line(facts.model)}, weights {facts.weight_format}")
    table.add_row("loaded in", figures.duration(facts.load_s))
    for name, read in (("documents", load), ("question", last)):
        if read is not None and read.prompt_tokens:
            speed = figures.speed(read.prompt_tokens, read.prefill_s)
            table.add_row(f"last {name}", f"{figures.tokens(read.prompt_tokens)}, {speed}")
    if last is not None:
        wrote = figures.speed(last.completion_tokens, last.decode_s)
        table.add_row("last answer", f"{figures.tokens(last.completion_tokens)}, {wrote}")
        if speculation is not None:
            counts = speculation.counts
            right = f"{counts.accepted:,} of {counts.tried:,} tokens right"
            table.add_row("", f"looked ahead {counts.steps:,} times, {right}")
    if speculation is None:
        table.add_row("speculation", "off")
    table.add_row("context", f"{position:,} of {facts.context:,} tokens")
    table.add_row("KV format", facts.kv_format)
    if facts.num_retrieval == facts.num_heads:
        table.add_row("heads", facts.heads)
    else:
        table.add_row("heads", f"{facts.heads} ({clean_line(facts.plan_source)})")
        table.add_row("", f"the others see {facts.sink_size} sink + {facts.recent_size} recent tokens")
    for name, text in memory_rows(memory):
        table.add_row(name, text)
    return Group(table, *notes_view(facts))


def notes_view(facts: Facts) -> list[Text]:
    """Write what the engine wants to be known, one note per entry."""
    return [Text(f"* {clean_line(note)}", style="dim") for note in facts.notes]


def retrieval_bytes(memory: EngineMemory) -> int:
    """Return the KV bytes of the retrieval heads: their blocks, and the recent tokens not yet in a block."""
    return memory.cache.retrieval_blocks + memory.cache.retrieval_windows


def streaming_bytes(memory: EngineMemory) -> int:
    """Return the KV bytes of the streaming heads."""
    return memory.cache.streaming_windows


def memory_rows(memory: EngineMemory) -> list[tuple[str, str]]:
    """Write a memory report as (label, text) rows."""
    kv, dense = memory.cache.total, memory.dense_16bit
    blocks = figures.size(memory.cache.retrieval_blocks)
    windows = figures.size(memory.cache.retrieval_windows)
    more = []
    if memory.cache.digests:
        more.append(("KV digests", f"{figures.size(memory.cache.digests)} (which blocks to read)"))
    if memory.cache.outer_blocks:
        more.append(("KV beyond", f"{figures.size(memory.cache.outer_blocks)} (the home of all blocks)"))
    return [
        ("weights", figures.size(memory.weights)),
        (
            "KV retrieval",
            f"{figures.size(retrieval_bytes(memory))} (blocks {blocks}, 16/32-bit windows {windows})",
        ),
        ("KV streaming", figures.size(streaming_bytes(memory))),
        *more,
        ("KV together", f"{figures.size(kv)}; dense 16-bit {figures.size(dense)} ({kv / dense:.0%})"),
    ]
