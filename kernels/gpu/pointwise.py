"""RMSNorm, the SiLU gate and rotary embedding in one launch each.

What they compute stands in `duolocal.kernels.pointwise`, which judges them. Here everything is float32 between the
loads and one rounding at the end: the reference, in 16 bits, rounds once more in between (the normalised vector, the
gate, each product of the rotation), so the two may differ by a unit in the last place of the dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers per program of `silu_mul_kernel`, heads per program of `rotate_kernel`.
_BLOCK = 1024
_HEADS = 4


@triton.jit
def rms_norm_kernel(x, residual, weight, out, added, stride, residual_stride, size, eps, SIZE_PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE_PAD)
    inside = column < size
    value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(added.dtype.element_ty)
        tl.store(added + row * size + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    value = value * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, value.to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Scale every vector of `x` to root mean square 1, then by `weight`.

    x [..., n], weight [n] -> [..., n], all of one dtype. With `residual` [..., n]: return what x + residual, rounded
    to the dtype, gives, and the rounded sum.
    """
    size = weight.shape[0]
    assert weight.ndim == 1 and weight.is_contiguous() and x.shape[-1] == size and x.dtype == weight.dtype
    assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    added = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, residual_rows = _rows(x), None if residual is None else _rows(residual)
    if rows.shape[0] and size:
        rms_norm_kernel[(rows.shape[0],)](
            rows,
            residual_rows,
            weight,
            out,
            added,
            rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0),
            size,
            eps,
            SIZE_PAD=triton.next_power_of_2(size),
            num_warps=4 if size <= 4096 else 8,
        )
    return out if added is None else (out, added)


def _rows(x: Tensor) -> Tensor:
    """Return x [..., n] as [rows, n] with unit stride in the last dimension, a view wherever there is one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def silu_mul_kernel(gate, up, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, silu(g) * u, mask=inside)


@triton.jit
def silu(x):
    """Return x / (1 + e^-x) of float32; a large negative x gives -0, as e^-x is infinite."""
    return x / (1.0 + tl.exp(-x))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up; gate and up of one shape and dtype -> the same."""
    assert gate.shape == up.shape and gate.dtype == up.dtype
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if gate.numel():
        silu_mul_kernel[(triton.cdiv(gate.numel(), _BLOCK),)](gate, up, out, gate.numel(), BLOCK=_BLOCK, num_warps=4)
    return out


@triton.jit
def _rotate_heads(
    x, out, cos, sin, token, head, heads, stride, head_stride, HALF: tl.constexpr, HALF_PAD: tl.constexpr
):
    """Rotate heads `head` [n] of one token; x has strides, out is contiguous."""
    pair = tl.arange(0, HALF_PAD)
    c = tl.load(cos + token * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    inside = (head < heads)[:, None] & (pair < HALF)[None, :]
    at = token * stride + head.to(tl.int64)[:, None] * head_stride + pair[None, :]
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    to = (token * heads + head[:, None]) * (2 * HALF) + pair[None, :]
    tl.store(out + to, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + to + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads"])
def rotate_kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    num_heads,
    num_kv_heads,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks = tl.cdiv(num_heads, HEADS)
    if block < q_blocks:
        head = block * HEADS + tl.arange(0, HEADS)
        _rotate_heads(q, q_out, cos, sin, token, head, num_heads, q_stride, q_head_stride, HALF, HALF_PAD)
    else:
        head = (block - q_blocks) * HEADS + tl.arange(0, HEADS)
        _rotate_heads(k, k_out, cos, sin, token, head, num_kv_heads, k_stride, k_head_stride, HALF, HALF_PAD)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (d, d + head_dim/2) of all heads by their token's angles (half-split RoPE).

    q [n, num_heads, head_dim] and k [n, num_kv_heads, head_dim] of one dtype, with unit stride in the last dimension;
    cos, sin [n, head_dim/2] of any float dtype, contiguous -> q, k, contiguous.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    assert head_dim % 2 == 0 and k.shape == (num_tokens, num_kv_heads, head_dim) and q.dtype == k.dtype
    assert q.stride(2) == k.stride(2) == 1
    assert cos.shape == sin.shape == (num_tokens, head_dim // 2) and cos.is_contiguous() and sin.is_contiguous()
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if num_tokens:
        rotate_kernel[(num_tokens, triton.cdiv(num_heads, _HEADS) + triton.cdiv(num_kv_heads, _HEADS))](
            q,
            k,
            q_out,
            k_out,
            cos,
            sin,
            num_heads,
            num_kv_heads,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            HALF=head_dim // 2,
            HALF_PAD=triton.next_power_of_2(head_dim // 2),
            HEADS=_HEADS,
            num_warps=4,
        )
    return q_out, k_out
