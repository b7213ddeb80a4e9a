"""Attention of a prefill chunk: the band of sink and recent tokens for every head, the blocks for retrieval heads.

The host knows the position of the chunk's first token, and the chunk is not in the ring yet: the ring holds what came
before it. Owns the band, the fused route over the blocks and the merge; `library_attention.py` is the other route over
the blocks. Both are flash attention (arXiv 2307.08691): softmax in base 2 while the keys pass by, sums in float32.
"""

from collections.abc import Callable
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from duolocal.kernels.gpu.block_tile import natural_lse, softmax_step
from duolocal.kernels.gpu.fused_attention import LOG2_E, fused_blocks_attention
from duolocal.kernels.gpu.layer_cache import LayerCache
from duolocal.kernels.gpu.library_attention import (
    Backend,
    hadamard_matrix,
    library_blocks_attention,
    triton_dtype,
)
from duolocal.kernels.gpu.store import check_chunk

Route = Literal["library", "fused"]

LIBRARY_LEAST = 128  # tokens of a chunk from which the library is the default on a GPU
BAND_ROWS = 64  # rows (a token's query heads of one KV head side by side) of a tile
BAND_KEYS = 64  # half of them beyond head_dim 64: more tiles at once instead
MERGE_ROWS = 32


@triton.jit
def attend(q, k, v, visible, top, total, acc, scale):
    """Add one tile of keys to an online softmax.

    q: [rows, dims]; k, v: [keys, dims] in q's dtype, 0 where nothing is stored; visible: [rows, keys], or broadcasts
    to it. top, total: float32 [rows], largest score so far (times log2(e)) and sum of 2^(score - top); acc: float32
    [rows, dims], the values weighted alike. scale: includes log2(e). Returns the new top, total and acc.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(visible, scores, float("-inf"))
    top, total, weights, shrink = softmax_step(scores, top, total)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return top, total, acc


@triton.jit
def finish(top, total, acc):
    """Return the softmax's output and its natural log-sum-exp; 0 and -inf for a row that saw nothing."""
    return acc / tl.where(total > 0.0, total, 1.0)[:, None], natural_lse(top, total)


