"""What computes inside a cache: one interface; a backend in plain torch, one in compiled CPU kernels, one on the GPU.

A backend is given what it works on, a `CacheState`; it knows nothing of the cache that owns both.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from duolocal.cache.pool import BlockPool
from duolocal.cache.ring import Ring
from duolocal.cache.selection import Selection
from duolocal.heads import HeadPlan
from duolocal.kernels.blocks import BlockLayout
from duolocal.kernels.interface import Rotation, StepTraits
from duolocal.kernels.sparse import SparseCounts, SparsePrefill


@dataclass(frozen=True)
class CacheState:
    """The memory of a cache, which stays where it is, and what never changes about it.

    exact_recent: tokens that retrieval heads see as computed; start: int64 [1], tokens before the open step, where
    kernels read it; selection: of the blocks that decode reads, None for all; prefill: the same for chunks of a prompt,
    with counts of what was read.
    """

    plan: HeadPlan
    layout: BlockLayout
    query_group: int
    exact_recent: int
    ring: Ring
    pool: BlockPool
    start: Tensor
    selection: Selection | None
    prefill: SparsePrefill | None
    sparse_counts: SparseCounts | None

    @property
    def sizes(self) -> dict[str, int]:
        """What decides which blocks a query sees."""
        return {
            "sink_size": self.plan.sink_size,
            "recent_size": self.exact_recent,
            "block_size": self.layout.block_size,
        }

    def widths(self, layer: int) -> list[int]:
        """Return how many recent tokens each KV head of a layer reads from the ring."""
        return [self.exact_recent if retrieval else self.plan.recent_size for retrieval in self.plan.retrieval[layer]]


@dataclass
class Step:
    """An open transaction: tokens start..end-1, and the ring slots it overwrites as they were.

    decodes: it is one token that goes through the decode kernels, and reads selected blocks where blocks are selected;
    ahead: as many tokens that may follow it are computed along, and stored one by one if they do.
    """

    start: int
    end: int
    decodes: bool
    slots: slice | Tensor
    saved: Tensor
    ahead: int = 0
    k: Tensor | None = None  # of the layer between its append and its attend
    v: Tensor | None = None


class CacheBackend(Protocol):
    """Stores new tokens and attends from them, one layer after the other: append, then attend."""

    def traits(self, step: Step) -> StepTraits:
        """Return what the model is to know of the step."""
        ...

    def append(self, layer: int, step: Step, k: Tensor, v: Tensor) -> None:
        """Take k and v [q_len, num_kv_heads, head_dim] of the step's tokens."""
        ...

    def attend(self, layer: int, step: Step, q: Tensor, positions: Tensor, rotation: Rotation | None) -> Tensor:
        """Attend from q [q_len, num_heads, head_dim] at the step's positions to all that each may see."""
        ...

    def digest(self, layer: int, first: int, last: int) -> None:
        """Make the digests of blocks first..last-1, which were read back; called only where blocks are selected."""
        ...
