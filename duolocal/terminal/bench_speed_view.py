"""The tables of `duolocal bench decode`, `prefill` and `load`; the last line is one JSON object."""

import json

import torch
from rich.console import Console

from duolocal.bench.decode import measure_decode
from duolocal.bench.first_prompt import can_measure
from duolocal.bench.load import measure_loads
from duolocal.bench.machine import machine_facts
from duolocal.bench.prefill import measure_prefill
from duolocal.bench.text import text_ids
from duolocal.bench.timing import Spread
from duolocal.commands.bench import Decode, Load, Prefill
from duolocal.engine.engine import Engine
from duolocal.engine.prefill_choice import prefill_policy
from duolocal.models.loader import ModelSource, open_model
from duolocal.models.quantized import quantize_on_load
from duolocal.options import words_of
from duolocal.settings import LoadSettings
from duolocal.sizes import format_tokens
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import new_console, progress_console
from duolocal.terminal.fetching import fetch
from duolocal.terminal.progress import bar
from duolocal.terminal.still import StillLine
from duolocal.terminal.tables import new_table
from duolocal.tokenizer import load_tokenizer

PROMPT_TOKENS = 16  # of `bench load`


def bench_decode(options: Decode, settings: LoadSettings) -> int:
    """Print the decode speed at the ascending `contexts`; return the exit code."""
    console, progress, repeats = new_console(), progress_console(), options.repeats
    contexts, num_tokens = options.contexts, options.tokens
    source = fetch_and_open(settings, progress)
    token_ids = text_ids(load_tokenizer(source), contexts[-1] + 1)
    engine = load_engine(source, settings, progress, context=contexts[-1] + num_tokens + 1)
    table = new_table(">context", ">ms/token", ">min", ">max", ">tokens/s", ">GB/s")
    results = []
    with StillLine(progress) as line:
        for result in measure_decode(
            engine, token_ids, contexts, num_tokens=num_tokens, repeats=repeats, on_step=line.show
        ):
            results.append(result.report())
            table.add_row(
                format_tokens(result.context),
                *_ms(result.token_s),
                f"{1 / result.token_s.median:.2f}",
                f"{result.bytes_per_s / 1e9:.2f}",
            )
    console.print(table)
    console.print(
        f"{settings_line(engine)}; {num_tokens} greedy tokens, median, min and max of {repeats} runs; GB/s: bytes of "
        "weights, keys and values that a token must read, over its time",
        style="dim",
    )
    print(json.dumps(report_of("decode", settings, engine, tokens=num_tokens, results=results)))
    return 0


def bench_prefill(options: Prefill, settings: LoadSettings) -> int:
    """Print the prefill speed at the ascending `contexts` and `chunk_sizes`; return the exit code."""
    console, progress, repeats = new_console(), progress_console(), options.repeats
    contexts, chunk_sizes = options.contexts, options.chunk_sizes
    source = fetch_and_open(settings, progress)
    token_ids = text_ids(load_tokenizer(source), contexts[-1])
    engine = load_engine(source, settings, progress, context=max(16, contexts[-1]), chunk_size=chunk_sizes[-1])
    with StillLine(progress) as line:
        engines = {"exact": engine}
        if settings.prefill == "sparse":  # both ways, in turns, with the same weights
            policy = prefill_policy("sparse", chunk_size=chunk_sizes[0])
            engines["sparse"] = Engine.build(
                engine.transformer, engine.plan, kv=engine.kv, chunk_size=engine.chunk_size, prefill=policy
            )
        results = measure_prefill(engines, token_ids, contexts, chunk_sizes, repeats=repeats, on_step=line.show)
    table = new_table(">context", ">chunk", ">tokens/s", ">min", ">max", ">prefill", ">density")
    for result in results:
        rates = result.elapsed_s.per_s(result.context)
        table.add_row(
            format_tokens(result.context),
            format_tokens(result.chunk_size),
            *(f"{rates[name]:,.1f}" for name in ("median", "min", "max")),
            result.prefill,
            "" if result.density is None else f"{result.density:.3f}",
        )
    console.print(table)
    console.print(
        f"{settings_line(engine)}; median, min and max of {repeats} runs from an empty cache; density: blocks read by "
        "retrieval heads of those behind their windows",
        style="dim",
    )
    print(json.dumps(report_of("prefill", settings, engine, results=[result.report() for result in results])))
    return 0


def bench_load(options: Load, settings: LoadSettings) -> int:
    """Print how long it takes from nothing to a first token; return the exit code."""
    console, progress, repeats = new_console(), progress_console(), options.repeats
    source = fetch_and_open(settings, progress)
    path, token_ids = source.path, text_ids(load_tokenizer(source), PROMPT_TOKENS)
    del source  # its mapped pages could not be dropped
    prompt = words_of(settings, without=("model",)) if can_measure() else None
    with StillLine(progress) as line:
        speed = measure_loads(
            {"": path}, token_ids, settings, repeats=repeats, cold=options.cold, prompt=prompt, on_step=line.show
        )[""]
    table = new_table("~step", ">seconds", ">min", ">max")
    for name, steps_s in speed.steps_s.items():
        table.add_row(name, *_seconds(steps_s))
    if speed.prompt_s is not None:
        table.add_row("chat", *_seconds(speed.prompt_s))
    console.print(table)
    console.print(
        f"KV {speed.kv}, context {speed.context:,}; median, min and max of {repeats} fresh processes; the model file "
        f"{'was dropped from' if speed.cold else 'is in'} the page cache; first token: of a prompt of {PROMPT_TOKENS}; "
        "chat: from the command line to the first prompt; "
        f"peak memory {figures.size(speed.peak_bytes)}",
        style="dim",
    )
    facts = machine_facts(threads=settings.threads, device=speed.device)
    head = {"benchmark": "load", "model": settings.model, "heads": settings.heads, "repeats": repeats}
    print(json.dumps({**head, **speed.report(), "machine": facts}))
    return 0


def fetch_and_open(settings: LoadSettings, progress: Console) -> ModelSource:
    """Find or fetch the model and open it."""
    return quantize_on_load(open_model(fetch(settings.model, progress)), settings.weights)


def load_engine(
    source: ModelSource, settings: LoadSettings, progress: Console, *, context: int, chunk_size: int | None = None
) -> Engine:
    with bar(progress, f"loading {clean_line(settings.model)}", "layers") as shown:
        return Engine.load(
            source,
            settings,
            context=context,
            chunk_size=chunk_size,
            kv_device_memory=None,
            prefill="exact",
            speculate="off",  # what is measured is the single step, whatever the text
            events=shown,
        )


def _seconds(seconds: Spread) -> list[str]:
    return [f"{value:.3f}" for value in (seconds.median, seconds.least, seconds.most)]


def _ms(seconds: Spread) -> list[str]:
    return [f"{1e3 * value:.2f}" for value in (seconds.median, seconds.least, seconds.most)]


def settings_line(engine: Engine) -> str:
    """Say under which settings an engine was measured."""
    plan = engine.plan
    return f"KV {engine.kv}, {plan.num_retrieval} of {plan.num_retrieval + plan.num_streaming} heads retrieval"


def report_of(name: str, settings: LoadSettings, engine: Engine, **more: object) -> dict[str, object]:
    """Return what the JSON of a benchmark says: its settings, `more`, and the machine."""
    plan = engine.plan
    return {
        "benchmark": name,
        "model": settings.model,
        "kv": engine.kv,
        **plan.report(),
        **more,
        "machine": machine_facts(
            threads=settings.threads or torch.get_num_threads(), device=str(engine.transformer.device)
        ),
    }
