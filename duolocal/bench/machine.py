"""What a figure depends on: processor, cores, versions, commit; and the memory of this process.

Loads no torch.
"""

import platform
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import psutil

import duolocal
from duolocal.kernels.cpu.threads import default_threads


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


def peak_bytes() -> int:
    """Return the most memory this process ever had resident, mapped files included."""
    peak = _proc_status("VmHWM")  # not ru_maxrss: on Linux a child starts with its parent's
    if peak is not None:
        return peak
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Return the memory this process has resident now."""
    return _proc_status("VmRSS") or psutil.Process().memory_info().rss


def _proc_status(field: str) -> int | None:
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


def _cpu_name() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
        if name:
            return name
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the checkout this package runs from, with "+" where it has changes; None elsewhere."""
    root = Path(duolocal.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    return commit + ("+" if _output("git", "-C", str(root), "status", "--porcelain") else "")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
