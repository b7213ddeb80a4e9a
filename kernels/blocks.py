"""The KV block: one KV head, a fixed number of tokens, keys and values with their scales, as one record of bytes.

The record has the same bytes wherever it lives. A block is encoded once, when its last token is known, and is
never changed or re-quantized afterwards.

Record: key codes | value codes | key scales | key minima | value scales | value minima, padded to 16 bytes.
Integer codes are asymmetric, x ≈ scale · code + minimum, with scale and minimum in float16 and the codes computed
from the rounded scale. FP8 (e4m3) has one bfloat16 scale per token, whose range small values need. INT4 packs two
codes per byte, the low nibble holding dimension j and the high nibble dimension j + head_dim / 2, so that
unpacking needs no interleave. A rotated plane is stored after a Hadamard transform along head_dim, which spreads
outliers over all dimensions (QuaRot, arXiv 2404.00456).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

FP8_MAX = 448.0  # largest finite float8_e4m3fn
RECORD_ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class Plane:
    """How the keys, or the values, of a block are stored."""

    kind: Literal["float", "fp8", "int"]
    bits: int
    dtype: torch.dtype | None = None  # of a "float" plane
    groups: int = 1  # scales per token and head ("int"): head_dim is cut into this many groups
    rotate: bool = False

    def code_bytes(self, head_dim: int) -> int:
        """Bytes of one token's codes."""
        return head_dim * self.bits // 8

    def scale_bytes(self) -> int:
        """Bytes of one token's scales and minima."""
        return {"float": 0, "fp8": 2, "int": 4 * self.groups}[self.kind]


