"""The tables of `duolocal bench`: measured elsewhere, printed here; the last line is one JSON object."""

import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from duolocal.bench import memory_report
from duolocal.settings import ChatSettings
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.progress import bar


def bench_memory(settings: ChatSettings, console: Console, progress: Console) -> int:
    """Print the bytes that the KV cache of these settings really takes; return the exit code."""
    with bar(progress, f"loading {clean_line(settings.model)}", ""):
        report = memory_report(
            settings.model,
            context=settings.context,
            kv=settings.kv,
            heads=settings.heads,
        )
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right")
    for name, value in report.items():
        label = name.removesuffix("_bytes").replace("_", " ")
        is_size = name.endswith("_bytes") and isinstance(value, int)
        table.add_row(label, Text(figures.size(value) if is_size else clean_line(str(value))))
    console.print(table)
    print(json.dumps(report))
    return 0
