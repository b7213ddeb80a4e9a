"""Section: all tests of GPU kernels on the device, every file in a process of its own, some at a time.

A kernel that reads where it must not ends its process's access to the device: the other files still run.
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import duolocal
from duolocal.bench.gpu.measure import Bench
from duolocal.processes import end

PATTERNS = ("test_triton_*.py", "test_gpu_*.py", "test_device_sampling.py")
_SHOWN_FAILURES = 5  # of a file, in the report; the log has all
_MESSAGE_CHARACTERS = 600
_POLL_S = 0.2
_LEFT_S = 3.0  # to write the report


@dataclass
class _Running:
    file: Path
    process: subprocess.Popen[bytes]
    report: Path
    output: IO[bytes]
    began: float


def run(bench: Bench) -> None:
    """Run the test files of the checkout that this package belongs to."""
    folder = Path(duolocal.__file__).parents[1] / "tests"
    files = sorted({file for pattern in PATTERNS for file in folder.glob(pattern)})
    if not files:
        bench.record("tests", error=f"no test files in {folder}: run the suite from a checkout")
        return
    run_files(bench, files, at_once=max(1, min(6, (os.cpu_count() or 2) // 2)))


def run_files(bench: Bench, files: list[Path], *, at_once: int) -> None:
    """Run pytest on each file; record counts and first failures as each ends, and what the deadline cut off."""
    waiting, running = list(files), list[_Running]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < at_once and bench.left_s > _LEFT_S:
                    running.append(_start(waiting.pop(0), Path(folder)))
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    _finish(bench, one)
                if bench.left_s <= _LEFT_S:
                    break
                time.sleep(_POLL_S)
        finally:
            for one in running:
                end(one.process)
                _finish(bench, one, cut_off=True)
            for file in waiting:
                bench.record("tests", file=file.name, skipped="no time was left")


def _start(file: Path, folder: Path) -> _Running:
    report = folder / f"{file.stem}.xml"
    output = (folder / f"{file.stem}.out").open("w+b")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
    process = subprocess.Popen(
        [*command, str(file)], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=file.parents[1]
    )
    return _Running(file, process, report, output, time.monotonic())


def _finish(bench: Bench, one: _Running, *, cut_off: bool = False) -> None:
    one.output.seek(0)
    text = one.output.read().decode(errors="replace")
    one.output.close()
    sys.stdout.write(f"--- {one.file.name}\n{text}\n")
    sys.stdout.flush()
    counts, failures = read_junit(one.report)
    code = one.process.returncode
    fields: dict[str, object] = {
        "file": one.file.name,
        "exit_code": code,
        "seconds": round(time.monotonic() - one.began, 1),
        **counts,
        "failures": failures,
    }
    if cut_off:
        fields["error"] = "not finished in the time there was"
    elif code not in (0, 5):  # 5: nothing was collected
        how = f"ended by signal {-code}" if code < 0 else f"pytest's exit code is {code}"
        fields["error"] = f"{counts.get('failed', 0) + counts.get('errors', 0)} failed" if failures else how
        if not failures:
            fields["trace"] = text[-2 * _MESSAGE_CHARACTERS :]
    bench.record("tests", **fields)


def read_junit(path: Path) -> tuple[dict[str, int], list[dict[str, str]]]:
    """Return counts (passed, failed, errors, skipped) and the first failures; ({}, []) where there is no report."""
    try:
        suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return {}, []
    total, failed, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    counts = {"passed": total - failed - errors - skipped, "failed": failed, "errors": errors, "skipped_tests": skipped}
    failures = []
    for suite in suites:
        for case in suite.iter("testcase"):
            for outcome in (*case.findall("failure"), *case.findall("error")):
                message = (outcome.get("message") or outcome.text or "")[:_MESSAGE_CHARACTERS]
                failures.append({"test": case.get("name", "?"), "message": message})
    return counts, failures[:_SHOWN_FAILURES]
