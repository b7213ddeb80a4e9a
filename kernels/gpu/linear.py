"""Products with grouped weights, by the number of rows of x.

One row, as in decoding: `linear_vector_kernel` reads codes straight into float32 sums and takes RMSNorm of x along. A
few rows: `linear_rows_kernel` decodes a tile of the weight to x's dtype and multiplies in tensor cores. More: each
matrix is decoded once into a scratch and multiplied by the library.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from duolocal.kernels.gpu.dequantize import code_mask, dequantize, run_features
from duolocal.kernels.gpu.linear_rows import linear_rows_kernel
from duolocal.kernels.gpu.linear_vector import linear_vector_kernel
from duolocal.kernels.gpu.pointwise import rms_norm, silu_mul
from duolocal.kernels.matrix import GroupedMatrix

# The most rows of x that decode the weight tile by tile (not measured). Beyond, decoding all of it once costs less.
# A tile of 64 rows would be a wgmma on sm_90, which triton 3.6 fails to compile from a reshaped operand.
FUSED_ROWS = 32
# Numbers of a matrix that are dense at a time: 256 MiB of 16 bits.
SCRATCH_ELEMENTS = 1 << 27
# Outputs per program of `linear_rows_kernel`.
_ROWS_BLOCK_N = 32
# What keeps a large GPU busy with one row of x: 132 multiprocessors, 8 warps each.
_WARPS_WANTED = 1024
# Left alone, ptxas takes 254 registers for some shapes: 8 warps on a multiprocessor. Fewer than 192 spill on sm_80.
_VECTOR_REGISTERS = 192

Layer = tuple[GroupedMatrix, Tensor | None]  # the weight and the bias [out_features]
Norm = tuple[Tensor, float]  # of RMSNorm: the weight [in_features], epsilon


def linear(
    x: Tensor,
    layers: Sequence[Layer],
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Return x Wᵀ + b of every layer, plus `residual` for a single one; with `norm`, of RMSNorm of x.

    x [n, in_features] contiguous, one to three layers -> [n, out_features] each, in x's dtype or `out_dtype`;
    residual [n, out_features]. Up to FUSED_ROWS rows, layers of one kind are one launch.
    """
    assert 1 <= len(layers) <= 3 and (residual is None or len(layers) == 1)
    n = _checked(x, layers, norm)
    dtype = x.dtype if out_dtype is None else out_dtype
    if residual is not None:
        assert residual.shape == (n, layers[0][0].out_features) and residual.is_contiguous()
    if n > FUSED_ROWS:
        x = x if norm is None else _normed(x, norm)
        return tuple(_dense(x, layer, residual, dtype) for layer in layers)
    outs = tuple(torch.empty((n, matrix.out_features), dtype=dtype, device=x.device) for matrix, _ in layers)
    if len({_kind(layer) for layer in layers}) == 1:
        _launch(x, layers, outs, norm=norm, residual=residual, gated=False)
    else:
        for layer, out in zip(layers, outs, strict=True):
            _launch(x, (layer,), (out,), norm=norm, residual=residual, gated=False)
    return outs


def gated_linear(x: Tensor, gate: Layer, up: Layer, *, norm: Norm | None = None) -> Tensor:
    """Return silu(x gateᵀ) * (x upᵀ) [n, out_features] for x [n, in_features]; with `norm`, of RMSNorm of x.

    Up to FUSED_ROWS rows, gate and up of one kind are one launch.
    """
    n = _checked(x, (gate, up), norm)
    assert gate[0].out_features == up[0].out_features
    if n > FUSED_ROWS or _kind(gate) != _kind(up):
        return silu_mul(*linear(x, (gate, up), norm=norm))
    out = torch.empty((n, gate[0].out_features), dtype=x.dtype, device=x.device)
    _launch(x, (gate, up), (out,), norm=norm, residual=None, gated=True)
    return out


def _checked(x: Tensor, layers: Sequence[Layer], norm: Norm | None) -> int:
    assert x.ndim == 2 and x.is_contiguous() and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    for matrix, bias in layers:
        assert matrix.in_features == x.shape[1], f"x {tuple(x.shape)}, in_features {matrix.in_features}"
        assert bias is None or (bias.shape == (matrix.out_features,) and bias.is_contiguous())
    if norm is not None:
        assert norm[0].shape == (x.shape[1],) and norm[0].dtype == x.dtype and norm[0].is_contiguous()
    return x.shape[0]