@dataclass(frozen=True)
class BlockLayout:
    """Where everything lies inside a record."""

    key: Plane
    value: Plane
    block_size: int  # tokens
    head_dim: int

    @cached_property
    def record_bytes(self) -> int:
        used = self.block_size * sum(
            plane.code_bytes(self.head_dim) + plane.scale_bytes() for plane in (self.key, self.value)
        )
        return -(-used // RECORD_ALIGNMENT) * RECORD_ALIGNMENT

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token in one KV head, keys and values and scales, padding included."""
        return self.record_bytes / self.block_size

    @property
    def key_bytes(self) -> int:
        """Bytes of a record that are keys: codes and scales."""
        return sum(span.stop - span.start for span in self.spans("key"))

    def spans(self, which: Literal["key", "value"]) -> tuple[slice, slice]:
        """Return the byte ranges of the codes and of the scales (scales first, then minima) inside a record."""
        n, dim = self.block_size, self.head_dim
        key_codes, value_codes = n * self.key.code_bytes(dim), n * self.value.code_bytes(dim)
        key_scales, value_scales = n * self.key.scale_bytes(), n * self.value.scale_bytes()
        scales_at = key_codes + value_codes
        if which == "key":
            return slice(0, key_codes), slice(scales_at, scales_at + key_scales)
        values_at = scales_at + key_scales
        return slice(key_codes, scales_at), slice(values_at, values_at + value_scales)


def encode_blocks(keys: Tensor, values: Tensor, layout: BlockLayout) -> Tensor:
    """Encode whole blocks.

    keys, values: [num_blocks, block_size, head_dim], any float dtype. Returns uint8 [num_blocks, record_bytes].
    """
    wanted = (layout.block_size, layout.head_dim)
    assert keys.shape == values.shape and tuple(keys.shape[1:]) == wanted, (keys.shape, values.shape, wanted)
    records = torch.zeros(keys.shape[0], layout.record_bytes, dtype=torch.uint8, device=keys.device)
    for which, plane, x in (("key", layout.key, keys), ("value", layout.value, values)):
        codes, scales = _encode_plane(x, plane)
        code_span, scale_span = layout.spans(which)  # type: ignore[arg-type]
        records[:, code_span] = codes
        if scales is not None:
            records[:, scale_span] = scales
    return records


def decode_blocks(
    records: Tensor, layout: BlockLayout, which: Literal["key", "value"], *, dtype: torch.dtype
) -> Tensor:
    """Decode the keys or the values of records.

    records: uint8 [num_blocks, record_bytes]. Returns [num_blocks, block_size, head_dim] in `dtype`; a rotated
    plane stays rotated (use `hadamard` on the query, or on the attention output, instead).
    """
    plane = layout.key if which == "key" else layout.value
    n, dim = layout.block_size, layout.head_dim
    code_span, scale_span = layout.spans(which)
    codes = records[:, code_span].contiguous()
    if plane.kind == "float":
        assert plane.dtype is not None
        return codes.view(plane.dtype).view(-1, n, dim).to(dtype)
    scale_bytes = records[:, scale_span].contiguous()
    if plane.kind == "fp8":
        x = codes.view(torch.float8_e4m3fn).view(-1, n, dim).to(dtype)
        return x * scale_bytes.view(torch.bfloat16).view(-1, n, 1).to(dtype)
    groups = plane.groups
    scale, minimum = (
        part.reshape(-1, n, groups, 1) for part in scale_bytes.view(torch.float16).to(dtype).chunk(2, dim=1)
    )
    if plane.bits == 4:
        packed = codes.view(-1, n, dim // 2)
        codes = torch.cat((packed & 15, packed >> 4), dim=-1)
    x = codes.view(-1, n, groups, dim // groups).to(dtype)
    return torch.addcmul(minimum.expand_as(x), x, scale).view(-1, n, dim)


def _encode_plane(x: Tensor, plane: Plane) -> tuple[Tensor, Tensor | None]:
    """Return codes uint8 [num_blocks, bytes] and scale bytes uint8 [num_blocks, bytes] or None."""
    num_blocks, n, dim = x.shape
    if plane.rotate:
        x = hadamard(x)
    if plane.kind == "float":
        assert plane.dtype is not None
        # Saturate: an overflow to infinity would poison the whole context.
        limit = min(torch.finfo(plane.dtype).max, torch.finfo(x.dtype).max)
        return x.clamp(-limit, limit).to(plane.dtype).contiguous().view(torch.uint8).view(num_blocks, -1), None
    work = x if x.dtype == torch.float64 else x.float()
    if plane.kind == "fp8":
        scale = (work.abs().amax(dim=-1, keepdim=True) / FP8_MAX).to(torch.bfloat16)  # [num_blocks, n, 1]
        scaled = (work / _nonzero(scale).to(work.dtype)).clamp(-FP8_MAX, FP8_MAX)
        codes = scaled.to(torch.float8_e4m3fn)
        return codes.view(torch.uint8).view(num_blocks, -1), _bytes(scale)
    grouped = work.reshape(num_blocks, n, plane.groups, dim // plane.groups)
    low = _as_half(grouped.amin(dim=-1, keepdim=True))
    steps = 2**plane.bits - 1
    # The rounded minimum and scale are what decoding sees, so the codes are computed from them.
    scale = _as_half((grouped.amax(dim=-1, keepdim=True) - low.to(work.dtype)) / steps)
    codes = ((grouped - low.to(work.dtype)) / _nonzero(scale).to(work.dtype)).round().clamp(0, steps)
    codes = codes.to(torch.uint8).view(num_blocks, n, dim)
    if plane.bits == 4:
        codes = codes[..., : dim // 2] | (codes[..., dim // 2 :] << 4)
    scales = torch.cat((_bytes(scale), _bytes(low)), dim=1)
    return codes.reshape(num_blocks, -1), scales


def _as_half(x: Tensor) -> Tensor:
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).to(torch.float16)


def _nonzero(scale: Tensor) -> Tensor:
    """A constant group has scale 0 and codes 0; divide by one there."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).view(x.shape[0], -1)


def hadamard(x: Tensor) -> Tensor:
    """Apply the normalised Walsh-Hadamard transform along the last dimension; it is its own inverse.

    x: [..., head_dim]. A head_dim that is not a power of two is transformed in equal blocks of the largest power
    of two that divides it (96 = 3 blocks of 32).
    """
    dim = x.shape[-1]
    size = dim & -dim
    y = x.reshape(-1, size)
    width = 1
    while width < size:
        y = y.view(-1, size // (2 * width), 2, width)
        y = torch.stack((y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]), dim=2)
        width *= 2
    return (y.reshape(x.shape)) / math.sqrt(size)
