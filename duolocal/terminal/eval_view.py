"""The tables of `duolocal eval`: measured elsewhere, printed here; the last line is one JSON object."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from duolocal.engine.engine import Engine
from duolocal.evaluate import Needle, PasskeyResult, passkey, passkey_prompts
from duolocal.models.loader import open_model
from duolocal.models.registry import resolve
from duolocal.sample_text import license_text
from duolocal.settings import ChatSettings
from duolocal.terminal.clean import clean_line
from duolocal.terminal.progress import bar
from duolocal.tokenizer import Tokenizer, load_tokenizer

ANSWER_SHOWN = 12  # characters: enough for a passkey, and two columns fit into 80
ROOM_TO_ANSWER = 128  # tokens: the prompt's length is met to within a few, and an answer follows


def eval_passkey(
    settings: ChatSettings,
    text: str | None,
    *,
    num_tokens: int,
    depths: int,
    seed: int,
    dense: bool,
    console: Console,
    progress: Console,
) -> int:
    """Print which passkeys the model returns under `settings`, and which the dense 16-bit model does.

    They are hidden in `text`, or in licences where it is None.
    """
    with bar(progress, f"fetching {clean_line(settings.model)}", "bytes") as shown:
        source = open_model(resolve(settings.model, on_progress=shown.update))
    tokenizer = load_tokenizer(source)
    places = [depth / max(1, depths - 1) for depth in range(depths)]
    needles = passkey_prompts(tokenizer, text or license_text(), num_tokens=num_tokens, depths=places, seed=seed)
    runs: dict[str, list[PasskeyResult]] = {}
    sizes = {"sink_size": settings.sink_size, "recent_size": settings.recent_size}
    for name, choice in (
        ("chosen", {"kv": settings.kv, "heads": settings.heads, **sizes}),
        ("dense", {"kv": "16", "heads": "all"}),
    ):
        if name == "dense" and not dense:
            continue
        with bar(progress, f"loading {clean_line(settings.model)}", "layers") as shown:
            engine = Engine.load(
                source,
                context=num_tokens + ROOM_TO_ANSWER,
                device=settings.device,
                threads=settings.threads,
                kernels=settings.kernels,
                on_layer=shown.update,
                on_build=shown.compiling,
                **choice,
            )
        if name == "chosen":
            plan = engine.plan
            console.print(
                f"KV {engine.kv}, {plan.num_retrieval} retrieval and {plan.num_streaming} streaming heads, "
                f"sink {plan.sink_size}, recent {plan.recent_size}" + ("; dense: all heads, 16 bits" if dense else ""),
                style="dim",
            )
        runs[name] = _run(engine, tokenizer, needles, name, progress)
    _print_table(runs, console)
    found = {name: sum(result.found for result in results) for name, results in runs.items()}
    report = {"evaluation": "passkey", "model": settings.model, "tokens": num_tokens, "depths": depths, "seed": seed}
    rows = {name: [{**asdict(result), "found": result.found} for result in results] for name, results in runs.items()}
    print(json.dumps({**report, "found": found, "results": rows}))
    return 0


def _run(
    engine: Engine, tokenizer: Tokenizer, needles: Sequence[Needle], name: str, progress: Console
) -> list[PasskeyResult]:
    results = []
    total = sum(len(needle.token_ids) for needle in needles)
    with bar(progress, f"reading ({name})", "tokens") as shown:
        for event in passkey(engine, tokenizer, needles):
            if isinstance(event, PasskeyResult):
                results.append(event)
            else:
                shown.update(event, total)
    return results


def _print_table(runs: dict[str, list[PasskeyResult]], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("depth", "tokens", "passkey"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in runs:
        table.add_column(name, no_wrap=True)
        table.add_column("NLL", justify="right", no_wrap=True, min_width=6)
    for row in zip(*runs.values(), strict=True):
        cells = [f"{row[0].depth:.0%}", f"{row[0].num_tokens:,}", row[0].passkey]
        for result in row:
            answer = " ".join(clean_line(result.answer).split())
            cells += [f"{'found ' if result.found else 'MISSED'} {answer[:ANSWER_SHOWN]}", f"{result.nll:.3f}"]
        table.add_row(*cells)
    console.print(table)
    for name, results in runs.items():
        mean = sum(result.nll for result in results) / len(results)
        console.print(f"{name}: {sum(r.found for r in results)} of {len(results)} found, mean NLL {mean:.3f}")
