"""The cache's arithmetic in Triton kernels on the GPU, 16-bit.

A decode step reads its position, its lengths and its blocks from device memory only, so that it can be captured as a
CUDA graph and replayed while the context grows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from duolocal.cache.backend import CacheState, Step
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
from duolocal.kernels.interface import Rotation, StepTraits

_CHUNK, _RESELECTS, _DECODES = (StepTraits(rotates=True, kind=kind) for kind in ("", "reselects", "decodes"))


class GpuBackend:
    """Appends and attends with the kernels of `kernels/gpu`; RoPE is applied in the pass that stores."""

    def __init__(self, state: CacheState) -> None:
        plan, device = state.plan, state.start.device
        assert state.prefill is None or not state.prefill.measure, "kept mass is measured on a CPU"
        self._state = state
        self._step: Step | None = None  # the decode step that the next two are about
        self._reselects = False
        self._selected_for: tuple[int, int] | None = None
        # One layer after the other works in the same memory.
        memory = _working_memory(state)
        self.layers: list[LayerCache] = []
        for layer, (flags, heads, rows) in enumerate(zip(plan.retrieval, plan.retrieval_heads, plan.rows, strict=True)):
            numbers = [heads.index(head) if retrieval else -1 for head, retrieval in enumerate(flags)]
            self.layers.append(
                LayerCache(
                    ring_k=state.ring.data[0, layer],
                    ring_v=state.ring.data[1, layer],
                    records=state.pool.records,
                    table=state.pool.table[rows],
                    retrieval_heads=torch.tensor(heads, dtype=torch.int32, device=device),
                    rows=torch.tensor(numbers, dtype=torch.int32, device=device),
                    widths=torch.tensor(state.widths(layer), dtype=torch.int32, device=device),
                    start=state.start,
                    layout=state.layout,
                    query_group=state.query_group,
                    sink_size=plan.sink_size,
                    recent_size=state.exact_recent,
                    selection=_selection(state, rows, memory),
                    beyond=state.pool.tiered,
                )
            )

    def traits(self, step: Step) -> StepTraits:
        """Return which graph holds the step: a captured graph either makes lists of blocks anew or does not.

        The kernels decide the same on the device; the host decides too, so that the steps between do not launch what
        would do nothing.
        """
        if not step.decodes:
            return _CHUNK
        state, selection = self._state, self._state.selection
        if selection is not None and step is not self._step:
            seen_end = step.start - state.exact_recent + 1
            newest = (seen_end - 1) // state.layout.block_size if seen_end > state.plan.sink_size else -1
            now = occasion(step.start, newest, reuse=selection.policy.reuse), selection.forgotten
            self._reselects, self._selected_for, self._step = now != self._selected_for, now, step
        return _RESELECTS if self._reselects else _DECODES

    def append(self, layer: int, step: Step, k: Tensor, v: Tensor) -> None:
        """Take k and v [q_len, num_kv_heads, head_dim]; they are stored by `attend`, together with their use."""
        step.k, step.v = k, v

    def attend(self, layer: int, step: Step, q: Tensor, positions: Tensor, rotation: Rotation | None) -> Tensor:
        """Store the layer's new keys and values, and attend from q [q_len, num_heads, head_dim]."""
        cache, k, v = self.layers[layer], step.k, step.v
        assert k is not None and v is not None and rotation is not None
        step.k = step.v = None
        if step.decodes:
            q_rotated, q_blocks = append_token(cache, q, k, v, *rotation)
            if self.traits(step) is _RESELECTS:
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
        cache, state, policy, counts = self.layers[layer], self._state, self._state.prefill, self._state.sparse_counts
        if policy is None or counts is None or not cache.num_retrieval:
            return None

        def blocks(band_lse: Tensor) -> tuple[Tensor, Tensor] | None:
            seen, chosen = sparse_blocks_attention(cache, q, step.start, band_lse, policy)
            counts.add(state.plan.rows[layer], chosen, start=step.start, end=step.end, **state.sizes)
            return seen

        return blocks

    def digest(self, layer: int, first: int, last: int) -> None:
        """Make the digests of blocks first..last-1, which were read back."""
        digest_blocks(self.layers[layer], max(0, first - 1), last)


def _working_memory(state: CacheState) -> dict[str, Tensor]:
    """Return what choosing works in, enough for the layer with most rows; see `LayerSelection`."""
    if state.selection is None:
        return {}
    rows, count = max(map(sum, state.plan.retrieval)), CANDIDATES * state.selection.budget_blocks
    return {
        "scores": torch.empty(rows, state.pool.max_blocks, dtype=torch.float32, device=state.start.device),
        "candidates": torch.empty(rows, count, dtype=torch.int32, device=state.start.device),
        "weights": torch.empty(rows, state.query_group, count, dtype=torch.float32, device=state.start.device),
    }


def _selection(state: CacheState, rows: slice, memory: dict[str, Tensor]) -> LayerSelection | None:
    selection, pool = state.selection, state.pool
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
