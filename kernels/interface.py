"""What a model asks of its kernels: the plain-torch reference and the compiled CPU path both offer it."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from duolocal.kernels.matrix import Affine, Matrix


class Kernels(Protocol):
    """The operations of a decoder layer but attention, which is the cache's."""

    @property
    def name(self) -> str: ...

    def embed(self, weight: Matrix, ids: Tensor) -> Tensor:
        """Return rows `ids` [n] int64 as [n, in_features] in the compute dtype."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        """Scale every vector of x [..., n] to root mean square 1, then by weight [n]."""
        ...

    def linear(self, x: Tensor, layers: Sequence[Affine], *, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return x Wᵀ + b [n, out_features] of every layer for x [n, in_features], plus `residual` for a single one."""
        ...

    def rotary_embedding(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the pairs (d, d + head_dim/2) of x [n, heads, head_dim] by cos and sin [n, head_dim/2]."""
        ...

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up."""
        ...

    def logits(self, hidden: Tensor, weight: Matrix) -> Tensor:
        """Return hidden [n, in_features] times the output matrix: float32 [n, out_features]."""
        ...
