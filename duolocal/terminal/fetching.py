"""Finding or fetching a model, with a bar: what every command that opens one does first."""

from pathlib import Path
from typing import TYPE_CHECKING

from duolocal.commands.models import Fetch
from duolocal.errors import DuoLocalError
from duolocal.models.registry import cached_path, resolve
from duolocal.settings import AUTO_MODEL, LoadSettings
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import progress_console, say
from duolocal.terminal.progress import bar

if TYPE_CHECKING:
    from rich.console import Console


def fetch(model: str, progress: "Console") -> Path:
    """Find or fetch a model by name or path, and with it the head pattern that is published for it.

    Return where the model is. Raises DuoLocalError, but not for a pattern that cannot be had.
    """
    notes: list[str] = []
    here = cached_path(model) is not None
    with bar(progress, f"fetching {clean_line(model)}", "bytes") as shown:
        path = resolve(model, on_progress=shown.update, on_note=notes.append)
    for note in notes:
        say(note)
    if not here:
        _fetch_pattern(path, model)
    return path


def _fetch_pattern(path: Path, model: str) -> None:
    from duolocal.engine.head_choice import published_for
    from duolocal.heads.known import published_pattern
    from duolocal.models.loader import open_model

    published = published_for(open_model(path), model)
    if published is None:
        return
    try:
        published_pattern(published)
    except DuoLocalError as error:
        say(f"no head pattern came with {model}: {error}")


def settle_model(settings: LoadSettings) -> LoadSettings:
    """Return `settings` with the model that is meant where none was named; where it is not the better one, say why."""
    if settings.model == AUTO_MODEL:
        from duolocal.plan.free import settled_model

        settings, reason = settled_model(settings)
        if reason is not None:
            say(reason)
    return settings


def fetch_model(options: Fetch) -> int:
    """Fetch a model, and print its path alone; return the exit code."""
    print(fetch(options.name, progress_console()))
    return 0
