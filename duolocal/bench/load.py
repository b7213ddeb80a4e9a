"""Time from nothing to the first token, each time in a fresh process."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duolocal.bench.child import Child, runner_command
from duolocal.bench.timing import Spread, spread


@dataclass(frozen=True)
class LoadSpeed:
    """Seconds of each step; "start" is what the interpreter and our smallest imports take, "total" the sum."""

    steps_s: dict[str, Spread]
    kv: str
    context: int
    device: str
    peak_bytes: int  # the largest of all runs
    cold: bool  # whether the model file was dropped from the page cache before each run

    def report(self) -> dict[str, object]:
        """Return the figures as JSON holds them."""
        return {
            "kv": self.kv,
            "context": self.context,
            "peak_bytes": self.peak_bytes,
            "cold_file": self.cold,
            "ms": {name.replace(" ", "_"): steps.milliseconds() for name, steps in self.steps_s.items()},
        }


def measure_load(
    path: Path,
    token_ids: Sequence[int],
    options: dict[str, Any],
    *,
    repeats: int,
    threads: int | None,
    cold: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> LoadSpeed:
    """Start, import, open, load with `options`, and answer `token_ids` with one token, `repeats` times.

    options: `context`, `longest_default` and those of `Engine.load`. cold: drop the file from the page cache before
    each run where the system can (Linux).
    """
    times: dict[str, list[float]] = {}
    answers = []
    for run in range(repeats):
        on_step(f"run {run + 1} of {repeats}")
        cold = cold and forget(path)
        began_s = time.perf_counter()
        with Child("duolocal", runner_command("first_token"), threads=threads) as child:
            answer = child.ask("first_token", path=str(path), token_ids=list(token_ids), threads=threads, **options)
            total_s = time.perf_counter() - began_s
        start_s = total_s - sum(answer["steps_s"].values())
        for name, elapsed_s in {"start": start_s, **answer["steps_s"], "total": total_s}.items():
            times.setdefault(name, []).append(elapsed_s)
        answers.append(answer)
    return LoadSpeed(
        steps_s={name: spread(values) for name, values in times.items()},
        kv=answers[0]["kv"],
        context=answers[0]["context"],
        device=answers[0]["device"],
        peak_bytes=max(answer["peak_bytes"] for answer in answers),
        cold=cold,
    )


def forget(path: Path) -> bool:
    """Drop a file, or the files of a folder, from the page cache; return whether the system can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in [path] if path.is_file() else path.iterdir():
        with suppress(OSError), file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
