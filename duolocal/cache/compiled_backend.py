"""The cache's arithmetic in compiled CPU kernels, float32."""

import torch
from torch import Tensor

from duolocal.cache.backend import CacheState, Step
from duolocal.cache.home import madvise_address
from duolocal.cache.pool import BlockPool
from duolocal.cache.selection import Selection
from duolocal.kernels.cpu.attention import CpuAttention, SelectedBlocks, Tiers
from duolocal.kernels.cpu.operations import CpuKernels, StepRecorder
from duolocal.kernels.cpu.structs import MOST_AHEAD
from duolocal.kernels.interface import Rotation, StepTraits
from duolocal.kernels.sparse import Chosen, choose


class CompiledBackend:
    """Appends and attends with `CpuAttention`; one token at a time it can be recorded and run again."""

    def __init__(self, state: CacheState, kernels: CpuKernels) -> None:
        plan, pool = state.plan, state.pool
        self.attention = CpuAttention(
            kernels,
            state.layout,
            ring=state.ring.data,
            records=pool.records,
            table=pool.table,
            start=state.start,
            retrieval=plan.retrieval,
            query_group=state.query_group,
            sink_size=plan.sink_size,
            recent_size=state.exact_recent,
            streaming_size=plan.recent_size,
            tiers=_tiers(pool),
            selected=_selected(state.selection),
        )
        self.recorder = StepRecorder(kernels)
        self._state = state
        # Keys and values of every layer in the recorded steps that look ahead, by how far.
        self._ahead: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @property
    def most_ahead(self) -> int:
        """Tokens that a decode step can look ahead."""
        return 0 if self._state.selection is not None else MOST_AHEAD - 1

    def traits(self, step: Step) -> StepTraits:
        """Return that the model rotates, and what repeats a decode step."""
        return StepTraits(repeat=self.recorder if step.decodes else None)

    def append(self, layer: int, step: Step, k: Tensor, v: Tensor) -> None:
        """Take k and v [q_len, num_kv_heads, head_dim] of the step's tokens."""
        step.k, step.v = k, v
        if step.ahead:
            if layer == 0:
                self._ahead[step.ahead] = []
            self._ahead[step.ahead].append((k, v))
            return
        self.attention.close_blocks(layer, k, v)
        if self._state.selection is not None:
            self.attention.digest(layer, k.shape[0])
        if step.decodes:
            self.attention.write_ring(layer, k, v)

    def attend(self, layer: int, step: Step, q: Tensor, positions: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Attend from q [q_len, num_heads, head_dim] at the step's positions."""
        k, v = step.k, step.v
        assert k is not None and v is not None
        step.k = step.v = None
        if step.decodes:
            return self.attention.decode(layer, q, (k, v) if step.ahead else None)
        if self._state.prefill is None or not self._state.plan.retrieval_heads[layer]:
            out = self.attention.prefill(layer, q, k, v)
        else:
            out = self._sparse(layer, step, q, k, v)
        self.attention.write_ring(layer, k, v)
        return out

    def accept(self, step: Step, row: int) -> None:
        """Store token number `row` of a step that looked ahead: its position is the one in `start`."""
        self.attention.accept(self._ahead[step.ahead], row)

    def choose(self, layer: int, q: Tensor, k: Tensor, *, start: int, end: int) -> Chosen:
        """Choose the blocks that a chunk's queries at positions start..end-1 read, by the cache's policy."""
        policy = self._state.prefill
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

        num_heads = len(self._state.plan.retrieval_heads[layer]) * self._state.query_group
        return choose(policy, estimate, num_heads=num_heads, start=start, end=end, **self._state.sizes)

    def _sparse(self, layer: int, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from a chunk by the cache's policy: choose blocks, then read those."""
        state, attention, rows = self._state, self.attention, self._state.plan.rows[layer]
        policy, counts = state.prefill, state.sparse_counts
        assert policy is not None and counts is not None
        chosen = self.choose(layer, q, k, start=step.start, end=step.end)
        counts.add(rows, chosen, start=step.start, end=step.end, **state.sizes)
        if not policy.measure:
            return attention.prefill(layer, q, k, v, chosen=chosen)
        kept, whole = (torch.empty(*q.shape[:2], 2) for _ in range(2))
        attention.prefill(layer, q, k, v, weights=whole)
        out = attention.prefill(layer, q, k, v, chosen=chosen, weights=kept)
        heads = list(state.plan.retrieval_heads[layer])
        kept_lse, whole_lse = (
            (weights[..., 0] + weights[..., 1].log()).unflatten(1, (-1, state.query_group))[:, heads].permute(1, 2, 0)
            for weights in (kept, whole)
        )
        counts.add_mass(rows, chosen, kept_lse, whole_lse, start=step.start)
        return out

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
