"""The tables of `duolocal eval ppl|kl`; the last line is one JSON object."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from duolocal.commands.eval import Curve, Reading, Variants
from duolocal.evaluate import Lineup
from duolocal.evaluate.compare import Comparison, compare, cut_windows
from duolocal.settings import LoadSettings
from duolocal.sizes import format_tokens
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import print_prose
from duolocal.terminal.eval_parts import (
    choices_report,
    eval_consoles,
    haystack,
    load_lineup,
    open_source,
    print_choices,
)
from duolocal.terminal.pictures import curve
from duolocal.terminal.progress import bar
from duolocal.terminal.tables import new_table
from duolocal.tokenizer import Tokenizer, load_tokenizer


def ppl(read: Reading, curve: Curve, variants: Variants, settings: LoadSettings) -> int:
    """Print perplexity of every setting against dense, over windows of a text; return the exit code."""
    return _compare("ppl", read, curve, variants, settings)


def kl(read: Reading, curve: Curve, variants: Variants, settings: LoadSettings) -> int:
    """Print perplexity and KL of every setting against dense, over windows of a text; return the exit code."""
    return _compare("kl", read, curve, variants, settings)


def _compare(what: str, read: Reading, curve: Curve, variants: Variants, settings: LoadSettings) -> int:
    console, progress = eval_consoles()
    text, png = haystack(read.text), curve.png
    source = open_source(settings, progress)
    tokenizer = load_tokenizer(source)
    bos = bos_ids(tokenizer)
    windows = cut_windows(tokenizer.encode(text[0]), num_tokens=read.tokens, context=read.context, bos=bos)
    context = len(windows[0])
    lineup = load_lineup(source, settings, variants.settings(), context=context, side_by_side=True, progress=progress)
    print_choices(lineup, console)
    with bar(progress, "measuring", "tokens") as shown:
        engines = [(choice.name, lineup.engine(choice)) for choice in lineup.everyone]
        results = compare(engines, windows, on_progress=shown.update)
    console.print(_ppl_table(results) if what == "ppl" else _kl_table(results, lineup, context))
    console.print(
        Text(
            f"{clean_line(text[1])}: {len(windows)} x {context:,} tokens, each window read from nothing; ± is the "
            "standard error over windows, worst the worst window"
            + ("; B/token: what each further token takes" if what == "kl" else ""),
            style="dim",
        )
    )
    if png is not None:
        _draw(what, results, lineup, context, png, console, model=settings.model)
    report = {"evaluation": what, "model": settings.model, "text": text[1], "tokens": read.tokens, "context": context}
    report |= {"windows": len(windows), "dense_kv_bytes": lineup.dense_bytes(context)}
    report |= {"settings": choices_report(lineup, context)}
    print(json.dumps({**report, "results": {result.name: result.report() for result in results}}))
    return 0


def bos_ids(tokenizer: Tokenizer) -> list[int]:
    """Return what a text has to begin with for this model: BOS, or nothing."""
    return [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []


def _kl_table(results: Sequence[Comparison], lineup: Lineup, context: int) -> Table:
    at = f"KV at {format_tokens(context)}"
    table = new_table("<heads KV", f">{at}", ">B/token", ">KL", ">±", ">worst", ">top-1", ">perplexity", ">±")
    dense_bytes = lineup.dense_bytes(context)
    for result, choice in zip(results, lineup.everyone, strict=True):
        each = f"{lineup.bytes_per_token(choice):,.0f}"
        if choice is lineup.dense:
            row = [figures.size(dense_bytes), each, "0", "", "", "", f"{result.perplexity:.3f}", ""]
        else:
            row = [
                f"{lineup.kv_bytes(choice, context) / dense_bytes:.0%}",
                each,
                f"{result.kl:.5f}",
                error_of(result.kl_error, ".4f"),
                f"{result.worst_kl:.4f}",
                f"{result.top1:.2%}",
                f"{result.rise:+.2%}",
                error_of(result.rise_error, ".2%"),
            ]
        table.add_row(Text(clean_line(result.name)), *row)
    return table


def _ppl_table(results: Sequence[Comparison]) -> Table:
    table = new_table("<heads KV", ">perplexity", ">±", ">against dense", ">±", ">worst window")
    for at, result in enumerate(results):
        row = [f"{result.perplexity:.3f}", error_of(result.perplexity_error, ".3f")]
        if at:
            row += [f"{result.rise:+.2%}", error_of(result.rise_error, ".2%"), f"{result.worst_rise:+.2%}"]
        table.add_row(Text(clean_line(result.name)), *row)
    return table


def error_of(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _draw(
    what: str,
    results: Sequence[Comparison],
    lineup: Lineup,
    context: int,
    png: Path,
    console: Console,
    *,
    model: str,
) -> None:
    points: dict[str, list[tuple[float, float]]] = {}
    for result, choice in zip(results[1:], lineup.choices, strict=True):
        y = result.kl if what == "kl" else 100 * result.rise
        points.setdefault(f"KV {choice.kv}", []).append((lineup.kv_bytes(choice, context) / context / 1024, y))
    path = curve(
        points,
        path=png,
        title=f"{clean_line(model)}, windows of {context:,} tokens",
        x_title="KV memory, KiB per token",
        y_title="KL to dense, nats per token" if what == "kl" else "perplexity above dense, %",
        levels={"0.02": 0.02} if what == "kl" else {"+2%": 2},
    )
    print_prose(console, clean_line(str(path)), "dim")