def _kind(layer: Layer) -> tuple[object, ...]:
    """Return what must be alike for matrices to share a launch."""
    matrix, bias = layer
    return matrix.bits, matrix.group_size, matrix.zero, matrix.zeros is None, matrix.minima is None, bias is None


def _normed(x: Tensor, norm: Norm) -> Tensor:
    out = rms_norm(x, norm[0], eps=norm[1])
    assert isinstance(out, Tensor)
    return out


def _dense(x: Tensor, layer: Layer, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Decode the matrix, a part at a time if it is very large, and multiply."""
    matrix, bias = layer
    step = max(1, SCRATCH_ELEMENTS // matrix.in_features)
    if matrix.out_features <= step:
        out = torch.nn.functional.linear(x, dequantize(matrix, x.dtype), bias)
    else:
        out = torch.empty((x.shape[0], matrix.out_features), dtype=dtype, device=x.device)
        for start in range(0, matrix.out_features, step):
            part = slice(start, min(start + step, matrix.out_features))
            weight = dequantize(matrix, x.dtype, start=part.start, stop=part.stop)
            out[:, part] = torch.nn.functional.linear(x, weight, None if bias is None else bias[part])
    return (out if residual is None else residual + out).to(dtype)


@dataclass(frozen=True)
class _VectorTile:
    """What one program of `linear_vector_kernel` takes at a time, twice."""

    rows: int
    runs: int
    num_warps: int

    @classmethod
    def of(cls, in_features: int, bits: int, out_features: int, *, gated: bool) -> "_VectorTile":
        """Choose for matrices of `out_features` in all.

        One lane per run, so that one run is one load of 16 bytes. A thread goes over several rows, which share x:
        fewer where there would not be enough programs.
        """
        num_runs = in_features // run_features(bits)
        padded = {runs: -(-num_runs // runs) * runs for runs in (128, 64, 32)}
        runs = next((runs for runs in padded if padded[runs] * 8 <= num_runs * 9), min(padded, key=lambda r: padded[r]))
        warps = runs // 32
        outputs = out_features * (2 if gated else 1)
        rows = next((rows for rows in (4, 2) if outputs // (2 * rows) * warps >= _WARPS_WANTED), 1)
        return cls(rows, runs, warps)


def _launch(
    x: Tensor,
    layers: Sequence[Layer],
    outs: Sequence[Tensor],
    *,
    norm: Norm | None,
    residual: Tensor | None,
    gated: bool,
) -> None:
    """Multiply at most FUSED_ROWS rows with layers of one kind; gated: the two of them into one result."""
    n, in_features = x.shape
    first, bits = layers[0][0], layers[0][0].bits
    sizes = [out.shape[1] for out in outs]
    if n == 0 or not sum(sizes):
        return
    if n > 1 and norm is not None:  # x times the norm's weight alone may overflow float16
        x, norm = _normed(x, norm), None
    num_runs = in_features // run_features(bits)
    three = [*layers, layers[0], layers[0]][:3]
    arrays = (
        *(matrix.codes for matrix, _ in three),
        *(matrix.scales for matrix, _ in three),
        *(matrix.offsets for matrix, _ in three),
        *(bias for _, bias in three),
        *[*outs, outs[0], outs[0]][:3],
        *[*sizes, sizes[0], sizes[0]][:3],
    )
    constants = {
        "COUNT": len(outs),
        "GATED": gated,
        "BITS": bits,
        "ZERO": first.zero,
        "GROUP_RUNS": first.group_size // run_features(bits),
    }
    if n == 1:
        tile = _VectorTile.of(in_features, bits, sum(sizes), gated=gated)
        block = tile.rows if gated else 2 * tile.rows
        linear_vector_kernel[(sum(triton.cdiv(size, block) for size in sizes),)](
            x,
            None if norm is None else norm[0],
            residual,
            *arrays,
            num_runs,
            0.0 if norm is None else norm[1],
            code_mask(bits),
            **constants,
            BLOCK_N=tile.rows,
            RUNS=tile.runs,
            EVEN=num_runs % tile.runs == 0,
            num_warps=tile.num_warps,
            maxnreg=_VECTOR_REGISTERS,
        )
        return
    block_m = max(16, triton.next_power_of_2(n))
    linear_rows_kernel[(sum(triton.cdiv(size, _ROWS_BLOCK_N) for size in sizes),)](
        x,
        residual,
        *arrays,
        n,
        num_runs,
        code_mask(bits),
        **constants,
        BLOCK_M=block_m,
        BLOCK_N=_ROWS_BLOCK_N,
        RUNS=4,
        num_warps=4,
        num_stages=3,
    )
