"""A weight matrix as kernels see it: its bytes, and how they are packed.

Owns the description only: what the formats mean stands in `duolocal.quant`.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Packing = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "AWQ"]
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
