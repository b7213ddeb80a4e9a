"""What all tests share: threads before torch, the same environment everywhere, hypothesis profiles, the real model."""

import importlib.util
import os

# Before torch loads: threads that wander between cores make timings and the CPU kernels several times slower. Each of
# several pytest workers (-n) gets a core, where all of them would be bound to the first. Which cores there are is noted
# by the first process: the workers inherit what torch has bound it to.
if hasattr(os, "sched_setaffinity"):
    cores = os.environ.setdefault("DUOLOCAL_TEST_CORES", ",".join(map(str, sorted(os.sched_getaffinity(0))))).split(",")
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker:
        os.sched_setaffinity(0, {int(cores[int(worker.removeprefix("gw")) % len(cores)])})
        os.environ["OMP_PROC_BIND"] = "false"
os.environ.setdefault("OMP_PROC_BIND", "true")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from duolocal.models.default import MODEL_VARIABLE
from duolocal.models.names import SMALL_MODEL
from duolocal.models.registry import cached_path

pytest_plugins = ["tests.thinning"]

# Before triton is imported: without a CUDA device its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_triton_*.py"]

# No deadline: one example's time says more about the load of the machine than about the code.
settings.register_profile("default", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("full", parent=settings.get_profile("default"), max_examples=200)

# What the user's shell says of terminals and languages, and how duolocal is set up there: tests that depend on one of
# them say so. Unlike the rest of the environment this decides what is printed.
_OF_THE_SHELL = (
    *("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLORTERM", "TTY_COMPATIBLE"),
    *("LANGUAGE", "LC_ALL", "LC_CTYPE", "LC_MESSAGES", "LC_NUMERIC", "LC_TIME"),
    *("DUOLOCAL_SESSIONS", "DUOLOCAL_KEEP", "PYTHONIOENCODING", "PYTHONUTF8"),
)


def pytest_configure(config: pytest.Config) -> None:
    if torch.cuda.is_available():  # compiled, all of their cases take seconds
        config.option.full = [*config.option.full, "test_triton_*.py"]
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("full" if "*" in config.getoption("full") else "default")


@pytest.fixture(scope="session", autouse=True)
def same_everywhere() -> Iterator[None]:
    """Take the terminal, the language and the user's settings out of the environment, also for child processes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _OF_THE_SHELL:
            patch.delenv(name, raising=False)
        patch.setenv("COLUMNS", "80")
        patch.setenv("LINES", "24")
        patch.setenv("TERM", "xterm-256color")
        patch.setenv("LANG", "C.UTF-8")
        patch.setenv(MODEL_VARIABLE, SMALL_MODEL)
        yield


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Return the file of the model that the tests use, or skip: a test fetches nothing."""
    path = cached_path(SMALL_MODEL)
    if path is None:
        pytest.skip(f"{SMALL_MODEL} is not cached: run `duolocal models fetch {SMALL_MODEL}`")
    return path


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Keep torch to one thread, as the engine does beside compiled kernels: both would want the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
