"""The process that reads damaged files: one request per line on stdin, one result per line on stdout.

A request is {"target", "seed", "number"}; the file is made here, from nothing but these three. What must not happen
is made to fail: writing outside the scratch folder, starting programs and opening connections by an audit hook, memory
by a limit of address space. A hang or a crash is noticed by the parent.
"""

import contextlib
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from duolocal.errors import DuoLocalError
from duolocal.processes import answer_on_stdout, limit_memory, send, status_bytes
from tests.fuzz.base import Target, Wrong, check_refusal
from tests.fuzz.misbehave import MISBEHAVING
from tests.fuzz.targets import TARGETS

SPACE = 1 << 30  # bytes of address space beyond what the imports took
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pty.spawn")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class _Watch:
    """Remembers what an audit hook saw while a file was read."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = str(scratch) + os.sep
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _FORBIDDEN:
            self.seen.append(event)
        elif event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & _WRITES:
            path = os.fsdecode(arguments[0])
            if not path.startswith((self.scratch, "/proc/self/", "/dev/null")):
                self.seen.append(f"writing {path}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.on, self.seen = True, []
        try:
            yield
        finally:
            self.on = False


def _forget_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _read(target: Target, path: Path, watch: _Watch) -> tuple[str, str]:
    try:
        with watch.watching():
            target.read(path)
        outcome, message = "loaded", ""
    except DuoLocalError as error:
        try:
            outcome, message = "refused", check_refusal(error)
        except Wrong as wrong:
            outcome, message = "failed", str(wrong)
    except Wrong as wrong:
        outcome, message = "failed", str(wrong)
    except BaseException as error:  # noqa: BLE001  also the panics of libraries written in Rust
        frames = " < ".join(
            f"{f.name} {Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-1:-5:-1]
        )
        outcome, message = "failed", f"{type(error).__name__}: {str(error)[:300]!r} in {frames}"
    if watch.seen:
        outcome, message = "failed", f"it did what no file may: {', '.join(watch.seen)}"
    return outcome, message


def main() -> None:
    """Serve requests until stdin ends."""
    seeds, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    replies = answer_on_stdout()
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    targets = TARGETS | {MISBEHAVING.name: MISBEHAVING}
    watch = _Watch(scratch)
    for name in sys.argv[3:]:  # undamaged seeds: read before memory is counted, they must load
        target = targets[name]
        for seed in sorted((seeds / target.seeds).iterdir()) if name != "template" else ():
            if (result := _read(target, seed, watch))[0] != "loaded":
                send(replies, {"broken": f"{name}: the seed {seed.name} is {result}"})
    limit_memory((status_bytes("VmSize") or 0) + SPACE)
    send(replies, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        target = targets[request["target"]]
        rng = random.Random(f"{request['target']} {request['seed']} {request['number']}")
        path = target.damage(seeds / target.seeds, scratch, rng)
        _forget_peak()
        before, began_s = status_bytes("VmRSS") or 0, time.process_time()
        outcome, message = _read(target, path, watch)
        took_s = time.process_time() - began_s
        peak = max(0, (status_bytes("VmHWM") or 0) - before)
        send(replies, {"outcome": outcome, "message": message, "cpu_s": took_s, "peak_bytes": peak})


if __name__ == "__main__":
    main()
