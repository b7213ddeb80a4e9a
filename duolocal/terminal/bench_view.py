"""The tables of `duolocal bench`: measured elsewhere, printed here; the last line is one JSON object."""

import json
from dataclasses import asdict

from rich.text import Text

from duolocal.bench import memory_report
from duolocal.commands.models import Measure
from duolocal.engine.engine import Engine
from duolocal.engine.kv_choice import measure_kv
from duolocal.errors import SettingsError
from duolocal.models.loader import open_model
from duolocal.sample_text import sample_text
from duolocal.settings import LoadSettings
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import new_console, progress_console
from duolocal.terminal.fetching import fetch
from duolocal.terminal.progress import bar
from duolocal.terminal.tables import bare_table, new_table
from duolocal.tokenizer import load_tokenizer

MIN_MEASURED_TOKENS = 1024


def bench_memory(settings: LoadSettings) -> int:
    """Print the bytes that the KV cache of these settings really takes; return the exit code."""
    progress = progress_console()
    fetch(settings.model, progress)
    with bar(progress, f"loading {clean_line(settings.model)}", ""):
        report = memory_report(settings)
    table = bare_table()
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right")
    for name, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {version}" for key, version in value.items())
        is_size = name.endswith("_bytes") and isinstance(value, int)
        label = name.removesuffix("_bytes").replace("_", " ").replace("16bit", "16-bit")
        table.add_row(label, Text(_size(value) if is_size else _number(value)))
    new_console().print(table)
    print(json.dumps(report))
    return 0


def measure_kv_formats(settings: LoadSettings, options: Measure) -> int:
    """Print what each KV format costs a model against the 16-bit cache, over the first tokens of a text.

    Raises SettingsError when the text is too short.
    """
    console, progress, num_tokens = new_console(), progress_console(), options.tokens
    text = options.text[0] if options.text else sample_text()
    if num_tokens < MIN_MEASURED_TOKENS:
        # The recent tokens are exact in every format, so a short text would show no difference at all.
        raise SettingsError(f"--tokens is {num_tokens:,}: give {MIN_MEASURED_TOKENS:,} or more to see a difference")
    path = fetch(settings.model, progress)
    with bar(progress, f"loading {clean_line(settings.model)}", "layers") as shown:
        source = open_model(path)
        engine = Engine.load(source, settings, context=num_tokens, kv="16", heads="all", events=shown)
        token_ids = load_tokenizer(source).encode(text)[:num_tokens]
        if len(token_ids) < num_tokens:
            raise SettingsError(
                f"the text has {len(token_ids):,} tokens, --tokens is {num_tokens:,}: give a longer text, or fewer"
            )
    with bar(progress, "measuring", "layers") as shown:
        results = list(
            measure_kv(
                source,
                engine.transformer,
                token_ids,
                chunk_size=engine.chunk_size,
                on_progress=shown.update,
            )
        )
    table = new_table("~KV format", ">bytes/token", ">mean KL", ">perplexity", ">rise", ">top-1")
    for result in results:
        table.add_row(
            result.kv,
            f"{result.bytes_per_token:.1f}",
            f"{result.mean_kl:.5f}",
            f"{result.perplexity:.3f}",
            f"{result.perplexity_rise:+.2%}",
            f"{result.top1_agreement:.2%}",
        )
    console.print(table)
    console.print(
        f"against the 16-bit cache, all heads retrieval, {num_tokens:,} tokens; bytes per KV head",
        style="dim",
    )
    report = {"measurement": "kv", "model": settings.model, "tokens": num_tokens}
    print(json.dumps({**report, "formats": [asdict(result) for result in results]}))
    return 0


def _size(num_bytes: object) -> str:
    assert isinstance(num_bytes, int)
    return f"{num_bytes:,} bytes ({figures.size(num_bytes)})"


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else clean_line(str(value))
