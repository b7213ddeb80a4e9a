"""The planes of a block record inside a kernel: codes as numbers for `tl.dot`, and numbers as codes.

A kernel sees x[t, d] = factor[t] · number[t, d] + addend[t]. Integer and FP8 numbers are exact in float16:

- int4: 64 + c = 0x5400 | c << 4, no conversion instruction; factor scale, addend minimum - 64 · scale
- int8: (0x6400 | c) - 1024 = c; factor scale, addend minimum
- fp8: the seven bits after the sign, shifted into place, are the number times 2^-8; factor 256 · scale, addend 0
- float: itself; factor 1, addend 0

Codes are loaded in units of one byte, or of two ("words"). A unit holds several codes, each at a bit position SHIFT:

    unit    int4: shift -> dimension of column c               int8, fp8
    byte    0 -> c, 4 -> D/2 + c                               0 -> c
    word    0 -> 2c, 8 -> 2c + 1, 4 -> D/2 + 2c, 12 -> D/2 + 2c + 1    0 -> 2c, 8 -> 2c + 1

Words suit a dot operand: 16-bit elements come from shared memory by ldmatrix, transposed if need be, and two of them
are decoded at a time in one register (`word_numbers`); bytes cannot.

Encoding gives the bytes of `encode_blocks` (float32 input, on the CPU). Only a rotation sums in another order, so a
rotated plane may differ by one code here and there. Tiles to encode come as two halves of head_dim, [tokens, HALF_PAD].
"""

import math
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

from duolocal.kernels.blocks import FP8_MAX, BlockLayout

F32 = tl.constexpr(0)
F16 = tl.constexpr(1)
BF16 = tl.constexpr(2)
FP8 = tl.constexpr(3)
INT8 = tl.constexpr(4)
INT4 = tl.constexpr(5)

_FP8_MAX = tl.constexpr(FP8_MAX)
_HALF_MAX = tl.constexpr(65504.0)
_BFLOAT16_MAX = tl.constexpr(torch.finfo(torch.bfloat16).max)


class PlaneConstants(NamedTuple):
    """Where a plane is in a record; offsets in bytes. Kernels take it as one constexpr, KEY or VALUE or PLANE."""

    kind: int  # one of F32, F16, BF16, FP8, INT8, INT4
    codes_at: int
    scales_at: int
    minima_at: int
    token_bytes: int  # of one token's codes
    rotate: bool


def plane_constants(layout: BlockLayout, which: Literal["key", "value"]) -> PlaneConstants:
    """Return the constants of the key or the value plane of a supported layout."""
    assert unsupported(layout) is None, unsupported(layout)
    plane = layout.key if which == "key" else layout.value
    codes, scales = layout.spans(which)
    if plane.kind == "float":
        kind = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}[plane.dtype]  # type: ignore[index]
    else:
        kind = FP8 if plane.kind == "fp8" else INT8 if plane.bits == 8 else INT4
    minima_at = scales.start + 2 * layout.block_size
    return PlaneConstants(
        kind.value, codes.start, scales.start, minima_at, plane.code_bytes(layout.head_dim), plane.rotate
    )


def unsupported(layout: BlockLayout) -> str | None:
    """Return what these kernels do not read in `layout`, or None."""
    if layout.head_dim % 16 or layout.head_dim > 256:
        return f"head_dim {layout.head_dim}: a multiple of 16 up to 256 is wanted"
    if layout.block_size not in (16, 32, 64, 128):
        return f"blocks of {layout.block_size} tokens: 16, 32, 64 or 128 are wanted"
    for name, plane in (("key", layout.key), ("value", layout.value)):
        if plane.groups != 1:
            return f"{plane.groups} scales per token and head in the {name} plane: one is wanted"
        if plane.kind == "float" and plane.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{name} plane of {plane.dtype}"
    return None


def hadamard_size(head_dim: int) -> int:
    """Return the largest power of two that divides head_dim: the transform's block."""
    return head_dim & -head_dim


def hadamard_factor(head_dim: int) -> float:
    """Return what normalises a sum of ±1 terms to the transform of `blocks.hadamard`."""
    return 1 / math.sqrt(hadamard_size(head_dim))


# Reading


