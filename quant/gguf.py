"""Weights in GGUF block formats: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K.

Owns the layout of one block and its decoding; reading files belongs to `duolocal.models.gguf`. A row of a weight is
a run of blocks; a block is a few scales and packed integers for 32 or 256 neighbouring input features. Layouts:
ggml's `ggml-common.h` (block_q4_0 … block_q6_K).

A decoded value is by definition the float32 result; other dtypes are that value rounded (or widened). Every product
of a scale and an integer is exact in float32, so the order of the multiplications does not matter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.kernels.matrix import PACKINGS, PackedMatrix

# Elements decoded at a time: bounds the temporaries (about 3 bytes per element) and keeps them in cache.
_CHUNK_ELEMENTS = 1 << 20

# Fills out [n, block_size] float32 from blocks [n, block_bytes] uint8.
_Decode = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class GGUFType:
    """One number format of GGUF: `block_size` values in `block_bytes` bytes."""

    id: int  # as in the file's tensor table
    name: str
    block_size: int
    block_bytes: int
    decode: _Decode

    def row_bytes(self, in_features: int) -> int:
        """Return the bytes of one row of `in_features` values, a multiple of `block_size`."""
        return in_features // self.block_size * self.block_bytes


@dataclass(frozen=True)
class GGUFWeight:
    """A weight [out_features, in_features] in GGUF blocks, every row a whole number of blocks."""

    raw: Tensor  # [out_features, row_bytes] uint8, as in the file; may be a view of a memory map
    type: GGUFType
    in_features: int

    def __post_init__(self) -> None:
        assert self.raw.dtype == torch.uint8 and self.raw.dim() == 2 and self.raw.stride(1) == 1
        assert self.in_features % self.type.block_size == 0
        assert self.raw.shape[1] == self.type.row_bytes(self.in_features)

    @property
    def out_features(self) -> int:
        return self.raw.shape[0]

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    @property
    def format(self) -> str:
        return self.type.name

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the whole matrix [out_features, in_features] in `dtype`."""
        return _decode_rows(self.raw, self.type, dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows `index` [n] as [n, in_features] in `dtype`, dequantizing only those."""
        return _decode_rows(self.raw[index], self.type, dtype)

    def row_range(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows start..stop-1 as [stop - start, in_features] in `dtype`."""
        return _decode_rows(self.raw[start:stop], self.type, dtype)

    def packed(self) -> PackedMatrix:
        """Return the bytes as they are, for kernels that decode on the way."""
        name = self.type.name
        assert name in PACKINGS, name
        return PackedMatrix(name, self.raw, self.out_features, self.in_features, row_bytes=self.raw.stride(0))


def _decode_rows(raw: Tensor, kind: GGUFType, dtype: torch.dtype) -> Tensor:
    blocks = raw.reshape(-1, kind.block_bytes)
    num_blocks = blocks.shape[0]
    out = torch.empty((num_blocks, kind.block_size), dtype=dtype, device=raw.device)
    step = max(1, _CHUNK_ELEMENTS // kind.block_size)
    for start in range(0, num_blocks, step):
        part = out[start : start + step]
        if dtype == torch.float32:
            kind.decode(blocks[start : start + step], part)
        else:
            exact = torch.empty(part.shape, dtype=torch.float32, device=raw.device)
            kind.decode(blocks[start : start + step], exact)
            part.copy_(exact)
    return out.view(raw.shape[0], -1)


def _half(blocks: Tensor, start: int, count: int = 1) -> Tensor:
    """Return the `count` float16 numbers at byte `start` of every block as [n, count] float32."""
    return blocks[:, start : start + 2 * count].view(torch.float16).float()


def _nibbles(packed: Tensor, runs: int) -> Tensor:
    """Return [n, runs, 2, k] uint8 from [n, runs * k]: of every run first the low nibbles, then the high ones."""
    packed = packed.contiguous().view(packed.shape[0], runs, -1)
    return torch.stack((packed & 15, packed >> 4), dim=2)


def _decode_f32(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.float32))


def _decode_f16(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.float16))


def _decode_bf16(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.bfloat16))


def _decode_q8_0(blocks: Tensor, out: Tensor) -> None:
    # d float16 | 32 int8
    out.copy_(blocks[:, 2:].view(torch.int8))
    out.mul_(_half(blocks, 0))


def _decode_q4_0(blocks: Tensor, out: Tensor) -> None:
    # d float16 | 16 bytes: value j in the low nibble of byte j, value 16 + j in the high one
    out.copy_(_nibbles(blocks[:, 2:], 1).view(out.shape))
    out.sub_(8).mul_(_half(blocks, 0))


