"""Products of a few rows of x with grouped weights: a tile of the weight is decoded and goes to the tensor cores."""

import triton
import triton.language as tl

from duolocal.kernels.gpu.dequantize import code_less, load_scale
from duolocal.kernels.gpu.linear_vector import choose, which_matrix
from duolocal.kernels.gpu.pointwise import silu


@triton.jit
def _decode_tile(
    codes,
    scales,
    offsets,
    row,
    run,
    num_runs,
    mask,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP_RUNS: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """Return two tiles [16 runs, rows] of `FLOAT`: the first and the next 16 features (of 8 bits, one tile twice)."""
    inside = (run < num_runs)[None, :, None]
    byte = tl.arange(0, 16)[None, None, :]
    at = (row * (num_runs * 16))[:, None, None] + (run * 16)[None, :, None] + byte
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    group = (row * (num_runs // GROUP_RUNS))[:, None, None] + (run // GROUP_RUNS)[None, :, None]
    scale, zero, minimum = load_scale(scales, offsets, group, inside, ZERO)
    low = tl.fma(code_less(code, mask, 0, BITS, zero), scale, minimum).to(FLOAT)
    high = low
    if BITS == 4:
        high = tl.fma(code_less(code, mask, 4, BITS, zero), scale, minimum).to(FLOAT)
    return _by_feature(low), _by_feature(high)


@triton.jit
def _by_feature(tile):
    """Return [16 runs, rows] in order of features from [rows, runs, 16] in order of bytes."""
    ROWS: tl.constexpr = tile.shape[0]
    RUNS: tl.constexpr = tile.shape[1]
    tile = tl.permute(tl.reshape(tile, [ROWS, RUNS, 4, 2, 2]), (0, 1, 3, 2, 4))  # 4m + 2a + b -> 8a + 2m + b
    return tl.trans(tl.reshape(tile, [ROWS, RUNS * 16]))


@triton.jit(do_not_specialize=["rows0", "rows1", "rows2", "num_tokens"])
def linear_rows_kernel(
    x,
    residual,
    codes0,
    codes1,
    codes2,
    scales0,
    scales1,
    scales2,
    offsets0,
    offsets1,
    offsets2,
    bias0,
    bias1,
    bias2,
    out0,
    out1,
    out2,
    rows0,
    rows1,
    rows2,
    num_tokens,
    num_runs,
    mask,
    COUNT: tl.constexpr,
    GATED: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP_RUNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUNS: tl.constexpr,
):
    """All tokens times BLOCK_N outputs of one of COUNT matrices or, GATED, of the product of two."""
    which, block = which_matrix(tl.program_id(0), rows0, rows1, BLOCK_N, COUNT)
    rows = choose(which, rows0, rows1, rows2, COUNT)
    codes = choose(which, codes0, codes1, codes2, COUNT)
    scales = choose(which, scales0, scales1, scales2, COUNT)
    offsets = offsets0
    if offsets0 is not None:
        offsets = choose(which, offsets0, offsets1, offsets2, COUNT)
    FLOAT: tl.constexpr = x.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if tl.float32 == FLOAT else "tf32"
    FEATURES: tl.constexpr = 128 // BITS
    index = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(index, rows - 1).to(tl.int64)
    token = tl.arange(0, BLOCK_M)
    x_row = token.to(tl.int64)[:, None] * (num_runs * FEATURES)
    byte = tl.arange(0, RUNS * 16)
    feature = byte // 16 * FEATURES + byte % 16
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, num_runs, RUNS):
        run = first + tl.arange(0, RUNS)
        x_at = x + x_row + (first * FEATURES + feature)[None, :]
        inside = (token < num_tokens)[:, None] & (first + byte // 16 < num_runs)[None, :]
        x_low = tl.load(x_at, mask=inside, other=0.0)
        low, high = _decode_tile(codes, scales, offsets, row, run, num_runs, mask, BITS, ZERO, GROUP_RUNS, FLOAT)
        total = tl.dot(x_low, low, total, input_precision=PRECISION)
        x_high = x_low
        if BITS == 4:
            x_high = tl.load(x_at + 16, mask=inside, other=0.0)
            total = tl.dot(x_high, high, total, input_precision=PRECISION)
        if GATED:
            low, high = _decode_tile(codes1, scales1, offsets1, row, run, num_runs, mask, BITS, ZERO, GROUP_RUNS, FLOAT)
            total_up = tl.dot(x_low, low, total_up, input_precision=PRECISION)
            if BITS == 4:
                total_up = tl.dot(x_high, high, total_up, input_precision=PRECISION)
    if bias0 is not None:
        bias = choose(which, bias0, bias1, bias2, COUNT)
        total += tl.load(bias + index, mask=index < rows, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if bias1 is not None:
            total_up += tl.load(bias1 + index, mask=index < rows, other=0.0).to(tl.float32)[None, :]
        total = silu(total) * total_up
    inside = (token < num_tokens)[:, None] & (index < rows)[None, :]
    at = token.to(tl.int64)[:, None] * rows + index[None, :]
    if residual is not None:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    out = choose(which, out0, out1, out2, COUNT)
    tl.store(out + at, total, mask=inside)
