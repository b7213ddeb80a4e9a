"""Compile noted launches in child processes and read registers, stack and shared memory off the machine code."""

import multiprocessing
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from tests.aot.known import Known, key_of
from tests.aot.record import Launch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_TIMEOUT_S = 120  # one compilation: the slowest take several seconds


class Usage(NamedTuple):
    """What cuobjdump -res-usage says of a kernel: registers per thread; bytes of stack per thread, of static shared."""

    registers: int
    stack: int
    shared: int


def resource_usage(cubin: bytes) -> Usage:
    """Return the resources of the one kernel in `cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return parse_usage(run.stdout)


def parse_usage(text: str) -> Usage:
    """Read the output of `cuobjdump -res-usage`; more than one function, or none, is our own bug."""
    found = re.findall(r"Function (\S+):\s*(REG:.*)", text)
    assert len(found) == 1, text
    numbers = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", found[0][1])}
    # Spills show in STACK; LOCAL is what older compilers called it. From sm_90 on SHARED has 1024 bytes that the system
    # keeps, which the limits leave out; triton's own is not in it, for it is sized at launch.
    shared = numbers["SHARED"] - (1024 if numbers["SHARED"] >= 1024 else 0)
    return Usage(numbers["REG"], numbers["STACK"] + numbers.get("LOCAL", 0), shared)


def row(launch: Launch, outcome: dict[str, Any]) -> dict[str, Any]:
    """Return what reports print and tests judge, as plain values."""
    empty = {"registers": None, "stack": None, "shared": None, "scratch": None, "seconds": None, "error": None}
    return {
        "kernel": launch.kernel,
        "module": launch.module,
        "arch": launch.arch,
        "cases": launch.cases,
        "constants": {name: plain(value) for name, value in launch.constants.items()},
        "signature": launch.signature,
        "warps": launch.options["num_warps"],
        "stages": launch.options["num_stages"],
        "grids": sorted(set(launch.grids)),
        "bad_grids": launch.bad_grids,
        **empty,
        **outcome,
    }


def plain(value: Any) -> Any:
    """Return a constant of a kernel as JSON can hold it."""
    value = getattr(value, "value", value)
    return value if isinstance(value, int | float | bool | str | None) else str(value)


def compile_launch(launch: Launch) -> dict[str, Any]:
    """Compile one launch in this process; a failure is an outcome, whatever its kind."""
    began = time.perf_counter()
    try:
        kernel = triton.compile(launch.source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options)
    except Exception as error:  # noqa: BLE001 - the compiler raises whatever it likes, and all of it is reported
        return {"error": _line(error), "seconds": round(time.perf_counter() - began, 2)}
    usage = resource_usage(kernel.asm["cubin"])
    return {
        "registers": usage.registers,
        "stack": usage.stack,
        "shared": kernel.metadata.shared + usage.shared,
        "scratch": kernel.metadata.global_scratch_size,
        "warps": kernel.metadata.num_warps,
        "seconds": round(time.perf_counter() - began, 2),
    }


def _line(error: BaseException) -> str:
    """Return the last cause in one line, after where it is: triton wraps an error in the source text around it."""
    place = str(error).partition("\n")[0] if "\n" in str(error) else ""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{place} {type(error).__name__}: {' '.join(str(error).split())[-500:]}".strip()


def compile_all(
    launches: Sequence[Launch],
    *,
    jobs: int,
    progress: Callable[[int], None] = lambda done: None,
    compile_one: Callable[[Launch], dict[str, Any]] = compile_launch,
    known: Known | None = None,
) -> list[dict[str, Any]]:
    """Compile `launches`, `jobs` at a time, each in a forked child: the compiler may abort its process.

    Returns one row each, in order; `compiled` says whether it was compiled now or is `known`.
    """
    # Fork: a launch holds functions and compiler objects that cannot be pickled, and a fresh child would import torch.
    context = multiprocessing.get_context("fork")
    keys = [key_of(launch) if known else "" for launch in launches]
    outcomes = {i: found for i, key in enumerate(keys) if known and (found := known.get(key))}
    old = set(outcomes)
    running: dict[Connection, tuple[int, Any, float]] = {}
    waiting = [index for index in reversed(range(len(launches))) if index not in outcomes]
    while waiting or running:
        while waiting and len(running) < jobs:
            index = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(compile_one, launches[index], sender))
            child.start()
            sender.close()
            running[receiver] = (index, child, time.monotonic())
        ready = wait(list(running), timeout=1)
        for receiver in [receiver for receiver in running if receiver in ready]:
            index, child, _ = running.pop(receiver)
            try:
                outcomes[index] = receiver.recv()
            except EOFError:
                outcomes[index] = {}
            child.join()
            if not outcomes[index]:
                outcomes[index] = {"error": f"the compiler ended its process, exit code {child.exitcode}"}
            progress(len(outcomes))
        for receiver, (index, child, began) in list(running.items()):
            if time.monotonic() - began > _TIMEOUT_S:
                child.kill()
                child.join()
                del running[receiver]
                outcomes[index] = {"error": f"not compiled after {_TIMEOUT_S} s"}
    if known:
        for i in set(outcomes) - old:
            known.add(keys[i], outcomes[i])
        known.save()
    return [row(launch, outcomes[i]) | {"compiled": i not in old} for i, launch in enumerate(launches)]


def _child(compile_one: Callable[[Launch], dict[str, Any]], launch: Launch, sender: Connection) -> None:
    sender.send(compile_one(launch))
    sender.close()
