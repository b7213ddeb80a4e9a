"""RMSNorm, the gate and rotary embedding of the GPU against float64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from duolocal.kernels.gpu import pointwise
from duolocal.kernels.gpu.pointwise import rms_norm, rotate, silu_mul
from tests.compiled import normal
from tests.triton_device import COMPUTE_DTYPES, DEVICE
from tests.triton_poison import poison


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with poison(monkeypatch, pointwise):
        yield


def assert_near(got: Tensor, exact: Tensor, dtype: torch.dtype, size: Tensor | float = 0.0) -> None:
    """Fail unless `got` is `exact` float64 within one rounding to `dtype` and eight float32 roundings of `size`."""
    unit = torch.finfo(dtype).eps / 2
    limit = 1.001 * unit * exact.abs() + 8 * 2.0**-24 * (exact.abs() + size) + torch.finfo(dtype).smallest_normal * unit
    assert got.dtype == dtype and got.shape == exact.shape
    error = (got.double().cpu() - exact.cpu()).abs()
    assert bool((error <= limit.cpu()).all()), float((error / limit.cpu()).max())


@pytest.mark.parametrize("dtype", COMPUTE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 576), (3, 64), (2, 5, 100), (2, 1), (0, 64), (1, 4097)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (normal(*shape, scale=3.0)).to(dtype).to(DEVICE)
    weight = normal(shape[-1], seed=1).to(dtype).to(DEVICE)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    # The mean square of n numbers: a sum in float32.
    result = rms_norm(x, weight, eps=1e-5)
    assert isinstance(result, Tensor)
    assert_near(result, exact, dtype, shape[-1] ** 0.5 * exact.abs())


@pytest.mark.parametrize("dtype", COMPUTE_DTYPES, ids=str)
def test_rms_norm_of_a_sum_and_of_strided_rows(dtype: torch.dtype) -> None:
    buffer = torch.full((3, 210), float("nan"), dtype=dtype, device=DEVICE)
    x, weight = buffer[:, 5:105], normal(100, seed=1).to(dtype).to(DEVICE)
    x.copy_(normal(3, 100))
    residual = buffer[:, 107:207]
    residual.copy_(normal(3, 100, seed=2, scale=100.0))
    normed, added = rms_norm(x, weight, eps=1e-2, residual=residual)
    assert torch.equal(added, x + residual)
    wide = added.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-2).rsqrt() * weight.double()
    assert_near(normed, exact, dtype, 10 * exact.abs())


@pytest.mark.parametrize("dtype", COMPUTE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (1, 1024), (0, 8)])
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = (normal(*shape, seed=seed, scale=4.0).to(dtype).to(DEVICE) for seed in (0, 1))
    if gate.numel() > 2:
        gate.view(-1)[0], gate.view(-1)[1] = 90.0, -90.0  # e^90 is beyond float32
    wide = gate.double()
    exact = wide / (1 + (-wide).exp()) * up.double()
    # Where e^-gate overflows, zero stands for a number below 10^-38.
    assert_near(silu_mul(gate, up), exact, dtype, exact.abs() + 1e-30)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.double().chunk(2, dim=-1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


@pytest.mark.parametrize("dtype", COMPUTE_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim"),
    [(1, 9, 3, 64), (3, 4, 4, 80), (2, 5, 1, 96), (0, 2, 1, 64)],
)
def test_rotate(num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    fused = torch.full(
        (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim), float("nan"), dtype=dtype, device=DEVICE
    )
    width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
    q = fused[:, :width].unflatten(1, (num_heads, head_dim))
    k = fused[:, width : width + kv_width].unflatten(1, (num_kv_heads, head_dim))
    q.copy_(normal(*q.shape))
    k.copy_(normal(*k.shape, seed=1))
    angles = normal(num_tokens, head_dim // 2, seed=2, scale=10.0)
    for angle_dtype in {torch.float32, dtype}:
        cos, sin = angles.cos().to(angle_dtype).to(DEVICE), angles.sin().to(angle_dtype).to(DEVICE)
        for got, x in zip(rotate(q, k, cos, sin), (q, k), strict=True):
            assert got.is_contiguous()
            assert_near(got, rotated(x, cos, sin), dtype, 1.0 * x.double().abs().amax() if x.numel() else 0.0)


def test_offsets_beyond_32_bits() -> None:
    """Rows so far apart that the offset of the last does not fit 31 bits; only what is touched takes memory."""
    far = torch.empty(2**31 + 4096, dtype=torch.float16, device=DEVICE)
    rows = far.as_strided((2, 64), (2**31 + 64, 1))
    rows.copy_(normal(2, 64))
    weight = torch.ones(64, dtype=torch.float16, device=DEVICE)
    got = rms_norm(rows, weight, eps=0.0)
    assert isinstance(got, Tensor)
    wide = rows.double()
    assert_near(got, wide * wide.square().mean(-1, keepdim=True).rsqrt(), torch.float16, 8.0)
    cos, sin = torch.zeros(2, 32, device=DEVICE), torch.ones(2, 32, device=DEVICE)
    turned, _ = rotate(rows[:, None], torch.zeros(2, 1, 64, dtype=torch.float16, device=DEVICE), cos, sin)
    assert torch.equal(turned[:, 0], torch.cat((-rows[:, 32:], rows[:, :32]), dim=1))
    heads = far.as_strided((1, 2, 64), (64, 2**31 + 64, 1))
    turned, _ = rotate(heads, torch.zeros(1, 1, 64, dtype=torch.float16, device=DEVICE), cos[:1], sin[:1])
    assert torch.equal(turned[0], torch.cat((-rows[:, 32:], rows[:, :32]), dim=1))
