"""Sections of a suite that go well, crash and hang: run as children by test_bench_gpu.py."""

import os
import signal
import sys
import time

from duolocal.bench.gpu.measure import Bench


def good(bench: Bench) -> None:
    bench.record("thing", value=1)
    bench.record("seen", copy=bench.known_ceilings.copy_bytes_per_s if bench.known_ceilings else None)


def crash(bench: Bench) -> None:
    bench.record("thing", value=1)
    bench.record("ceilings", copy_bytes_per_s=2.0, matmul_flop_per_s=3.0)
    sys.stdout.write("a line for the log\n")
    raise RuntimeError("an illegal memory access")


def killed(bench: Bench) -> None:
    bench.record("thing", value=1)
    os.kill(os.getpid(), signal.SIGKILL)


def hang(bench: Bench) -> None:
    bench.record("thing", value=1)
    while True:
        time.sleep(1)
