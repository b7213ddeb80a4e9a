"""RMSNorm, rotary embedding and the SiLU gate: what a layer does besides products and attention.

Owns the plain-torch reference of each, with its shape checks. Does not know the model, the cache or where the
RoPE frequencies come from (`duolocal.models.rope`).
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Scale every vector of `x` to root mean square 1, then by `weight`.

    x [..., n], weight [n] in x's dtype -> [..., n] in x's dtype. The mean square is accumulated in float32
    (float64 for float64), and the product with `weight` is taken in x's dtype, as transformers does. Raises
    ValueError on a mismatch. Zhang and Sennrich, arXiv 1910.07467, equation 4.
    """
    if weight.ndim != 1 or x.ndim < 1 or x.shape[-1] != weight.shape[0] or weight.dtype != x.dtype:
        raise ValueError(
            f"rms_norm: x {tuple(x.shape)} {x.dtype} and weight {tuple(weight.shape)} {weight.dtype}: "
            "wanted x [..., n] and weight [n] of one dtype"
        )
    wide = x.to(_accumulation_dtype(x.dtype))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (d, d + head_dim/2) of every head of `x` by its token's angles (half-split RoPE).

    x [num_tokens, heads, head_dim], cos and sin [num_tokens, head_dim/2], all of one dtype -> like x. Raises
    ValueError on a mismatch. Su et al., arXiv 2104.09864, equation 34, in the half-split order of the
    Llama checkpoints on model hubs.
    """
    if (
        x.ndim != 3
        or x.shape[-1] % 2
        or cos.shape != (x.shape[0], x.shape[-1] // 2)
        or sin.shape != cos.shape
        or not x.dtype == cos.dtype == sin.dtype
    ):
        raise ValueError(
            f"rotary_embedding: x {tuple(x.shape)} {x.dtype}, cos {tuple(cos.shape)} {cos.dtype}, "
            f"sin {tuple(sin.shape)} {sin.dtype}: wanted x [num_tokens, heads, head_dim] with even head_dim, "
            "cos and sin [num_tokens, head_dim/2], one dtype"
        )
    first, second = x.chunk(2, dim=-1)  # [num_tokens, heads, head_dim/2] each
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, the gated activation of the MLP.

    gate and up of one shape and dtype -> the same. Raises ValueError on a mismatch. Shazeer, arXiv
    2002.05202.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"silu_mul: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype}: "
            "wanted one shape and dtype"
        )
    return torch.nn.functional.silu(gate) * up


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
