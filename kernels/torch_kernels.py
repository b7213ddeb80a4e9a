"""The operations of a layer in plain torch: any device and dtype; the judge of every faster path."""

from collections.abc import Sequence

import torch
from torch import Tensor

from duolocal.kernels.interface import Norm, Rotation
from duolocal.kernels.matrix import Affine, Matrix
from duolocal.kernels.pointwise import rms_norm, rotary_embedding, silu_mul

# Rows of the vocabulary dequantized at a time, and rows of hidden states multiplied with them. A Llama-3
# lm_head whole would be 2.1 GB in float32; a tile of it is 134 MB, and a tile of the product 32 MB, whatever
# the prompt.
VOCAB_TILE = 8192
ROW_TILE = 1024


class TorchKernels:
    """Every matrix is dequantized once per call, so a prefill chunk pays for it once."""

    name = "torch"
    capturable = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.angle_dtype = dtype

    def embed(self, weight: Matrix, ids: Tensor) -> Tensor:
        """Return rows `ids` [n] as [n, in_features] in the compute dtype."""
        return weight.rows(ids, self.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        return rms_norm(x, weight, eps=eps)

    def linear(
        self, x: Tensor, layers: Sequence[Affine], *, norm: Norm | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return x Wᵀ + b [n, out_features] of every layer, plus `residual` for a single one."""
        assert residual is None or len(layers) == 1
        if norm is not None:
            x = rms_norm(x, norm.weight, eps=norm.eps)
        results = tuple(torch.nn.functional.linear(x, layer.weight.dequantize(x.dtype), layer.bias) for layer in layers)
        return results if residual is None else (residual + results[0],)

    def gated_linear(self, x: Tensor, gate: Affine, up: Affine, *, norm: Norm | None = None) -> Tensor:
        """Return silu(gate(x)) * up(x) [n, out_features]."""
        return silu_mul(*self.linear(x, (gate, up), norm=norm))

    def rotate(self, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return rotary_embedding(q, *rotation), rotary_embedding(k, *rotation)

    def logits(self, hidden: Tensor, weight: Matrix) -> Tensor:
        """Return float32 [n, out_features]; beyond the result the memory needed does not grow with n."""
        num_rows = hidden.shape[0]
        logits = torch.empty(num_rows, weight.out_features, dtype=torch.float32, device=hidden.device)
        for start in range(0, weight.out_features, VOCAB_TILE):
            tile = weight.row_range(start, min(start + VOCAB_TILE, weight.out_features), hidden.dtype)
            for row in range(0, num_rows, ROW_TILE):
                rows = slice(row, row + ROW_TILE)
                logits[rows, start : start + VOCAB_TILE] = hidden[rows] @ tile.T
        return logits
