"""The weight of a linear layer or an embedding, in whatever bits its file holds.

Owns the interface and the plain 16/32-bit kind. The quantized kinds stand in `gguf.py` and `awq.py`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from duolocal.kernels.matrix import PackedMatrix, Packing

_PACKINGS: dict[torch.dtype, Packing] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Weight(Protocol):
    """A matrix [out_features, in_features] kept in its own bits; nothing here is ever re-quantized."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        ...

    @property
    def format(self) -> str:
        """Name for people: "Q4_1", "awq-int4-g128", "bf16"."""
        ...

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the whole matrix [out_features, in_features] in `dtype`."""
        ...

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows `index` [n] as [n, in_features] in `dtype`, dequantizing only those."""
        ...

    def row_range(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows start..stop-1 as [stop - start, in_features] in `dtype`, a view where that needs no copy."""
        ...

    def packed(self) -> PackedMatrix:
        """Return the bytes as they are, for kernels that decode on the way."""
        ...


@dataclass(frozen=True)
class DenseWeight:
    """A weight in F32, F16 or BF16."""

    tensor: Tensor  # [out_features, in_features]

    @property
    def out_features(self) -> int:
        return self.tensor.shape[0]

    @property
    def in_features(self) -> int:
        return self.tensor.shape[1]

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def format(self) -> str:
        return {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}.get(
            self.tensor.dtype, str(self.tensor.dtype).removeprefix("torch.")
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self.tensor[index].to(dtype)

    def row_range(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.tensor[start:stop].to(dtype)

    def packed(self) -> PackedMatrix:
        tensor = self.tensor
        assert tensor.stride(1) == 1
        row_bytes = tensor.stride(0) * tensor.element_size()
        return PackedMatrix(_PACKINGS[tensor.dtype], tensor, self.out_features, self.in_features, row_bytes)


@dataclass(frozen=True)
class Linear:
    """The parts of y = x Wᵀ + b, W in its own bits; multiplying is the kernels' business."""

    weight: Weight
    bias: Tensor | None = None  # [out_features], compute dtype
