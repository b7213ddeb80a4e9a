"""The cache's arithmetic in compiled CPU kernels, float32."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duolocal.cache.home import madvise_address
from duolocal.cache.path import Step
from duolocal.cache.pool import BlockPool
from duolocal.cache.selection import Selection
from duolocal.kernels.cpu.attention import CpuAttention, SelectedBlocks, Tiers
from duolocal.kernels.cpu.operations import CpuKernels
from duolocal.kernels.interface import Rotation
from duolocal.kernels.sparse import Chosen, choose

if TYPE_CHECKING:
    from duolocal.cache.cache import DuoCache


class CompiledPath:
    """Appends and attends with `CpuAttention`; one token at a time it can be recorded and run again."""

    rotates = capturable = False

    def __init__(self, cache: "DuoCache", kernels: CpuKernels) -> None:
        plan, pool = cache.plan, cache.pool
        self.attention = CpuAttention(
            kernels,
            cache.layout,
            ring=cache.ring.data,
            records=pool.records,
            table=pool.table,
            start=cache.start,
            retrieval=plan.retrieval,
            query_group=cache.query_group,
            sink_size=plan.sink_size,
            recent_size=cache.exact_recent,
            streaming_size=plan.recent_size,
            tiers=_tiers(pool),
            selected=_selected(cache.selection),
        )
        self._selects = cache.selection is not None
        self._cache = cache
        self._sizes = {
            "sink_size": plan.sink_size,
            "recent_size": cache.exact_recent,
            "block_size": cache.layout.block_size,
        }
        self._rows: list[slice] = []  # of the block table, per layer
        row = 0
        for flags in plan.retrieval:
            self._rows.append(slice(row, row + sum(flags)))
            row += sum(flags)

    def append(self, layer: int, step: Step, k: Tensor, v: Tensor) -> None:
        """Take k and v [q_len, num_kv_heads, head_dim] of the step's tokens."""
        step.k, step.v = k, v
        self.attention.close_blocks(layer, k, v)
        if self._selects:
            self.attention.digest(layer, k.shape[0])
        if k.shape[0] == 1:
            self.attention.write_ring(layer, k, v)

    def attend(self, layer: int, step: Step, q: Tensor, positions: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Attend from q [q_len, num_heads, head_dim] at the step's positions."""
        k, v = step.k, step.v
        assert k is not None and v is not None
        step.k = step.v = None
        if q.shape[0] == 1:
            return self.attention.decode(layer, q)
        if self._cache.prefill is None or not sum(self._cache.plan.retrieval[layer]):
            out = self.attention.prefill(layer, q, k, v)
        else:
            out = self._sparse(layer, step, q, k, v)
        self.attention.write_ring(layer, k, v)
        return out

    def choose(self, layer: int, q: Tensor, k: Tensor, *, start: int, end: int) -> Chosen:
        """Choose the blocks that a chunk's queries at positions start..end-1 read, by the cache's policy."""
        cache, rows, policy = self._cache, self._rows[layer], self._cache.prefill
        assert policy is not None

        def estimate(tiles: range, num_blocks: int) -> tuple[Tensor, Tensor]:
            return self.attention.block_weights(
                layer,
                q,
                k,
                first=tiles.start * policy.tile + policy.stride // 2,
                step=policy.stride,
                queries=len(tiles) * policy.asked_per_tile,
                blocks=num_blocks,
            )

        num_heads = (rows.stop - rows.start) * cache.query_group
        return choose(policy, estimate, num_heads=num_heads, start=start, end=end, **self._sizes)

    def _sparse(self, layer: int, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from a chunk by the cache's policy: choose blocks, then read those."""
        cache, attention, rows = self._cache, self.attention, self._rows[layer]
        policy, counts = cache.prefill, cache.sparse_counts
        assert policy is not None and counts is not None
        chosen = self.choose(layer, q, k, start=step.start, end=step.end)
        counts.add(rows, chosen, start=step.start, end=step.end, **self._sizes)
        if not policy.measure:
            return attention.prefill(layer, q, k, v, chosen=chosen)
        kept, whole = (torch.empty(*q.shape[:2], 2) for _ in range(2))
        attention.prefill(layer, q, k, v, weights=whole)
        out = attention.prefill(layer, q, k, v, chosen=chosen, weights=kept)
        heads = [head for head, retrieval in enumerate(cache.plan.retrieval[layer]) if retrieval]
        kept_lse, whole_lse = (
            (weights[..., 0] + weights[..., 1].log()).unflatten(1, (-1, cache.query_group))[:, heads].permute(1, 2, 0)
            for weights in (kept, whole)
        )
        counts.add_mass(rows, chosen, kept_lse, whole_lse, start=step.start)
        return out

    def chooses(self, step: Step) -> bool:
        """Nothing is captured here: lists are made where they are due."""
        return False

    def digest(self, layer: int, first: int, last: int) -> None:
        """Make the digests of blocks first..last-1, which were read back."""
        self.attention.digest(layer, first=first, last=last)


def _tiers(pool: BlockPool) -> Tiers | None:
    if not pool.tiered:
        return None
    return Tiers(pool.first_home, pool.tags, None if pool.mapping is None else madvise_address())


def _selected(selection: Selection | None) -> SelectedBlocks | None:
    if selection is None:
        return None
    return SelectedBlocks(
        selection.digests,
        selection.lists,
        selection.made_at,
        selection.channels,
        selection.centre,
        selection.policy.reuse,
    )