@triton.jit(do_not_specialize=["q_len", "start", "sink_size"])
def band_attention_kernel(
    q,  # [q_len, num_heads, DIM], rows of heads side by side
    k,  # [q_len, num_kv_heads, DIM]
    v,
    ring_k,  # [num_kv_heads, num_slots, DIM]
    ring_v,
    widths,  # int32 [num_kv_heads]
    out,  # float32 [q_len, num_heads, DIM]
    lse,  # float32 [q_len, num_heads]
    q_len,
    start,
    sink_size,
    recent_size,
    q_stride,
    k_stride,
    v_stride,
    scale,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    begin = tl.program_id(0) * BLOCK_M
    rows = begin + tl.arange(0, BLOCK_M)
    tokens = rows // GROUP
    heads = head * GROUP + rows % GROUP
    dims = tl.arange(0, DIM_PAD)
    keys = tl.arange(0, BLOCK_N)
    inside = (tokens < q_len)[:, None] & (dims < DIM)[None, :]
    at = tokens.to(tl.int64)[:, None] * q_stride + heads[:, None] * DIM + dims[None, :]
    queries = tl.load(q + at, mask=inside, other=0.0)

    width = tl.load(widths + head)
    positions = (start + tokens)[:, None]
    first = start + begin // GROUP
    end = start + tl.minimum(q_len, (begin + BLOCK_M - 1) // GROUP + 1)  # one past the tile's last token
    band = tl.maximum(sink_size, first - width + 1)  # a sink is never read as part of the band

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)

    # What came before the chunk: sinks, then the band, in one loop.
    slots = head.to(tl.int64) * (sink_size + recent_size)
    sinks_end = tl.minimum(sink_size, start)
    sink_tiles = tl.cdiv(sinks_end, BLOCK_N)
    band_tiles = tl.cdiv(tl.maximum(start - band, 0), BLOCK_N)
    for tile in range(0, sink_tiles + band_tiles):
        is_sink = tile < sink_tiles
        j = tl.where(is_sink, tile * BLOCK_N, band + (tile - sink_tiles) * BLOCK_N) + keys
        held = j < tl.where(is_sink, sinks_end, start)  # what a slot holds beyond that may be NaN
        slot = tl.where(is_sink, j, sink_size + (j - sink_size) % recent_size)
        source = (slots + slot)[:, None] * DIM + dims[None, :]
        loaded = held[:, None] & (dims < DIM)[None, :]
        tile_k = tl.load(ring_k + source, mask=loaded, other=0.0)
        tile_v = tl.load(ring_v + source, mask=loaded, other=0.0)
        visible = held[None, :] & (is_sink | (positions - j[None, :] < width))
        top, total, acc = attend(queries, tile_k, tile_v, visible, top, total, acc, scale)

    # The chunk: sinks among its first tokens, then the band.
    sinks_end = tl.minimum(sink_size, end)
    band = tl.maximum(band, start)
    sink_tiles = tl.cdiv(tl.maximum(sinks_end - start, 0), BLOCK_N)
    band_tiles = tl.cdiv(tl.maximum(end - band, 0), BLOCK_N)
    for tile in range(0, sink_tiles + band_tiles):
        is_sink = tile < sink_tiles
        j = tl.where(is_sink, start + tile * BLOCK_N, band + (tile - sink_tiles) * BLOCK_N) + keys
        held = j < tl.where(is_sink, sinks_end, end)
        token = (j - start).to(tl.int64)[:, None]
        column = (head * DIM + dims)[None, :]
        loaded = held[:, None] & (dims < DIM)[None, :]
        tile_k = tl.load(k + token * k_stride + column, mask=loaded, other=0.0)
        tile_v = tl.load(v + token * v_stride + column, mask=loaded, other=0.0)
        visible = held[None, :] & (j[None, :] <= positions) & (is_sink | (positions - j[None, :] < width))
        top, total, acc = attend(queries, tile_k, tile_v, visible, top, total, acc, scale)

    result, result_lse = finish(top, total, acc)
    row = tokens.to(tl.int64) * (num_kv_heads * GROUP) + heads
    tl.store(out + row[:, None] * DIM + dims[None, :], result, mask=inside)
    tl.store(lse + row, result_lse, mask=tokens < q_len)


def band_attention(cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Attend from a chunk to sinks and recent tokens, in the ring or in the chunk itself.

    q: [q_len, num_heads, head_dim], k, v: [q_len, num_kv_heads, head_dim], in the ring's dtype, positions start.. . A
    query at i sees j <= i with j < sink_size or i - j < widths[its KV head]. Returns out float32
    [q_len, num_heads, head_dim] and lse float32 [q_len, num_heads], natural. The cost of a query does not grow with
    the chunk. Memory: the two results, 4 · num_heads · (head_dim + 1) bytes per token.
    """
    q_len, num_heads, dim = q.shape
    check_chunk(cache, k, v, start)
    assert q.shape == (k.shape[0], cache.num_heads, dim) and q.dtype == k.dtype, (q.shape, q.dtype, k.dtype)
    assert q.stride(2) == 1 and q.stride(1) == dim, q.stride()
    out = torch.empty(q_len, num_heads, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(q_len, num_heads, dtype=torch.float32, device=q.device)
    block_m, block_n, num_warps, num_stages = band_tiles(dim, q_len * cache.query_group)
    grid = (triton.cdiv(q_len * cache.query_group, block_m), cache.num_kv_heads)
    band_attention_kernel[grid](
        q,
        k,
        v,
        cache.ring_k,
        cache.ring_v,
        cache.widths,
        out,
        lse,
        q_len,
        start,
        cache.sink_size,
        cache.recent_size,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        dim**-0.5 * LOG2_E,
        GROUP=cache.query_group,
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out, lse


def band_tiles(head_dim: int, rows: int) -> tuple[int, int, int, int]:
    """Return rows and keys of a tile, warps and pipeline stages."""
    block_m = max(16, min(BAND_ROWS, triton.next_power_of_2(rows)))  # 16: what a tensor core takes
    return block_m, BAND_KEYS if head_dim <= 64 else BAND_KEYS // 2, 4 if head_dim <= 128 else 8, 2


def blocks_attention(
    cache: LayerCache, q: Tensor, start: int, *, route: Route | None = None, backend: Backend | None = None
) -> tuple[Tensor, Tensor] | None:
    """Attend from a chunk to what the retrieval heads see of their quantized blocks.

    q: [q_len, num_heads, head_dim] at positions start..; a query at i sees sink_size <= j <= i - recent_size. route:
    None for the default of this device and length; backend: of the library route. Returns out float32
    [num_retrieval, q_len · group, head_dim], a token's query heads side by side, and lse float32
    [num_retrieval, q_len · group], natural; 0 and -inf for a query that sees nothing; None when no query of the chunk
    sees anything. A rotated value plane leaves the output rotated.
    """
    assert q.shape[1:] == (cache.num_heads, cache.head_dim), (q.shape, cache.num_heads, cache.head_dim)
    if cache.num_retrieval == 0 or start + q.shape[0] <= cache.sink_size + cache.recent_size:
        return None
    if (route or default_route(q)) == "library":
        return library_blocks_attention(cache, q, start, backend=backend)
    return fused_blocks_attention(cache, q, start)


def default_route(q: Tensor) -> Route:
    """Return how the blocks are read when nobody says: by the library for long chunks on a GPU."""
    return "library" if q.is_cuda and q.shape[0] >= LIBRARY_LEAST else "fused"


@triton.jit(do_not_specialize=["tokens"])
def merge_blocks_kernel(
    band,  # float32 [tokens, num_heads, DIM]
    band_lse,  # float32 [tokens, num_heads]
    blocks,  # float32 [num_retrieval, tokens * GROUP, DIM]
    blocks_lse,  # float32 [num_retrieval, tokens * GROUP]
    rows,  # int32 [num_kv_heads]
    out,  # [tokens, num_heads, DIM]
    tokens,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    OUT: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # token · num_heads + head
    token, head = at // NUM_HEADS, (at % NUM_HEADS).to(tl.int32)
    inside = token < tokens
    row = tl.load(rows + head // GROUP, mask=inside, other=-1)
    retrieval = row >= 0
    block_at = (row.to(tl.int64) * tokens + token) * GROUP + head % GROUP
    dims = tl.arange(0, DIM_PAD)[None, :]
    lse_a = tl.load(band_lse + at, mask=inside, other=0.0)  # finite: every query sees itself
    lse_b = tl.load(blocks_lse + block_at, mask=retrieval, other=float("-inf"))
    top = tl.maximum(lse_a, lse_b)
    weight_a, weight_b = tl.exp(lse_a - top), tl.exp(lse_b - top)
    total = weight_a + weight_b
    mask = inside[:, None] & (dims < DIM)
    a = tl.load(band + at[:, None] * DIM + dims, mask=mask, other=0.0)
    b = tl.load(blocks + block_at[:, None] * DIM + dims, mask=retrieval[:, None] & mask, other=0.0)
    merged = a * (weight_a / total)[:, None] + b * (weight_b / total)[:, None]
    tl.store(out + at[:, None] * DIM + dims, merged.to(OUT), mask=mask)


def merge_blocks(
    cache: LayerCache, band: Tensor, band_lse: Tensor, blocks: Tensor, blocks_lse: Tensor, dtype: torch.dtype
) -> Tensor:
    """Join the band of all heads with the blocks of the retrieval heads.

    band: float32 [q_len, num_heads, head_dim] with band_lse [q_len, num_heads]; blocks: float32
    [num_retrieval, q_len · group, head_dim], not rotated, with blocks_lse. Returns [q_len, num_heads, head_dim] in
    `dtype`.
    """
    q_len, num_heads, dim = band.shape
    assert band_lse.shape == (q_len, num_heads)
    assert blocks.shape == (cache.num_retrieval, q_len * cache.query_group, dim), blocks.shape
    assert blocks_lse.shape == blocks.shape[:2]
    assert all(x.is_contiguous() and x.dtype == torch.float32 for x in (band, band_lse, blocks, blocks_lse))
    out = torch.empty(q_len, num_heads, dim, dtype=dtype, device=band.device)
    merge_blocks_kernel[(triton.cdiv(q_len * num_heads, MERGE_ROWS),)](
        band,
        band_lse,
        blocks,
        blocks_lse,
        cache.rows,
        out,
        q_len,
        NUM_HEADS=num_heads,
        GROUP=cache.query_group,
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        BLOCK_M=MERGE_ROWS,
        OUT=triton_dtype(dtype),
        num_warps=4,
    )
    return out


def prefill_attention(
    cache: LayerCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    *,
    route: Route | None = None,
    blocks_of: Callable[[Tensor], tuple[Tensor, Tensor] | None] | None = None,
) -> Tensor:
    """Attend from a chunk to all that each of its tokens may see.

    q: [q_len, num_heads, head_dim], k, v: [q_len, num_kv_heads, head_dim], positions start..; the ring holds what came
    before the chunk, and the blocks that the chunk fills are closed. Returns [q_len, num_heads, head_dim] in q's dtype.
    blocks_of: in place of `blocks_attention`; gets the log-sum-exps [q_len, num_heads] of the band.
    Memory: 4 · head_dim bytes per token and head for the band, for retrieval heads as much again (twice for a rotated
    value plane), and the scratch of the route.
    """
    band, band_lse = band_attention(cache, q, k, v, start)
    seen = blocks_attention(cache, q, start, route=route) if blocks_of is None else blocks_of(band_lse)
    if seen is None:
        return band.to(q.dtype)
    blocks, blocks_lse = seen
    if cache.layout.value.rotate:
        blocks = blocks @ hadamard_matrix(cache.head_dim, q.device)
    return merge_blocks(cache, band, band_lse, blocks, blocks_lse, q.dtype)
