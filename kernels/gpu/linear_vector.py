"""Products of one row of x with grouped weights: codes go straight into float32 sums, RMSNorm of x comes along.

A sum over one row takes no conversion and no subtraction per weight. A 4-bit code c, put into the mantissa, is the
float32 1 + c/16 (or 1 + c/256 four bits lower, so that one shift serves both nibbles of a byte); the sum starts at
minus the sum of x, and what is left is the sum of x c / 16. The rounding of that start is 2^-16 (for 1 + c/256) of the
sum of |x| of sixteen features at the worst: far below what a 16-bit x holds.
"""

import triton
import triton.language as tl

from duolocal.kernels.gpu.dequantize import code_float, code_less, load, load_scale
from duolocal.kernels.gpu.pointwise import silu


@triton.jit
def _float_pair(x, at, mask):
    """Return x[2 at] and x[2 at + 1] as float32; of 16-bit numbers a pair is one 32-bit load."""
    FLOAT: tl.constexpr = x.dtype.element_ty
    if FLOAT.primitive_bitwidth == 16:
        pair = load(x.to(tl.pointer_type(tl.int32)) + at, mask)
        if tl.bfloat16 == FLOAT:
            return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
        else:
            low = pair.to(tl.int16).to(FLOAT, bitcast=True).to(tl.float32)
            return low, (pair >> 16).to(tl.int16).to(FLOAT, bitcast=True).to(tl.float32)
    else:
        first = load(x + 2 * at, mask).to(tl.float32)
        return first, load(x + 2 * at + 1, mask).to(tl.float32)


@triton.jit
def _load_x(x, norm, squares, at, mask):
    """Return the four features 2 at, 2 at + 1, 2 at + 8, 2 at + 9, times norm's weight, and squares plus theirs."""
    a, b = _float_pair(x, at, mask)
    c, d = _float_pair(x, at + 4, mask)
    if norm is not None:
        squares = tl.fma(a, a, tl.fma(b, b, tl.fma(c, c, tl.fma(d, d, squares))))
        na, nb = _float_pair(norm, at, mask)
        nc, nd = _float_pair(norm, at + 4, mask)
        a, b, c, d = a * na, b * nb, c * nc, d * nd
    return (a, b, c, d), squares


@triton.jit
def _sum_nibbles(words, low, high, low_start, high_start, mask):
    """Return low_start + the sum of low (1 + c / 256) over the low nibbles c of each word, and high's (1 + c / 16)."""
    a, b, c, d = low
    e, f, g, h = high
    # Nibble by nibble of a byte: what is shifted serves both, and need not be kept.
    low_sum = tl.fma(code_float(words, mask, 0, 15), a, low_start)
    high_sum = tl.fma(code_float(words, mask << 4, 4, 19), e, high_start)
    low_sum = tl.fma(code_float(words, mask, 8, 15), b, low_sum)
    high_sum = tl.fma(code_float(words, mask << 4, 12, 19), f, high_sum)
    low_sum = tl.fma(code_float(words, mask, 16, 15), c, low_sum)
    high_sum = tl.fma(code_float(words, mask << 4, 20, 19), g, high_sum)
    low_sum = tl.fma(code_float(words, mask, 24, 15), d, low_sum)
    high_sum = tl.fma(code_float(words, mask << 4, 28, 19), h, high_sum)
    return tl.sum(low_sum, axis=1), tl.sum(high_sum, axis=1)


@triton.jit
def _sum_bytes(words, x, mask, ZERO: tl.constexpr):
    """Return the sum of x times (c - ZERO) over the four codes of each word."""
    a, b, c, d = x
    total = code_less(words, mask, 0, 8, ZERO) * a
    total = tl.fma(code_less(words, mask, 8, 8, ZERO), b, total)
    total = tl.fma(code_less(words, mask, 16, 8, ZERO), c, total)
    return tl.fma(code_less(words, mask, 24, 8, ZERO), d, total)


@triton.jit
def _total(x):
    a, b, c, d = x
    return (a + b) + (c + d)


@triton.jit
def _row_part(
    codes,
    scales,
    offsets,
    row,
    run,
    num_runs,
    low,
    high,
    mask,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP_RUNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Return the products of x with 16 bytes of codes each, [runs], of one row; x is in tiles [runs, 4]."""
    inside = None if EVEN else run < num_runs
    codes = codes.to(tl.pointer_type(tl.int32)) + row * (num_runs * 4)
    words = load(codes + run[:, None] * 4 + tl.arange(0, 4)[None, :], None if EVEN else inside[:, None])  # type: ignore[index]
    group = row * (num_runs // GROUP_RUNS) + run // GROUP_RUNS
    scale, zero, minimum = load_scale(scales, offsets, group, inside, ZERO)
    if BITS == 4:
        low_sum, high_sum = _total(low), _total(high)
        low_part, high_part = _sum_nibbles(words, low, high, -low_sum, -high_sum, mask)
        x_sum = tl.sum(low_sum + high_sum, axis=1)
        return scale * (256.0 * low_part + 16.0 * high_part - zero * x_sum) + minimum * x_sum
    else:
        return scale * tl.sum(_sum_bytes(words, low, mask, ZERO), axis=1)


@triton.jit
def _rows_part(
    codes,
    scales,
    offsets,
    index,
    rows,
    run,
    num_runs,
    low,
    high,
    mask,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP_RUNS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return `_row_part` of BLOCK_N rows from `index` on as [runs, BLOCK_N].

    Row by row, and not as one tile with a dimension of rows: which dimension goes over the lanes is then no choice
    of the compiler's (triton 3.6 and 3.9 differ), and so few words are held at a time that nothing spills.
    """
    tl.static_assert(BLOCK_N == 1 or BLOCK_N == 2 or BLOCK_N == 4)
    last = rows - 1  # what would be beyond is this row again, and is not stored
    row = tl.minimum(index, last).to(tl.int64)
    a = _row_part(codes, scales, offsets, row, run, num_runs, low, high, mask, BITS, ZERO, GROUP_RUNS, EVEN)
    if BLOCK_N == 1:
        return a[:, None]
    else:
        row = tl.minimum(index + 1, last).to(tl.int64)
        b = _row_part(codes, scales, offsets, row, run, num_runs, low, high, mask, BITS, ZERO, GROUP_RUNS, EVEN)
        if BLOCK_N == 2:
            return tl.join(a, b)
        else:
            row = tl.minimum(index + 2, last).to(tl.int64)
            c = _row_part(codes, scales, offsets, row, run, num_runs, low, high, mask, BITS, ZERO, GROUP_RUNS, EVEN)
            row = tl.minimum(index + 3, last).to(tl.int64)
            d = _row_part(codes, scales, offsets, row, run, num_runs, low, high, mask, BITS, ZERO, GROUP_RUNS, EVEN)
            return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [run.shape[0], 4])


