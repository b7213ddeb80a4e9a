"""Time from nothing to the first token, each time in a fresh process."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from duolocal.bench.child import Child, runner_command
from duolocal.bench.first_prompt import first_prompt_s
from duolocal.bench.timing import Spread, spread
from duolocal.settings import LoadSettings


@dataclass(frozen=True)
class LoadSpeed:
    """Seconds of each step; "start" is what the interpreter and our smallest imports take, "total" the sum."""

    steps_s: dict[str, Spread]
    kv: str
    context: int
    device: str
    peak_bytes: int  # the largest of all runs
    cold: bool  # whether the model file was dropped from the page cache before each run
    imported_bytes: int = 0  # resident after the imports, of the peak; the least of all runs
    prompt_s: Spread | None = None  # from the command line to the chat's first prompt

    def report(self) -> dict[str, object]:
        """Return the figures as JSON holds them."""
        steps = {name.replace(" ", "_"): steps.milliseconds() for name, steps in self.steps_s.items()}
        return {
            "kv": self.kv,
            "context": self.context,
            "peak_bytes": self.peak_bytes,
            "imported_bytes": self.imported_bytes,
            "cold_file": self.cold,
            "ms": steps | ({} if self.prompt_s is None else {"chat_prompt": self.prompt_s.milliseconds()}),
        }


def measure_loads(
    paths: Mapping[str, Path],
    token_ids: Sequence[int],
    settings: LoadSettings,
    *,
    repeats: int,
    cold: bool = False,
    prompt: Sequence[str] | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, LoadSpeed]:
    """Start, import, open, load with `settings`, and answer `token_ids` with one token, `repeats` times.

    The models, named by the keys of `paths`, take turns; each run is a fresh process. cold: drop the files from the
    page cache before each run where the system can (Linux). prompt: options of `duolocal chat` beside --model, to time
    its first prompt too; None: not.
    """
    runs: dict[str, list[_Run]] = {name: [] for name in paths}
    for number in range(repeats):
        for name, path in paths.items():
            on_step(f"{name}: run {number + 1} of {repeats}".removeprefix(": "))
            runs[name].append(_run(path, token_ids, settings, cold=cold, prompt=prompt))
    return {name: _summary(found) for name, found in runs.items()}


@dataclass(frozen=True)
class _Run:
    """One process, or two with the chat."""

    steps_s: dict[str, float]
    answer: dict[str, Any]
    prompt_s: float | None
    cold: bool


def _run(
    path: Path,
    token_ids: Sequence[int],
    settings: LoadSettings,
    *,
    cold: bool,
    prompt: Sequence[str] | None,
) -> _Run:
    cold = cold and forget(path)
    began_s = time.perf_counter()
    with Child("duolocal", runner_command("first_token"), threads=settings.threads) as child:
        answer = child.ask(
            "first_token", settings=asdict(replace(settings, model=str(path))), token_ids=list(token_ids)
        )
        total_s = time.perf_counter() - began_s
    start_s = total_s - sum(answer["steps_s"].values())
    prompt_s = None
    if prompt is not None:
        cold = cold and forget(path)
        prompt_s = first_prompt_s(["--model", str(path), *prompt], threads=settings.threads)
    return _Run({"start": start_s, **answer["steps_s"], "total": total_s}, answer, prompt_s, cold)


def _summary(runs: Sequence[_Run]) -> LoadSpeed:
    first = runs[0].answer
    prompts = [run.prompt_s for run in runs if run.prompt_s is not None]
    return LoadSpeed(
        steps_s={name: spread([run.steps_s[name] for run in runs]) for name in runs[0].steps_s},
        kv=first["kv"],
        context=first["context"],
        device=first["device"],
        peak_bytes=max(run.answer["peak_bytes"] for run in runs),
        cold=all(run.cold for run in runs),
        imported_bytes=min(run.answer["imported_bytes"] for run in runs),
        prompt_s=spread(prompts) if prompts else None,
    )


def forget(path: Path) -> bool:
    """Drop a file, or the files of a folder, from the page cache; return whether the system can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in [path] if path.is_file() else path.iterdir():
        with suppress(OSError), file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
