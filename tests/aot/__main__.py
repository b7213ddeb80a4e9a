"""Print what every GPU kernel needs on every architecture, compiled here and now, without a GPU.

python -m tests.aot [--matrix few|usual|all] [--arch 80 90] [--only TEXT] [--json FILE] [--toys] [--jobs N]

Exit code 1 if anything is over a limit, 2 if it cannot run.
"""

# ruff: noqa: T201 - a command for people
import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--matrix", choices=("few", "usual", "all"), default="usual", help="which shapes and formats; all: many minutes"
    )
    parser.add_argument("--arch", type=int, nargs="+", help="only these architectures: 80, 86, 89, 90")
    parser.add_argument("--only", metavar="TEXT", help="only kernels whose name has TEXT in it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report there")
    parser.add_argument("--toys", action="store_true", help="also compile the kernels that must be refused")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time (default %(default)s)")
    arguments = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        print("python -m tests.aot: triton is not installed: pip install triton", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("python -m tests.aot: unset TRITON_INTERPRET: the interpreter compiles nothing", file=sys.stderr)
        return 2
    # Before triton is imported: what is in the user's cache must not matter, nor what it is told to do elsewhere.
    for name in [name for name in os.environ if name.startswith("TRITON_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="duolocal-aot-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # as the engine sets it
        return report(arguments)


def report(arguments: argparse.Namespace) -> int:
    """Record, compile, print; return the exit code."""
    import torch
    import triton

    from tests.aot import build, cases
    from tests.aot.known import Known
    from tests.aot.limits import problems, severity
    from tests.aot.record import ARCHITECTURES, Recorder
    from tests.aot.toys import failing_operations, toy_cases

    torch.set_num_threads(1)  # nothing is computed, and a process with threads should not fork
    began = time.monotonic()
    recorder, toys = Recorder(), Recorder()
    kernels, failed = cases.kernels()
    failed_toys: dict[str, str] = {}
    for case in cases.all_cases(arguments.matrix):
        try:
            recorder.run(case.name, case.run, case.architectures)
        except Exception as error:  # noqa: BLE001 - one operation that fails must not hide the others
            failed[case.name] = cases.failure(error)
    if arguments.toys:
        for name, launch_toy in toy_cases().items():
            toys.run(name, launch_toy, (80, 90) if name == "fp8" else (80,))
        for name, operation in failing_operations().items():
            try:
                toys.run(name, operation, (80,))
            except Exception as error:  # noqa: BLE001
                failed_toys[name] = cases.failure(error)
    unused = sorted(kernels - {f"{launch.module}.{launch.kernel}" for launch in recorder.launches.values()})
    launches = [
        launch
        for launch in recorder.launches.values()
        if launch.arch in (arguments.arch or ARCHITECTURES) and (arguments.only or "") in launch.kernel
    ]
    print(f"{len(launches)} compilations, triton {triton.__version__}", file=sys.stderr)
    everything = [*launches, *toys.launches.values()]
    # Once here, so that forked children find the compiler loaded.
    warm = Recorder()
    warm.run("warm", toy_cases()["good 1"], (80,))
    build.compile_launch(next(iter(warm.launches.values())))
    known, progress = Known(), _progress(len(everything))
    rows = build.compile_all(everything, jobs=arguments.jobs, progress=progress, known=known)
    rows, toy_rows = rows[: len(launches)], rows[len(launches) :]
    if arguments.toys:
        (crash,) = build.compile_all(list(warm.launches.values()), jobs=1, compile_one=_abort)
        toy_rows.append(crash | {"cases": ["crash"]})
    toys_again: list[dict[str, Any]] = []
    if arguments.toys:
        known.save(copy := Path(os.environ["TRITON_CACHE_DIR"], "known.json"))
        toys_again = build.compile_all(list(toys.launches.values()), jobs=1, known=Known(copy), compile_one=_abort)
        toys_again = [row for row in toys_again if not row["compiled"]]
    for row in [*rows, *toy_rows, *toys_again]:
        row["problems"] = problems(row, cases.REGISTER_LIMITS)
    whole = {
        "triton": triton.__version__,
        "seconds": round(time.monotonic() - began, 1),
        "rows": rows,
        "toys": toy_rows,
        "toys_again": toys_again,
        "failed_toys": failed_toys,
        "failed_cases": failed,
        "unused_kernels": unused,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(whole, indent=1))
    print(table(rows))
    bad = sorted((row for row in rows if row["problems"]), key=severity, reverse=True)
    for where, same in grouped(bad).items():
        print(f"\n{where}: {', '.join(f'sm_{arch}' for arch in sorted(same))}")
        for problem, on in by_problem(same).items():
            print(f"  {problem}" + ("" if len(on) == len(same) else f" ({', '.join(f'sm_{arch}' for arch in on)})"))
    for said in dict.fromkeys(failed.values()):
        names = [name for name, other in failed.items() if other == said]
        print(f"\nfails: {said}\n  {len(names)} cases: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}")
    if unused:
        print("\nlaunched by no case of tests/aot/cases.py: " + ", ".join(unused))
    earlier = sum(not row["compiled"] for row in rows)
    print(f"\n{len(rows)} compilations, {earlier} of them known, {len(bad)} over a limit, {whole['seconds']} s")
    return int(bool(bad or failed or (unused and not arguments.only)))


def grouped(rows: list[dict[str, Any]]) -> dict[str, dict[int, list[str]]]:
    """Return {what was compiled: {architecture: problems}}: the same fault often shows on all of them."""
    found: dict[str, dict[int, list[str]]] = {}
    for row in rows:
        constants = " ".join(f"{name}={value}" for name, value in row["constants"].items())
        where = f"{row['kernel']}, {row['cases'][0]} ({row['warps']} warps, {row['stages']} stages; {constants})"
        found.setdefault(where, {})[row["arch"]] = row["problems"]
    return found


def by_problem(problems: dict[int, list[str]]) -> dict[str, list[int]]:
    """Turn {architecture: problems} around."""
    found: dict[str, list[int]] = {}
    for arch, said in sorted(problems.items()):
        for problem in said:
            found.setdefault(problem, []).append(arch)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the report: one line for each kernel, configuration and architecture."""
    head = ("kernel", "first case", "arch", "registers", "spill", "shared", "warps", "stages", "s")
    lines = [
        (
            row["kernel"],
            row["cases"][0] + (f" +{len(row['cases']) - 1}" if len(row["cases"]) > 1 else ""),
            f"sm_{row['arch']}",
            *("-" if row[name] is None else str(row[name]) for name in ("registers", "stack", "shared")),
            str(row["warps"]),
            str(row["stages"]),
            f"{row['seconds'] or 0:.1f}",
        )
        for row in sorted(rows, key=lambda row: (row["module"], row["kernel"], row["cases"][0], row["arch"]))
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    text = (
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    )
    return "\n".join(text)


def _abort(launch: object) -> dict[str, Any]:
    os.abort()


def _progress(total: int) -> Callable[[int], None]:
    def show(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
