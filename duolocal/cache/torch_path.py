"""The cache's arithmetic in plain torch: any device, any compute type; the reference of the compiled path."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duolocal.cache.path import Step
from duolocal.cache.selection import occasion
from duolocal.kernels.attention import block_attention, merge, window_attention
from duolocal.kernels.blocks import encode_blocks
from duolocal.kernels.digest import choose_blocks, make_digests
from duolocal.kernels.interface import Rotation
from duolocal.kernels.sparse import chosen_block_attention, sparse_block_attention

if TYPE_CHECKING:
    from duolocal.cache.cache import DuoCache


class TorchPath:
    """Appends and attends with the operations of `kernels/attention.py` and `kernels/blocks.py`."""

    rotates = capturable = False

    def __init__(self, cache: "DuoCache") -> None:
        self._cache = cache
        plan, device = cache.plan, cache.device
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
            widths = [cache.exact_recent if retrieval else plan.recent_size for retrieval in flags]
            self._recent_sizes.append(torch.tensor(widths, dtype=torch.int64, device=device))

    def append(self, layer: int, step: Step, k: Tensor, v: Tensor) -> None:
        """Take k and v [q_len, num_kv_heads, head_dim] of the step's tokens."""
        step.k, step.v = k.transpose(0, 1), v.transpose(0, 1)  # [num_kv_heads, q_len, head_dim]
        self._close_blocks(layer, step)
        if step.end - step.start == 1:
            self._cache.ring.write(layer, step.k, step.v, start=step.start)

    def attend(self, layer: int, step: Step, q: Tensor, positions: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Attend from q [q_len, num_heads, head_dim] to all that each may see."""
        cache = self._cache
        assert step.k is not None and step.v is not None
        q_len, num_heads, head_dim = q.shape
        grouped = q.view(q_len, cache.plan.num_kv_heads, cache.query_group, head_dim).permute(1, 2, 0, 3)
        keys, values, key_positions = self._window(layer, step)
        scale = head_dim**-0.5
        out, lse = window_attention(
            grouped,
            keys,
            values,
            q_positions=positions,
            k_positions=key_positions,
            sink_size=cache.plan.sink_size,
            recent_sizes=self._recent_sizes[layer],
            scale=scale,
        )
        heads = self._retrieval[layer]
        if heads.shape[0] and step.end - cache.exact_recent > cache.plan.sink_size:
            sizes = {"sink_size": cache.plan.sink_size, "recent_size": cache.exact_recent, "scale": scale}
            table = cache.pool.table[self._rows[layer], : cache.pool.num_blocks]
            if cache.selection is not None and q_len == 1:
                listed = self._listed(layer, grouped[heads][:, :, 0], step.start)
                block_out, block_lse = chosen_block_attention(
                    grouped[heads], cache.pool.take, table, cache.layout, listed, first=step.start, tile=1, **sizes
                )
            elif cache.prefill is not None and q_len > 1:
                block_out, block_lse = self._sparse(layer, step, grouped[heads], lse[heads], positions, scale)
            else:
                block_out, block_lse = block_attention(
                    grouped[heads], cache.pool.take, table, cache.layout, q_positions=positions, **sizes
                )
            out[heads] = merge(out[heads], lse[heads], block_out, block_lse)
        if q_len > 1:
            cache.ring.write(layer, step.k, step.v, start=step.start)
        step.k = step.v = None
        return out.permute(2, 0, 1, 3).reshape(q_len, num_heads, head_dim).to(q.dtype)

    def chooses(self, step: Step) -> bool:
        """Nothing is captured here: lists are made where they are due."""
        return False

    def _sparse(
        self, layer: int, step: Step, q: Tensor, window_lse: Tensor, positions: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend from a chunk's retrieval heads to what the policy chooses behind the window."""
        cache, rows = self._cache, self._rows[layer]
        policy, counts = cache.prefill, cache.sparse_counts
        assert policy is not None and counts is not None
        table = cache.pool.table[rows, : cache.pool.num_blocks]
        sizes = {"sink_size": cache.plan.sink_size, "recent_size": cache.exact_recent}
        out, lse, chosen = sparse_block_attention(
            q,
            window_lse,
            cache.pool.take,
            table,
            cache.layout,
            policy,
            q_positions=positions,
            scale=scale,
            **sizes,
        )
        counts.add(rows, chosen, start=step.start, end=step.end, block_size=cache.layout.block_size, **sizes)
        if policy.measure:
            _, exact = block_attention(
                q, cache.pool.take, table, cache.layout, q_positions=positions, scale=scale, **sizes
            )
            kept, whole = torch.logaddexp(window_lse, lse), torch.logaddexp(window_lse, exact)
            counts.add_mass(rows, chosen, kept, whole, start=step.start)
        return out, lse

    def digest(self, layer: int, first: int, last: int) -> None:
        """Make the digests of blocks first..last-1 of a layer."""
        selection, pool = self._cache.selection, self._cache.pool
        assert selection is not None
        for row in range(self._rows[layer].start, self._rows[layer].stop):
            records = pool.take(pool.table[row, first:last])
            selection.digests[row, first:last] = make_digests(
                records, pool.layout, selection.channels[row], selection.centre[row]
            )

    def _listed(self, layer: int, q: Tensor, position: int) -> Tensor:
        """Return which blocks each row reads for q [rows, group, head_dim]: bool [rows, 1, num_blocks]."""
        cache, selection = self._cache, self._cache.selection
        assert selection is not None
        size = cache.layout.block_size
        first, newest = cache.plan.sink_size // size, (position - cache.exact_recent) // size
        now = occasion(position, newest, reuse=selection.policy.reuse)
        read = torch.zeros(q.shape[0], 1, cache.pool.num_blocks, dtype=torch.bool, device=cache.device)
        for number, row in enumerate(range(self._rows[layer].start, self._rows[layer].stop)):
            count = min(newest - first, selection.budget_blocks)
            if int(selection.made_at[row]) != now:
                best = choose_blocks(
                    q[number],
                    selection.digests[row, first:newest],
                    partial(self._records, row, first),
                    cache.layout,
                    selection.channels[row],
                    budget=selection.budget_blocks,
                    hidden=cache.plan.sink_size - first * size,
                )
                selection.lists[row, : count + 1] = torch.cat((best + first, best.new_tensor([newest])))
                selection.made_at[row] = now
            read[number, 0, selection.lists[row, : count + 1].long()] = True
        return read

    def _records(self, row: int, first: int, numbers: Tensor) -> Tensor:
        """Return the records of some blocks of a row, numbered from `first` on."""
        pool = self._cache.pool
        return pool.take(pool.table[row, first + numbers])

    def _window(self, layer: int, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values [num_kv_heads, kv_len, head_dim] of ring and chunk, and their positions."""
        cache = self._cache
        if step.end - step.start == 1:
            k, v = cache.ring.data[:, layer]
            return k, v, cache.ring.positions(step.end)
        assert step.k is not None and step.v is not None
        sinks = torch.arange(min(cache.plan.sink_size, step.start), device=cache.device)
        recent_start = max(cache.plan.sink_size, step.start - cache.exact_recent + 1)
        recent = torch.arange(min(recent_start, step.start), step.start, device=cache.device)
        held = torch.cat((sinks, recent))
        k, v = cache.ring.read(layer, held)
        chunk = torch.arange(step.start, step.end, device=cache.device)
        return torch.cat((k, step.k), dim=1), torch.cat((v, step.v), dim=1), torch.cat((held, chunk))

    def _close_blocks(self, layer: int, step: Step) -> None:
        """Encode every block of this layer whose last token has just come."""
        cache = self._cache
        size = cache.layout.block_size
        first, last = step.start // size, step.end // size
        heads = self._retrieval[layer]
        if first == last or not heads.shape[0]:
            return
        assert step.k is not None and step.v is not None
        opened = torch.arange(first * size, step.start, device=cache.device)
        open_k, open_v = cache.ring.read(layer, opened)
        k, v = (
            torch.cat((older, newer), dim=1)[heads, : (last - first) * size].reshape(-1, size, cache.layout.head_dim)
            for older, newer in ((open_k, step.k), (open_v, step.v))
        )
        targets = cache.pool.table[self._rows[layer], first:last].reshape(-1)
        cache.pool.put(targets, encode_blocks(k, v, cache.layout))
        if cache.selection is not None:
            self.digest(layer, first, last)
