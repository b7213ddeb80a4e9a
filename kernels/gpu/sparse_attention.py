"""Sparse prefill on the GPU: the scores of the queries asked, and attention over the blocks that were chosen.

What is chosen from the scores is decided in `kernels/sparse.py`, on the device and without a look at the host. Both
kernels read the quantized blocks as they are, head_dim in two halves, as the fused route of an exact prefill does; rows
are a token's query heads of one KV head side by side.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from duolocal.kernels.gpu.block_tile import (
    add_values,
    load_queries,
    natural_lse,
    softmax_step,
    store_rows,
    tile_scores,
)
from duolocal.kernels.gpu.fused_attention import LOG2_E, dot_dtype, fused_tiles
from duolocal.kernels.gpu.layer_cache import LayerCache
from duolocal.kernels.gpu.library_attention import fold_queries, number_dtype, triton_dtype
from duolocal.kernels.gpu.planes import plane_constants
from duolocal.kernels.gpu.prefill import blocks_attention
from duolocal.kernels.sparse import Chosen, SparsePrefill, choose

SPAN_BLOCKS = 16  # blocks that one program scores


@triton.jit(do_not_specialize=["rows", "first", "num_blocks", "sink_size"])
def block_scores_kernel(
    q,  # [num_retrieval, rows, DIM], rotated where the keys are, in K_DOT
    records,  # uint8 [num_records, record_bytes]
    table,  # int64 [num_retrieval, max_blocks]
    out,  # float32 [num_retrieval, rows, num_blocks]
    rows,
    first,
    num_blocks,
    sink_size,
    recent_size,
    table_stride,
    record_stride,
    scale,
    STEP: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K_DOT: tl.constexpr,
    KEY: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, HALF_PAD)
    keys = tl.arange(0, BLOCK_N)
    half: tl.constexpr = DIM // 2
    inside = (row < rows)[:, None] & (columns < half)[None, :]
    q_at = (head * rows + row)[:, None] * DIM + columns[None, :]
    q_low, q_high, q_sum = load_queries(q, q_at, inside, DIM)
    last_seen = (first + row // GROUP * STEP - recent_size)[:, None]
    mask = (columns < half)[None, :] & (keys >= 0)[:, None]
    begin = tl.program_id(2) * SPAN
    for block in range(begin, tl.minimum(begin + SPAN, num_blocks)):
        record = records + tl.load(table + head * table_stride + block) * record_stride
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for piece in range(0, BLOCK_SIZE // BLOCK_N):
            tokens = piece * BLOCK_N + keys
            j = block * BLOCK_SIZE + tokens
            scores = tile_scores(q_low, q_high, q_sum, record, tokens, columns, mask, KEY, DIM, K_DOT)
            visible = (j >= sink_size)[None, :] & (j[None, :] <= last_seen)
            scores = tl.where(visible, scores * scale, float("-inf"))
            top, total, _, _ = softmax_step(scores, top, total)
        tl.store(out + (head * rows + row) * num_blocks + block, natural_lse(top, total), mask=row < rows)


def block_scores(cache: LayerCache, q: Tensor, *, first: int, step: int, num_blocks: int) -> Tensor:
    """Return the log-sum-exp of what queries see of each block.

    q: [n, num_heads, head_dim] at positions first, first + step, ... Returns float32 [num_retrieval, group, n,
    num_blocks], natural; -inf where a query sees nothing of a block.
    """
    layout, dim, group, rows = cache.layout, cache.head_dim, cache.query_group, q.shape[0] * cache.query_group
    interpreted = q.device.type == "cpu"
    k_dot, v_dot = (dot_dtype(plane, interpreted=interpreted) for plane in (layout.key, layout.value))
    block_m, block_n, num_warps, num_stages = fused_tiles(dim, rows, layout, k_dot, v_dot)
    out = torch.empty(cache.num_retrieval, rows, num_blocks, dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(rows, block_m), cache.num_retrieval, triton.cdiv(num_blocks, SPAN_BLOCKS))
    block_scores_kernel[grid](
        fold_queries(cache, q, k_dot),
        cache.records,
        cache.table,
        out,
        rows,
        first,
        num_blocks,
        cache.sink_size,
        cache.recent_size,
        cache.table.stride(0),
        cache.records.stride(0),
        dim**-0.5 * LOG2_E,
        STEP=step,
        SPAN=SPAN_BLOCKS,
        GROUP=group,
        DIM=dim,
        HALF_PAD=max(16, triton.next_power_of_2(dim // 2)),
        BLOCK_SIZE=layout.block_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        K_DOT=triton_dtype(k_dot),
        KEY=plane_constants(layout, "key"),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out.unflatten(1, (q.shape[0], group)).transpose(1, 2)


@triton.jit(do_not_specialize=["rows", "first", "sink_size", "list_length"])
def chosen_blocks_attention_kernel(
    q,  # [num_retrieval, rows, DIM], rotated where the keys are, in K_DOT
    records,  # uint8 [num_records, record_bytes]
    table,  # int64 [num_retrieval, max_blocks]
    lists,  # int32 [num_retrieval, tiles, list_length], the blocks that a tile reads come first
    counts,  # int32 [num_retrieval, tiles]
    out,  # float32 [num_retrieval, rows, DIM]
    lse,  # float32 [num_retrieval, rows]
    rows,
    first,
    sink_size,
    list_length,
    recent_size,
    table_stride,
    record_stride,
    scale,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K_DOT: tl.constexpr,
    V_DOT: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    V_NUMBER: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_M
    row = begin + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, HALF_PAD)
    keys = tl.arange(0, BLOCK_N)
    half: tl.constexpr = DIM // 2
    inside = (row < rows)[:, None] & (columns < half)[None, :]
    q_at = (head * rows + row)[:, None] * DIM + columns[None, :]
    q_low, q_high, q_sum = load_queries(q, q_at, inside, DIM)
    last_seen = (first + row // GROUP - recent_size)[:, None]
    choice = head * (rows // (TILE * GROUP)) + begin // (TILE * GROUP)
    pieces: tl.constexpr = BLOCK_SIZE // BLOCK_N

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc_low = tl.zeros([BLOCK_M, HALF_PAD], tl.float32)
    acc_high = tl.zeros([BLOCK_M, HALF_PAD], tl.float32)
    mask = (columns < half)[None, :] & (keys >= 0)[:, None]
    for at in range(0, tl.load(counts + choice) * pieces):
        block = tl.load(lists + choice * list_length + at // pieces)
        tokens = at % pieces * BLOCK_N + keys
        j = block * BLOCK_SIZE + tokens
        record = records + tl.load(table + head * table_stride + block) * record_stride
        scores = tile_scores(q_low, q_high, q_sum, record, tokens, columns, mask, KEY, DIM, K_DOT)
        visible = (j >= sink_size)[None, :] & (j[None, :] <= last_seen)
        scores = tl.where(visible, scores * scale, float("-inf"))
        top, total, weights, shrink = softmax_step(scores, top, total)
        acc_low, acc_high = add_values(
            weights, shrink, acc_low, acc_high, record, tokens, columns, mask, VALUE, DIM, V_DOT, V_NUMBER
        )

    row_at = head * rows + row
    store_rows(out, lse, row_at, columns, inside, row < rows, top, total, acc_low, acc_high, DIM)


def chosen_blocks_attention(cache: LayerCache, q: Tensor, chosen: Chosen) -> tuple[Tensor, Tensor]:
    """Attend from the queries of whole tiles to the blocks that were chosen for them.

    q: [len(chosen.tiles) · tile, num_heads, head_dim] from position chosen.first on. Returns as `blocks_attention`
    does: out float32 [num_retrieval, rows, head_dim] and lse float32 [num_retrieval, rows]; 0 and -inf for a query that
    sees nothing. A rotated value plane leaves the output rotated.
    """
    layout, dim, group = cache.layout, cache.head_dim, cache.query_group
    assert chosen.blocks is not None and q.shape[0] == len(chosen.tiles) * chosen.tile, (q.shape, chosen)
    rows = q.shape[0] * group
    interpreted = q.device.type == "cpu"
    k_dot, v_dot = (dot_dtype(plane, interpreted=interpreted) for plane in (layout.key, layout.value))
    block_m, block_n, num_warps, num_stages = fused_tiles(dim, chosen.tile * group, layout, k_dot, v_dot)
    while chosen.tile * group % block_m:  # a program's rows are of one tile
        block_m //= 2
    lists = chosen.blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32).contiguous()
    counts = chosen.blocks.sum(-1, dtype=torch.int32)
    out = torch.empty(cache.num_retrieval, rows, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(cache.num_retrieval, rows, dtype=torch.float32, device=q.device)
    chosen_blocks_attention_kernel[(rows // block_m, cache.num_retrieval)](
        fold_queries(cache, q, k_dot),
        cache.records,
        cache.table,
        lists,
        counts,
        out,
        lse,
        rows,
        chosen.first,
        cache.sink_size,
        lists.shape[2],
        cache.recent_size,
        cache.table.stride(0),
        cache.records.stride(0),
        dim**-0.5 * LOG2_E,
        TILE=chosen.tile,
        GROUP=group,
        DIM=dim,
        HALF_PAD=max(16, triton.next_power_of_2(dim // 2)),
        BLOCK_SIZE=layout.block_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        K_DOT=triton_dtype(k_dot),
        V_DOT=triton_dtype(v_dot),
        KEY=plane_constants(layout, "key"),
        VALUE=plane_constants(layout, "value"),
        V_NUMBER=number_dtype(layout.value),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out, lse


def sparse_blocks_attention(
    cache: LayerCache, q: Tensor, start: int, band_lse: Tensor, policy: SparsePrefill
) -> tuple[tuple[Tensor, Tensor] | None, Chosen]:
    """Attend from a chunk to the blocks that the policy chooses.

    q: [q_len, num_heads, head_dim] at positions start..; band_lse: float32 [q_len, num_heads] of their windows. Returns
    what `blocks_attention` does, and what was chosen.
    """
    end, group = start + q.shape[0], cache.query_group

    def estimate(tiles: range, num_blocks: int) -> tuple[Tensor, Tensor]:
        asked = slice(tiles.start * policy.tile + policy.stride // 2 - start, tiles.stop * policy.tile - start)
        rows = slice(asked.start, asked.stop, policy.stride)
        first = start + asked.start
        lse = block_scores(cache, q[rows].contiguous(), first=first, step=policy.stride, num_blocks=num_blocks)
        window = band_lse[rows].unflatten(1, (-1, group)).index_select(1, cache.retrieval_heads.long())
        return lse, window.permute(1, 2, 0)

    chosen = choose(
        policy,
        estimate,
        num_heads=cache.num_retrieval * group,
        start=start,
        end=end,
        sink_size=cache.sink_size,
        recent_size=cache.recent_size,
        block_size=cache.layout.block_size,
    )
    if chosen.blocks is None:
        return blocks_attention(cache, q, start), chosen
    outs, lses = [], []
    for begin, stop in chosen.pieces(start, end):
        part = q[begin - start : stop - start]
        found = (
            chosen_blocks_attention(cache, part, chosen)
            if begin == chosen.first
            else blocks_attention(cache, part, begin)
        )
        if found is None:
            rows = part.shape[0] * group
            found = (
                torch.zeros(cache.num_retrieval, rows, cache.head_dim, device=q.device),
                torch.full((cache.num_retrieval, rows), float("-inf"), device=q.device),
            )
        outs.append(found[0])
        lses.append(found[1])
    return (torch.cat(outs, dim=1), torch.cat(lses, dim=1)), chosen
