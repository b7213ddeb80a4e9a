"""`duolocal eval needle`: what the reader that retrieves finds in texts far longer than the context.

Every length is one pass over the text, kept as a file of its own in --out; a pass that was interrupted goes on from
where it was. The last line printed is one JSON object.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from duolocal.commands.eval import Needle
from duolocal.engine.engine import Engine
from duolocal.engine.session import ChatSession, Prefilled
from duolocal.errors import SettingsError
from duolocal.evaluate import Outcome
from duolocal.evaluate.documentation import Haystack, documentation
from duolocal.evaluate.grid import places
from duolocal.evaluate.needle import MOST, NeedleResult, Task, make_task, run_task
from duolocal.files import read_json, write_json
from duolocal.processes import peak_bytes
from duolocal.reader import PASSAGE_TOKENS, Retriever
from duolocal.reader.passages import Carried
from duolocal.reader.retrieve import State
from duolocal.settings import LoadSettings
from duolocal.sizes import format_tokens
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.eval_parts import eval_consoles, open_source
from duolocal.terminal.eval_view import draw_maps, print_maps
from duolocal.terminal.progress import bar
from duolocal.tokenizer import Tokenizer, load_tokenizer

CONTEXT = 4096  # tokens: passages, question and answer
_CHARACTERS = (4.5, 7.0)  # of documentation for a token: more where a vocabulary needs it
_KEEP_S = 60.0  # between two states on disk


def eval_needle(options: Needle, settings: LoadSettings) -> int:
    """Print which needles the reader finds by length and depth; return the exit code."""
    console, progress = eval_consoles()
    lengths, kinds, out, png, seed = options.tokens, options.kinds, options.out, options.png, options.seed
    depths, absent = options.depths, options.absent
    at = places(depths)
    if depths + absent > MOST:
        raise SettingsError(
            f"{depths} depths and {absent} absent needles of a kind are too many for one text: {MOST} together at most"
        )
    if out is not None and not out.is_dir():
        raise SettingsError(f"--out {out} is no folder: make it first (mkdir {out})")
    source = open_source(settings, progress)
    tokenizer = load_tokenizer(source)
    with bar(progress, f"loading {clean_line(settings.model)}", "layers") as shown:
        engine = Engine.load(source, settings, context=min(source.config.max_positions, CONTEXT), events=shown)
    session = ChatSession(engine, tokenizer)
    retriever = Retriever(engine, tokenizer, passage_tokens=options.passages or PASSAGE_TOKENS)
    points = []
    for length in lengths:
        with bar(progress, f"finding {format_tokens(length)} tokens of text", ""):
            haystack, task = _task(
                tokenizer, options.text, num_tokens=length, depths=at, kinds=kinds, absent=absent, seed=seed
            )
        identity = {
            "model": source.fingerprint,
            "task": task.digest,
            "chunk_tokens": retriever.chunk_tokens,
            "passage_tokens": retriever.passage_tokens,
        }
        path = None if out is None else out / f"needle-{length}-seed{seed}.json"
        point = None if path is None else read_json(path, identity=identity)
        if point is None:
            point = _measure(session, retriever, task, identity, path, progress)
            point |= {"length": length, "seed": seed, "text": haystack.sources, "identity": identity}
            if path is not None:
                write_json(path, point)
        points.append(point)
        _print_point(point, console)
    runs = {
        kind: [_outcome(row) for point in points for row in point["results"] if _hidden(row, kind)] for kind in kinds
    }
    print_maps(runs, lengths, at, console)
    _print_counts(points, kinds, console)
    if png is not None:
        draw_maps(runs, lengths, at, png, console, title=f"needle, --reader retrieve, {clean_line(settings.model)}")
    print(json.dumps({"evaluation": "needle", "reader": "retrieve", "model": settings.model, "points": points}))
    return 0


def _task(
    tokenizer: Tokenizer, text: tuple[str, str] | None, *, num_tokens: int, **wanted: Any
) -> tuple[Haystack, Task]:
    if text is not None:
        return Haystack(text[0], {text[1]: len(text[0])}), make_task(
            tokenizer, text[0], num_tokens=num_tokens, **wanted
        )
    for characters in _CHARACTERS:
        haystack = documentation(round(num_tokens * characters))
        try:
            return haystack, make_task(tokenizer, haystack.text, num_tokens=num_tokens, **wanted)
        except SettingsError:
            if characters == _CHARACTERS[-1]:
                raise
    raise AssertionError


def _measure(
    session: ChatSession,
    retriever: Retriever,
    task: Task,
    identity: Mapping[str, Any],
    path: Path | None,
    progress: Console,
) -> dict[str, Any]:
    """Read one text for all its needles; return what there is to keep of it."""
    part = None if path is None else path.with_suffix(".part")
    state, before_s, results = _read_state(part, identity)
    last = Prefilled(0, 0, 0.0)
    saved = time.monotonic()
    with bar(progress, f"reading {format_tokens(task.length)}", "tokens") as shown:
        for event in run_task(session, retriever, task, resume=state, answered=len(results)):
            if isinstance(event, NeedleResult):
                results.append(asdict(event))
                shown.describe(f"answering {len(results)} of {len(task.needles)}")
                _write_state(part, retriever.state(), before_s + last.elapsed_s, identity, results)
                continue
            last = event
            shown.update(event.done, event.total, event.elapsed_s)
            if time.monotonic() - saved > _KEEP_S:
                _write_state(part, retriever.state(), before_s + event.elapsed_s, identity, results)
                saved = time.monotonic()
    if part is not None:
        part.unlink(missing_ok=True)
    tokens = last.done + (0 if state is None else state.tokens)
    return {
        "tokens_read": tokens,
        "questions": len(task.needles),
        "read_s": round(before_s + last.elapsed_s, 1),
        "tokens_per_s": round(tokens / (before_s + last.elapsed_s), 1),
        "window_bytes": retriever.cache_bytes,
        "peak_bytes": peak_bytes(),
        "cpus": os.cpu_count(),
        "results": results,
    }


def _hidden(row: Mapping[str, Any], kind: str) -> bool:
    return bool(row["kind"] == kind and row["depth"] is not None)


def _outcome(row: Mapping[str, Any]) -> Outcome:
    return Outcome(**{**row["begun"], "wanted": tuple(row["begun"]["wanted"])})


def _print_point(point: Mapping[str, Any], console: Console) -> None:
    made = ", ".join(f"{clean_line(name)} {count:,}" for name, count in point["text"].items())
    peak = "" if point["peak_bytes"] is None else f", peak memory {figures.size(point['peak_bytes'])}"
    console.print(
        Text(
            f"{figures.tokens(point['tokens_read'])} read once for {point['questions']} questions in "
            f"{figures.duration(point['read_s'])} ({figures.speed(point['tokens_read'], point['read_s'])}), "
            f"window {figures.size(point['window_bytes'])}{peak}; characters of text: {made}",
            style="dim",
        )
    )


def _print_counts(points: Sequence[Mapping[str, Any]], kinds: Sequence[str], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("tokens", "needle", "in the passages", "answer begun", "free answer", "guessed, nothing hidden"):
        table.add_column(heading, justify="left" if heading == "needle" else "right")
    for point in points:
        for kind in kinds:
            rows = [row for row in point["results"] if row["kind"] == kind]
            here = [row for row in rows if row["depth"] is not None]
            gone = [row for row in rows if row["depth"] is None]
            counts = [
                sum(row["held"] for row in here),
                sum(row["begun"]["found"] for row in here),
                sum(row["said"] for row in here),
            ]
            guessed = sum(row["begun"]["found"] or row["said"] for row in gone)
            table.add_row(
                format_tokens(point["length"]),
                kind,
                *(f"{count} of {len(here)}" for count in counts),
                f"{guessed} of {len(gone)}" if gone else "-",
            )
    console.print(table)


def _read_state(path: Path | None, identity: Mapping[str, Any]) -> tuple[State | None, float, list[dict[str, Any]]]:
    kept = None if path is None else read_json(path, identity=identity)
    if kept is None:
        return None, 0.0, []
    carried = tuple(
        tuple(
            Carried(score, (document, start), stop, (first, last)) for score, document, start, stop, first, last in rows
        )
        for rows in kept["carried"]
    )
    return State(kept["chunks"], kept["tokens"], carried), kept["elapsed_s"], kept["results"]


def _write_state(
    path: Path | None,
    state: State,
    elapsed_s: float,
    identity: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
) -> None:
    if path is None:
        return
    rows = [[[each.score, *each.place, each.stop, *each.around] for each in carried] for carried in state.carried]
    content = {"identity": identity, "chunks": state.chunks, "tokens": state.tokens, "elapsed_s": elapsed_s}
    write_json(path, {**content, "carried": rows, "results": results})
