"""The threads behind compiled kernels: nothing mixes, nobody sleeps through work, and the caller keeps its cores."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from duolocal.kernels.cpu import threads
from duolocal.kernels.cpu.build import build, load
from duolocal.kernels.cpu.operations import CpuKernels
from duolocal.kernels.cpu.pool import ThreadPool, program
from duolocal.kernels.cpu.structs import SiluArgs
from duolocal.quant.weight import DenseWeight, Linear
from tests.compiled import THREADS, compiled, compiled_kernels, normal, poisoned

pytestmark = compiled_kernels


class Work:
    """A silu of 5000 numbers on a pool: five items, so that every thread has some."""

    def __init__(self, pool: ThreadPool) -> None:
        self.pool = pool
        self.gate, self.up = normal(5000, seed=1), normal(5000, seed=2)
        self.out = torch.empty(5000)
        self.wanted = torch.nn.functional.silu(self.gate) * self.up
        self._args = SiluArgs(self.gate.data_ptr(), self.up.data_ptr(), self.out.data_ptr(), 5000)

    def run(self, *, times: int = 1) -> None:
        self.out.fill_(float("nan"))
        self.pool.run(program(self.pool, [("silu_mul", self._args)] * times), times)
        torch.testing.assert_close(self.out, self.wanted, rtol=1e-6, atol=1e-9)


@pytest.fixture(params=[2, 3])
def pool(request: pytest.FixtureRequest) -> Iterator[ThreadPool]:
    """A pool of this test's own, unlike those of `compiled`, which live as long as the process."""
    pool = ThreadPool(load(build()), request.param)
    yield pool
    pool.close()


def wait_until_asleep(pool: ThreadPool) -> None:
    deadline = time.monotonic() + 20
    while not all(pool._pool.asleep[number] for number in range(1, pool.num_threads)):
        assert time.monotonic() < deadline, "a worker spins although there is nothing to do"
        time.sleep(0.01)


def test_threads_that_run_at_once_get_their_own_results() -> None:
    """Six Python threads on two pools, each with inputs of its own."""
    weights = [Linear(DenseWeight(normal(100, 64, seed=i))) for i in range(6)]
    inputs = [normal(1 + i * 4, 64, seed=10 + i) for i in range(6)]

    def product(i: int) -> Tensor:
        return compiled(2 + i % 2).linear(inputs[i], (weights[i],))[0]

    wanted = [product(i) for i in range(6)]
    barrier = threading.Barrier(6)

    def many(i: int) -> bool:
        barrier.wait()
        return all(torch.equal(product(i), wanted[i]) for _ in range(300))

    with poisoned(), ThreadPoolExecutor(6) as executor:
        assert list(executor.map(many, range(6))) == [True] * 6


def test_sleeping_workers_wake_up(pool: ThreadPool) -> None:
    work = Work(pool)
    wait_until_asleep(pool)  # they start asleep
    for _ in range(2):
        work.run()
        time.sleep(0.2)
        wait_until_asleep(pool)
    work.run(times=20)


def test_workers_that_linger_take_the_next_program(pool: ThreadPool) -> None:
    """Pauses around the time that a worker waits before it sleeps: it must not miss what comes just then."""
    work = Work(pool)
    for i in range(60):
        work.run()
        time.sleep(0.0003 * (i % 20))


@pytest.mark.parametrize("num_threads", THREADS)
def test_many_tiny_runs(num_threads: int) -> None:
    kernels = compiled(num_threads)
    x, weight = normal(1, 16), normal(16, seed=1)
    wanted = kernels.rms_norm(x, weight, eps=1e-5)
    for _ in range(2000):
        assert torch.equal(kernels.rms_norm(x, weight, eps=1e-5), wanted)


def test_every_operation_of_a_program_waits_for_the_one_before() -> None:
    """A recorded chain: each operation reads what all threads wrote in the one before."""
    kernels = compiled(2)
    start, one = normal(40, 256), torch.ones(256)
    layers = [Linear(DenseWeight(normal(256, 256, seed=i, scale=1 / 16))) for i in range(4)]
    x = start.clone()
    with kernels.record() as recording:
        y = x
        for layer in layers:
            y = kernels.linear(kernels.rms_norm(y, one, eps=1e-5), (layer,), residual=y)[0]
    assert len(recording.calls) == 8
    wanted = y.clone()
    for _ in range(30):
        y.fill_(float("nan"))
        recording.run()
        assert torch.equal(y, wanted)
    x.copy_(normal(40, 256, seed=9))
    recording.run()
    fresh = x
    for layer in layers:
        fresh = kernels.linear(kernels.rms_norm(fresh, one, eps=1e-5), (layer,), residual=fresh)[0]
    assert torch.equal(y, fresh)  # run on what the input now holds
    assert not torch.equal(y, wanted)


def test_timed_runs_count_every_operation(pool: ThreadPool) -> None:
    work = Work(pool)
    before = pool.ticks()
    times = pool.timed(program(pool, [("silu_mul", work._args)] * 5), 5)
    assert len(times) == 6
    everything = [before, *times, pool.ticks()]
    assert everything == sorted(everything)
    work.run()  # and the next run writes no times


@pytest.mark.parametrize("rested", [True, False])
def test_close_ends_the_threads(rested: bool) -> None:
    pool = ThreadPool(load(build()), 3)
    workers = list(pool._threads)
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    Work(pool).run()
    if rested:
        wait_until_asleep(pool)
    pool.close()
    assert not any(worker.is_alive() for worker in workers)
    pool.close()  # a second time is nothing


