"""What `duolocal tune` shows: bars of both measurements, then what a chat takes with them and without."""

from rich.text import Text

from duolocal.engine.engine import Engine
from duolocal.engine.resolve import default_context
from duolocal.models.loader import open_model
from duolocal.settings import FirstUse, LoadSettings
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import new_console, progress_console
from duolocal.terminal.fetching import fetch
from duolocal.terminal.progress import bar
from duolocal.terminal.tables import fact_table


def tune(settings: LoadSettings) -> int:
    """Rank the heads of a model and measure its KV formats where that is not done yet; return the exit code."""
    console, progress = new_console(), progress_console()
    source = open_model(fetch(settings.model, progress))
    with bar(progress, f"loading {clean_line(settings.model)}", "layers") as shown:
        engine = Engine.load(
            source, settings, context=default_context(source.config), events=shown, first_use=FirstUse(tune=True)
        )
    plan = engine.plan
    table = fact_table()
    table.add_row("heads", f"{plan.num_retrieval} of {plan.num_retrieval + plan.num_streaming} KV heads retrieval")
    table.add_row("KV format", engine.kv)
    console.print(table)
    for note in engine.notes:
        console.print(Text(f"* {clean_line(note)}", style="dim"))
    return 0
