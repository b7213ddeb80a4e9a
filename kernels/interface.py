"""What a model asks of its kernels: the plain-torch reference, the compiled CPU path and the GPU path all offer it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from duolocal.kernels.matrix import Affine, Matrix


class Norm(NamedTuple):
    """An RMSNorm to be applied to what a product reads."""

    weight: Tensor  # [in_features]
    eps: float


class Rotation(NamedTuple):
    """The angles of RoPE for some tokens, each [num_tokens, head_dim/2]."""

    cos: Tensor
    sin: Tensor


class HasKernels(Protocol):
    """A model, told from others."""

    @property
    def kernels(self) -> "Kernels": ...


class Repeat(Protocol):
    """Runs a step of one model, and from then on repeats on other inputs what it ran."""

    def __call__(self, compute: Callable[..., Tensor], *inputs: Tensor, model: HasKernels) -> Tensor:
        """Return `compute(*inputs)`, which runs the model's kernels and nothing else; the result is the caller's."""
        ...


@dataclass(frozen=True)
class StepTraits:
    """What a cache says of the step that it is about to take: all that a model and a decode loop need to know of it.

    rotates: the cache applies RoPE, in the pass that stores, so it is given the Rotation. repeat: what runs the step in
    place of the model, None where the model has to. kind: steps of one kind are one CUDA graph.
    """

    rotates: bool = False
    repeat: Repeat | None = None
    kind: str = ""


class Kernels(Protocol):
    """The operations of a decoder layer but attention, which is the cache's."""

    @property
    def name(self) -> str: ...

    @property
    def capturable(self) -> bool:
        """Whether a decode step reads nothing on the host, so that a CUDA graph can hold it."""
        ...

    @property
    def angle_dtype(self) -> torch.dtype:
        """In which a Rotation is to be given."""
        ...

    def embed(self, weight: Matrix, ids: Tensor) -> Tensor:
        """Return rows `ids` [n] int64 as [n, in_features] in the compute dtype."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        """Scale every vector of x [..., n] to root mean square 1, then by weight [n]."""
        ...

    def linear(
        self, x: Tensor, layers: Sequence[Affine], *, norm: Norm | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return x Wᵀ + b [n, out_features] of every layer for x [n, in_features], plus `residual` for a single one."""
        ...

    def gated_linear(self, x: Tensor, gate: Affine, up: Affine, *, norm: Norm | None = None) -> Tensor:
        """Return silu(gate(x)) * up(x) [n, out_features] for x [n, in_features]."""
        ...

    def rotate(self, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Rotate the pairs (d, d + head_dim/2) of q and k, each [num_tokens, heads, head_dim]."""
        ...

    def logits(self, hidden: Tensor, weight: Matrix) -> Tensor:
        """Return hidden [n, in_features] times the output matrix: float32 [n, out_features]."""
        ...
