"""The tables of `duolocal bench profile`; the last line is one JSON object."""

import json
from typing import Any

from rich.table import Table

from duolocal.bench.machine import machine_facts
from duolocal.bench.profile import Ceilings, StepProfile, compiled_kernels, measure_ceilings, profile_decode
from duolocal.bench.profile import profile_prefill as profile_chunk
from duolocal.bench.text import text_ids
from duolocal.commands.bench import Profile
from duolocal.engine.resolve import DEFAULT_CHUNK_SIZE
from duolocal.settings import LoadSettings
from duolocal.terminal.bench_speed_view import fetch_and_open, load_engine
from duolocal.terminal.consoles import new_console, progress_console
from duolocal.terminal.still import StillLine
from duolocal.terminal.tables import new_table
from duolocal.tokenizer import load_tokenizer


def bench_profile(options: Profile, settings: LoadSettings) -> int:
    """Print where a decode step and a prefill chunk spend their time at each length; return the exit code."""
    console, progress, contexts = new_console(), progress_console(), options.contexts
    source = fetch_and_open(settings, progress)
    chunk = DEFAULT_CHUNK_SIZE["cpu"]
    token_ids = text_ids(load_tokenizer(source), contexts[-1] + chunk + 1)
    engine = load_engine(source, settings, progress, context=contexts[-1] + chunk + 1)
    kernels = compiled_kernels(engine)
    profiles: list[tuple[str, StepProfile]] = []
    with StillLine(progress) as line:
        line.show("measuring what the machine can do")
        ceilings = measure_ceilings(kernels)
        for context in contexts:
            line.show(f"filling up to {context:,} tokens")
            engine.prefill(token_ids[engine.position : context])
            line.show(f"{context:,} tokens: profiling")
            following = token_ids[context : context + chunk]
            profiles.append(("decode", profile_decode(engine, following[0], repeats=options.repeats)))
            profiles.append(("prefill", profile_chunk(engine, following, repeats=max(3, options.repeats // 10))))
            ceilings = ceilings.best(measure_ceilings(kernels))
    for name, profile in profiles:
        console.print(_table(name, profile, ceilings))
    console.print(
        f"Ceilings measured here with {kernels.num_threads} threads: reading memory "
        f"{ceilings.read_bytes_per_s / 1e9:.1f} GB/s, float32 product {ceilings.flop_per_s / 1e9:.0f} GFLOP/s. "
        "The last column is the share of the nearer one: bytes that must be read, or arithmetic.",
        style="dim",
    )
    report = {
        "benchmark": "profile",
        "model": settings.model,
        "kv": engine.kv,
        "retrieval_heads": engine.plan.num_retrieval,
        "streaming_heads": engine.plan.num_streaming,
        "ceilings": {
            "read_gb_per_s": round(ceilings.read_bytes_per_s / 1e9, 2),
            "gflop_per_s": round(ceilings.flop_per_s / 1e9, 1),
        },
        "steps": [_report(name, profile, ceilings) for name, profile in profiles],
        **machine_facts(threads=kernels.num_threads),
    }
    print(json.dumps(report))
    return 0


def _table(name: str, profile: StepProfile, ceilings: Ceilings) -> Table:
    what = "decode of one token" if name == "decode" else f"prefill of {profile.tokens:,} tokens"
    table = new_table(title=f"{what} after {profile.position:,}: {1e3 * profile.whole_s:.2f} ms")
    table.add_column("operation")
    for heading in ("calls", "ms", "share", "GB/s", "GFLOP/s", "of ceiling"):
        table.add_column(heading, justify="right", no_wrap=True)
    for operation in profile.operations:
        row = operation.report(ceilings, profile.whole_s)
        table.add_row(
            operation.name,
            str(operation.calls),
            f"{row['ms']:.3f}",
            f"{row['share']:.1%}",
            *("" if row[key] is None else f"{row[key]:.1f}" for key in ("gb_per_s", "gflop_per_s")),
            "" if row["of_ceiling"] is None else f"{row['of_ceiling']:.0%}",
        )
    rest = f"{1e3 * profile.rest_s:.3f}"
    table.add_row(
        "Python, sampling" if name == "decode" else "Python", "", rest, f"{profile.rest_s / profile.whole_s:.1%}"
    )
    return table


def _report(name: str, profile: StepProfile, ceilings: Ceilings) -> dict[str, Any]:
    return {
        "step": name,
        "tokens": profile.tokens,
        "position": profile.position,
        "ms": round(1e3 * profile.whole_s, 4),
        "rest_ms": round(1e3 * profile.rest_s, 4),
        "operations": [operation.report(ceilings, profile.whole_s) for operation in profile.operations],
    }
