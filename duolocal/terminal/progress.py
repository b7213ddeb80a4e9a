"""Progress of everything that can take longer than a second: downloads, loading, prefill.

One line whatever the width: Rich's own columns shrink all together, down to letters, on a narrow terminal.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.progress import Progress, ProgressColumn, Task, TaskID
from rich.table import Column
from rich.text import Text

from duolocal.engine.events import LoadEvents
from duolocal.terminal import figures
from duolocal.terminal.consoles import plain_text

_SHOW_AFTER_S = 0.3  # what is done sooner needs no bar
_SAY_AFTER_S = 3.0  # into a pipe, where there is no bar, longer work that comes once is said in a line
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_MIN_DESCRIPTION = 16  # columns
_MIN_BAR, _MAX_BAR = 8, 40  # columns


class _Line(ProgressColumn):
    """Spinner, description, bar and figures; what does not fit is left out, the time left stays longest."""

    def __init__(self, columns: int) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._columns = columns

    def render(self, task: Task) -> Text:
        spinner = "|/-\\" if plain_text() else _SPINNER
        description = f"{spinner[int(time.monotonic() * 10) % len(spinner)]} {task.description}"
        parts = _figures(task)
        least = min(cell_len(description), _MIN_DESCRIPTION)
        while len(parts) > 1 and least + sum(cell_len(part) + 2 for part in parts) > self._columns:
            parts.pop()
        # The most important figure was first; on the screen it stands last, at the edge.
        tail = "".join(f"  {part}" for part in reversed(parts))
        room = self._columns - cell_len(tail)
        if cell_len(description) > room:
            return Text(set_cell_size(description[: max(0, room - 1)], max(0, room - 1)) + "…" + tail)
        line = Text(description)
        width = min(_MAX_BAR, room - cell_len(description) - 1)
        if task.total and width >= _MIN_BAR:
            filled = int(width * min(1.0, task.completed / task.total))
            done, left = ("#", ".") if plain_text() else ("━", "━")
            line.append(" ").append(done * filled, "cyan").append(left * (width - filled), "bright_black")
        return line.append(tail)


def _figures(task: Task) -> list[str]:
    """Write what is known of a task, the most important first."""
    elapsed_s = task.fields["elapsed_s"] or task.elapsed or 0.0
    done, total, unit = int(task.completed), task.total, task.fields["unit"]
    if not total:
        return [figures.duration(task.elapsed or 0.0)]
    parts = []
    if done and elapsed_s:
        parts.append(f"{figures.duration(elapsed_s * (total - done) / done)} left")
    else:
        parts.append(figures.duration(task.elapsed or 0.0))
    parts.append(f"{100 * done / total:.0f}%")
    if done and elapsed_s and unit == "tokens":
        parts.append(figures.speed(done, elapsed_s))
    if done and elapsed_s and unit == "bytes":
        parts.append(f"{figures.size(int(done / elapsed_s))}/s")
    if unit == "bytes":
        parts.append(f"{figures.size(done)} of {figures.size(int(total))}")
    else:
        parts.append(f"{done:,}/{int(total):,} {unit}".rstrip())
    return parts


class _LateProgress(Progress):
    """A progress display that stays invisible for its first moment."""

    def __init__(self, *, console: Console) -> None:
        self._visible_from_s = time.monotonic() + _SHOW_AFTER_S
        # Into a file or a pipe there is no bar, not even the empty line that Rich would leave.
        super().__init__(
            _Line(console.width),
            console=console,
            transient=True,
            refresh_per_second=8,
            disable=not console.is_terminal,
        )

    def get_renderable(self) -> RenderableType:
        if time.monotonic() < self._visible_from_s:
            return Text("", end="")
        return super().get_renderable()


class Bar(LoadEvents):
    """One bar; `update` takes what is done so far and, when known, the seconds the work itself took.

    Given to a load, it shows the layers, and says what comes once per machine or per model.
    """

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._began_s: dict[str, float] = {}  # work that comes once, until it was said

    def update(self, done: int, total: int | None, elapsed_s: float | None = None, *, unit: str | None = None) -> None:
        fields: dict[str, Any] = {} if unit is None else {"unit": unit}
        self._progress.update(self._task, completed=done, total=total, elapsed_s=elapsed_s, **fields)

    def describe(self, description: str) -> None:
        self._progress.update(self._task, description=description)

    def fetching(self, done: int, total: int) -> None:
        self.update(done, total)

    def loading(self, done: int, total: int) -> None:
        self.update(done, total)

    def compiling(self) -> None:
        self.describe("compiling the kernels, once for this machine")

    def identifying(self, done: int, total: int) -> None:
        self._step("finding the retrieval heads, once for this model", done, total, unit="")

    def measuring(self, done: int, total: int) -> None:
        self._step("measuring KV formats, once for this model", done, total, unit="layers")

    def quantizing(self, done: int, total: int) -> None:
        self._step("making lm_head and embedding smaller", done, total, unit="rows")

    def announce(self, line: str) -> None:
        self._print(line)

    def learning(self, done: int, total: int) -> None:
        self._step("finding what tells blocks apart, once for this model and context", done, total, unit="tokens")

    def _step(self, description: str, done: int, total: int, *, unit: str) -> None:
        self.describe(description)
        self.update(done, total, unit=unit)
        console = self._progress.console
        if console.is_terminal:
            return
        began_s = self._began_s.setdefault(description, time.monotonic())
        if time.monotonic() - began_s > _SAY_AFTER_S:
            self._began_s[description] = float("inf")
            self._print(f"{description}: {100 * done / total:.0f}% after {_SAY_AFTER_S:.0f} s")

    def _print(self, line: str) -> None:
        console = self._progress.console
        quiet, console.quiet = console.quiet, False  # it is, where bars would be in the way
        console.print(Text(line), highlight=False, soft_wrap=True)
        console.quiet = quiet


@contextmanager
def bars(console: Console, *kinds: tuple[str, str]) -> Iterator[list[Bar]]:
    """Show transient bars below each other; a kind is a description and a unit, as in `bar`."""
    with _LateProgress(console=console) as progress:
        yield [
            Bar(progress, progress.add_task(description, total=None, unit=unit, elapsed_s=None))
            for description, unit in kinds
        ]


@contextmanager
def bar(console: Console, description: str, unit: str) -> Iterator[Bar]:
    """Show a transient progress bar on `console`; `unit` is "tokens", "bytes", "layers" or ""."""
    with _LateProgress(console=console) as progress:
        task = progress.add_task(description, total=None, unit=unit, elapsed_s=None)
        yield Bar(progress, task)
