"""How many threads, and which core each of them runs on.

The affinity of the process is read when this module is imported: with OMP_PROC_BIND=true, importing torch binds the
main thread to one core, and afterwards the system no longer tells which cores we may use.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def _affinity() -> tuple[int, ...]:
    if not hasattr(os, "sched_getaffinity"):
        return tuple(range(os.cpu_count() or 1))
    allowed = sorted(os.sched_getaffinity(0))
    binding = os.environ.get("OMP_PROC_BIND", "false").lower() != "false"
    if len(allowed) == 1 and "torch" in sys.modules and binding:
        # What a container or taskset leaves us is not known any more: binding to a core outside it fails, and that
        # thread stays unbound.
        return tuple(range(os.cpu_count() or 1))
    return tuple(allowed)


_ALLOWED = _affinity()


def distinct_cores(allowed: tuple[int, ...] = _ALLOWED, sysfs: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """Return one logical CPU of each physical core that this process may use, in order."""
    seen, cores = set(), []
    for cpu in allowed:
        try:
            siblings = (sysfs / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:
            siblings = str(cpu)
        if siblings not in seen:
            seen.add(siblings)
            cores.append(cpu)
    return cores


def default_threads(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return one thread per physical core, whose second thread shares its arithmetic, within a container's quota."""
    return max(1, min(len(distinct_cores()), _quota(quota)))


def _quota(file: Path) -> int:
    """Return how many cores' time a container may use; as many as there are where nothing limits it."""
    try:
        quota, period = file.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup 2, or "max"
        return os.cpu_count() or 1


def cpu_of(thread: int) -> int | None:
    """Return the logical CPU for the `thread`-th thread of a pool: cores first, then their second threads."""
    cores = distinct_cores()
    cpus = cores + [cpu for cpu in _ALLOWED if cpu not in cores]
    return cpus[thread] if thread < len(cpus) and hasattr(os, "sched_setaffinity") else None


def bind(thread: int) -> None:
    """Keep the calling thread, the `thread`-th of a pool, on a core of its own where the system allows it."""
    cpu = cpu_of(thread)
    if cpu is not None:
        with suppress(OSError):
            os.sched_setaffinity(0, {cpu})


@contextmanager
def unbound() -> Iterator[None]:
    """Start processes inside: they get all cores that this process was given, wherever its main thread is bound to."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(_ALLOWED))  # the kernel takes from a mask that is too wide what is allowed
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def bound(cpu: int | None) -> Iterator[None]:
    """Keep the calling thread on `cpu` for a while; a process that it starts later must not inherit the bond."""
    before = os.sched_getaffinity(0) if cpu is not None else set()
    if len(before) < 2:
        yield
        return
    assert cpu is not None
    with suppress(OSError):
        os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