def test_kernels_of_one_size_share_a_pool() -> None:
    assert CpuKernels(2).pool is CpuKernels(2).pool
    assert CpuKernels(2).pool is not CpuKernels(3).pool


# ---- which cores ----


def write_topology(folder: Path, siblings: dict[int, str]) -> None:
    for cpu, text in siblings.items():
        topology = folder / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(text + "\n")


@pytest.mark.parametrize(
    ("siblings", "allowed", "cores"),
    [
        ({0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"}, range(8), [0, 1, 2, 3]),
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, range(4), [0, 2]),
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, (1, 3), [1, 3]),  # what a container left us
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, (1, 2, 3), [1, 2]),
        ({0: "0", 1: "1"}, range(2), [0, 1]),
        ({}, (0, 5), [0, 5]),  # no such files: every CPU counts as a core
        ({}, (), []),
    ],
)
def test_distinct_cores(tmp_path: Path, siblings: dict[int, str], allowed: range, cores: list[int]) -> None:
    write_topology(tmp_path, siblings)
    assert threads.distinct_cores(tuple(allowed), tmp_path) == cores


def test_threads_take_cores_first_and_then_their_second_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_ALLOWED", (0, 1, 2, 3))
    monkeypatch.setattr(threads, "distinct_cores", lambda: [0, 2])
    assert [threads.cpu_of(number) for number in range(6)] == [0, 2, 1, 3, None, None]
    assert threads.default_threads(Path("/no quota")) == 2


def test_the_affinity_is_not_believed_once_torch_has_bound_the_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2})
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    assert threads._affinity() == (2,)
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    assert threads._affinity() == (2,)
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    assert threads._affinity() == (0, 1, 2, 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2})
    assert threads._affinity() == (1, 2)


class Affinity:
    """A process that may use CPUs 0 to 3."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, now: set[int]) -> None:
        self.now = now
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(self.now))
        monkeypatch.setattr(os, "sched_setaffinity", self._set)

    def _set(self, _: int, cpus: set[int]) -> None:
        if not cpus <= {0, 1, 2, 3}:
            raise OSError(22, "Invalid argument")
        self.now = set(cpus)


def test_bound_restores_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Affinity(monkeypatch, now={0, 1, 2})
    with threads.bound(1):
        assert process.now == {1}
    assert process.now == {0, 1, 2}

    def failing() -> None:
        with threads.bound(2):
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert process.now == {0, 1, 2}
    for cpu in (None, 99):  # no core of its own; one that the system refuses
        with threads.bound(cpu):
            assert process.now == {0, 1, 2}
    process.now = {3}
    with threads.bound(0):
        assert process.now == {3}  # who is bound already stays there
    assert process.now == {3}


FORKED = """
import os, torch
from duolocal.errors import KernelError
from duolocal.kernels.cpu.operations import CpuKernels
kernels, x = CpuKernels(2), torch.ones(1, 16)
wanted = kernels.rms_norm(x, x[0], eps=1e-5)
for which in ("old", "new"):
    child = os.fork()
    if child == 0:
        try:
            mine = kernels if which == "old" else CpuKernels(2)
            print(torch.equal(mine.rms_norm(x, x[0], eps=1e-5), wanted), flush=True)
        except KernelError as error:
            print(error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
print(torch.equal(kernels.rms_norm(x, x[0], eps=1e-5), wanted))
"""


@cache
def forked() -> list[str]:
    """Return what a forked child says with its parent's kernels, one with new kernels, and their parent at last."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@needs_fork
def test_a_forked_child_is_told_that_it_has_no_threads() -> None:
    child, _, parent = forked()
    assert "fork" in child and "load the engine in the child process" in child
    assert parent == "True"


@needs_fork
def test_a_forked_child_can_load_kernels_of_its_own() -> None:
    assert forked()[1] == "True"


CHILD = """
import os, subprocess, sys, threading
before = os.sched_getaffinity(0)
import torch
from duolocal.kernels.cpu import threads
from duolocal.kernels.cpu.operations import CpuKernels
kernels = CpuKernels(2)
x = torch.ones(1, 16)
for _ in range(5):
    kernels.rms_norm(x, x[0], eps=1e-5)
assert os.sched_getaffinity(0) == before, os.sched_getaffinity(0)
seen = subprocess.run([sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"],
                      capture_output=True, text=True, check=True)
assert seen.stdout.strip() == str(sorted(before)), seen.stdout
(worker,) = [thread for thread in threading.enumerate() if thread.name.startswith("duolocal-")]
wanted = threads.cpu_of(1)
assert wanted is None or os.sched_getaffinity(worker.native_id) == {wanted}, os.sched_getaffinity(worker.native_id)
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_the_caller_keeps_its_cores_and_so_do_its_child_processes() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_PROC_BIND"}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.parametrize(
    ("text", "most"), [("max 100000\n", 10**6), ("200000 100000\n", 2), ("150000 100000\n", 1), ("50000 100000\n", 1)]
)
def test_threads_stay_within_a_containers_quota(tmp_path: Path, text: str, most: int) -> None:
    file = tmp_path / "cpu.max"
    assert threads.default_threads(file) == len(threads.distinct_cores())  # no such file
    file.write_text(text)
    assert threads.default_threads(file) == min(most, len(threads.distinct_cores()))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_children_started_unbound_get_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Affinity(monkeypatch, now={1})
    monkeypatch.setattr(threads, "_ALLOWED", (0, 1, 2))
    with threads.unbound():
        assert process.now == {0, 1, 2}
    assert process.now == {1}
