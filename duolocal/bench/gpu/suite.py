"""The suite: one child process per section, in order, within one deadline; what is known is on disk at any moment.

Owns the order, the time each section gets, and the report. A section that crashes or hangs costs its own results only.
Loads no torch: the parent holds nothing of the device.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from duolocal.bench.child import child_environment
from duolocal.errors import DuoLocalError
from duolocal.files import free_name, write_json
from duolocal.kernels.cpu.threads import unbound
from duolocal.processes import end, how_ended

NO_DEVICE = "torch sees no CUDA device here: nothing was measured"
PROBE = "import json, torch\nprint(json.dumps(torch.cuda.get_device_name(0) if torch.cuda.is_available() else None))"
_RESERVE_S = 3.0  # that a section has left when it is told that its time is over
_GRACE_S = 2.0  # from there until it is killed
_POLL_S = 0.25
_END_S = 4.0  # of the whole suite, for the table
_TAIL_CHARACTERS = 600
_PACKAGE = "duolocal.bench.gpu"


@dataclass(frozen=True)
class Section:
    """One child: `run` is module:function; it gets at most `most_s`, and is left out where `least_s` is not left."""

    letter: str
    name: str
    run: str
    least_s: float
    most_s: float


SECTIONS = (
    Section("a", "device", f"{_PACKAGE}.device:run", 12, 30),
    Section("b", "correctness", f"{_PACKAGE}.correctness:run", 30, 150),
    Section("c", "products", f"{_PACKAGE}.products:run", 20, 60),
    Section("c", "decode attention", f"{_PACKAGE}.decode_kernels:run", 20, 75),
    Section("c", "prefill attention", f"{_PACKAGE}.prefill_kernels:run", 15, 50),
    Section("c", "pointwise", f"{_PACKAGE}.pointwise:run", 10, 25),
    Section("d", "decode", f"{_PACKAGE}.decode:run", 30, 100),
    Section("d", "selected decode", f"{_PACKAGE}.selected:run", 30, 150),
    Section("e", "prefill", f"{_PACKAGE}.prefill:run", 30, 150),
    Section("f", "capped", f"{_PACKAGE}.capped:run", 20, 50),
    Section("f", "capped long", f"{_PACKAGE}.capped:run_long", 12, 40),
    Section("g", "sweep", f"{_PACKAGE}.sweep:run", 20, 150),
)


@dataclass(frozen=True)
class SuiteFiles:
    """Where results go: three files."""

    report: Path
    log: Path
    profile: Path


def chosen_sections(letters: Collection[str]) -> list[Section]:
    """Return the sections of those letters, in the suite's order."""
    return [section for section in SECTIONS if section.letter in letters]


def cuda_device_name() -> str:
    """Return the device's name, asked for in a process of its own. Raises DuoLocalError where there is none."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    try:
        name = json.loads(done.stdout)
    except json.JSONDecodeError:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise DuoLocalError(f"torch could not be asked for a CUDA device ({last[0]}): nothing was measured") from None
    if name is None:
        raise DuoLocalError(NO_DEVICE)
    return str(name)


def suite_files(folder: Path, device: str, date: str) -> SuiteFiles:
    """Return the names of new files in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower().replace("nvidia", "")).strip("-") or "device"
    stem = f"gpu-{slug}-{date}"
    name = free_name(stem, taken=lambda name: (folder / f"{name}.json").exists(), form="{}-{}")
    return SuiteFiles(*(folder / f"{name}{end}" for end in (".json", ".log", "-profile.txt")))


