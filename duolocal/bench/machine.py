"""What a figure depends on: processor, cores, versions, commit.

Loads no torch.
"""

import platform
import sys
from importlib import metadata
from pathlib import Path

import psutil

import duolocal
from duolocal.kernels.cpu.cpuinfo import cpu_name
from duolocal.kernels.cpu.threads import default_threads
from duolocal.processes import output_of


def machine_facts(*, threads: int | None = None, device: str = "cpu") -> dict[str, object]:
    """Return what has to stand beside a figure: processor, memory, system, versions, commit, threads, device."""
    return {
        "cpu": _cpu_name(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": default_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "device": device,
        "threads": threads,
        "versions": {
            "duolocal": duolocal.__version__,
            "torch": metadata.version("torch"),
            "python": platform.python_version(),
        },
        "commit": _commit(),
    }


def _cpu_name() -> str:
    known = output_of("sysctl", "-n", "machdep.cpu.brand_string") if sys.platform == "darwin" else None
    return known or cpu_name()


def _commit() -> str | None:
    """Return the commit of the checkout this package runs from, with "+" where it has changes; None elsewhere."""
    root = Path(duolocal.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    commit = output_of("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    return commit + ("+" if output_of("git", "-C", str(root), "status", "--porcelain") else "")
