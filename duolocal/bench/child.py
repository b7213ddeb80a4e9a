"""A benchmark's child process, seen from the parent: start it with the right environment, ask, end it.

Invariant: a child computes only while it is asked, so that runs of several children can alternate.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

import duolocal
from duolocal import errors
from duolocal.errors import DuoLocalError
from duolocal.kernels.cpu.threads import unbound
from duolocal.processes import LineProcess

_TAIL_LINES = 3
_TAIL_CHARACTERS = 400
_END_S = 5.0


def runner_command(name: str) -> tuple[str, ...]:
    """Return the command of a program in `duolocal.bench.runners`."""
    return (sys.executable, "-m", f"duolocal.bench.runners.{name}")


def child_environment(threads: int | None) -> dict[str, str]:
    """Return the environment of a child: threads that stay on their core unless the user said otherwise, no network."""
    environment = dict(os.environ)
    root = str(Path(duolocal.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("OMP_PROC_BIND", "true")
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment


class Child:
    """A running child; leaving the `with` block ends it."""

    def __init__(self, name: str, command: Sequence[str], *, threads: int | None = None) -> None:
        self.name = name
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        with unbound():
            self._process = LineProcess(command, stderr=self._stderr, env=child_environment(threads))
        self._times = psutil.Process(self._process.popen.pid)

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Send a request and wait for the answer. Raises DuoLocalError where the child refuses or has ended."""
        self._process.send({"do": do, **fields})
        answer = self._process.receive()
        if answer is None:
            raise self._ended()
        if "error" in answer:
            raise getattr(errors, answer["kind"], DuoLocalError)(f"{self.name}: {answer['error']}")
        return answer

    def cpu_s(self) -> float:
        """Return the processor time the child has used so far."""
        try:
            times = self._times.cpu_times()
        except psutil.Error:
            return 0.0
        return times.user + times.system

    def close(self) -> None:
        """End the child."""
        self._process.close(grace_s=_END_S)
        self._stderr.close()

    def _ended(self) -> DuoLocalError:
        code = self._process.popen.wait()
        how = f"ended with exit code {code}" if code >= 0 else f"was ended by signal {-code}"
        if code == -9:
            how += " (which the system sends where memory runs out)"
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - 8192))
        lines = [line.strip() for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        tail = " | ".join(lines[-_TAIL_LINES:])[-_TAIL_CHARACTERS:]
        return DuoLocalError(f"{self.name} {how}: {tail or 'it said nothing'}")

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
