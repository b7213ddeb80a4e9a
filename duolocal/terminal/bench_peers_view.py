"""The tables of `duolocal bench peers`: one per length as it is done, a summary, then one JSON object."""

import json
from collections.abc import Sequence

import torch
from rich.table import Table

from duolocal.bench.compare import DUOLOCAL, RunnerResult, best_of, comparison, fastest, peers_of, ratios
from duolocal.bench.machine import machine_facts
from duolocal.bench.peer_list import (
    FLASH_QUANTIZED,
    LLAMA_CPP,
    TRANSFORMERS,
    PeerChoice,
    check_model,
    check_packages,
    check_room,
    has_requantized,
    requantize,
    requantized_path,
    runner_specs,
)
from duolocal.bench.peers import METHOD, PeersRun, measure_peers
from duolocal.bench.text import text_ids
from duolocal.commands.bench import Peers
from duolocal.errors import SettingsError
from duolocal.kernels.cpu.threads import default_threads
from duolocal.plan.free import available_bytes
from duolocal.settings import LoadSettings
from duolocal.sizes import format_tokens
from duolocal.terminal import figures
from duolocal.terminal.bench_speed_view import fetch_and_open
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import new_console, progress_console
from duolocal.terminal.still import StillLine
from duolocal.terminal.tables import new_table
from duolocal.tokenizer import load_tokenizer

BUSY_SHARE = 0.02  # of a core, used by children that should be idle: worth a warning


def bench_peers(options: Peers, settings: LoadSettings) -> int:
    """Print speed and memory of duolocal beside the chosen peers at the ascending lengths; return the exit code."""
    choice = PeerChoice(
        peers=options.peers,
        flash=tuple(word == "on" for word in options.llama_flash),
        kv=options.llama_kv,
        requantized=not options.no_requantized,
        limits=dict(options.limit),
    )
    console, progress, contexts, json_file = new_console(), progress_console(), options.contexts, options.json
    decode_tokens, repeats = options.tokens, options.repeats
    check_packages(choice.peers)
    if json_file is not None and not json_file.parent.is_dir():
        raise SettingsError(f"--json is {json_file}: there is no folder {json_file.parent}")
    if settings.weights != "auto":
        raise SettingsError(f"--weights is {settings.weights}: the peers read the file as it is; leave it out")
    source = fetch_and_open(settings, progress)
    check_model(source, choice.peers)
    threads = settings.threads or default_threads()
    q4_0 = None
    if has_requantized(source, choice):
        if not requantized_path(source).is_file():
            progress.print(f"requantizing {clean_line(source.path.name)} to Q4_0, once", style="dim")
        q4_0 = requantize(source, threads=threads)
    specs = runner_specs(source, settings, choice, contexts, threads=threads, decode_tokens=decode_tokens, q4_0=q4_0)
    check_room(source, specs, contexts[-1], available=available_bytes(torch.device("cpu")))
    token_ids = text_ids(load_tokenizer(source), contexts[-1] + 1)
    facts = machine_facts(threads=threads)
    console.print(
        f"{clean_line(settings.model)} ({source.weight_format}), {facts['cpu']}; threads: {threads}, runners: "
        f"{len(specs)}, decoded tokens: {decode_tokens}, rounds: {repeats}",
        style="dim",
    )
    run = PeersRun()

    def report() -> dict[str, object]:
        done = [context for context in contexts if any(context in result.measured for result in run.results)]
        return {
            "benchmark": "peers",
            "model": settings.model,
            "weight_format": source.weight_format,
            "file_bytes": source.path.stat().st_size,
            "contexts": done,
            "decode_tokens": decode_tokens,
            "repeats": repeats,
            "machine": facts,
            "method": METHOD,
            "idle_cpu_share": round(run.idle_cpu_share, 4),
            **comparison(run.results, done),
        }

    with StillLine(progress) as line:
        for context in measure_peers(
            specs,
            token_ids,
            contexts,
            threads=threads,
            repeats=repeats,
            decode_tokens=decode_tokens,
            run=run,
            on_step=line.show,
        ):
            line.clear()
            console.print()
            console.print(length_table(run.results, context))
            if json_file is not None:
                json_file.write_text(json.dumps(report(), indent=1) + "\n", encoding="utf-8")
    console.print()
    console.print(f"{clean_line(_main(run.results).spec.name)} divided by", style="bold")
    console.print(summary_table(run.results, contexts))
    for text in _footnotes(run, choice, contexts):
        console.print(text, style="dim")
    print(json.dumps(report()))
    return 0


