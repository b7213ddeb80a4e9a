"""Joining the partial results of a decode step: one program per query head."""

import triton
import triton.language as tl

from duolocal.kernels.gpu.decode_blocks import LOWEST
from duolocal.kernels.gpu.planes import hadamard_tile


@triton.jit
def merge_splits_kernel(
    partial_out,  # float32 [num_kv_heads, splits, GROUP, DIM]
    partial_lse,  # float32 [num_kv_heads, splits, GROUP], base 2
    rows,  # int32 [num_kv_heads], -1 for a streaming head
    out,  # [num_heads, DIM] compute dtype
    splits,
    WINDOW_SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    ROTATED: tl.constexpr,
    FACTOR: tl.constexpr,  # of the Hadamard transform
):
    query_head = tl.program_id(0)
    head = query_head // GROUP
    member = query_head % GROUP
    first = head.to(tl.int64) * splits
    # A streaming head has nothing but its window; its other places were never written.
    end = tl.where(tl.load(rows + head) >= 0, splits, WINDOW_SPLITS)
    lse_at = partial_lse + first * GROUP + member
    out_at = partial_out + (first * GROUP + member) * DIM
    # DIM_PAD dimensions as rows of 16: the transform's two factors are small.
    dims = tl.arange(0, DIM_PAD)
    window_top, window_total, window_out = _join(out_at, lse_at, 0, WINDOW_SPLITS, dims, GROUP, DIM, DIM_PAD, TILE)
    top, total, blocks_out = _join(out_at, lse_at, WINDOW_SPLITS, end, dims, GROUP, DIM, DIM_PAD, TILE)
    if ROTATED:
        x = tl.reshape(blocks_out, (DIM_PAD // 16, 16))
        i = tl.arange(0, DIM_PAD // 16) * 16
        j = tl.arange(0, 16)
        size: tl.constexpr = DIM & -DIM
        x = tl.sum(hadamard_tile(i[:, None], i[None, :], size)[:, :, None] * x[None, :, :], 1)
        x = tl.sum(x[:, :, None] * hadamard_tile(j[:, None], j[None, :], 16)[None, :, :], 1)
        blocks_out = tl.reshape(x, (DIM_PAD,)) * FACTOR
    highest = tl.maximum(window_top, top)
    window_weight = tl.exp2(window_top - highest)
    weight = tl.exp2(top - highest)
    x = (window_out * window_weight + blocks_out * weight) / (window_total * window_weight + total * weight)
    tl.store(out + query_head * DIM + dims, x.to(out.dtype.element_ty), mask=dims < DIM)


@triton.jit
def _join(
    out_at,
    lse_at,
    begin,
    end,
    dims,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Join partial results: return the largest lse, the sum of 2^(lse - largest), and of the outputs weighted alike."""
    offsets = tl.arange(0, TILE)
    highest = tl.full([TILE], LOWEST, tl.float32)
    for at in range(begin, end, TILE):
        lse = tl.load(lse_at + (at + offsets) * GROUP, mask=at + offsets < end, other=float("-inf"))
        highest = tl.maximum(highest, lse)
    top = tl.max(highest, 0)
    total = tl.zeros([TILE], tl.float32)
    x = tl.zeros([TILE, DIM_PAD], tl.float32)
    for at in range(begin, end, TILE):
        inside = at + offsets < end
        weight = tl.exp2(tl.load(lse_at + (at + offsets) * GROUP, mask=inside, other=float("-inf")) - top)
        # An empty range wrote no output.
        read = (weight > 0.0)[:, None] & (dims[None, :] < DIM)
        part = tl.load(out_at + (at + offsets)[:, None] * (GROUP * DIM) + dims[None, :], mask=read, other=0.0)
        total += weight
        x += part * weight[:, None]
    return top, tl.sum(total, 0), tl.sum(x, 0)
