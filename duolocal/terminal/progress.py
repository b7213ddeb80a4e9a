"""Progress of everything that can take longer than a second: downloads, loading, prefill."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from duolocal.terminal import figures

_SHOW_AFTER_S = 0.3  # what is done sooner needs no bar
_NARROW = 60  # columns


class _Amount(ProgressColumn):
    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        done, total = int(task.completed), int(task.total)
        unit = task.fields["unit"]
        if unit == "bytes":
            return Text(f"{figures.size(done)} of {figures.size(total)}")
        return Text(f"{done:,}/{total:,}" + (f" {unit}" if unit else ""))


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        elapsed_s = task.fields["elapsed_s"] or task.elapsed or 0.0
        done = int(task.completed)
        if not done or not elapsed_s or task.fields["unit"] not in ("tokens", "bytes"):
            return Text("")
        if task.fields["unit"] == "bytes":
            return Text(f"{figures.size(int(done / elapsed_s))}/s")
        return Text(figures.speed(done, elapsed_s))


class _Remaining(ProgressColumn):
    def render(self, task: Task) -> Text:
        elapsed_s = task.fields["elapsed_s"] or task.elapsed or 0.0
        if task.total is None or not task.completed or not elapsed_s:
            return Text(figures.duration(task.elapsed or 0.0))
        left_s = elapsed_s * (task.total - task.completed) / task.completed
        return Text(f"{figures.duration(left_s)} left")


class _LateProgress(Progress):
    """A progress display that stays invisible for its first moment."""

    def __init__(self, *columns: ProgressColumn, console: Console) -> None:
        self._visible_from_s = time.monotonic() + _SHOW_AFTER_S
        # Into a file or a pipe there is no bar, not even the empty line that Rich would leave.
        super().__init__(
            *columns, console=console, transient=True, refresh_per_second=8, disable=not console.is_terminal
        )

    def get_renderable(self) -> RenderableType:
        if time.monotonic() < self._visible_from_s:
            return Text("", end="")
        return super().get_renderable()


class Bar:
    """One bar; `update` takes what is done so far and, when known, the seconds the work itself took."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def update(self, done: int, total: int | None, elapsed_s: float | None = None, *, unit: str | None = None) -> None:
        fields: dict[str, Any] = {} if unit is None else {"unit": unit}
        self._progress.update(self._task, completed=done, total=total, elapsed_s=elapsed_s, **fields)

    def describe(self, description: str) -> None:
        self._progress.update(self._task, description=description)


@contextmanager
def bar(console: Console, description: str, unit: str) -> Iterator[Bar]:
    """Show a transient progress bar on `console`; `unit` is "tokens", "bytes", "layers" or ""."""
    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
    if console.width >= _NARROW:
        columns += [BarColumn(bar_width=None), _Amount(), _Speed(), _Remaining()]
    else:
        columns += [_Amount(), _Remaining()]
    with _LateProgress(*columns, console=console) as progress:
        task = progress.add_task(description, total=None, unit=unit, elapsed_s=None)
        yield Bar(progress, task)
