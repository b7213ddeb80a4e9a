"""Attention in plain torch: the window in the compute dtype, the quantized blocks behind it, and their merge.

A query at position i reads position j

- from the window, exactly as computed, when j <= i and (j < sink_size or i - j < recent_size);
- from its block, as quantized, when j >= sink_size and i - j >= recent_size (retrieval heads only).

The two sets are disjoint and depend on i and j alone, so how tokens were fed in cannot change what is computed.
Each function returns its own softmax with the log-sum-exp, and `merge` joins them.

All KV heads share one layout: queries [num_kv_heads, query_group, q_len, head_dim], the query heads of a KV head
side by side. Scores, softmax and sums are float32 (float64 for float64 input).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from duolocal.kernels.blocks import BlockLayout, decode_blocks, hadamard

QUERY_TILE = 256  # queries per tile: bounds the score matrix
KEY_SPAN = 2048  # tokens of blocks decoded at a time: bounds the transient, whatever the context


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_positions: Tensor,
    k_positions: Tensor,
    sink_size: int,
    recent_sizes: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to sink and recent tokens.

    q: [num_kv_heads, group, q_len, head_dim]; k, v: [num_kv_heads, kv_len, head_dim]; q_positions: int64 [q_len],
    consecutive; k_positions: int64 [kv_len], -1 where nothing is stored, ascending when q_len > 1;
    recent_sizes: int64 [num_kv_heads]. Returns out [num_kv_heads, group, q_len, head_dim] and lse
    [num_kv_heads, group, q_len]. Every query sees at least itself.
    """
    num_kv_heads, _, q_len, head_dim = q.shape
    assert k.shape == v.shape == (num_kv_heads, k_positions.shape[0], head_dim), (q.shape, k.shape, v.shape)
    assert q_positions.shape == (q_len,) and recent_sizes.shape == (num_kv_heads,)
    accumulate = _accumulate_dtype(q)
    out = torch.empty(q.shape, dtype=accumulate, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=accumulate, device=q.device)
    widest = int(recent_sizes.max())
    for start in range(0, q_len, QUERY_TILE):
        tile = slice(start, min(start + QUERY_TILE, q_len))
        tile_positions = q_positions[tile]
        keys, values, key_positions = k, v, k_positions
        if q_len > 1:
            first, last = int(tile_positions[0]), int(tile_positions[-1])
            bounds = torch.tensor([0, sink_size, first - widest + 1, last + 1], device=q.device)
            begin, sink_end, band, end = torch.searchsorted(k_positions, bounds).tolist()
            band = max(band, sink_end)
            keys = torch.cat((k[:, begin:sink_end], k[:, band:end]), dim=1)
            values = torch.cat((v[:, begin:sink_end], v[:, band:end]), dim=1)
            key_positions = torch.cat((k_positions[begin:sink_end], k_positions[band:end]))
        distance = tile_positions[:, None] - key_positions[None, :]  # [tile, keys]
        inside = (key_positions < sink_size)[None, None] | (distance[None] < recent_sizes[:, None, None])
        visible = inside & ((distance >= 0) & (key_positions >= 0))[None]  # [num_kv_heads, tile, keys]
        scores = torch.einsum("hgqd,hkd->hgqk", q[:, :, tile].to(accumulate) * scale, keys.to(accumulate))
        scores.masked_fill_(~visible[:, None], float("-inf"))
        tile_lse = scores.logsumexp(dim=-1)
        weights = scores.sub_(tile_lse[..., None]).exp_()
        # What is not stored may hold anything, and 0 · NaN is NaN.
        values = values.to(accumulate).masked_fill((key_positions < 0)[None, :, None], 0.0)
        out[:, :, tile] = torch.einsum("hgqk,hkd->hgqd", weights, values)
        lse[:, :, tile] = tile_lse
    return out, lse


def block_attention(
    q: Tensor,
    take: Callable[[Tensor], Tensor],
    table: Tensor,
    layout: BlockLayout,
    *,
    q_positions: Tensor,
    sink_size: int,
    recent_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to the quantized blocks behind the window.

    q: [num_heads, group, q_len, head_dim] of retrieval KV heads; table: int64 [num_heads, num_blocks], the record of
    each block in order of position; take: gives the records uint8 [n, record_bytes] of n entries of the table;
    q_positions: int64 [q_len], consecutive. Returns out [num_heads, group, q_len, head_dim] and lse
    [num_heads, group, q_len]; a query that sees nothing has out 0 and lse -inf.
    """
    num_heads, group, q_len, head_dim = q.shape
    assert table.shape[0] == num_heads and layout.head_dim == head_dim, (q.shape, table.shape, layout)
    accumulate = _accumulate_dtype(q)
    q = q.to(accumulate)
    if layout.key.rotate:
        q = hadamard(q)
    q = q * scale
    top = torch.full((num_heads, group, q_len), float("-inf"), dtype=accumulate, device=q.device)
    total = torch.zeros_like(top)
    out = torch.zeros_like(q)
    first, last = int(q_positions[0]), int(q_positions[-1])
    seen_end = max(0, min(last - recent_size + 1, table.shape[1] * layout.block_size))  # positions visible to any
    blocks_per_span = max(1, KEY_SPAN // layout.block_size)
    for block in range(sink_size // layout.block_size, -(-seen_end // layout.block_size), blocks_per_span):
        span_table = table[:, block : block + blocks_per_span]
        span_start = block * layout.block_size
        span_end = min(span_start + span_table.shape[1] * layout.block_size, seen_end)
        span_records = take(span_table.reshape(-1))
        k, v = (
            decode_blocks(span_records, layout, which, dtype=accumulate).view(num_heads, -1, head_dim)[
                :, : span_end - span_start
            ]
            for which in ("key", "value")
        )
        k_positions = torch.arange(span_start, span_end, device=q.device)
        # Queries before this one see nothing of the span.
        skipped = max(0, span_start + recent_size - first)
        for start in range(skipped, q_len, QUERY_TILE):
            tile = slice(start, min(start + QUERY_TILE, q_len))
            scores = torch.matmul(q[:, :, tile].flatten(1, 2), k.transpose(1, 2)).view(
                num_heads, group, -1, span_end - span_start
            )
            if span_start < sink_size or first + start - (span_end - 1) < recent_size:
                distance = q_positions[tile, None] - k_positions[None]
                hidden = (distance < recent_size) | (k_positions < sink_size)[None]
                scores.masked_fill_(hidden, float("-inf"))
            new_top = torch.maximum(top[:, :, tile], scores.amax(dim=-1))
            reference = new_top.masked_fill(new_top == float("-inf"), 0.0)
            weights = scores.sub_(reference[..., None]).exp_()
            shrink = (top[:, :, tile] - reference).exp()
            total[:, :, tile] = total[:, :, tile] * shrink + weights.sum(dim=-1)
            added = torch.matmul(weights.flatten(1, 2), v).view(num_heads, group, -1, head_dim)
            out[:, :, tile] = out[:, :, tile] * shrink[..., None] + added
            top[:, :, tile] = new_top
    lse = top + total.log()
    out = out / total.masked_fill(total == 0, 1.0)[..., None]
    return (hadamard(out) if layout.value.rotate else out), lse


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Join two softmaxes over disjoint keys.

    out_a, out_b: [..., head_dim] with their log-sum-exps [...]; lse_a is finite. Returns [..., head_dim].
    """
    lse = torch.logaddexp(lse_a, lse_b)
    return out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None]


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
