"""Every GPU kernel, compiled ahead of time, stays within registers and shared memory.

By default that is one model with every KV format for sm_80, and every kernel for sm_90; with `--full` the usual shapes
on all architectures. What an earlier run compiled is not compiled again (tests/aot/known.py).

The compiling is done by `python -m tests.aot` in one child process: this one may be under TRITON_INTERPRET, which
replaces the compiler. Needs triton with its own cuobjdump (Linux wheels have it), but no GPU.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.aot.limits import SHARED_LIMIT, SHARED_LIMITS, problems, severity
from tests.thinning import is_full

_ROOT = Path(__file__).parent.parent
_TIMEOUT_S = 1700  # takes about two minutes on one core where nothing is known, with --full seven


def _missing() -> str:
    """Return why nothing can be compiled here, or nothing."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "triton is not installed"
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return "" if tool.is_file() else f"this triton has no cuobjdump ({tool})"


def _modules() -> list[str]:
    """Return the modules of kernels/gpu that define kernels, without importing triton."""
    files = sorted((_ROOT / "kernels" / "gpu").glob("*.py"))
    return [file.stem for file in files if re.search(r"^def \w+_kernel\(", file.read_text(), re.MULTILINE)]


_ARCHITECTURES = [
    pytest.param(arch, id=f"sm_{arch}", marks=() if arch in (80, 90) else pytest.mark.full) for arch in SHARED_LIMITS
]


