"""Consumes what a session yields: the prefill bar, the streamed answer, and Ctrl-C that stops only the work."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from rich.console import Console

from duolocal import processes
from duolocal.engine.session import Event, Finished, Prefilled, Text
from duolocal.reader.session import Picked
from duolocal.terminal.markdown import MarkdownStream
from duolocal.terminal.progress import Bar, bar

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]


class Cancellable(Protocol):
    """What Ctrl-C can stop: a ChatSession, a ReadingSession."""

    def cancel(self) -> None: ...


def cancel_on_interrupt(session: Cancellable) -> AbstractContextManager[Callable[[], None]]:
    """Turn Ctrl-C into `session.cancel()`; the third one in a row gets out whatever hangs. Yields as in `processes`."""
    return processes.cancel_on_interrupt(session.cancel, most=3)


@contextmanager
def _no_echo() -> Iterator[None]:
    """Keep the terminal from echoing keys (and ^C) into what is being drawn; typed text waits for the prompt."""
    if termios is None or sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = termios.tcgetattr(sys.stdin)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def show_events(
    console: Console,
    session: Cancellable,
    events: Iterable[Event | Picked],
    *,
    reading: str,
    on_picked: Callable[[Picked], None] = lambda picked: None,
) -> Finished | None:
    """Show events until they end; return the last one's Finished, if there was one.

    `reading` names what is prefilled ("reading README.md"). Text is streamed as Markdown. `on_picked` shows the
    passages that an answer is made of.
    """
    finished: Finished | None = None
    with cancel_on_interrupt(session) as insist, _no_echo(), ExitStack() as stack:
        stage = stack.enter_context(ExitStack())  # the bar, until there is text
        progress: Bar | None = stage.enter_context(bar(console, reading, "tokens"))
        answer: MarkdownStream | None = None
        for event in events:
            insist()
            if isinstance(event, Prefilled):
                if progress is not None:
                    progress.update(event.done, event.total, event.elapsed_s)
            elif isinstance(event, Picked):
                stage.close()
                on_picked(event)
                progress = stage.enter_context(bar(console, "reading the passages", "tokens"))
            elif isinstance(event, Text):
                if answer is None:
                    stage.close()
                    progress = None
                    answer = stack.enter_context(MarkdownStream(console))
                answer.feed(event.text)
            elif isinstance(event, Finished):
                finished = event
    return finished
