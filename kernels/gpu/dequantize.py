"""Decoding of grouped weights: what the kernels of `linear.py` share, and a whole matrix at once.

Layout and meaning of the planes: `GroupedMatrix`. Every decoded value is the float32 one, rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from duolocal.kernels.matrix import GroupedMatrix

# Of `dequantize_kernel`: rows and 16-byte runs of codes per program of four warps.
_ROWS = 2
_RUNS = 64


def run_features(bits: int) -> int:
    """Return how many input features 16 bytes of codes hold."""
    return 128 // bits


def code_mask(bits: int) -> int:
    """Return what kernels take as `mask`: where a code stands when `code_float` has shifted it.

    An argument and no constant: ptxas builds a constant operand anew before nearly every use, which was a third of
    all instructions of a product.
    """
    return 15 << 15 if bits == 4 else 255


@triton.jit
def load(pointer, mask):
    """Load with zero where the mask is false; a mask of None is no mask."""
    if mask is None:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=mask, other=0)


@triton.jit
def code_float(word, mask, BIT: tl.constexpr, TO: tl.constexpr):
    """Return 1 + c * 2^(TO - 23) as float32 for the 4-bit code c at bit `BIT` of each int32; `mask` is 15 << TO.

    The code becomes a part of a mantissa: a conversion instruction has a quarter of the throughput.
    """
    if BIT <= TO:
        word = word << (TO - BIT)
    else:
        word = word >> (BIT - TO)
    return ((word & mask) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def code_less(word, mask, BIT: tl.constexpr, BITS: tl.constexpr, zero):
    """Return c - zero, exactly, for the code c at bit `BIT` of each int32; `zero` is a whole float32 or a number."""
    if BITS == 4:
        return tl.fma(code_float(word, mask << 4, BIT, 19), 16.0, -16.0 - zero)
    return (((word >> BIT) & mask) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)


@triton.jit
def load_scale(scales, offsets, group, mask, ZERO: tl.constexpr):
    """Return scale, zero and minimum of each group: two of them tiles of float32 or, where constant, numbers."""
    scale = load(scales + group, mask).to(tl.float32)
    if offsets is None:
        return scale, 1.0 * ZERO, 0.0
    else:
        offset = load(offsets + group, mask)
        if offsets.dtype.element_ty == tl.uint8:
            return scale, (offset.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0, 0.0
        else:
            return scale, 0.0, offset.to(tl.float32)


@triton.jit
def dequantize_kernel(
    codes,
    scales,
    offsets,
    out,
    rows,
    num_runs,
    mask,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP_RUNS: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    run = (tl.program_id(1) * RUNS + tl.arange(0, RUNS))[None, :, None]
    column = tl.arange(0, 4)[None, None, :]
    inside = (row < rows) & (run < num_runs)
    word = tl.load(codes.to(tl.pointer_type(tl.int32)) + row * (num_runs * 4) + run * 4 + column, mask=inside, other=0)
    group = row * (num_runs // GROUP_RUNS) + run // GROUP_RUNS
    scale, zero, minimum = load_scale(scales, offsets, group, inside, ZERO)
    PAIRS: tl.constexpr = 64 // BITS  # of a run
    pair_out = row * (num_runs * PAIRS) + run * PAIRS + column
    for quarter in tl.static_range(PAIRS // 4):
        # Bytes 0 and 1 of a word hold a pair of the first eight features, bytes 2 and 3 of the next eight.
        first = tl.fma(code_less(word, mask, quarter % 2 * 16 + quarter // 2 * 4, BITS, zero), scale, minimum)
        second = tl.fma(code_less(word, mask, quarter % 2 * 16 + quarter // 2 * 4 + 8, BITS, zero), scale, minimum)
        _store_pair(out, pair_out + quarter * 4, first, second, inside)


@triton.jit
def _store_pair(out, at, first, second, mask):
    """Store to out[2 at] and out[2 at + 1]; 16-bit numbers as one 32-bit word, four of them in a row 16 bytes."""
    FLOAT: tl.constexpr = out.dtype.element_ty
    if FLOAT.primitive_bitwidth == 16:
        low = first.to(FLOAT).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = second.to(FLOAT).to(tl.uint16, bitcast=True).to(tl.uint32)
        tl.store(out.to(tl.pointer_type(tl.uint32)) + at, low | (high << 16), mask=mask)
    else:
        tl.store(out + 2 * at, first, mask=mask)
        tl.store(out + 2 * at + 1, second, mask=mask)


def dequantize(matrix: GroupedMatrix, dtype: torch.dtype, *, start: int = 0, stop: int | None = None) -> Tensor:
    """Return rows start … stop - 1 (all by default) as [stop - start, in_features] in `dtype`, 16 or 32 bits wide."""
    stop = matrix.out_features if stop is None else stop
    rows, bits = stop - start, matrix.bits
    assert 0 <= start <= stop <= matrix.out_features
    assert dtype in (torch.bfloat16, torch.float16, torch.float32)
    out = torch.empty((rows, matrix.in_features), dtype=dtype, device=matrix.codes.device)
    num_runs = matrix.in_features // run_features(bits)
    if rows == 0:
        return out
    offsets = matrix.offsets
    dequantize_kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(num_runs, _RUNS))](
        matrix.codes[start:stop],
        matrix.scales[start:stop],
        None if offsets is None else offsets[start:stop],
        out,
        rows,
        num_runs,
        code_mask(bits),
        BITS=bits,
        ZERO=matrix.zero,
        GROUP_RUNS=matrix.group_size // run_features(bits),
        ROWS=_ROWS,
        RUNS=_RUNS,
        num_warps=4,
    )
    return out
