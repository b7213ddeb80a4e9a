"""What this machine has free, in each place that a cache may take."""

import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from duolocal.models.default import default_model
from duolocal.plan.fitting import Free
from duolocal.settings import AUTO_MODEL, LoadSettings


def available_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated on `device` now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    available = psutil.virtual_memory().available
    limit = _cgroup_available()
    return available if limit is None else min(available, limit)


def settled_model(settings: LoadSettings) -> tuple[LoadSettings, str | None]:
    """Return `settings` with the model that is meant where none was named, and why it is not the better one, if so."""
    if settings.model != AUTO_MODEL:
        return settings, None
    name, reason = default_model(free_memory=available_bytes(torch.device("cpu")))
    return replace(settings, model=name), reason


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