def needs_compiler(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that reads the report: the first one compiles for minutes."""
    skip = pytest.mark.skipif(bool(_missing()), reason=_missing() or "-")
    return pytest.mark.slow(pytest.mark.timeout(_TIMEOUT_S + 100)(skip(test)))


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Compile everything once."""
    matrix = "usual" if is_full(request.config, Path(__file__)) else "few"
    file = tmp_path_factory.mktemp("aot") / "report.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # the same with and without a GPU
    command = [sys.executable, "-W", "ignore", "-m", "tests.aot", "--matrix", matrix, "--toys", "--json", str(file)]
    run = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    assert file.is_file(), f"exit code {run.returncode}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
    return json.loads(file.read_text())


@needs_compiler
@pytest.mark.parametrize("arch", _ARCHITECTURES)
@pytest.mark.parametrize("module", _modules())
def test_kernels_fit(report: dict[str, Any], module: str, arch: int) -> None:
    rows = [row for row in report["rows"] if row["module"].endswith(f".{module}") and row["arch"] == arch]
    assert rows, f"no case of tests/aot/cases.py launches a kernel of {module} on sm_{arch}"
    bad = sorted((row for row in rows if row["problems"]), key=severity, reverse=True)
    if bad:
        worst = bad[0]
        pytest.fail(
            f"{len(bad)} of {len(rows)} compilations are over a limit; the worst: {worst['kernel']}, "
            f"{worst['cases'][0]}, {worst['constants']}, {worst['warps']} warps, {worst['stages']} stages: "
            f"{'; '.join(worst['problems'])}. All of them: python -m tests.aot --arch {arch}",
            pytrace=False,
        )


@needs_compiler
def test_every_operation_runs(report: dict[str, Any]) -> None:
    assert not report["failed_cases"]


@needs_compiler
def test_every_kernel_is_launched_by_a_case(report: dict[str, Any]) -> None:
    assert not report["unused_kernels"], "add an operation that launches them to tests/aot/cases.py"


def _toys(report: dict[str, Any], case: str) -> dict[int, dict[str, Any]]:
    found = {row["arch"]: row for row in report["toys"] if case in row["cases"]}
    assert found
    return found


@needs_compiler
def test_a_good_kernel_is_accepted(report: dict[str, Any]) -> None:
    row = _toys(report, "good 65")[80]
    assert row["problems"] == [] and row["error"] is None
    assert 1 < row["registers"] < 64 and row["warps"] == 4


@needs_compiler
def test_a_spill_is_reported(report: dict[str, Any]) -> None:
    row = _toys(report, "spilling")[80]
    assert row["stack"] > 100
    assert any("spills" in problem for problem in row["problems"])


@needs_compiler
def test_too_much_shared_memory_is_reported(report: dict[str, Any]) -> None:
    row = _toys(report, "shared")[80]
    assert row["shared"] > SHARED_LIMITS[80]
    assert any("shared memory, more than the 166912 of sm_80" in problem for problem in row["problems"])


@needs_compiler
def test_what_one_architecture_cannot_compile_is_reported_there(report: dict[str, Any]) -> None:
    rows = _toys(report, "fp8")
    (problem,) = rows[80]["problems"]
    assert problem.startswith("does not compile") and "fp8e4nv not supported" in problem
    assert rows[90]["problems"] == []


@needs_compiler
def test_a_crash_of_the_compiler_is_reported(report: dict[str, Any]) -> None:
    (problem,) = _toys(report, "crash")[80]["problems"]
    assert "the compiler ended its process, exit code -6" in problem


@needs_compiler
def test_a_grid_out_of_range_is_reported(report: dict[str, Any]) -> None:
    (problem,) = _toys(report, "wide grid")[80]["problems"]
    assert "(1, 65536)" in problem


@needs_compiler
def test_an_operation_that_waits_for_the_device_fails(report: dict[str, Any]) -> None:
    assert "DataDependentOutputException" in report["failed_toys"]["reads back"]


@needs_compiler
def test_an_argument_on_the_host_fails(report: dict[str, Any]) -> None:
    assert "good_kernel: x is on the cpu" in report["failed_toys"]["on the host"]


@needs_compiler
def test_launches_are_specialised_as_real_ones(report: dict[str, Any]) -> None:
    good = [row for row in report["toys"] if row["cases"][0].startswith("good ")]
    signatures = {tuple(row["cases"]): row["signature"] for row in good}
    pointers = {"x": "*fp32/16", "out": "*fp32/16"}
    assert signatures == {
        ("good 1",): pointers | {"factor": "fp32"},  # n == 1 is a constant
        ("good 48", "good 64"): pointers | {"n": "i32/16", "factor": "fp32"},
        ("good 65",): pointers | {"n": "i32", "factor": "fp32"},
        ("good unaligned",): {"x": "*fp32", "out": "*fp32", "n": "i32", "factor": "fp32"},
        ("good half",): {"x": "*fp16/16", "out": "*fp16/16", "n": "i32", "factor": "fp32"},
        ("good long",): pointers | {"n": "i64", "factor": "fp32"},
    }


@needs_compiler
def test_what_compiled_is_known_from_then_on(report: dict[str, Any]) -> None:
    good = [row for row in report["toys"] if row["error"] is None]
    assert len(good) > 5
    assert report["toys_again"] == [row | {"compiled": False} for row in good]  # its compiler only aborts


@needs_compiler
def test_the_output_of_cuobjdump_is_read() -> None:
    from tests.aot.build import parse_usage

    text = " Common:\n  GLOBAL:0\n Function a_kernel:\n  REG:{} STACK:{} SHARED:{} LOCAL:{} CONSTANT[0]:392\n"
    assert parse_usage(text.format(128, 8, 0, 0)) == (128, 8, 0)
    assert parse_usage(text.format(40, 8, 1088, 16)) == (40, 24, 64)
    with pytest.raises(AssertionError):
        parse_usage("")


_FINE: dict[str, Any] = {
    "kernel": "some_kernel",
    "arch": 86,
    "registers": 128,
    "stack": 0,
    "shared": SHARED_LIMIT,
    "scratch": 0,
    "warps": 8,
    "bad_grids": [],
    "error": None,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"error": "no"}, "does not compile: no"),
        ({"stack": 8}, "spills 8 bytes"),
        ({"registers": 256, "warps": 4}, "256 registers, more than 255"),
        ({"registers": 129, "warps": 16}, "69632 registers"),
        ({"shared": SHARED_LIMIT + 1}, "more than the 101376 of sm_86"),
        ({"arch": 90, "shared": SHARED_LIMIT + 1}, "of an RTX 4090"),
        ({"arch": 90, "shared": 232_449}, "more than the 232448 of sm_90"),
        ({"scratch": 16}, "global scratch"),
        ({"warps": 64, "registers": 16}, "64 warps"),
        ({"bad_grids": ["a: (0,)"]}, "a: (0,)"),
    ],
)
def test_limits(change: dict[str, Any], said: str) -> None:
    assert problems(_FINE) == []
    (problem,) = problems(_FINE | change)
    assert said in problem


def test_a_kernel_may_have_a_limit_of_its_own() -> None:
    assert problems(_FINE, {"some_kernel": 128}) == []
    assert problems(_FINE, {"some_kernel": 127})
