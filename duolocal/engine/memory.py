"""What a context needs in memory, what there is, and the refusal when the first exceeds the second.

Owns what this machine has free and the words of a refusal. The arithmetic is `duolocal.plan`'s, the same that
`duolocal plan` shows; what is really allocated is counted by `DuoCache.memory` and the weights.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from duolocal.cache.home import Placement
from duolocal.errors import MemoryLimitError
from duolocal.heads import HeadPlan
from duolocal.kernels.blocks import BlockLayout
from duolocal.models.config import ModelConfig
from duolocal.plan.fitting import Free, Freedom, nearest, place
from duolocal.plan.memory import MemoryPlan, Request, dense_16bit_bytes, plan_memory
from duolocal.plan.weights import Weights, weights_of_size
from duolocal.quant.kv import kv_layout

__all__ = [
    "GIB",
    "MemoryNeeds",
    "available_bytes",
    "check_memory",
    "choose_placement",
    "dense_16bit_bytes",
    "free_places",
    "memory_needs",
    "placement_for",
    "refusal",
]

GIB = 2**30


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that a load and its longest prefill will hold on the device."""

    weights: int
    blocks: int
    windows: int
    transient: int

    @property
    def total(self) -> int:
        return self.weights + self.blocks + self.windows + self.transient


def memory_needs(
    config: ModelConfig,
    plan: HeadPlan,
    layout: BlockLayout,
    *,
    weight_bytes: int,
    context: int,
    chunk_size: int,
    dtype: torch.dtype,
    kernels: str,
) -> MemoryNeeds:
    """Return the bytes that `context` tokens need, prefilled `chunk_size` at a time by the kernels of that name."""
    request = Request(
        config=config,
        heads=plan,
        layout=layout,
        weights=weights_of_size(weight_bytes),
        context=context,
        chunk_size=chunk_size,
        dtype=dtype,
        kernels=kernels,
        device="cuda" if kernels == "triton" else "cpu",
    )
    return _needs(plan_memory(request))


def available_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated on `device` now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    available = psutil.virtual_memory().available
    limit = _cgroup_available()
    return available if limit is None else min(available, limit)


def free_places(device: torch.device, folder: Path, *, available: int | None = None) -> Free:
    """Return what may be taken now: on `device`, beside a GPU, and on the disk of `folder`, which need not exist yet.

    available: of the device, where it is known.
    """
    if available is None:
        available = available_bytes(device)
    host = available_bytes(torch.device("cpu")) if device.type == "cuda" else 0
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        disk = shutil.disk_usage(folder).free
    except OSError:
        disk = 0
    return Free(available, host, disk)


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
    needs = _needs(plan)
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
        f"(weights {needs.weights / GIB:.1f}, KV blocks {needs.blocks / GIB:.1f}, "
        f"windows {needs.windows / GIB:.1f}, working {needs.transient / GIB:.1f}){beyond}, "
        f"and {free.device / GIB:.1f} GiB are free; {advice}"
    )


def check_memory(
    config: ModelConfig,
    plan: HeadPlan,
    *,
    kv: str,
    weight_bytes: int,
    context: int,
    chunk_size: int,
    device: torch.device,
    dtype: torch.dtype,
    kernels: str,
    available: int,
    weights: Weights | None = None,
    threads: int = 1,
) -> None:
    """Refuse a context whose blocks would not all fit on the device, naming the numbers and what fits.

    weights: their sizes; None to count `weight_bytes` alone. Raises MemoryLimitError before anything is allocated.
    """
    request = Request(
        config=config,
        heads=plan,
        layout=kv_layout(kv, head_dim=config.head_dim, dtype=dtype),
        weights=weights_of_size(weight_bytes) if weights is None else weights,
        context=context,
        chunk_size=chunk_size,
        dtype=dtype,
        kernels=kernels,
        device=device.type,
        threads=threads,
    )
    choose_placement(request, Free(available), Freedom(kv, offload=False))


def placement_for(
    config: ModelConfig,
    plan: HeadPlan,
    *,
    kv: str,
    weights: Weights,
    context: int,
    chunk_size: int,
    device: torch.device,
    dtype: torch.dtype,
    kernels: str,
    free: Free,
    folder: Path,
    threads: int = 1,
    kv_device_memory: int | None = None,
    select: int | None = None,
    sparse: bool = False,
) -> Placement:
    """Return where the blocks of a context lie.

    weights: `duolocal.plan.weights.weights_of` the opened model; free: `free_places`, before it is loaded;
    kv_device_memory: as `--kv-device-memory`, None for as many blocks on the device as fit; select: the token budget of
    selected decode; sparse: whether prefill chooses blocks. Raises MemoryLimitError, before anything is allocated,
    naming the numbers and what fits.
    """
    request = Request(
        config=config,
        heads=plan,
        layout=kv_layout(kv, head_dim=config.head_dim, dtype=dtype),
        weights=weights,
        context=context,
        chunk_size=chunk_size,
        dtype=dtype,
        kernels=kernels,
        device=device.type,
        threads=threads,
        kv_device_memory=kv_device_memory,
        outer="disk" if device.type == "cpu" else "memory",
        select=select,
        sparse=sparse,
    )
    placed = choose_placement(request, free, Freedom(kv))
    return Placement(placed.kv_device_memory, placed.outer, folder)


def _needs(plan: MemoryPlan) -> MemoryNeeds:
    device = plan.device
    return MemoryNeeds(
        weights=device.weights,
        blocks=device.blocks + device.digests,
        windows=device.windows,
        transient=device.copies + device.working + device.workspace + device.tokens,
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