@triton.jit
def choose(which, a, b, c, COUNT: tl.constexpr):
    """Return the one of up to three pointers or numbers that a program works on."""
    chosen = a
    if COUNT > 1:  # noqa: SIM102 - known when compiling: not to be merged with what is not
        if which == 1:
            chosen = b
    if COUNT > 2:  # noqa: SIM102
        if which == 2:
            chosen = c
    return chosen


@triton.jit
def which_matrix(block, rows0, rows1, BLOCK_N: tl.constexpr, COUNT: tl.constexpr):
    """Return which matrix a program works on, and its block within that matrix."""
    which = 0
    if COUNT > 1:
        blocks0 = tl.cdiv(rows0, BLOCK_N)
        beyond0 = (block >= blocks0).to(tl.int32)
        beyond1 = beyond0 * 0
        if COUNT > 2:
            blocks1 = tl.cdiv(rows1, BLOCK_N)
            beyond1 = (block >= blocks0 + blocks1).to(tl.int32)
            block -= beyond1 * blocks1
        block -= beyond0 * blocks0
        which = beyond0 + beyond1
    return which, block


@triton.jit(do_not_specialize=["rows0", "rows1", "rows2"])
def linear_vector_kernel(
    x,
    norm,
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
    num_runs,
    eps,
    mask,
    COUNT: tl.constexpr,
    GATED: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP_RUNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Twice BLOCK_N outputs of one of COUNT matrices or, GATED, BLOCK_N from two; the warps share the features."""
    BLOCK: tl.constexpr = BLOCK_N if GATED else 2 * BLOCK_N
    which, block = which_matrix(tl.program_id(0), rows0, rows1, BLOCK, COUNT)
    rows = choose(which, rows0, rows1, rows2, COUNT)
    codes = choose(which, codes0, codes1, codes2, COUNT)
    scales = choose(which, scales0, scales1, scales2, COUNT)
    offsets = offsets0
    if offsets0 is not None:
        offsets = choose(which, offsets0, offsets1, offsets2, COUNT)
    codes_b = codes1 if GATED else codes
    scales_b = scales1 if GATED else scales
    offsets_b = offsets1 if GATED else offsets
    start = block * BLOCK
    start_b = start if GATED else start + BLOCK_N
    total = tl.zeros((RUNS, BLOCK_N), tl.float32)
    total_b = tl.zeros((RUNS, BLOCK_N), tl.float32)
    squares = tl.zeros((RUNS, 4), tl.float32)
    for first in range(0, num_runs, RUNS):
        run = first + tl.arange(0, RUNS)
        at = run[:, None] * (64 // BITS) + tl.arange(0, 4)[None, :]
        inside = None if EVEN else (run < num_runs)[:, None]
        low, squares = _load_x(x, norm, squares, at, inside)
        high = low
        if BITS == 4:
            high, squares = _load_x(x, norm, squares, at + 8, inside)
        total += _rows_part(
            codes, scales, offsets, start, rows, run, num_runs, low, high, mask, BITS, ZERO, GROUP_RUNS, EVEN, BLOCK_N
        )
        total_b += _rows_part(
            codes_b,
            scales_b,
            offsets_b,
            start_b,
            rows,
            run,
            num_runs,
            low,
            high,
            mask,
            BITS,
            ZERO,
            GROUP_RUNS,
            EVEN,
            BLOCK_N,
        )
    y = tl.sum(total, axis=0)
    y_b = tl.sum(total_b, axis=0)
    index = start + tl.arange(0, BLOCK_N)
    index_b = start_b + tl.arange(0, BLOCK_N)
    if norm is not None:
        mean = tl.sum(tl.sum(squares, axis=1), axis=0) / (num_runs * (128 // BITS))
        y *= tl.rsqrt(mean + eps)
        y_b *= tl.rsqrt(mean + eps)
    if bias0 is not None:
        bias = choose(which, bias0, bias1, bias2, COUNT)
        y += tl.load(bias + index, mask=index < rows, other=0.0).to(tl.float32)
        bias_b = bias1 if GATED else bias
        y_b += tl.load(bias_b + index_b, mask=index_b < rows, other=0.0).to(tl.float32)
    out = choose(which, out0, out1, out2, COUNT)
    if GATED:
        tl.store(out + index, silu(y) * y_b, mask=index < rows)
    else:
        if residual is not None:
            y += tl.load(residual + index, mask=index < rows, other=0.0).to(tl.float32)
            y_b += tl.load(residual + index_b, mask=index_b < rows, other=0.0).to(tl.float32)
        tl.store(out + index, y, mask=index < rows)
        tl.store(out + index_b, y_b, mask=index_b < rows)
