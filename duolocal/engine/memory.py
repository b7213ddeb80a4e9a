"""What a context needs in memory, what there is, and the refusal when the first exceeds the second.

Owns what this machine has free and the words of a refusal. The arithmetic is `duolocal.plan`'s, the same that
`duolocal plan` shows; what is really allocated is counted by `DuoCache.memory` and the weights.
"""

import shutil
from pathlib import Path

import psutil
import torch

from duolocal.errors import MemoryLimitError
from duolocal.plan.fitting import Free, Freedom, nearest, place
from duolocal.plan.memory import plan_memory
from duolocal.plan.request import Request

GIB = 2**30


def available_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated on `device` now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    available = psutil.virtual_memory().available
    limit = _cgroup_available()
    return available if limit is None else min(available, limit)


def free_places(device: torch.device, folder: Path) -> Free:
    """Return what may be taken now: on `device`, beside a GPU, and on the disk of `folder`, which may not exist yet."""
    host = available_bytes(torch.device("cpu")) if device.type == "cuda" else 0
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        disk = shutil.disk_usage(folder).free
    except OSError:
        disk = 0
    return Free(available_bytes(device), host, disk)


def choose_placement(request: Request, free: Free, freedom: Freedom) -> Request:
    """Return `request` with its blocks where they have room: on the device, else with a cache there (`place`).

    freedom: what a suggestion may vary; where it does not `offload`, all blocks must fit on the device. Raises
    MemoryLimitError, before anything is allocated, naming the numbers and the nearest settings that fit.
    """
    if freedom.offload or request.kv_device_memory is not None:
        placed = place(request, free)
    else:
        placed = request if plan_memory(request).total <= free.device else None
    if placed is None:
        raise refusal(request, free, freedom)
    return placed


def refusal(request: Request, free: Free, freedom: Freedom) -> MemoryLimitError:
    """Return the error for a request that has no room: one line with the numbers and up to three settings that fit."""
    plan = plan_memory(request)
    device = plan.device
    found = nearest(request, free, freedom)
    if found:
        advice = f"this fits: {' or '.join(setting.words for setting in found)}"
    else:
        advice = "use a smaller model, or a machine with more memory"
    if request.heads.num_streaming == 0:
        advice += "; streaming heads would need less (--heads with a pattern file)"
    beyond = ""
    for where, needed, there in (("host", plan.host_blocks, free.host), ("disk", plan.disk_blocks, free.disk)):
        if needed > there:
            beyond = f" and {needed / GIB:.1f} GiB on the {where}, where {there / GIB:.1f} GiB are free"
    return MemoryLimitError(
        f"context {request.context:,} needs {plan.total / GIB:.1f} GiB on {request.device} "
        f"(weights {device.weights / GIB:.1f}, KV blocks {(device.blocks + device.digests) / GIB:.1f}, "
        f"windows {device.windows / GIB:.1f}, working {device.transient / GIB:.1f}){beyond}, "
        f"and {free.device / GIB:.1f} GiB are free; {advice}"
    )


def _cgroup_available() -> int | None:
    """Return what a container's memory limit leaves, or None where there is none (Linux, cgroup 2)."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        statistics = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return int(limit) - used + int(statistics.get("inactive_file", 0))  # cached files are given back when needed
