"""Where commands write: answers to standard output, progress to a terminal on standard error."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def new_console(*, stderr: bool = False, no_color: bool = False) -> "Console":
    """Return a console; colours as the terminal and NO_COLOR say."""
    from rich.console import Console

    # An empty NO_COLOR counts as unset (no-color.org); Rich looks for the variable only when not told.
    return Console(stderr=stderr, no_color=no_color or bool(os.environ.get("NO_COLOR")), highlight=False)


def progress_console(*, no_color: bool = False) -> "Console":
    """Return the console for progress: standard error, quiet where that is no terminal."""
    console = new_console(stderr=True, no_color=no_color)
    console.quiet = not console.is_terminal
    return console


def starting_notice(progress: "Console") -> Any:
    """Return a context that shows a sign of life: importing torch takes seconds on a cold disk."""
    from duolocal.terminal.progress import bar

    return bar(progress, "starting", "")
