"""`duolocal quantize`: progress while layers are quantized, and a report whose last line is one JSON object."""

import json
from dataclasses import asdict, replace

from rich.table import Table

from duolocal.commands.quantize import SAMPLES, TOKENS_PER_SAMPLE, Quantize
from duolocal.models.loader import open_model
from duolocal.quantize import QuantizeProgress, QuantizeResult, QuantizeSettings, quantize
from duolocal.quantize.work_area import NAME as WORK_AREA
from duolocal.settings import LoadSettings
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import new_console, progress_console, resumable
from duolocal.terminal.fetching import fetch
from duolocal.terminal.progress import Bar, bar
from duolocal.terminal.tables import new_table

_READS = {"qkv": "q, k, v", "o": "o", "gate_up": "gate, up", "down": "down"}


def quantize_model(options: Quantize, machine: LoadSettings) -> int:
    """Quantize a model, and print what it came to; return the exit code."""
    wanted = QuantizeSettings(
        method=options.method,
        group_size=options.group_size,
        num_samples=options.samples or SAMPLES,
        num_tokens=options.tokens or TOKENS_PER_SAMPLE,
        seed=options.seed,
    )
    console, progress, out = new_console(), progress_console(), options.out
    text = None if options.text is None else options.text[0]
    settings = replace(machine, model=options.model)
    source = open_model(fetch(settings.model, progress))
    result = None
    with (
        resumable(console, out / WORK_AREA, f"in {out}"),
        bar(progress, f"{wanted.method}: opening {clean_line(settings.model)}", "layers") as shown,
    ):
        for event in quantize(source, out, wanted, text=text, device=settings.device, threads=settings.threads):
            if isinstance(event, QuantizeProgress):
                _show(event, shown, wanted.method)
            else:
                result = event
    assert result is not None
    console.print(_losses_table(result))
    what = "weights" if result.method == "rtn" else f"outputs, over {figures.tokens(result.num_tokens)} of text"
    console.print(f"relative squared error of the {what}; mean over {len(result.layers)} layers", style="dim")
    console.print(
        f"{figures.size(result.bytes_before)} ({source.weight_format}) to {figures.size(result.bytes_after)}: "
        f"{result.linear_bits:.3g} bits per quantized weight, {result.bits:.3g} over the whole model",
        soft_wrap=True,
    )
    resumed = f" ({result.resumed} layers were there already)" if result.resumed else ""
    console.print(
        f"written in {figures.duration(result.elapsed_s)}{resumed}: use it with --model {clean_line(str(out))}",
        soft_wrap=True,
    )
    report = {
        "quantization": result.method,
        "model": settings.model,
        "out": str(out),
        "group_size": result.group_size,
        "calibration_tokens": result.num_tokens,
        "seed": wanted.seed,
        "bits_per_quantized_weight": result.linear_bits,
        "bits_per_weight": result.bits,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "resumed_layers": result.resumed,
        "seconds": round(result.elapsed_s, 1),
        "layers": [asdict(losses) for losses in result.layers],
    }
    print(json.dumps(report))
    return 0


def _show(event: QuantizeProgress, shown: Bar, method: str) -> None:
    words = f"{method}: {event.doing}"
    if event.losses is not None:
        words += f", loss {event.losses.mean:.2g}"
        if event.losses.alphas:
            words += f" (rtn {event.losses.plain_mean:.2g})"
    shown.describe(words)
    # Layers that an earlier run finished took this one no time: scaled so that the time left is right.
    elapsed_s = event.elapsed_s * event.done / event.fresh if event.fresh else None
    shown.update(event.done, event.total, elapsed_s)


def _losses_table(result: QuantizeResult) -> Table:
    searched = result.method == "awq"
    table = new_table("<linears", ">rtn", *([">awq"] if searched else []), ">worst layer")
    for group, name in _READS.items():
        values = [layer.losses[group] for layer in result.layers]
        plain = [layer.plain[group] for layer in result.layers]
        worst = max(range(len(values)), key=values.__getitem__)
        row = [f"{sum(plain) / len(plain):.2e}"]
        if searched:
            row.append(f"{sum(values) / len(values):.2e}")
        table.add_row(name, *row, f"{values[worst]:.2e} (layer {worst + 1})")
    return table
