"""Finding or fetching a model, with a bar: what every command that opens one does first."""

from pathlib import Path
from typing import TYPE_CHECKING

from duolocal.commands.models import Fetch
from duolocal.models.registry import resolve
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import progress_console
from duolocal.terminal.progress import bar

if TYPE_CHECKING:
    from rich.console import Console


def fetch(model: str, progress: "Console") -> Path:
    """Find or fetch a model by name or path; return where it is. Raises DuoLocalError."""
    with bar(progress, f"fetching {clean_line(model)}", "bytes") as shown:
        return resolve(model, on_progress=shown.update)


def fetch_model(options: Fetch) -> int:
    """Fetch a model, and print its path alone; return the exit code."""
    print(fetch(options.name, progress_console()))
    return 0
