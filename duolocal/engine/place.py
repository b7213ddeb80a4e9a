"""Where a model computes and in which dtype: the names people give, and what they come to on this machine."""

import torch

from duolocal.cache import DuoCache
from duolocal.errors import SettingsError

DEVICES = ("cpu", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def device_named(name: str) -> torch.device:
    """Return the device that "auto", "cpu" or "cuda" stands for; raises SettingsError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in DEVICES:
        raise SettingsError(f"device {name!r} is unknown: use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device(name)


def dtype_named(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that "auto" or a name of DTYPES stands for on `device`; raises SettingsError."""
    if name == "auto":
        # 16-bit products are 6 to 10 times slower than float32 on CPUs without AMX.
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if name not in DTYPES:
        raise SettingsError(f"dtype {name!r} is unknown: use auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def tier_note(cache: DuoCache) -> str:
    """Say where the blocks of a cache lie that has some beyond its device."""
    pool = cache.pool
    here = "GPU memory" if cache.device.type == "cuda" else "memory"
    beyond = "in a file" if pool.mapping is not None else "in host memory"
    size, unit = (pool.outer_bytes / 2**30, "GiB") if pool.outer_bytes >= 2**30 else (pool.outer_bytes / 2**20, "MiB")
    return (
        f"KV blocks lie {beyond} ({size:.1f} {unit}), with copies of {pool.num_slots / pool.max_blocks:.0%} of them in "
        f"{here}: results are the same, answers come slower"
    )