@triton.jit
def load_codes(
    record,
    tokens,
    columns,
    mask,
    PLANE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Load raw codes: units of one byte, of two (WORDS), or the floats of a float plane.

    record: pointer to uint8, the record's first byte, or a tensor of pointers that broadcasts; tokens, columns: int32
    tensors that broadcast, token within the block and unit within the token's codes; mask like them, or None.
    Returns uint8, uint16 or floats; 0 where masked.
    """
    coded: tl.constexpr = tl.uint16 if WORDS else tl.uint8
    kind: tl.constexpr = PLANE.kind
    float16: tl.constexpr = tl.float16 if kind == 1 else tl.bfloat16
    unit: tl.constexpr = coded if kind >= 3 else (float16 if kind >= 1 else tl.float32)
    size: tl.constexpr = 4 if kind == 0 else (2 if kind <= 2 or WORDS else 1)
    units = (record + PLANE.codes_at).to(tl.pointer_type(unit)) + (tokens * (PLANE.token_bytes // size) + columns)
    return _load(units, mask)


@triton.jit
def numbers(codes, SHIFT: tl.constexpr, KIND: tl.constexpr, DOT: tl.constexpr):
    """Return the codes at bit position SHIFT of each unit as numbers of type DOT.

    DOT is float16 for integer and FP8 planes (float32 is also exact), any float type for float planes.
    """
    if KIND <= 2:
        x = codes
    else:
        wide = codes.to(tl.uint16)
        if KIND == 5:
            if SHIFT < 4:
                bits = ((wide << (4 - SHIFT)) & 0xF0) | 0x5400
            else:
                bits = ((wide >> (SHIFT - 4)) & 0xF0) | 0x5400
            x = bits.to(tl.float16, bitcast=True)
        elif KIND == 4:
            x = (((wide >> SHIFT) & 0xFF) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
        else:
            if SHIFT == 0:
                bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
            else:
                bits = (wide & 0x8000) | ((wide & 0x7F00) >> 1)
            x = bits.to(tl.float16, bitcast=True)
    return x.to(DOT)


@triton.jit
def word_numbers(words, SHIFT: tl.constexpr, KIND: tl.constexpr, DOT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return `numbers` of words, two words at a time: LLVM would take a register of two apart."""
    if KIND <= 2 or INTERPRETED:
        x = numbers(words, SHIFT, KIND, DOT)
    elif KIND == 5:
        if SHIFT == 0:
            x = _two_words("shl.b32 t, $1, 4; lop3.b32 $0, t, 0x00F000F0, 0x54005400, 0xEA;", words)
        elif SHIFT == 4:
            x = _two_words("lop3.b32 $0, $1, 0x00F000F0, 0x54005400, 0xEA;", words)
        elif SHIFT == 8:
            x = _two_words("shr.b32 t, $1, 4; lop3.b32 $0, t, 0x00F000F0, 0x54005400, 0xEA;", words)
        else:
            x = _two_words("shr.b32 t, $1, 8; lop3.b32 $0, t, 0x00F000F0, 0x54005400, 0xEA;", words)
    elif KIND == 4:
        if SHIFT == 0:
            x = _two_words("lop3.b32 $0, $1, 0x00FF00FF, 0x64006400, 0xEA;", words)
        else:
            x = _two_words("shr.b32 t, $1, 8; lop3.b32 $0, t, 0x00FF00FF, 0x64006400, 0xEA;", words)
        x -= 1024.0
    else:
        # Sign and the rest lie apart; 0xEA is (a & b) | c.
        if SHIFT == 0:
            x = _two_words(
                "shl.b32 t, $1, 8; and.b32 t, t, 0x80008000; shl.b32 u, $1, 7; lop3.b32 $0, u, 0x3F803F80, t, 0xEA;",
                words,
            )
        else:
            x = _two_words("and.b32 t, $1, 0x80008000; shr.b32 u, $1, 1; lop3.b32 $0, u, 0x3F803F80, t, 0xEA;", words)
    return x


@triton.jit
def _two_words(CODE: tl.constexpr, words):
    code: tl.constexpr = "{ .reg .b32 t; .reg .b32 u; " + CODE + " }"
    return tl.inline_asm_elementwise(code, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def load_scales(record, tokens, mask, PLANE: tl.constexpr):
    """Load the factor and the addend of each token, float32 like `tokens`; 0 where masked.

    A float plane has factors of 1 and addends of 0, an FP8 plane addends of 0: leave them out there.
    """
    scales, minima = load_raw_scales(record, tokens, mask, PLANE)
    return scale_factors(scales, minima, PLANE.kind)


@triton.jit
def load_raw_scales(record, tokens, mask, PLANE: tl.constexpr):
    """Load the scale and the minimum of each token as stored; what a plane has not is 0."""
    if PLANE.kind >= 4:
        scales = _load((record + PLANE.scales_at).to(tl.pointer_type(tl.float16)) + tokens, mask)
        minima = _load((record + PLANE.minima_at).to(tl.pointer_type(tl.float16)) + tokens, mask)
    elif PLANE.kind == 3:
        scales = _load((record + PLANE.scales_at).to(tl.pointer_type(tl.uint16)) + tokens, mask)
        minima = tl.zeros_like(scales)
    else:
        scales = tl.zeros(tokens.shape, tl.float16)
        minima = scales
    return scales, minima


@triton.jit
def scale_factors(scales, minima, KIND: tl.constexpr):
    """Return the factor and the addend, float32, of raw scales."""
    if KIND >= 4:
        factor = scales.to(tl.float32)
        addend = minima.to(tl.float32)
        if KIND == 5:
            addend = addend - 64.0 * factor
    elif KIND == 3:
        # bfloat16 is the upper half of float32.
        factor = (scales.to(tl.uint32) << 16).to(tl.float32, bitcast=True) * 256.0
        addend = tl.zeros_like(factor)
    else:
        factor = tl.full(scales.shape, 1.0, tl.float32)
        addend = tl.zeros_like(factor)
    return factor, addend


@triton.jit
def _load(pointers, mask):
    if mask is None:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=mask, other=0)
    return x


# The Hadamard transform


@triton.jit
def hadamard_tile(rows, columns, SIZE: tl.constexpr):
    """Return the unnormalised transform's entries, float32: ±1 inside a block of SIZE dimensions, 0 outside.

    rows, columns: int32 tensors of dimensions that broadcast. The normalisation is `hadamard_factor`.
    """
    both = rows & columns & (SIZE - 1)
    both = both ^ (both >> 4)
    both = both ^ (both >> 2)
    both = both ^ (both >> 1)
    sign = (0x3F800000 | ((both & 1) << 31)).to(tl.uint32).to(tl.float32, bitcast=True)  # no conversion instruction
    return tl.where((rows // SIZE) == (columns // SIZE), sign, 0.0)


@triton.jit
def rotate_halves(low, high, DIM: tl.constexpr, HALF_PAD: tl.constexpr, FACTOR: tl.constexpr, DOT: tl.constexpr):
    """Return the transform of rows given as two halves [rows, HALF_PAD] each (0 beyond DIM / 2), float32.

    DOT: a type that holds the input exactly (the compute dtype); the products with ±1 are then exact, the sums float32.
    """
    size: tl.constexpr = DIM & -DIM
    half: tl.constexpr = DIM // 2
    i = tl.arange(0, HALF_PAD)[:, None]
    j = tl.arange(0, HALF_PAD)[None, :]
    inside = (i < half) & (j < half)
    low = low.to(DOT)
    high = high.to(DOT)
    within = tl.where(inside, hadamard_tile(i, j, size), 0.0).to(DOT)
    if size == DIM:
        # [[h, h], [h, -h]]
        x = tl.dot(low, within, input_precision="ieee")
        y = tl.dot(high, within, input_precision="ieee")
        new_low = x + y
        new_high = x - y
    else:
        across = tl.where(inside, hadamard_tile(i, j + half, size), 0.0).to(DOT)  # symmetric as a whole, not as a tile
        new_low = tl.dot(low, within, input_precision="ieee")
        new_high = tl.dot(low, across, input_precision="ieee")
        across = tl.where(inside, hadamard_tile(i + half, j, size), 0.0).to(DOT)
        within = tl.where(inside, hadamard_tile(i + half, j + half, size), 0.0).to(DOT)
        new_low = tl.dot(high, across, new_low, input_precision="ieee")
        new_high = tl.dot(high, within, new_high, input_precision="ieee")
    return new_low * FACTOR, new_high * FACTOR


# Writing


@triton.jit
def bfloat16_bits(x):
    """Round finite float32 to bfloat16, half to even; return its bits as uint16 (the interpreter's cast truncates)."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)


@triton.jit
def fp8_bits(x):
    """Round float32 within ±448 to e4m3, half to even; return its bits as uint8."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the steps are 2^-9, those of float32 from 2^14 on.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def integer_codes(x, low, scale, STEPS: tl.constexpr):
    """Return round((x - low) / scale) within 0..STEPS as uint32; half to even."""
    y = tl.math.div_rn(x - low, scale)
    y = tl.minimum(tl.maximum(y, 0.0), STEPS)
    # From 2^23 on, float32 has steps of one, and its last bits are the integer.
    return (y + 8388608.0).to(tl.uint32, bitcast=True) & 0xFF


@triton.jit
def store_plane(
    record,
    tokens,
    low,
    high,
    mask,
    PLANE: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """Encode rows of a plane into their record.

    record: pointer to uint8; tokens: int32 [rows], their places in the block; low, high: float32 [rows, HALF_PAD],
    dimensions 0..DIM/2-1 and DIM/2..DIM-1, already rotated where the plane is; mask: bool [rows].
    """
    half: tl.constexpr = DIM // 2
    kind: tl.constexpr = PLANE.kind
    columns = tl.arange(0, HALF_PAD)[None, :]
    inside = columns < half
    written = mask[:, None] & inside
    if kind <= 2:
        size: tl.constexpr = 4 if kind == 0 else 2
        at = tokens[:, None] * (PLANE.token_bytes // size) + columns
        if kind == 0:
            units = (record + PLANE.codes_at).to(tl.pointer_type(tl.float32)) + at
            # Saturated like the others: an infinity would poison the whole context.
            tl.store(units, _within(low, 3.4028234663852886e38), mask=written)
            tl.store(units + half, _within(high, 3.4028234663852886e38), mask=written)
        elif kind == 1:
            units = (record + PLANE.codes_at).to(tl.pointer_type(tl.float16)) + at
            tl.store(units, _within(low, _HALF_MAX).to(tl.float16), mask=written)
            tl.store(units + half, _within(high, _HALF_MAX).to(tl.float16), mask=written)
        else:
            units = (record + PLANE.codes_at).to(tl.pointer_type(tl.uint16)) + at
            tl.store(units, bfloat16_bits(_within(low, _BFLOAT16_MAX)), mask=written)
            tl.store(units + half, bfloat16_bits(_within(high, _BFLOAT16_MAX)), mask=written)
    elif kind == 3:
        largest = tl.maximum(
            tl.max(tl.where(inside, tl.abs(low), 0.0), 1), tl.max(tl.where(inside, tl.abs(high), 0.0), 1)
        )
        scale_bits = bfloat16_bits(tl.math.div_rn(largest, tl.full(largest.shape, _FP8_MAX, tl.float32)))
        tl.store((record + PLANE.scales_at).to(tl.pointer_type(tl.uint16)) + tokens, scale_bits, mask=mask)
        scale = (scale_bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        scale = tl.where(scale == 0.0, 1.0, scale)[:, None] + tl.zeros_like(low)
        bytes_ = record + PLANE.codes_at + tokens[:, None] * PLANE.token_bytes + columns
        tl.store(bytes_, fp8_bits(_within(tl.math.div_rn(low, scale), _FP8_MAX)), mask=written)
        tl.store(bytes_ + half, fp8_bits(_within(tl.math.div_rn(high, scale), _FP8_MAX)), mask=written)
    else:
        steps: tl.constexpr = 255.0 if kind == 4 else 15.0
        huge: tl.constexpr = float("inf")
        smallest = tl.minimum(tl.min(tl.where(inside, low, huge), 1), tl.min(tl.where(inside, high, huge), 1))
        largest = tl.maximum(tl.max(tl.where(inside, low, -huge), 1), tl.max(tl.where(inside, high, -huge), 1))
        minimum = _within(smallest, _HALF_MAX).to(tl.float16)
        step = tl.math.div_rn(largest - minimum.to(tl.float32), tl.full(largest.shape, steps, tl.float32))
        scale = _within(step, _HALF_MAX).to(tl.float16)
        tl.store((record + PLANE.scales_at).to(tl.pointer_type(tl.float16)) + tokens, scale, mask=mask)
        tl.store((record + PLANE.minima_at).to(tl.pointer_type(tl.float16)) + tokens, minimum, mask=mask)
        # Codes come from the rounded scale and minimum, which are what decoding sees. A constant row has scale 0.
        divisor = scale.to(tl.float32)
        divisor = tl.where(divisor == 0.0, 1.0, divisor)[:, None] + tl.zeros_like(low)
        floor = minimum.to(tl.float32)[:, None]
        low_codes = integer_codes(low, floor, divisor, steps)
        high_codes = integer_codes(high, floor, divisor, steps)
        bytes_ = record + PLANE.codes_at + tokens[:, None] * PLANE.token_bytes + columns
        if kind == 5:
            tl.store(bytes_, (low_codes | (high_codes << 4)).to(tl.uint8), mask=written)
        else:
            tl.store(bytes_, low_codes.to(tl.uint8), mask=written)
            tl.store(bytes_ + half, high_codes.to(tl.uint8), mask=written)


@triton.jit
def _within(x, LIMIT):
    return tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
