"""The cache's arithmetic in plain torch: any device, any compute type; the reference of the compiled path."""

from functools import partial

import torch
from torch import Tensor

from duolocal.cache.backend import CacheState, Step
from duolocal.cache.selection import occasion
from duolocal.kernels.attention import block_attention, merge, window_attention
from duolocal.kernels.blocks import encode_blocks
from duolocal.kernels.digest import choose_blocks, make_digests
from duolocal.kernels.interface import Rotation, StepTraits
from duolocal.kernels.sparse import chosen_block_attention, sparse_block_attention


class TorchBackend:
    """Appends and attends with the operations of `kernels/attention.py` and `kernels/blocks.py`."""

    def __init__(self, state: CacheState) -> None:
        self._state = state
        plan, device = state.plan, state.start.device
        # Per layer: its retrieval heads, the window width of every head.
        self._retrieval = [torch.tensor(heads, dtype=torch.int64, device=device) for heads in plan.retrieval_heads]
        self._recent_sizes = [torch.tensor(state.widths(layer), device=device) for layer in range(plan.num_layers)]

    def traits(self, step: Step) -> StepTraits:
        """Return that the model rotates, and that nothing is repeated."""
        return StepTraits()

    def append(self, layer: int, step: Step, k: Tensor, v: Tensor) -> None:
        """Take k and v [q_len, num_kv_heads, head_dim] of the step's tokens."""
        step.k, step.v = k.transpose(0, 1), v.transpose(0, 1)  # [num_kv_heads, q_len, head_dim]
        self._close_blocks(layer, step)
        if step.decodes:
            self._state.ring.write(layer, step.k, step.v, start=step.start)

    def attend(self, layer: int, step: Step, q: Tensor, positions: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Attend from q [q_len, num_heads, head_dim] to all that each may see."""
        state = self._state
        assert step.k is not None and step.v is not None
        q_len, num_heads, head_dim = q.shape
        grouped = q.view(q_len, state.plan.num_kv_heads, state.query_group, head_dim).permute(1, 2, 0, 3)
        keys, values, key_positions = self._window(layer, step)
        scale = head_dim**-0.5
        out, lse = window_attention(
            grouped,
            keys,
            values,
            q_positions=positions,
            k_positions=key_positions,
            sink_size=state.plan.sink_size,
            recent_sizes=self._recent_sizes[layer],
            scale=scale,
        )
        heads = self._retrieval[layer]
        if heads.shape[0] and step.end - state.exact_recent > state.plan.sink_size:
            sizes = {"sink_size": state.plan.sink_size, "recent_size": state.exact_recent, "scale": scale}
            table = state.pool.table[state.plan.rows[layer], : state.pool.num_blocks]
            if state.selection is not None and step.decodes:
                listed = self._listed(layer, grouped[heads][:, :, 0], step.start)
                block_out, block_lse = chosen_block_attention(
                    grouped[heads], state.pool.take, table, state.layout, listed, first=step.start, tile=1, **sizes
                )
            elif state.prefill is not None and not step.decodes:
                block_out, block_lse = self._sparse(layer, step, grouped[heads], lse[heads], positions, scale)
            else:
                block_out, block_lse = block_attention(
                    grouped[heads], state.pool.take, table, state.layout, q_positions=positions, **sizes
                )
            out[heads] = merge(out[heads], lse[heads], block_out, block_lse)
        if not step.decodes:
            state.ring.write(layer, step.k, step.v, start=step.start)
        step.k = step.v = None
        return out.permute(2, 0, 1, 3).reshape(q_len, num_heads, head_dim).to(q.dtype)

    def _sparse(
        self, layer: int, step: Step, q: Tensor, window_lse: Tensor, positions: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend from a chunk's retrieval heads to what the policy chooses behind the window."""
        state, rows = self._state, self._state.plan.rows[layer]
        policy, counts = state.prefill, state.sparse_counts
        assert policy is not None and counts is not None
        take, table, layout = state.pool.take, state.pool.table[rows, : state.pool.num_blocks], state.layout
        sizes = {"sink_size": state.plan.sink_size, "recent_size": state.exact_recent}
        out, lse, chosen = sparse_block_attention(
            q, window_lse, take, table, layout, policy, q_positions=positions, scale=scale, **sizes
        )
        counts.add(rows, chosen, start=step.start, end=step.end, **state.sizes)
        if policy.measure:
            _, exact = block_attention(q, take, table, layout, q_positions=positions, scale=scale, **sizes)
            kept, whole = torch.logaddexp(window_lse, lse), torch.logaddexp(window_lse, exact)
            counts.add_mass(rows, chosen, kept, whole, start=step.start)
        return out, lse

    def digest(self, layer: int, first: int, last: int) -> None:
        """Make the digests of blocks first..last-1 of a layer."""
        selection, pool, rows = self._state.selection, self._state.pool, self._state.plan.rows[layer]
        assert selection is not None
        for row in range(rows.start, rows.stop):
            records = pool.take(pool.table[row, first:last])
            selection.digests[row, first:last] = make_digests(
                records, pool.layout, selection.channels[row], selection.centre[row]
            )

    def _listed(self, layer: int, q: Tensor, position: int) -> Tensor:
        """Return which blocks each row reads for q [rows, group, head_dim]: bool [rows, 1, num_blocks]."""
        state, selection, rows = self._state, self._state.selection, self._state.plan.rows[layer]
        assert selection is not None
        size = state.layout.block_size
        first, newest = state.plan.sink_size // size, (position - state.exact_recent) // size
        now = occasion(position, newest, reuse=selection.policy.reuse)
        read = torch.zeros(q.shape[0], 1, state.pool.num_blocks, dtype=torch.bool, device=state.start.device)
        for number, row in enumerate(range(rows.start, rows.stop)):
            count = min(newest - first, selection.budget_blocks)
            if int(selection.made_at[row]) != now:
                best = choose_blocks(
                    q[number],
                    selection.digests[row, first:newest],
                    partial(self._records, row, first),
                    state.layout,
                    selection.channels[row],
                    budget=selection.budget_blocks,
                    hidden=state.plan.sink_size - first * size,
                )
                selection.lists[row, : count + 1] = torch.cat((best + first, best.new_tensor([newest])))
                selection.made_at[row] = now
            read[number, 0, selection.lists[row, : count + 1].long()] = True
        return read

    def _records(self, row: int, first: int, numbers: Tensor) -> Tensor:
        """Return the records of some blocks of a row, numbered from `first` on."""
        pool = self._state.pool
        return pool.take(pool.table[row, first + numbers])

    def _window(self, layer: int, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values [num_kv_heads, kv_len, head_dim] of ring and chunk, and their positions."""
        state = self._state
        if step.decodes:
            k, v = state.ring.data[:, layer]
            return k, v, state.ring.positions(step.end)
        assert step.k is not None and step.v is not None
        sinks = torch.arange(min(state.plan.sink_size, step.start), device=state.start.device)
        recent_start = max(state.plan.sink_size, step.start - state.exact_recent + 1)
        recent = torch.arange(min(recent_start, step.start), step.start, device=state.start.device)
        held = torch.cat((sinks, recent))
        k, v = state.ring.read(layer, held)
        chunk = torch.arange(step.start, step.end, device=state.start.device)
        return torch.cat((k, step.k), dim=1), torch.cat((v, step.v), dim=1), torch.cat((held, chunk))

    def _close_blocks(self, layer: int, step: Step) -> None:
        """Encode every block of this layer whose last token has just come."""
        state = self._state
        size = state.layout.block_size
        first, last = step.start // size, step.end // size
        heads = self._retrieval[layer]
        if first == last or not heads.shape[0]:
            return
        assert step.k is not None and step.v is not None
        opened = torch.arange(first * size, step.start, device=state.start.device)
        open_k, open_v = state.ring.read(layer, opened)
        k, v = (
            torch.cat((older, newer), dim=1)[heads, : (last - first) * size].reshape(-1, size, state.layout.head_dim)
            for older, newer in ((open_k, step.k), (open_v, step.v))
        )
        targets = state.pool.table[state.plan.rows[layer], first:last].reshape(-1)
        state.pool.put(targets, encode_blocks(k, v, state.layout))
        if state.selection is not None:
            self.digest(layer, first, last)
