"""Measurements on this machine: memory, speed, and speed beside other runtimes.

Everything here returns plain values; printing them is the command line's business. Importing the package loads no
torch: a runner of another runtime would carry it in its peak memory.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["memory_report"]

if TYPE_CHECKING:
    from duolocal.bench.memory import memory_report


def __getattr__(name: str) -> Any:
    if name == "memory_report":
        from duolocal.bench.memory import memory_report

        return memory_report
    raise AttributeError(f"module 'duolocal.bench' has no attribute {name!r}")