def length_table(results: Sequence[RunnerResult], context: int) -> Table:
    """Return the figures of every runner at one length, and those of the first duolocal divided by them."""
    table = new_table(
        f"<{format_tokens(context)} tokens", ">prefill", ">decode", ">peak", ">×prefill", ">×decode", ">×peak"
    )
    main = _main(results)
    against = {ratio.against: ratio for ratio in ratios(results, context) if ratio.runner == main.spec.name}
    for result in results:
        measured, ratio = result.measured.get(context), against.get(result.spec.name)
        if measured is None:
            table.add_row(clean_line(result.spec.name), *"------")
            continue
        table.add_row(
            clean_line(result.spec.name),
            _rate(measured.prefill_tokens_per_s),
            _rate(measured.decode_tokens_per_s),
            figures.size(measured.peak_bytes),
            *(["", "", ""] if ratio is None else map(_times, (ratio.prefill, ratio.decode, ratio.peak_memory))),
        )
    return table


def summary_table(results: Sequence[RunnerResult], contexts: Sequence[int]) -> Table:
    """Return the first duolocal against the fastest setting of every peer, by length."""
    main = _main(results)
    table = new_table("<the fastest", ">tokens", ">×prefill", ">×decode", ">×peak", "<prefill, decode with")
    for peer in peers_of(results):
        for context in contexts:
            best = fastest(results, peer, context)
            if best is None:
                table.add_row(peer, format_tokens(context), *"----")
                continue
            (ratio,) = (
                ratio
                for ratio in ratios(results, context)
                if ratio.runner == main.spec.name and ratio.against == best_of(peer)
            )
            settings = [runner.removeprefix(peer).strip() for runner in (best.prefill_runner, best.decode_runner)]
            table.add_row(
                peer,
                format_tokens(context),
                *map(_times, (ratio.prefill, ratio.decode, ratio.peak_memory)),
                ", ".join(filter(None, settings)),
            )
    return table


def _footnotes(run: PeersRun, choice: PeerChoice, contexts: Sequence[int]) -> list[str]:
    main = _main(run.results).spec.name
    notes = ["", f"prefill, decode: tokens per second; ×: {main} divided by the row. " + METHOD]
    if any("key" in result.spec.options for result in run.results):
        notes.append(
            "llama.cpp settings: fa is flash attention, then the KV format; q8_0/f16: keys q8_0, values f16 (it "
            "quantizes values only with flash attention). × peak of the fastest: against its smallest setting."
        )
    flash_quantized = any(choice.flash) and any(kv != "f16" for kv in choice.kv) and LLAMA_CPP in choice.peers
    for peer in (*choice.peers, *((FLASH_QUANTIZED,) if flash_quantized else ())):
        limit = choice.limit(peer)
        if limit is not None and limit < contexts[-1]:
            longest = format_tokens(contexts[-1])
            notes.append(f"- {peer} is measured up to {format_tokens(limit)} (--limit {peer}={longest} for more)")
    libraries = {result.spec.peer: result.loaded.get("imported_bytes") for result in run.results}
    sizes = ", ".join(f"{peer} {figures.size(size)}" for peer, size in libraries.items() if size)
    notes.append(f"Of the peaks, an interpreter with the libraries of each, before any model: {sizes}.")
    if TRANSFORMERS in libraries:
        notes.append("transformers dequantizes the weights to float32 while loading, and its peak is from then.")
    if run.idle_cpu_share > BUSY_SHARE:
        notes.append(
            f"Doubtful: children that should have been idle used {run.idle_cpu_share:.2f} cores while others ran."
        )
    return notes


def _main(results: Sequence[RunnerResult]) -> RunnerResult:
    return next(result for result in results if result.spec.peer == DUOLOCAL)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _times(value: float) -> str:
    return f"{value:.2f}"
