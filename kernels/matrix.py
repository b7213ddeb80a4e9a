"""A weight matrix as kernels see it: its bytes, and how they are packed.

Owns the description only: what the formats mean stands in `duolocal.quant`.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Packing = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "AWQ", "NF4", "INT8"
]
PACKINGS: tuple[Packing, ...] = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "AWQ",
    "NF4",
    "INT8",
)


@dataclass(frozen=True)
class PackedMatrix:
    """The bytes of a matrix [out_features, in_features].

    data: row by row, `row_bytes` apart, for all packings but AWQ; AWQ: int32 [in_features, out_features / 8] with
    zeros int32 [in_features / group_size, out_features / 8] and scales float16 [in_features / group_size,
    out_features], all contiguous.
    """

    packing: Packing
    data: Tensor
    out_features: int
    in_features: int
    row_bytes: int
    zeros: Tensor | None = None
    scales: Tensor | None = None
    group_size: int = 0


# Input features whose codes lie together in a `GroupedMatrix`.
GROUPED_RUN = 32
# The feature, of 16, that each of 16 bytes of codes holds.
GROUPED_ORDER = tuple(8 * a + 2 * m + b for m in range(4) for a in range(2) for b in range(2))


@dataclass(frozen=True)
class GroupedMatrix:
    """A matrix [out_features, in_features] in planes, as GPU kernels read it; in_features is a multiple of 32.

    codes: uint8 [out_features, in_features * bits / 8]. Of 8 bits, 16 bytes hold 16 neighbouring input features; of
    4 bits, 32: the first 16 in the low nibbles, the next 16 in the high ones. Feature 8a + 2m + b of 16 (a, b < 2,
    m < 4) is byte 4m + 2a + b: a thread that takes 16 bytes as four words, and 16-bit activations as words of two
    neighbours, finds what belongs together at one m, and both are loads of 16 bytes (`GROUPED_ORDER`). scales:
    float16 [out_features, groups]; a group is in_features / groups neighbouring features, a multiple of 32. A value
    is scale * (code - zero), or scale * code + minimum, in float32, rounded once to the wanted dtype. The zero is
    `zeros` uint8 [out_features, groups] (of 4 bits only) or `zero` everywhere; the minimum `minima` float16
    [out_features, groups]. All contiguous, on one device.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    zero: int = 0
    zeros: Tensor | None = None
    minima: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.bits in (4, 8)
        assert self.codes.dtype == torch.uint8 and self.codes.dim() == 2
        assert self.scales.dtype == torch.float16 and self.scales.shape[0] == self.codes.shape[0]
        assert self.in_features % self.scales.shape[1] == 0 and self.group_size % GROUPED_RUN == 0
        assert self.zeros is None or (self.zeros.dtype == torch.uint8 and self.zeros.shape == self.scales.shape)
        assert self.minima is None or (self.minima.dtype == torch.float16 and self.minima.shape == self.scales.shape)
        assert self.minima is None or (self.zeros is None and self.zero == 0)
        assert self.bits == 4 or (self.zeros is None and self.minima is None)
        assert 0 <= self.zero < 1 << self.bits and not (self.zeros is not None and self.zero)
        planes = (self.codes, self.scales, self.zeros, self.minima)
        assert all(plane is None or plane.is_contiguous() for plane in planes)

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1] * 8 // self.bits

    @property
    def group_size(self) -> int:
        """Input features that share a scale and an offset."""
        return self.in_features // self.scales.shape[1]

    @property
    def offsets(self) -> Tensor | None:
        """Zeros or minima, whichever there are."""
        return self.minima if self.zeros is None else self.zeros


class Matrix(Protocol):
    """A matrix [out_features, in_features] in whatever bits it is kept."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the whole matrix in `dtype`."""
        ...

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows `index` [n] as [n, in_features] in `dtype`."""
        ...

    def row_range(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows start..stop-1 as [stop - start, in_features] in `dtype`."""
        ...

    def packed(self) -> PackedMatrix:
        """Return the bytes, for kernels that decode on the way."""
        ...


class Affine(Protocol):
    """y = x Wᵀ + b."""

    @property
    def weight(self) -> Matrix: ...

    @property
    def bias(self) -> Tensor | None: ...
