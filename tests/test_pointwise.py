"""RMSNorm, rotary embedding and the SiLU gate against naive float64 loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duolocal.kernels.pointwise import rms_norm, rotary_embedding, silu_mul

# Relative to the largest value: a few roundings of the dtype (unit roundoff 2^-53, 2^-24, 2^-8), sums
# included.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}
DTYPES = st.sampled_from(list(TOLERANCE))
SEEDS = st.integers(0, 2**31)


def normal(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_near(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    limit = TOLERANCE[dtype] * max(1.0, wanted.abs().max().item()) if wanted.numel() else 0.0
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=limit)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 5),
    size=st.integers(1, 40),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_rms_norm_matches_the_definition(rows: int, size: int, scale: float, dtype: torch.dtype, seed: int) -> None:
    x, weight = normal(seed, rows, size, dtype=dtype) * scale, normal(seed + 1, size, dtype=dtype)
    wanted = torch.empty(rows, size, dtype=torch.float64)
    for row in range(rows):
        values = x[row].double().tolist()
        root = math.sqrt(sum(value * value for value in values) / size + 1e-5)
        for column in range(size):
            wanted[row, column] = values[column] / root * weight[column].item()
    assert_near(rms_norm(x, weight, eps=1e-5), wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_rounds_to_16_bits_only_once(dtype: torch.dtype) -> None:
    x = normal(0, 8, 512, dtype=dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(rms_norm(x, torch.ones(512, dtype=dtype), eps=1e-5), exact.to(dtype))


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 5), heads=st.integers(1, 4), half=st.integers(1, 20), dtype=DTYPES, seed=SEEDS)
def test_rotary_embedding_matches_the_definition(
    tokens: int, heads: int, half: int, dtype: torch.dtype, seed: int
) -> None:
    x = normal(seed, tokens, heads, 2 * half, dtype=dtype)
    angles = normal(seed + 1, tokens, half, dtype=torch.float64)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    wanted = torch.empty(tokens, heads, 2 * half, dtype=torch.float64)
    for token in range(tokens):
        for head in range(heads):
            for pair in range(half):
                a, b = x[token, head, pair].item(), x[token, head, pair + half].item()
                c, s = cos[token, pair].item(), sin[token, pair].item()
                wanted[token, head, pair] = a * c - b * s
                wanted[token, head, pair + half] = a * s + b * c
    assert_near(rotary_embedding(x, cos, sin), wanted, dtype)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 5), size=st.integers(1, 40), dtype=DTYPES, seed=SEEDS)
def test_silu_mul_matches_the_definition(rows: int, size: int, dtype: torch.dtype, seed: int) -> None:
    gate, up = normal(seed, rows, size, dtype=dtype) * 4, normal(seed + 1, rows, size, dtype=dtype)
    wanted = torch.empty(rows, size, dtype=torch.float64)
    for row in range(rows):
        for column in range(size):
            g = gate[row, column].item()
            wanted[row, column] = g / (1 + math.exp(-g)) * up[row, column].item()
    assert_near(silu_mul(gate, up), wanted, dtype)


def test_mismatched_shapes_and_dtypes_are_refused_with_both_named() -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(5,\)"):
        rms_norm(x, torch.zeros(5), eps=1e-5)
    with pytest.raises(ValueError, match=r"float32.*float64"):
        rms_norm(x, torch.zeros(4, dtype=torch.float64), eps=1e-5)
    heads, angles = torch.zeros(3, 2, 4), torch.zeros(3, 2)
    for bad_x, bad_cos, bad_sin in (
        (heads, torch.zeros(3, 4), torch.zeros(3, 4)),  # angles for head_dim, not for pairs
        (heads, torch.zeros(2, 2), torch.zeros(2, 2)),
        (heads, angles, torch.zeros(1, 2)),
        (heads, angles.double(), angles.double()),
        (torch.zeros(3, 2, 5), angles, angles),
        (torch.zeros(3, 4), angles, angles),
    ):
        with pytest.raises(ValueError, match="rotary_embedding"):
            rotary_embedding(bad_x, bad_cos, bad_sin)
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5\)"):
        silu_mul(x, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="silu_mul"):
        silu_mul(x, x.double())