def run_suite(
    sections: Sequence[Section],
    files: SuiteFiles,
    *,
    device: str,
    deadline: float,
    torch_device: str = "cuda",
    sizes: str = "full",
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run sections one after the other and return the report, which is on disk after every single result.

    device: its name; deadline: on time.monotonic(), for all together; torch_device, sizes: other than the defaults in
    tests only.
    """
    began = time.monotonic()
    deadline -= _END_S
    report: dict[str, Any] = {
        "benchmark": "gpu",
        "device": device,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "weights": "random (Llama-3-8B shapes, INT4 in groups of 128)" if sizes == "full" else "random (tiny)",
        "limit_s": round(deadline - began, 1),
        "ceilings": None,
        "sections": {},
    }
    with files.log.open("ab") as log:
        for at, section in enumerate(sections):
            left_s = deadline - time.monotonic()
            limit_s = allotted(section, sections[at + 1 :], left_s)
            entry: dict[str, Any] = {"status": "running", "limit_s": round(limit_s, 1), "records": []}
            report["sections"][section.name] = entry
            if not limit_s:
                entry |= {"status": "skipped", "why": f"{left_s:.0f} s were left, {section.least_s:.0f} s are wanted"}
            else:
                on_step(f"{section.name} (at most {limit_s:.0f} s, {left_s:.0f} s left)")
                log.write(f"\n===== {section.name}\n".encode())
                settings = {
                    "run": section.run,
                    "device": torch_device,
                    "sizes": sizes,
                    "left_s": limit_s,
                    "reserve_s": _RESERVE_S,
                    "ceilings": report["ceilings"],
                    "profile": str(files.profile),
                }
                _run_section(settings, entry, log, lambda: write_json(files.report, report))
            _take_ceilings(report, entry)
            report["elapsed_s"] = round(time.monotonic() - began, 1)
            write_json(files.report, report)
    return report


def allotted(section: Section, later: Sequence[Section], left_s: float) -> float:
    """Return the seconds that a section gets of those left: the later ones keep their least; 0: not even its own."""
    if left_s < section.least_s:
        return 0.0
    return min(section.most_s, max(left_s - sum(other.least_s for other in later), section.least_s))


def failed(report: dict[str, Any]) -> list[str]:
    """Return what went wrong, one line each: sections that crashed or hung, results that are errors, failed tests."""
    lines = []
    for name, entry in report["sections"].items():
        if entry["status"] in ("crashed", "timeout"):
            lines.append(f"{name}: {entry['status']}, {entry.get('why', '')}")
        for record in entry["records"]:
            if "error" in record:
                what = " ".join(
                    str(record[key])
                    for key in ("what", "file", "name", "kernel", "kv", "context", "chunk", "route", "values", "rows")
                    if record.get(key) is not None
                )
                lines.append(f"{name}: {what}: {record['error']}")
    return lines


def _run_section(settings: dict[str, Any], entry: dict[str, Any], log: IO[bytes], write: Callable[[], None]) -> None:
    """Run one child to its end or its limit, taking over its records as they come."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        records.touch()
        log.flush()
        log_start = log.tell()
        command = [sys.executable, "-m", f"{_PACKAGE}.child", json.dumps({**settings, "records": str(records)})]
        with unbound():
            # A group of its own, not a session: a killed suite must not leave it behind.
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                process_group=0,
            )
        limit_s = settings["left_s"] + _GRACE_S
        known = 0
        try:
            while child.poll() is None and time.monotonic() - began < limit_s:
                time.sleep(_POLL_S)
                entry["records"] = _read_records(records)
                if len(entry["records"]) > known:
                    known = len(entry["records"])
                    write()
            hung = child.poll() is None
        finally:
            end(child, group=True)
        entry["records"] = _read_records(records)
        entry["elapsed_s"] = round(time.monotonic() - began, 1)
        entry["status"] = "done"
        if hung or (child.returncode and entry["elapsed_s"] >= settings["left_s"]):
            entry |= {"status": "timeout", "why": f"still running after {entry['elapsed_s']:.0f} s"}
        elif child.returncode:
            entry |= {"status": "crashed", "why": how_ended(child.returncode)}
        if entry["status"] != "done":
            entry["tail"] = _tail(Path(log.name), log_start)


def _environment() -> dict[str, str]:
    # Several test processes run at once: threads bound by each for itself would all share the first cores.
    return {**child_environment(2), "OMP_PROC_BIND": "false", "PYTHONUNBUFFERED": "1"}


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines; a child that dies while it writes leaves half of one."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            with suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def _tail(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")[-_TAIL_CHARACTERS:]


def _take_ceilings(report: dict[str, Any], entry: dict[str, Any]) -> None:
    for record in entry["records"]:
        if record["what"] == "ceilings" and report["ceilings"] is None:
            report["ceilings"] = {name: value for name, value in record.items() if name != "what"}
