"""Blocks by a fused kernel: attention that reads the quantized blocks as they are.

It serves short chunks, where decoding would not be repaid, and every format and dtype that the library does not take.
The keys of few rows are cut into splits, so that a short chunk also fills the GPU; their results are joined by
log-sum-exp. head_dim is read in two halves, which is how INT4 codes lie.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from duolocal.kernels.blocks import BlockLayout, Plane
from duolocal.kernels.gpu.block_tile import add_values, load_queries, softmax_step, store_rows, tile_scores
from duolocal.kernels.gpu.layer_cache import LayerCache
from duolocal.kernels.gpu.library_attention import fold_queries, number_dtype, triton_dtype
from duolocal.kernels.gpu.planes import plane_constants

FUSED_ROWS = 64  # rows of a tile; half of them beyond head_dim 128 and for 32-bit planes
FUSED_KEYS = 64
SPLIT_PROGRAMS = 256  # programs that fill a GPU
SPLIT_KEYS = 512  # the least keys that are worth a split
MAX_SPLITS = 32
LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["rows", "start", "sink_size", "tiles_per_split"])
def fused_blocks_attention_kernel(
    q,  # [num_retrieval, rows, DIM], rotated where the keys are, in K_DOT
    records,  # uint8 [num_records, record_bytes]
    table,  # int64 [num_retrieval, max_blocks]
    out,  # float32 [splits, num_retrieval, rows, DIM]
    lse,  # float32 [splits, num_retrieval, rows]
    rows,
    start,
    sink_size,
    recent_size,
    tiles_per_split,
    table_stride,
    record_stride,
    scale,
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
    split = tl.program_id(2)
    begin = tl.program_id(0) * BLOCK_M
    row = begin + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, HALF_PAD)
    keys = tl.arange(0, BLOCK_N)
    half: tl.constexpr = DIM // 2
    inside = (row < rows)[:, None] & (columns < half)[None, :]
    q_at = (head * rows + row)[:, None] * DIM + columns[None, :]
    q_low, q_high, q_sum = load_queries(q, q_at, inside, DIM)
    last_seen = (start + row // GROUP - recent_size)[:, None]
    # Whole blocks before the first key that the tile's last query does not see are full.
    seen_end = start + tl.minimum(rows - 1, begin + BLOCK_M - 1) // GROUP - recent_size + 1
    first_tile = sink_size // BLOCK_N + split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(tl.maximum(seen_end, 0), BLOCK_N))

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc_low = tl.zeros([BLOCK_M, HALF_PAD], tl.float32)
    acc_high = tl.zeros([BLOCK_M, HALF_PAD], tl.float32)
    mask = (columns < half)[None, :] & (keys >= 0)[:, None]
    for tile in range(first_tile, end_tile):
        first = tile * BLOCK_N
        j = first + keys
        tokens = first % BLOCK_SIZE + keys
        record = records + tl.load(table + head * table_stride + first // BLOCK_SIZE) * record_stride
        scores = tile_scores(q_low, q_high, q_sum, record, tokens, columns, mask, KEY, DIM, K_DOT)
        visible = (j >= sink_size)[None, :] & (j[None, :] <= last_seen)
        scores = tl.where(visible, scores * scale, float("-inf"))
        top, total, weights, shrink = softmax_step(scores, top, total)
        acc_low, acc_high = add_values(
            weights, shrink, acc_low, acc_high, record, tokens, columns, mask, VALUE, DIM, V_DOT, V_NUMBER
        )

    row_at = (split * tl.num_programs(1) + head) * rows + row
    store_rows(out, lse, row_at, columns, inside, row < rows, top, total, acc_low, acc_high, DIM)


def fused_blocks_attention(cache: LayerCache, q: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Attend from a chunk's queries to the blocks of the retrieval heads.

    q: [q_len, num_heads, head_dim] at positions start.. . Returns out float32 [num_retrieval, q_len · group, head_dim],
    a token's query heads side by side, and lse float32 [num_retrieval, q_len · group]; 0 and -inf for a query that
    sees nothing. A rotated value plane leaves the output rotated.

    Memory beside the result, in bytes: (2 + 4 · splits) · num_retrieval · q_len · group · head_dim, where splits · rows
    is at most about SPLIT_PROGRAMS · FUSED_ROWS when there is more than one split.
    """
    layout, dim, group = cache.layout, cache.head_dim, cache.query_group
    rows = q.shape[0] * group
    interpreted = q.device.type == "cpu"
    k_dot, v_dot = (dot_dtype(plane, interpreted=interpreted) for plane in (layout.key, layout.value))
    queries = fold_queries(cache, q, k_dot)
    block_m, block_n, num_warps, num_stages = fused_tiles(dim, rows, layout, k_dot, v_dot)
    row_tiles = triton.cdiv(rows, block_m)
    seen_end = start + q.shape[0] - cache.recent_size
    tiles = max(1, triton.cdiv(seen_end, block_n) - cache.sink_size // block_n)
    wanted = min(SPLIT_PROGRAMS // (row_tiles * cache.num_retrieval), tiles * block_n // SPLIT_KEYS, MAX_SPLITS)
    tiles_per_split = triton.cdiv(tiles, max(1, wanted))
    splits = triton.cdiv(tiles, tiles_per_split)
    out = torch.empty(splits, cache.num_retrieval, rows, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(splits, cache.num_retrieval, rows, dtype=torch.float32, device=q.device)
    fused_blocks_attention_kernel[(row_tiles, cache.num_retrieval, splits)](
        queries,
        cache.records,
        cache.table,
        out,
        lse,
        rows,
        start,
        cache.sink_size,
        cache.recent_size,
        tiles_per_split,
        cache.table.stride(0),
        cache.records.stride(0),
        dim**-0.5 * LOG2_E,
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
    return _join(out, lse)


def fused_tiles(
    head_dim: int, rows: int, layout: BlockLayout, k_dot: torch.dtype, v_dot: torch.dtype
) -> tuple[int, int, int, int]:
    """Return rows and keys of a tile, warps and pipeline stages."""
    rows = max(16, min(FUSED_ROWS, triton.next_power_of_2(rows)))  # 16: what a tensor core takes
    if torch.float32 in (k_dot, v_dot):  # no tensor cores, twice the memory
        return min(rows, 16 if head_dim > 128 else 32), min(layout.block_size, 16), 4, 2
    # What is decoded stands in registers beside the sums.
    quantized = layout.key.kind != "float" or layout.value.kind != "float"
    keys = FUSED_KEYS if head_dim <= (64 if quantized else 128) else FUSED_KEYS // 2
    return rows, min(layout.block_size, keys), 4 if head_dim <= 128 else 8, 2


def _join(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join the softmaxes of splits [splits, ...]."""
    if out.shape[0] == 1:
        return out[0], lse[0]
    joined = torch.logsumexp(lse, dim=0)
    weights = (lse - joined.clamp_min(-1e30)).exp_()  # 0 where no split saw anything
    return out.mul_(weights[..., None]).sum(dim=0), joined


def dot_dtype(plane: Plane, *, interpreted: bool) -> torch.dtype:
    """Return the dtype that a plane's dots run in; the interpreter has no bfloat16 dots."""
    dtype = plane.dtype or torch.float16
    return torch.float32 if interpreted and dtype == torch.bfloat16 else dtype
