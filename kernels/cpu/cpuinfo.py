"""What the system says of the CPU: its name and its instruction sets."""

import platform
from pathlib import Path


def cpu_lines(*fields: str) -> list[str]:
    """Return the different lines of /proc/cpuinfo that begin with one of `fields`, [] where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return list(dict.fromkeys(line for line in lines if line.startswith(fields)))


def cpu_name() -> str:
    """Return the CPU's name for people."""
    names = cpu_lines("model name")
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
