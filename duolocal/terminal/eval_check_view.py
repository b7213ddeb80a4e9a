"""What `duolocal eval check` prints: figures, a curve, and the verdict; the last line is one JSON object."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from duolocal.commands.eval import Check, Variants
from duolocal.documents import Document
from duolocal.engine.resolve import default_context
from duolocal.evaluate import Lineup, Outcome, score
from duolocal.evaluate.check import GOOD, SMALL, CheckResult, check, document_tokens
from duolocal.settings import LoadSettings
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import print_prose
from duolocal.terminal.eval_compare_view import bos_ids
from duolocal.terminal.eval_parts import bars, eval_consoles, load_lineup, open_source, print_choices
from duolocal.terminal.pictures import curve
from duolocal.terminal.progress import bar
from duolocal.terminal.tables import new_table
from duolocal.tokenizer import load_tokenizer

PROMPT_ROOM = 256  # tokens for the question and answer around a passkey, where the context has them


def eval_check(options: Check, variants: Variants, settings: LoadSettings) -> int:
    """Check a document under one setting against dense and print the verdict; see `duolocal.evaluate.check`."""
    console, progress = eval_consoles()
    document, png = options.doc, options.png
    source = open_source(settings, progress)
    tokenizer = load_tokenizer(source)
    bos = bos_ids(tokenizer)
    limit = settings.context or default_context(source.config)
    with bar(progress, f"reading {clean_line(document.name)}", ""):
        ids = tokenizer.encode(document.text)
    token_ids = document_tokens(ids, context=limit - len(bos), asked=options.tokens, name=document.name)
    room = min(limit, len(bos) + len(token_ids) + PROMPT_ROOM)
    lineup = load_lineup(source, settings, variants.settings(), context=room, side_by_side=True, progress=progress)
    print_choices(lineup, console)
    if document.note:
        console.print(Text(clean_line(document.note), style="dim"))
    takes = f"this reads {len(token_ids):,} tokens twice, dense and as chosen, and then takes up to {options.minutes:g}"
    console.print(f"{takes} minutes for passkeys and other settings (--minutes)", style="dim")
    with bar(progress, "reading", "tokens") as shown:

        def step(what: str, done: int, total: int) -> None:
            shown.describe(what)
            shown.update(done, total)

        result = check(
            lineup, tokenizer, token_ids, minutes=options.minutes, seed=options.seed, bos=bos, on_progress=step
        )
    _print(result, len(ids), document, console)
    if png is not None:
        _draw(result, lineup, png, console, title=f"{document.name}, {settings.model}")
    console.print(Text(_verdict_line(result), style="bold"))
    print(json.dumps(_report(result, settings, document, len(ids))))
    return 0


def _print(result: CheckResult, whole: int, document: Document, console: Console) -> None:
    dense, ours = result.comparisons
    part = "" if result.num_tokens == whole else f" (the first of {whole:,}; --tokens)"
    console.print(Text(f"{clean_line(document.name)}: {figures.tokens(result.num_tokens)}{part}"))
    table = new_table("<", ">dense", f">{clean_line(result.chosen.name)}")
    runs = [result.needles[each.name] for each in result.comparisons]
    table.add_row("KV memory", *map(figures.size, result.kv_bytes))
    table.add_row("time to read it", *(figures.duration(each.elapsed_s) for each in result.comparisons))
    table.add_row("time per token of an answer", *map(_decode_time, runs))
    table.add_row("perplexity", f"{dense.perplexity:.3f}", f"{ours.perplexity:.3f} ({ours.rise:+.2%})")
    table.add_row("KL to dense, nats per token", "0", f"{ours.kl:.5f}")
    table.add_row("KL by quarter of the document", "", " ".join(f"{kl:.4f}" for kl in ours.kl_by_quarter))
    table.add_row("likeliest token is the same", "", f"{ours.top1:.2%}")
    table.add_row("passkeys found", *map(_found, runs))
    console.print(table)
    saved = result.kv_bytes[0] - result.kv_bytes[1]
    change = f"{figures.size(abs(saved))} {'saved' if saved >= 0 else 'more'}"
    share = abs(saved) / result.kv_bytes[0]
    console.print(Text(f"KV memory: {change} ({share:.0%} of the dense 16-bit cache)"))
    if result.needle_tokens and result.needle_tokens < result.num_tokens:
        console.print(f"passkeys were hidden in the first {result.needle_tokens:,} tokens", style="dim")
    if result.point_tokens:
        _print_points(result, console)
    for note in result.notes:
        console.print(Text(clean_line(note), style="dim"))


def _print_points(result: CheckResult, console: Console) -> None:
    table = new_table("<setting", ">KV per token", ">KL", ">perplexity", "<")
    most = max(point.kl for point in result.points)
    for point in sorted(result.points, key=lambda point: point.kv_bytes):
        chosen = point.dial is None
        table.add_row(
            Text(clean_line(point.name), style="bold" if chosen else ""),
            figures.size(point.kv_bytes // result.num_tokens),
            f"{point.kl:.5f}",
            f"{point.rise:+.2%}",
            Text(bars(point.kl, most) + (" ◀ yours" if chosen else ""), style="cyan"),
        )
    console.print(table)
    if result.point_tokens < result.num_tokens:
        part = f"these were compared on the first {result.point_tokens:,} tokens; KL grows with length"
        console.print(part, style="dim")


def _verdict_line(result: CheckResult) -> str:
    ours = result.comparisons[1]
    dense_run, run = result.needles.values()
    known = [outcome.found for outcome, other in zip(run, dense_run, strict=True) if other.found]
    passkeys = f"passkeys: {known.count(True)} of the {len(known)} that dense finds" if run else "no passkeys asked"
    return (
        f"verdict: {result.verdict}: KL {ours.kl:.4f} (good ≤ {GOOD.kl:g}, small loss ≤ {SMALL.kl:g}), perplexity "
        f"{ours.rise:+.1%} (≤ +{GOOD.rise:.0%}, ≤ +{SMALL.rise:.0%}), {passkeys}; {clean_line(result.advice)}"
    )


def _decode_time(outcomes: list[Outcome]) -> str:
    if not outcomes:
        return "-"
    return f"{1000 * min(outcome.decode_s for outcome in outcomes):.0f} ms"


def _found(outcomes: list[Outcome]) -> str:
    if not outcomes:
        return "-"
    total = score(outcomes)
    return f"{total.found} of {total.count}, NLL {total.nll:.3f}"


def _report(result: CheckResult, settings: LoadSettings, document: Document, whole: int) -> dict[str, object]:
    dense, ours = result.comparisons
    plan = result.chosen.plan
    return {
        "evaluation": "check",
        "model": settings.model,
        "document": document.name,
        "document_tokens": whole,
        "tokens": result.num_tokens,
        "heads": result.chosen.setting.heads,
        "kv": result.chosen.kv,
        **plan.report(),
        "dense_kv_bytes": result.kv_bytes[0],
        "kv_bytes": result.kv_bytes[1],
        "dense": dense.report(),
        "chosen": ours.report(),
        "passkeys": {name: [asdict(outcome) for outcome in run] for name, run in result.needles.items()},
        "neighbours": [asdict(point) for point in result.points],
        "neighbour_tokens": result.point_tokens,
        "limits": {"good": asdict(GOOD), "small loss": asdict(SMALL)},
        "notes": result.notes,
        "verdict": result.verdict,
        "advice": result.advice,
    }


def _draw(result: CheckResult, lineup: Lineup, png: Path, console: Console, *, title: str) -> None:
    at = {point.name: (point.kv_bytes / result.num_tokens / 1024, point.kl) for point in result.points}
    here, *others = result.points
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in others:  # one line for each dial, through the chosen setting
        lines.setdefault((point.dial or "").split()[0], [at[here.name]]).append(at[point.name])
    path = curve(
        lines or {here.name: [at[here.name]]},
        path=png,
        title=clean_line(title),
        x_title="KV memory, KiB per token",
        y_title="KL to dense, nats per token",
        levels={"good": GOOD.kl, "small loss": SMALL.kl},
        marked={"yours": at[here.name]} | {point.name: at[point.name] for point in others},
    )
    print_prose(console, clean_line(str(path)), "dim")
