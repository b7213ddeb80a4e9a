"""The table of `duolocal eval weights`: models with fewer bits per weight beside their source; last line JSON."""

import json
from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table
from rich.text import Text

from duolocal.commands.eval import Reading, Weights
from duolocal.engine.engine import Engine
from duolocal.evaluate.compare import Comparison, compare, cut_windows
from duolocal.evaluate.engines import DENSE_KV
from duolocal.evaluate.weights import common_tokenizer
from duolocal.models.loader import ModelSource
from duolocal.settings import WEIGHTS, LoadSettings
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.eval_compare_view import bos_ids, error_of
from duolocal.terminal.eval_parts import eval_consoles, haystack, open_source
from duolocal.terminal.progress import bar
from duolocal.terminal.tables import new_table

ACTIVATION_NAMES = ("int8-activations", "int16-activations")


def eval_weights(options: Weights, read: Reading, settings: LoadSettings) -> int:
    """Print perplexity and KL of every other model beside the one of `settings`, over windows of a text.

    The others are names, paths, a format of `--weights` that stands for the model of `settings` in it, or one of
    ACTIVATION_NAMES for that model with quantized activations, which all others have in float32.
    """
    settings = replace(settings, activations="float32")
    console, progress = eval_consoles()
    text = haystack(read.text)
    asked = [(settings.model, settings)]
    for name in options.against:
        if name in WEIGHTS:
            asked.append((f"{settings.model} {name}", replace(settings, weights=name)))
        elif name in ACTIVATION_NAMES:
            chosen = replace(settings, activations=name.removesuffix("-activations"))
            asked.append((f"{settings.model} {name}", chosen))
        else:
            asked.append((name, replace(settings, model=name)))
    models = [(name, open_source(chosen, progress)) for name, chosen in asked]
    tokenizer, ids = common_tokenizer(models, text[0])
    windows = cut_windows(ids, num_tokens=read.tokens, context=read.context, bos=bos_ids(tokenizer))
    context = len(windows[0])
    engines = []
    # All are in memory at once, each in the bits of its file, with one window's cache each.
    for (name, source), (_, chosen) in zip(models, asked, strict=True):
        dense = replace(chosen, context=context, kv=DENSE_KV, heads="all")
        with bar(progress, f"loading {clean_line(name)}", "layers") as shown:
            engines.append((name, Engine.load(source, dense, events=shown)))
    with bar(progress, "measuring", "tokens") as shown:
        results = compare(engines, windows, on_progress=shown.update)
    console.print(_table(results, [source for _, source in models]))
    console.print(
        Text(
            f"{clean_line(text[1])}: {len(windows)} x {context:,} tokens, each window read from nothing; ± is the "
            "standard error over windows, worst the worst window",
            style="dim",
        )
    )
    report = {"evaluation": "weights", "model": settings.model, "text": text[1], "tokens": read.tokens}
    report |= {"context": context, "windows": len(windows)}
    found = {
        result.name: {"weights": source.weight_format, "bytes": source.size_bytes, **result.report()}
        for result, (_, source) in zip(results, models, strict=True)
    }
    print(json.dumps({**report, "results": found}))
    return 0


def _table(results: Sequence[Comparison], sources: Sequence[ModelSource]) -> Table:
    table = new_table("~model", "<weights", ">size", ">KL", ">±", ">worst", ">top-1", ">perplexity", ">change", ">±")
    for at, (result, source) in enumerate(zip(results, sources, strict=True)):
        row = [source.weight_format, figures.size(source.size_bytes)]
        if at == 0:
            row += ["0", "", "", "", f"{result.perplexity:.3f}", "", ""]
        else:
            row += [
                f"{result.kl:.5f}",
                error_of(result.kl_error, ".4f"),
                f"{result.worst_kl:.4f}",
                f"{result.top1:.2%}",
                f"{result.perplexity:.3f}",
                f"{result.rise:+.2%}",
                error_of(result.rise_error, ".2%"),
            ]
        table.add_row(Text(clean_line(result.name)), *row)
    return table
