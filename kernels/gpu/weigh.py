"""The keys of candidates, before a list is made of them: what each query head's attention to each of them is.

Candidates are blocks that `select.py` has found by their digests. One program per candidate and row reads its keys as
the record has them, wherever the table says that it lies, and leaves the log-sum-exp of each query head's scores: the
shares of attention among all candidates come of those.
"""

import triton
import triton.language as tl
from torch import Tensor

from duolocal.kernels.gpu.block_tile import load_queries, softmax_step, tile_scores
from duolocal.kernels.gpu.digest import now_and_blocks
from duolocal.kernels.gpu.fused_attention import LOG2_E
from duolocal.kernels.gpu.layer_cache import LayerCache
from duolocal.kernels.gpu.planes import F32, plane_constants

# To be swept on a GPU.
TILE_TOKENS = 64  # of a block, looked at together; fewer in float32, which has no tensor core
WARPS = 4


@triton.jit(do_not_specialize=["reuse"])
def weigh_blocks_kernel(
    q,  # [num_heads, DIM], rotated where the keys are, in the type of the product with them
    records,  # uint8 [num_records, RECORD_BYTES]
    table,  # int64 [num_retrieval, max_blocks]
    retrieval_heads,  # int32 [num_retrieval]
    candidates,  # int32 [num_retrieval, NUM_CANDIDATES]
    made_at,  # int64 [num_retrieval]
    start,  # int64 [1]
    weights,  # float32 [num_retrieval, GROUP, NUM_CANDIDATES], log-sum-exp of base 2
    table_stride,
    reuse,
    scale,  # of the scores, log2(e) included
    BUDGET: tl.constexpr,
    NUM_CANDIDATES: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
    TILE: tl.constexpr,  # tokens
    KEY: tl.constexpr,
):
    row = tl.program_id(1)
    entry = tl.program_id(0)
    now, first, newest = now_and_blocks(tl.load(start), reuse, SINK, RECENT, BLOCK_SIZE)
    count = newest - first
    if (count > BUDGET) & (entry < count) & (tl.load(made_at + row) != now):
        block = tl.load(candidates + row * NUM_CANDIDATES + entry)
        record = records + tl.load(table + row.to(tl.int64) * table_stride + block) * RECORD_BYTES
        half: tl.constexpr = DIM // 2
        dot: tl.constexpr = q.dtype.element_ty
        members = tl.arange(0, GROUP_PAD)
        columns = tl.arange(0, HALF_PAD)
        inside = (members < GROUP)[:, None] & (columns < half)[None, :]
        q_at = (tl.load(retrieval_heads + row) * GROUP + members)[:, None] * DIM + columns[None, :]
        q_low, q_high, q_sum = load_queries(q, q_at, inside, DIM)
        top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PAD], tl.float32)
        for at in range(0, BLOCK_SIZE, TILE):
            tokens = at + tl.arange(0, TILE)
            mask = (columns < half)[None, :] & (tokens >= 0)[:, None]
            scores = tile_scores(q_low, q_high, q_sum, record, tokens, columns, mask, KEY, DIM, dot)
            # Sinks are read from the ring. The first block has tokens behind them, but a tile of it may not.
            visible = (block * BLOCK_SIZE + tokens >= SINK)[None, :]
            scores = tl.where(visible, scores * scale, float("-inf"))
            top, total, _, _ = softmax_step(scores, top, total)
        out = weights + (row * GROUP + members) * NUM_CANDIDATES + entry
        tl.store(out, top + tl.log2(total), mask=members < GROUP)


def weigh_candidates(cache: LayerCache, q_blocks: Tensor) -> None:
    """Fill `weights` of the cache's selection for its candidates, where a list is due and chosen among them.

    q_blocks: [num_heads, head_dim] from `append_token`.
    """
    selection, layout, dim = cache.selection, cache.layout, cache.head_dim
    assert selection is not None
    assert q_blocks.shape == (cache.num_heads, dim) and q_blocks.is_contiguous(), q_blocks.shape
    assert cache.records.is_contiguous() and cache.table.stride(1) == 1 and cache.query_group <= 16
    key = plane_constants(layout, "key")
    tile = TILE_TOKENS // 4 if key.kind == F32.value else TILE_TOKENS
    weigh_blocks_kernel[(selection.num_candidates, cache.num_retrieval)](
        q_blocks,
        cache.records,
        cache.table,
        cache.retrieval_heads,
        selection.candidates,
        selection.made_at,
        cache.start,
        selection.weights,
        cache.table.stride(0),
        selection.reuse,
        dim**-0.5 * LOG2_E,
        BUDGET=selection.budget,
        NUM_CANDIDATES=selection.num_candidates,
        SINK=cache.sink_size,
        RECENT=cache.recent_size,
        GROUP=cache.query_group,
        GROUP_PAD=16,  # the least that tensor cores take
        DIM=dim,
        HALF_PAD=max(16, triton.next_power_of_2(dim // 2)),
        BLOCK_SIZE=layout.block_size,
        RECORD_BYTES=layout.record_bytes,
        TILE=min(tile, layout.block_size),
        KEY=key,
        num_warps=WARPS,
    )
