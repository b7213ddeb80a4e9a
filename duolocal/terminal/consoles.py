"""Where commands write: answers to standard output, progress to a terminal on standard error."""

import os
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duolocal.terminal.clean import clean_line

if TYPE_CHECKING:
    from rich.console import Console


_PLAIN = str.maketrans("█▉▊▋▌▍▎▏▆▅▃▓▒░▁·◀", "######::###%+-..<")


def plain_text(encoding: str | None = None) -> bool:
    """Tell whether pictures are drawn in ASCII: in a POSIX locale, and where `encoding` is not UTF-8 (None: stdout's).

    Python takes the POSIX locale for UTF-8 (PEP 538, 540), which the terminal need not be.
    """
    ctype = os.environ.get("LC_CTYPE", "")
    given = (os.environ.get("LC_ALL"), "" if ctype == "C.UTF-8" else ctype, os.environ.get("LANG"))
    locale = next(filter(None, given), "")
    encoding = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"
    return locale in ("C", "POSIX") or not encoding.lower().startswith("utf")


def drawn(marks: str, encoding: str | None = None) -> str:
    """Return the marks of a bar or picture as this terminal shows them, one column each."""
    return marks.translate(_PLAIN) if plain_text(encoding) else marks


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


def say(text: str) -> None:
    """Write one line of ours to standard error, whatever is in the text."""
    print(f"duolocal: {clean_line(text)}", file=sys.stderr, flush=True)


@contextmanager
def telling_after(seconds: float, text: str) -> Iterator[None]:
    """Say `text` where the block takes longer."""
    timer = threading.Timer(seconds, say, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def resumable(console: "Console", state: Path | None, where: str) -> Iterator[None]:
    """Say that work goes on `where` it stopped, if there is a `state` of it; on Ctrl-C, that the same command would."""
    if state is not None and state.exists():
        console.print(f"going on {clean_line(where)}", style="dim", soft_wrap=True)
    try:
        yield
    except KeyboardInterrupt:
        if state is not None and state.exists():
            console.print(f"interrupted; the same command goes on {clean_line(where)}", soft_wrap=True)
        raise


def print_prose(console: "Console", text: str, style: str = "") -> None:
    """Print text that is wrapped between words only: a path that is longer than a line can still be copied."""
    from rich.text import Text

    wrapper = textwrap.TextWrapper(console.width, break_long_words=False, break_on_hyphens=False)
    lines = [part for line in text.split("\n") for part in wrapper.wrap(line) or [""]]
    console.print(Text("\n".join(lines), style=style), soft_wrap=True)


def starting_notice(progress: "Console") -> Any:
    """Return a context that shows a sign of life: importing torch takes seconds on a cold disk."""
    from duolocal.terminal.progress import bar

    return bar(progress, "starting", "")
