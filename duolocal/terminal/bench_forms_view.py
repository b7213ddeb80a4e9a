"""The table of `duolocal bench forms`: one model in several forms, loaded in turn; the last line is one JSON object."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from duolocal.bench.first_prompt import can_measure
from duolocal.bench.forms import disk_bytes, make_form
from duolocal.bench.load import LoadSpeed, measure_loads
from duolocal.bench.machine import machine_facts
from duolocal.bench.text import text_ids
from duolocal.commands.bench import Forms, Load
from duolocal.files import free_name
from duolocal.models.loader import open_model
from duolocal.options import words_of
from duolocal.settings import LoadSettings
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import new_console, progress_console
from duolocal.terminal.fetching import fetch
from duolocal.terminal.still import StillLine
from duolocal.terminal.tables import new_table
from duolocal.tokenizer import load_tokenizer

PROMPT_TOKENS = 16
CONTEXT = 8192


def bench_forms(options: Forms, load: Load, settings: LoadSettings) -> int:
    """Print load time and peak memory of the model, of forms made of it, and of others; return the exit code.

    What is measured is loading: heads and KV format are fixed, so that none is ranked or measured on its first use."""
    console, progress = new_console(), progress_console()
    settings = replace(
        settings,
        context=settings.context or CONTEXT,
        heads="all" if settings.heads == "auto" else settings.heads,
        kv="int8" if settings.kv == "auto" else settings.kv,
    )
    sources = {settings.model: fetch(settings.model, progress)}
    for other in options.also:
        sources[other] = fetch(other, progress)
    first = open_model(sources[settings.model])
    token_ids = text_ids(load_tokenizer(first), PROMPT_TOKENS)
    paths: dict[str, Path] = {}
    for path in sources.values():
        source = open_model(path)
        paths[free_name(f"{source.kind} {source.weight_format}", taken=paths.__contains__)] = path
        del source  # its mapped pages could not be dropped
    del first
    prompt = words_of(settings, without=("model",)) if can_measure() else None
    folder = Path(tempfile.mkdtemp(prefix="duolocal-forms-", dir=options.work))
    try:
        with StillLine(progress) as line:
            for form in options.forms:
                line.show(f"making {form} of {clean_line(settings.model)}")
                made = make_form(
                    form,
                    sources[settings.model],
                    folder / form,
                    device=settings.device,
                    threads=settings.threads,
                )
                source = open_model(made)
                paths[free_name(f"{source.kind} {source.weight_format}", taken=paths.__contains__)] = made
                del source
            speeds = measure_loads(
                paths,
                token_ids,
                settings,
                repeats=load.repeats,
                cold=load.cold,
                prompt=prompt,
                on_step=line.show,
            )
        sizes = {name: disk_bytes(path) for name, path in paths.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    console.print(_table(speeds, sizes))
    dropped = "was dropped from" if all(speed.cold for speed in speeds.values()) else "is in"
    console.print(
        f"seconds, medians of {load.repeats} fresh processes each, taking turns; KV {settings.kv}, heads "
        f"{settings.heads}, context {settings.context:,}; the file {dropped} the page cache; first token: of a prompt "
        f"of {PROMPT_TOKENS}; chat: from the command line to the first prompt; peak: resident memory with the mapped "
        f"pages that were read, of which {figures.size(min(speed.imported_bytes for speed in speeds.values()))} are "
        "there after the imports",
        style="dim",
        soft_wrap=True,
    )
    facts = machine_facts(threads=settings.threads, device=next(iter(speeds.values())).device)
    results = [{"form": name, "disk_bytes": sizes[name], **speed.report()} for name, speed in speeds.items()]
    head = {"benchmark": "forms", "model": settings.model, "others": list(options.also), "repeats": load.repeats}
    head |= {"heads": settings.heads, "kv": settings.kv}
    print(json.dumps({**head, "results": results, "machine": facts}))
    return 0


def _table(speeds: dict[str, LoadSpeed], sizes: dict[str, int]) -> Table:
    table = new_table("<form", ">on disk", ">open", ">load", ">first token", ">total", ">chat", ">peak")
    for name, speed in speeds.items():
        steps = speed.steps_s
        seconds = [f"{steps[step].median:.3f}" for step in ("open", "load", "first token", "total")]
        chat = "" if speed.prompt_s is None else f"{speed.prompt_s.median:.3f}"
        table.add_row(clean_line(name), figures.size(sizes[name]), *seconds, chat, figures.size(speed.peak_bytes))
    return table
