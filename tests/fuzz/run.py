"""Runs targets in child processes under limits, counts, and keeps the files that failed."""

import os
import select
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duolocal.processes import LineProcess

CPU_LIMIT_S = 5.0  # for one file; a whole one takes about 0.05 s
WALL_LIMIT_S = 60.0  # until a child counts as hanging: generous, other programs may have the processor
PEAK_LIMIT = 512 << 20  # bytes that reading one file may add; the seeds are below 1 MB
_START_LIMIT_S = 300.0


@dataclass
class Tally:
    """What became of the files of one target."""

    target: str
    refused: int = 0
    loaded: int = 0
    slowest_s: float = 0.0  # of processor time
    peak_bytes: int = 0
    failures: list[str] = field(default_factory=list)  # one line each
    kinds: Counter[str] = field(default_factory=Counter)  # of refusals, by their last words

    @property
    def files(self) -> int:
        return self.refused + self.loaded + len(self.failures)

    def line(self) -> str:
        """Return the summary for people."""
        return (
            f"{self.target}: {self.files:,} files, {self.refused:,} refused in one line, {self.loaded:,} loaded, "
            f"{len(self.failures):,} failures, slowest {self.slowest_s:.2f} s, peak +{self.peak_bytes / 1e6:.0f} MB"
        )


def total(tallies: Sequence[Tally]) -> Tally:
    """Return the sum of all targets."""
    out = Tally("total")
    for tally in tallies:
        out.refused += tally.refused
        out.loaded += tally.loaded
        out.slowest_s = max(out.slowest_s, tally.slowest_s)
        out.peak_bytes = max(out.peak_bytes, tally.peak_bytes)
        out.failures += tally.failures
    return out


class _Child:
    """One reading process."""

    def __init__(self, seeds: Path, scratch: Path, targets: Sequence[str]) -> None:
        self.scratch = scratch
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONHASHSEED": "0"}
        environment |= {"TOKENIZERS_PARALLELISM": "false"}
        self._log = open(scratch.with_name("stderr.txt"), "w+")  # noqa: SIM115
        self._process = LineProcess(
            [sys.executable, "-m", "tests.fuzz.child", str(seeds), str(scratch), *targets],
            stderr=self._log,
            cwd=Path(__file__).parents[2],
            env=environment,
        )
        answer = self._answer(_START_LIMIT_S)
        if answer is None or "ready" not in answer:
            raise RuntimeError(f"the reading process did not start: {answer or self._last_words()}")

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any] | None:
        """Return the result, or None where the process hangs or has died; then it is of no more use."""
        self._process.send(request)
        return self._answer(limit_s)

    def _answer(self, limit_s: float) -> dict[str, Any] | None:
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        return self._process.receive() if ready else None

    def end(self) -> str:
        """Stop it; return how it was found."""
        code = None
        with suppress(subprocess.TimeoutExpired):
            code = self._process.popen.wait(1)
        self._process.close()
        words = self._last_words()
        self._log.close()
        return "hangs" if code is None else f"ended the process with {code} ({words})"

    def close(self) -> None:
        self._process.close()
        self._log.close()

    def _last_words(self) -> str:
        self._log.flush()
        with open(self._log.name, errors="replace") as log:
            lines = [line.strip() for line in log if line.strip()]
        return " | ".join(lines[-3:])[:300]


class Readers:
    """The reading process, started when it is needed, and anew when it has come to an end."""

    def __init__(self, seeds: Path, scratch: Path, targets: Sequence[str]) -> None:
        self._arguments = (seeds, scratch, targets)
        self._child: _Child | None = None

    def child(self) -> _Child:
        self._child = self._child or _Child(*self._arguments)
        return self._child

    def end(self) -> str:
        """Stop a process that did not answer; return how it was found."""
        assert self._child is not None
        found, self._child = self._child.end(), None
        return found

    def close(self) -> None:
        if self._child is not None:
            self._child.close()


def run_target(
    name: str,
    seeds: Path,
    work: Path,
    *,
    count: int,
    seed: int = 0,
    first: int = 0,
    keep: Path | None = None,
    wall_limit_s: float = WALL_LIMIT_S,
    readers: "Readers | None" = None,
    on_file: Callable[[int, int], None] = lambda done, count: None,
) -> Tally:
    """Read `count` damaged files of one target; files that fail are copied below `keep`.

    `readers` lets several targets share a process.
    """
    tally = Tally(name)
    scratch = work / "file"
    own = Readers(seeds, scratch, [name]) if readers is None else readers
    try:
        for number in range(first, first + count):
            answer = own.child().ask({"target": name, "seed": seed, "number": number}, wall_limit_s)
            failure = own.end() if answer is None else _judge(answer, tally)
            if failure is not None:
                tally.failures.append(f"{name} seed {seed} number {number}: {failure}")
                _keep(scratch, keep, f"{name}-{seed}-{number}")
            on_file(number - first + 1, count)
    finally:
        if readers is None:
            own.close()
    return tally


def _judge(answer: dict[str, Any], tally: Tally) -> str | None:
    """Count a result; return what is wrong with it, if anything."""
    tally.slowest_s = max(tally.slowest_s, answer["cpu_s"])
    tally.peak_bytes = max(tally.peak_bytes, answer["peak_bytes"])
    if answer["outcome"] == "failed":
        return answer["message"]
    if answer["cpu_s"] > CPU_LIMIT_S:
        return f"took {answer['cpu_s']:.1f} s of processor time"
    if answer["peak_bytes"] > PEAK_LIMIT:
        return f"took {answer['peak_bytes'] / 1e6:,.0f} MB"
    if answer["outcome"] == "refused":
        tally.refused += 1
        tally.kinds[answer["message"].split(": ", 1)[-1][:24]] += 1
    else:
        tally.loaded += 1
    return None


def _keep(scratch: Path, keep: Path | None, name: str) -> None:
    if keep is not None and scratch.exists():
        shutil.rmtree(keep / name, ignore_errors=True)
        shutil.copytree(scratch, keep / name)
