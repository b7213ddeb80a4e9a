"""The KV cache of one context: a ring of sink and recent tokens for every head, quantized blocks for retrieval heads.

A retrieval head is a streaming head with a history: what a query may see beyond the window, it reads from
quantized blocks. A block is written once, when its last token is known, from the values as computed; until a token
leaves the window it is read from the ring. So the precision in which position i sees position j depends on i and j
alone: never on chunks, undo, or where a block lives.

Appending is a transaction over all layers: begin, then append and attend per layer, then commit; `rollback`
leaves the cache as it was before `begin`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.cache.pool import BlockPool
from duolocal.cache.ring import Ring
from duolocal.heads import HeadPlan
from duolocal.kernels.attention import block_attention, merge, window_attention
from duolocal.kernels.blocks import BlockLayout, encode_blocks

# Retrieval heads keep at least this many recent tokens as computed. It is a constant, not the block size, so that
# the block size cannot change results; block sizes up to it are possible because a block is complete before its
# first token leaves the window.
MIN_EXACT_RECENT = 128


@dataclass(frozen=True)
class Snapshot:
    """The cache at one moment: constant size, since blocks are immutable and only ring and length are copied."""

    num_tokens: int
    ring: Tensor
    truncations: int


@dataclass(frozen=True)
class CacheMemory:
    """Bytes really allocated, by head class."""

    retrieval_blocks: int
    retrieval_windows: int
    streaming_windows: int

    @property
    def total(self) -> int:
        return self.retrieval_blocks + self.retrieval_windows + self.streaming_windows


class DuoCache:
    """Keys and values of up to `context` tokens under a HeadPlan and a block layout."""

    def __init__(
        self,
        plan: HeadPlan,
        layout: BlockLayout,
        *,
        num_heads: int,
        context: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        assert layout.block_size <= MIN_EXACT_RECENT, layout.block_size
        self.plan = plan
        self.layout = layout
        self.context = context
        self.device = device
        self.dtype = dtype
        self.num_tokens = 0
        self._query_group = num_heads // plan.num_kv_heads
        self._scale = layout.head_dim**-0.5
        self._exact_recent = exact_recent_size(plan)
        self.ring = Ring(
            num_layers=plan.num_layers,
            num_kv_heads=plan.num_kv_heads,
            head_dim=layout.head_dim,
            sink_size=plan.sink_size,
            recent_size=self._exact_recent,
            device=device,
            dtype=dtype,
        )
        self.pool = BlockPool(
            layout, num_rows=plan.num_retrieval, max_blocks=context // layout.block_size, device=device
        )
        # Per layer: its retrieval heads, their rows of the block table, the window width of every head.
        self._retrieval: list[Tensor] = []
        self._rows: list[slice] = []
        self._recent_sizes: list[Tensor] = []
        row = 0
        for flags in plan.retrieval:
            heads = [head for head, retrieval in enumerate(flags) if retrieval]
            self._retrieval.append(torch.tensor(heads, dtype=torch.int64, device=device))
            self._rows.append(slice(row, row + len(heads)))
            row += len(heads)
            widths = [self._exact_recent if retrieval else plan.recent_size for retrieval in flags]
            self._recent_sizes.append(torch.tensor(widths, dtype=torch.int64, device=device))
        self._step: _Step | None = None
        self._truncated_to: list[int] = []

    def begin(self, q_len: int) -> None:
        """Start to append `q_len` tokens; the caller has checked that they fit into the context."""
        assert self._step is None, "a transaction is open"
        start, end = self.num_tokens, self.num_tokens + q_len
        assert end <= self.context, (start, q_len, self.context)
        slots = self.ring.overwritten(start=start, count=q_len)
        self._step = _Step(start, end, slots, self.ring.data[:, :, :, slots])
        self.pool.grow(end // self.layout.block_size)

    def commit(self) -> None:
        """Make the appended tokens part of the context."""
        assert self._step is not None
        self.num_tokens = self._step.end
        self._step = None

    def rollback(self) -> None:
        """Forget the open transaction; the cache is as it was before `begin`."""
        assert self._step is not None
        self.ring.data[:, :, :, self._step.slots] = self._step.saved
        self.pool.shrink(self.num_tokens // self.layout.block_size)
        self._step = None

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take the keys and values of the new tokens in one layer.

        k, v: [q_len, num_kv_heads, head_dim] in the compute dtype, RoPE applied to k.
        """
        step = self._step
        assert step is not None, "append outside begin and commit"
        wanted = (step.end - step.start, self.plan.num_kv_heads, self.layout.head_dim)
        assert tuple(k.shape) == tuple(v.shape) == wanted, (k.shape, v.shape, wanted)
        step.k, step.v = k.transpose(0, 1), v.transpose(0, 1)  # [num_kv_heads, q_len, head_dim]
        self._close_blocks(layer, step)
        if step.end - step.start == 1:
            self.ring.write(layer, step.k, step.v, start=step.start)

    def attend(self, layer: int, q: Tensor, positions: Tensor) -> Tensor:
        """Attend from the new tokens to all that each may see.

        q: [q_len, num_heads, head_dim]; positions: int64 [q_len], the absolute positions of the tokens just
        appended. Returns [q_len, num_heads, head_dim] in q's dtype.
        """
        step = self._step
        assert step is not None and step.k is not None and step.v is not None
        q_len, num_heads, head_dim = q.shape
        grouped = q.view(q_len, self.plan.num_kv_heads, self._query_group, head_dim).permute(1, 2, 0, 3)
        keys, values, key_positions = self._window(layer, step)
        out, lse = window_attention(
            grouped,
            keys,
            values,
            q_positions=positions,
            k_positions=key_positions,
            sink_size=self.plan.sink_size,
            recent_sizes=self._recent_sizes[layer],
            scale=self._scale,
        )
        heads = self._retrieval[layer]
        if heads.shape[0] and step.end - self._exact_recent > self.plan.sink_size:
            block_out, block_lse = block_attention(
                grouped[heads],
                self.pool.records,
                self.pool.table[self._rows[layer], : self.pool.num_blocks],
                self.layout,
                q_positions=positions,
                sink_size=self.plan.sink_size,
                recent_size=self._exact_recent,
                scale=self._scale,
            )
            out[heads] = merge(out[heads], lse[heads], block_out, block_lse)
        if q_len > 1:
            self.ring.write(layer, step.k, step.v, start=step.start)
        step.k = step.v = None
        return out.permute(2, 0, 1, 3).reshape(q_len, num_heads, head_dim).to(q.dtype)

    def snapshot(self) -> Snapshot:
        """Copy what `restore` needs; constant size."""
        assert self._step is None
        return Snapshot(self.num_tokens, self.ring.data.clone(), len(self._truncated_to))

    def restore(self, snapshot: Snapshot) -> None:
        """Return to an earlier moment of this context, prefilling nothing.

        The snapshot must lie on the way that led here: once the cache was cut below it, it is void.
        """
        assert self._step is None
        cut_since = self._truncated_to[snapshot.truncations :]
        assert all(cut >= snapshot.num_tokens for cut in cut_since), "snapshot of an abandoned context"
        assert snapshot.num_tokens <= self.num_tokens
        self.ring.data.copy_(snapshot.ring)
        self.pool.shrink(snapshot.num_tokens // self.layout.block_size)
        self.num_tokens = snapshot.num_tokens
        self._truncated_to.append(self.num_tokens)

    def reset(self) -> None:
        """Forget everything."""
        assert self._step is None
        self.pool.shrink(0)
        self.num_tokens = 0
        self._truncated_to.append(0)

    def memory(self) -> CacheMemory:
        """Return the bytes really allocated, by head class."""
        num_heads = self.plan.num_layers * self.plan.num_kv_heads
        ring_per_head = self.ring.nbytes // num_heads
        retrieval = self.plan.num_retrieval
        return CacheMemory(
            retrieval_blocks=self.pool.nbytes,
            retrieval_windows=ring_per_head * retrieval,
            streaming_windows=ring_per_head * (num_heads - retrieval),
        )

    def _window(self, layer: int, step: "_Step") -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values [num_kv_heads, kv_len, head_dim] of ring and chunk, and their positions."""
        if step.end - step.start == 1:
            k, v = self.ring.data[:, layer]
            return k, v, self.ring.positions(step.end)
        assert step.k is not None and step.v is not None
        sinks = torch.arange(min(self.plan.sink_size, step.start), device=self.device)
        recent_start = max(self.plan.sink_size, step.start - self._exact_recent + 1)
        recent = torch.arange(min(recent_start, step.start), step.start, device=self.device)
        held = torch.cat((sinks, recent))
        k, v = self.ring.read(layer, held)
        chunk = torch.arange(step.start, step.end, device=self.device)
        return torch.cat((k, step.k), dim=1), torch.cat((v, step.v), dim=1), torch.cat((held, chunk))

    def _close_blocks(self, layer: int, step: "_Step") -> None:
        """Encode every block of this layer whose last token has just come."""
        size = self.layout.block_size
        first, last = step.start // size, step.end // size
        heads = self._retrieval[layer]
        if first == last or not heads.shape[0]:
            return
        assert step.k is not None and step.v is not None
        opened = torch.arange(first * size, step.start, device=self.device)
        open_k, open_v = self.ring.read(layer, opened)
        k, v = (
            torch.cat((older, newer), dim=1)[heads, : (last - first) * size].reshape(-1, size, self.layout.head_dim)
            for older, newer in ((open_k, step.k), (open_v, step.v))
        )
        targets = self.pool.table[self._rows[layer], first:last].reshape(-1)
        self.pool.records[targets] = encode_blocks(k, v, self.layout)


def exact_recent_size(plan: HeadPlan) -> int:
    """Return how many recent tokens retrieval heads see as computed."""
    return max(plan.recent_size, MIN_EXACT_RECENT)


@dataclass
class _Step:
    """An open transaction: tokens start..end-1, and the ring slots it overwrites as they were."""

    start: int
    end: int
    slots: Tensor
    saved: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
