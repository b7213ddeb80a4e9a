"""The operations of a decoder layer on a GPU: Triton kernels for grouped weights, the library for dense ones.

Checks shapes and chooses between the two; arithmetic is the business of `linear.py` and `pointwise.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from duolocal.kernels.gpu import linear, pointwise
from duolocal.kernels.interface import Norm, Rotation
from duolocal.kernels.matrix import Affine, GroupedMatrix, Matrix


class TritonKernels:
    """The kernels of one GPU in a 16-bit compute dtype (float32 in the interpreter)."""

    name = "triton"
    capturable = True
    angle_dtype = torch.float32

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def embed(self, weight: Matrix, ids: Tensor) -> Tensor:
        """Return rows `ids` [n] int64 as [n, in_features] in the compute dtype."""
        return weight.rows(ids, self.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        """Scale every vector of x [..., n] to root mean square 1, then by weight [n]."""
        normed = pointwise.rms_norm(x, weight, eps=eps)
        assert isinstance(normed, Tensor)
        return normed

    def linear(
        self, x: Tensor, layers: Sequence[Affine], *, norm: Norm | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return x Wᵀ + b [n, out_features] of every layer for x [n, in_features], plus `residual` for a single one."""
        assert residual is None or len(layers) == 1
        together = _grouped_layers(layers)
        if together is not None:
            return linear.linear(x, together, norm=norm, residual=residual)
        if norm is not None:
            x = self.rms_norm(x, norm.weight, eps=norm.eps)
        if len(layers) > 1:
            return tuple(self.linear(x, (layer,))[0] for layer in layers)
        result = torch.nn.functional.linear(x, layers[0].weight.dequantize(x.dtype), layers[0].bias)
        return (result if residual is None else result.add_(residual),)

    def gated_linear(self, x: Tensor, gate: Affine, up: Affine, *, norm: Norm | None = None) -> Tensor:
        """Return silu(gate(x)) * up(x) [n, out_features]."""
        together = _grouped_layers((gate, up))
        if together is not None:
            return linear.gated_linear(x, *together, norm=norm)
        return pointwise.silu_mul(*self.linear(x, (gate, up), norm=norm))

    def rotate(self, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Rotate the pairs (d, d + head_dim/2) of q and k, each [num_tokens, heads, head_dim]."""
        return pointwise.rotate(q, k, *rotation)

    def logits(self, hidden: Tensor, weight: Matrix) -> Tensor:
        """Return hidden [n, in_features] times the output matrix: float32 [n, out_features]."""
        matrix = _grouped(weight)
        if matrix is not None:
            return linear.linear(hidden, ((matrix, None),), out_dtype=torch.float32)[0]
        dense = weight.dequantize(hidden.dtype)
        if hidden.is_cuda:  # sums leave the tensor cores unrounded
            return torch.mm(hidden, dense.T, out_dtype=torch.float32)
        return (hidden @ dense.T).float()


def _grouped(weight: Matrix) -> GroupedMatrix | None:
    """Return the planes of a weight that has been regrouped for a GPU, else None."""
    matrix = getattr(weight, "matrix", None)
    return matrix if isinstance(matrix, GroupedMatrix) else None


def _grouped_layers(layers: Sequence[Affine]) -> list[tuple[GroupedMatrix, Tensor | None]] | None:
    """Return weights and biases where all weights are grouped, else None."""
    found = [(matrix, layer.bias) for layer in layers if (matrix := _grouped(layer.weight)) is not None]
    return found if len(found) == len(layers) else None
