"""What the memory and the time of a load depend on: the one value that all of `duolocal.plan` counts with."""

from dataclasses import dataclass

import torch

from duolocal.cache.home import Outer
from duolocal.heads import HeadPlan
from duolocal.kernels.blocks import BlockLayout
from duolocal.models.config import ModelConfig
from duolocal.plan.weights import Weights


@dataclass(frozen=True)
class Request:
    """All that the memory depends on.

    weights: as they will be loaded. kernels: "compiled", "torch" or "triton". kv_device_memory: bytes for records of
    blocks and their tables on the device, None for all of them; the others go to `outer`. select: the token budget of
    selected decode, None for dense decode. sparse: whether prefill chooses blocks. ahead: how many tokens decode steps
    look ahead with, each number being a recorded step of its own.
    """

    config: ModelConfig
    heads: HeadPlan
    layout: BlockLayout
    weights: Weights
    context: int  # tokens
    chunk_size: int  # tokens
    dtype: torch.dtype
    kernels: str
    device: str = "cpu"  # or "cuda"
    threads: int = 1
    kv_device_memory: int | None = None
    outer: Outer = "disk"
    select: int | None = None
    sparse: bool = False
    ahead: tuple[int, ...] = ()

    @property
    def max_blocks(self) -> int:
        """Blocks of one retrieval head."""
        return self.context // self.layout.block_size
