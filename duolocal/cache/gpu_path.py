"""The cache's arithmetic in Triton kernels on the GPU, 16-bit.

A decode step reads its position, its lengths and its blocks from device memory only, so that it can be captured as a
CUDA graph and replayed while the context grows.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duolocal.cache.path import Step
from duolocal.cache.selection import occasion
from duolocal.kernels.digest import CANDIDATES
from duolocal.kernels.gpu.append import append_token
from duolocal.kernels.gpu.decode import decode_attention
from duolocal.kernels.gpu.digest import digest_blocks
from duolocal.kernels.gpu.layer_cache import LayerCache, LayerSelection
from duolocal.kernels.gpu.pointwise import rotate
from duolocal.kernels.gpu.prefill import prefill_attention
from duolocal.kernels.gpu.select import select_blocks
from duolocal.kernels.gpu.sparse_attention import sparse_blocks_attention
from duolocal.kernels.gpu.store import close_blocks, write_ring
from duolocal.kernels.interface import Rotation

if TYPE_CHECKING:
    from duolocal.cache.cache import DuoCache


class GpuPath:
    """Appends and attends with the kernels of `kernels/gpu`; RoPE is applied in the pass that stores."""

    rotates = capturable = True

    def __init__(self, cache: "DuoCache") -> None:
        plan, device = cache.plan, cache.device
        assert cache.prefill is None or not cache.prefill.measure, "kept mass is measured on a CPU"
        self._cache = cache
        self._step: Step | None = None  # the decode step that the next two are about
        self._chooses = False
        self._made_for: tuple[int, int] | None = None
        # One layer after the other works in the same memory.
        memory = _working_memory(cache)
        self._layers: list[LayerCache] = []
        self._rows: list[slice] = []  # of the block table, per layer
        first_row = 0
        for layer, flags in enumerate(plan.retrieval):
            heads = [head for head, retrieval in enumerate(flags) if retrieval]
            rows = [heads.index(head) if retrieval else -1 for head, retrieval in enumerate(flags)]
            widths = [cache.exact_recent if retrieval else plan.recent_size for retrieval in flags]
            self._layers.append(
                LayerCache(
                    ring_k=cache.ring.data[0, layer],
                    ring_v=cache.ring.data[1, layer],
                    records=cache.pool.records,
                    table=cache.pool.table[first_row : first_row + len(heads)],
                    retrieval_heads=torch.tensor(heads, dtype=torch.int32, device=device),
                    rows=torch.tensor(rows, dtype=torch.int32, device=device),
                    widths=torch.tensor(widths, dtype=torch.int32, device=device),
                    start=cache.start,
                    layout=cache.layout,
                    query_group=cache.query_group,
                    sink_size=plan.sink_size,
                    recent_size=cache.exact_recent,
                    selection=_selection(cache, slice(first_row, first_row + len(heads)), memory),
                    beyond=cache.pool.tiered,
                )
            )
            self._rows.append(slice(first_row, first_row + len(heads)))
            first_row += len(heads)

    def append(self, layer: int, step: Step, k: Tensor, v: Tensor) -> None:
        """Take k and v [q_len, num_kv_heads, head_dim]; they are stored by `attend`, together with their use."""
        step.k, step.v = k, v

    def attend(self, layer: int, step: Step, q: Tensor, positions: Tensor, rotation: Rotation | None) -> Tensor:
        """Store the layer's new keys and values, and attend from q [q_len, num_heads, head_dim]."""
        cache, k, v = self._layers[layer], step.k, step.v
        assert k is not None and v is not None and rotation is not None
        step.k = step.v = None
        if q.shape[0] == 1:
            q_rotated, q_blocks = append_token(cache, q, k, v, *rotation)
            if self.chooses(step):
                select_blocks(cache, q_rotated, q_blocks)
            return decode_attention(cache, q_rotated, q_blocks)
        q, k = rotate(q, k, *rotation)
        close_blocks(cache, k, v, step.start)
        if cache.selection is not None:
            # The block before the chunk may have been completed by a decode step that made no list.
            size = cache.layout.block_size
            digest_blocks(cache, max(0, step.start // size - 1), step.end // size)
        out = prefill_attention(cache, q, k, v, step.start, blocks_of=self._sparse(layer, step, q))
        write_ring(cache, k, v, step.start)
        return out

    def _sparse(self, layer: int, step: Step, q: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor] | None] | None:
        """Return what attends from a chunk to the blocks that the policy chooses, None where all are read."""
        cache, policy, counts = self._layers[layer], self._cache.prefill, self._cache.sparse_counts
        if policy is None or counts is None or not cache.num_retrieval:
            return None

        def blocks(band_lse: Tensor) -> tuple[Tensor, Tensor] | None:
            seen, chosen = sparse_blocks_attention(cache, q, step.start, band_lse, policy)
            counts.add(
                self._rows[layer],
                chosen,
                start=step.start,
                end=step.end,
                sink_size=cache.sink_size,
                recent_size=cache.recent_size,
                block_size=cache.layout.block_size,
            )
            return seen

        return blocks

    def digest(self, layer: int, first: int, last: int) -> None:
        """Make the digests of blocks first..last-1, which were read back."""
        digest_blocks(self._layers[layer], max(0, first - 1), last)

    def chooses(self, step: Step) -> bool:
        """Whether this decode step makes its lists anew: a captured graph holds one kind of step.

        The kernels decide the same on the device; the host decides too, so that the steps between do not launch what
        would do nothing.
        """
        cache, selection = self._cache, self._cache.selection
        if selection is None:
            return False
        if step is not self._step:
            seen_end = step.start - cache.exact_recent + 1
            newest = (seen_end - 1) // cache.layout.block_size if seen_end > cache.plan.sink_size else -1
            now = occasion(step.start, newest, reuse=selection.policy.reuse), selection.forgotten
            self._chooses, self._made_for, self._step = now != self._made_for, now, step
        return self._chooses


def _working_memory(cache: "DuoCache") -> dict[str, Tensor]:
    """Return what choosing works in, enough for the layer with most rows; see `LayerSelection`."""
    if cache.selection is None:
        return {}
    rows, count = max(map(sum, cache.plan.retrieval)), CANDIDATES * cache.selection.budget_blocks
    return {
        "scores": torch.empty(rows, cache.pool.max_blocks, dtype=torch.float32, device=cache.device),
        "candidates": torch.empty(rows, count, dtype=torch.int32, device=cache.device),
        "weights": torch.empty(rows, cache.query_group, count, dtype=torch.float32, device=cache.device),
    }


def _selection(cache: "DuoCache", rows: slice, memory: dict[str, Tensor]) -> LayerSelection | None:
    selection, pool = cache.selection, cache.pool
    if selection is None:
        return None
    return LayerSelection(
        digests=selection.digests[rows],
        lists=selection.lists[rows],
        made_at=selection.made_at[rows],
        channels=selection.channels[rows],
        centre=selection.centre[rows],
        **memory,
        reuse=selection.policy.reuse,
        tags=pool.tags[rows] if pool.tiered else None,
        first_slot=rows.start * pool.num_slots,
        first_home=pool.first_home + rows.start * pool.max_blocks,
    )