def _decode_q4_1(blocks: Tensor, out: Tensor) -> None:
    # d float16 | m float16 | 16 bytes as in Q4_0
    out.copy_(_nibbles(blocks[:, 4:], 1).view(out.shape))
    scales = _half(blocks, 0, 2)
    out.mul_(scales[:, :1]).add_(scales[:, 1:])


def _five_bits(high: Tensor, low: Tensor) -> Tensor:
    """Return [n, 32] uint8 from the fifth bits, high [n, 4], one bit per value, and the nibbles low [n, 16]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=high.device)
    bits = (high.unsqueeze(-1) >> shifts & 1).view(high.shape[0], 32)
    return _nibbles(low, 1).view(high.shape[0], 32) | bits << 4


def _decode_q5_0(blocks: Tensor, out: Tensor) -> None:
    # d float16 | 32 fifth bits | 16 bytes as in Q4_0
    out.copy_(_five_bits(blocks[:, 2:6], blocks[:, 6:]))
    out.sub_(16).mul_(_half(blocks, 0))


def _decode_q5_1(blocks: Tensor, out: Tensor) -> None:
    # d float16 | m float16 | 32 fifth bits | 16 bytes as in Q4_0
    out.copy_(_five_bits(blocks[:, 4:8], blocks[:, 8:]))
    scales = _half(blocks, 0, 2)
    out.mul_(scales[:, :1]).add_(scales[:, 1:])


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and minimum [n, 8, 1] float32 of the eight sub-blocks of Q4_K and Q5_K.

    Bytes 4..15 hold eight 6-bit scales and eight 6-bit minima: the first four of each in the low 6 bits of bytes
    0..3 and 4..7; the last four have their low nibbles in bytes 8..11 and their top bits in bytes 0..3 and 4..7.
    """
    scale_bits, minimum_bits, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((scale_bits & 63, (rest & 15) | (scale_bits >> 2 & 48)), dim=1)
    minimum = torch.cat((minimum_bits & 63, (rest >> 4) | (minimum_bits >> 2 & 48)), dim=1)
    super_scales = _half(blocks, 0, 2)
    return (super_scales[:, :1] * scale).unsqueeze(-1), (super_scales[:, 1:] * minimum).unsqueeze(-1)


def _decode_q4_k(blocks: Tensor, out: Tensor) -> None:
    # d float16 | dmin float16 | 12 bytes of scales | 4 runs of 32 bytes: 32 low nibbles, then 32 high ones
    grouped = out.view(-1, 8, 32)
    grouped.copy_(_nibbles(blocks[:, 16:], 4).view(grouped.shape))
    scale, minimum = _k_scales(blocks)
    grouped.mul_(scale).sub_(minimum)


def _decode_q5_k(blocks: Tensor, out: Tensor) -> None:
    # as Q4_K with 32 bytes of fifth bits before the nibbles: bit s of byte j belongs to value j of sub-block s
    grouped = out.view(-1, 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(1, 8, 1)
    high = blocks[:, 16:48].unsqueeze(1) >> shifts & 1
    grouped.copy_(_nibbles(blocks[:, 48:], 4).view(grouped.shape) | high << 4)
    scale, minimum = _k_scales(blocks)
    grouped.mul_(scale).sub_(minimum)


def _decode_q6_k(blocks: Tensor, out: Tensor) -> None:
    # 2 runs of 64 bytes of low nibbles | 2 runs of 32 bytes of top bit pairs | 16 int8 scales | d float16
    low = _nibbles(blocks[:, :128], 2).view(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).view(1, 1, 4, 1)
    high = blocks[:, 128:192].contiguous().view(-1, 2, 1, 32) >> shifts & 3
    out.copy_((low | high << 4).view(out.shape))
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    out.sub_(32)
    out.view(-1, 16, 16).mul_(scale.unsqueeze(-1))


_ALL = (
    GGUFType(0, "F32", 1, 4, _decode_f32),
    GGUFType(1, "F16", 1, 2, _decode_f16),
    GGUFType(2, "Q4_0", 32, 18, _decode_q4_0),
    GGUFType(3, "Q4_1", 32, 20, _decode_q4_1),
    GGUFType(6, "Q5_0", 32, 22, _decode_q5_0),
    GGUFType(7, "Q5_1", 32, 24, _decode_q5_1),
    GGUFType(8, "Q8_0", 32, 34, _decode_q8_0),
    GGUFType(12, "Q4_K", 256, 144, _decode_q4_k),
    GGUFType(13, "Q5_K", 256, 176, _decode_q5_k),
    GGUFType(14, "Q6_K", 256, 210, _decode_q6_k),
    GGUFType(30, "BF16", 1, 2, _decode_bf16),
)
GGUF_TYPES: dict[int, GGUFType] = {kind.id: kind for kind in _ALL}
