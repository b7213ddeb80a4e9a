"""`duolocal models convert`: progress, a line for people, and one JSON object as the last line."""

import json
import time
from pathlib import Path

from rich.console import Console

from duolocal.commands.models import Convert
from duolocal.engine.kernels import arrange_rows
from duolocal.engine.place import device_named
from duolocal.models.loader import ModelSource, open_model
from duolocal.models.native_writer import write_native
from duolocal.models.outer_weights import outer_note, quantize_outer
from duolocal.models.quantized import quantize_on_load
from duolocal.quant.grouped import group
from duolocal.quantize.dense import write_dense
from duolocal.settings import LoadSettings
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import new_console, progress_console
from duolocal.terminal.fetching import fetch
from duolocal.terminal.progress import Bar, bar

_KERNELS = {"rows": "CPU", "planes": "GPU"}


def convert_model(settings: LoadSettings, options: Convert) -> int:
    """Write the model of `settings` in another form; return the exit code."""
    console, progress, out, to = new_console(), progress_console(), options.out, options.to
    name = clean_line(settings.model)
    source = open_model(fetch(settings.model, progress))
    began_s = time.monotonic()
    report: dict[str, object] = {"command": "models convert", "model": settings.model, "out": str(out), "to": to}
    with bar(progress, f"converting {name}", "tensors") as shown:
        if to == "native":
            report |= _native(source, settings, out, shown, console)
        else:
            num_bytes = write_dense(source, out, on_progress=shown.update)
            _say(console, f"{clean_line(str(out))}: 16-bit safetensors, {figures.size(num_bytes)}")
            report["bytes"] = num_bytes
    report |= {"bytes_before": source.size_bytes, "elapsed_s": round(time.monotonic() - began_s, 3)}
    print(json.dumps(report))
    return 0


def _native(source: ModelSource, settings: LoadSettings, out: Path, shown: Bar, console: Console) -> dict[str, object]:
    # A file for a GPU can be made without one.
    for_gpu = settings.device == "cuda" or device_named(settings.device).type == "cuda"
    arrangement = "planes" if for_gpu else "rows"
    source = quantize_outer(quantize_on_load(source, settings.weights), settings.outer_weights)
    written = write_native(
        source,
        out,
        arrangement=arrangement,
        arrange=group if arrangement == "planes" else arrange_rows,
        on_progress=shown.update,
    )
    note = outer_note(source)
    if note is not None:
        _say(console, clean_line(note))
    _say(
        console,
        f"{clean_line(str(out))}: {source.weight_format} for {_KERNELS[arrangement]} kernels, "
        f"{figures.size(written.num_bytes)}; load it with --model",
    )
    return {
        "arrangement": arrangement,
        "weight_format": source.weight_format,
        "outer_note": note,
        "fingerprint": source.fingerprint,
        "bytes": written.num_bytes,
    }


def _say(console: Console, text: str) -> None:
    console.print(text, style="dim", soft_wrap=True, markup=False)
