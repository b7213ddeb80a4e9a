"""The KV formats by name: how the blocks of retrieval heads are stored.

Sinks, recent tokens and streaming heads are always in the compute dtype, whatever the format.
Which INT4 and INT8 schemes these are was decided by measurement: docs/kv-formats.md.
"""

import torch

from duolocal.errors import SettingsError
from duolocal.kernels.blocks import BlockLayout, Plane

KV_FORMATS = ("32", "16", "int8", "fp8", "k8v4", "int4")  # by falling size
DEFAULT_BLOCK_SIZE = 64  # tokens


def kv_layout(name: str, *, head_dim: int, dtype: torch.dtype, block_size: int = DEFAULT_BLOCK_SIZE) -> BlockLayout:
    """Return the block layout of KV format `name` for a model computing in `dtype`.

    Raises SettingsError for an unknown name.
    """
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    full = torch.float64 if dtype == torch.float64 else torch.float32
    planes = {
        "32": (Plane("float", full.itemsize * 8, full),) * 2,
        "16": (Plane("float", 16, half),) * 2,
        "fp8": (Plane("fp8", 8),) * 2,
        "int8": (Plane("int", 8),) * 2,
        "k8v4": (Plane("int", 8), Plane("int", 4, rotate=True)),  # keys in 8 bits, values in 4
        "int4": (Plane("int", 4, rotate=True),) * 2,
    }
    if name not in planes:
        raise SettingsError(f"unknown KV format {name!r}: choose auto or one of {', '.join(KV_FORMATS)}")
    key, value = planes[name]
    return BlockLayout(key, value, block_size, head_dim)
