"""The bytes of a KV block, judged by a codec written out number by number."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duolocal.errors import SettingsError
from duolocal.kernels.blocks import BlockLayout, Plane, decode_blocks, encode_blocks, hadamard
from duolocal.quant.kv import KV_FORMATS, kv_layout

HEAD_DIMS = (16, 64, 80, 96, 128, 256)


def naive_hadamard(dim: int) -> np.ndarray:
    """The Walsh-Hadamard matrix by its definition: the sign is the parity of the common bits of row and column."""
    size = dim & -dim
    block = np.array([[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]) / math.sqrt(size)
    return np.kron(np.eye(dim // size), block)


def naive_int_round_trip(x: np.ndarray, plane: Plane) -> np.ndarray:
    """What one token of one head becomes: float64 [head_dim] -> float64 [head_dim]."""
    if plane.rotate:
        x = naive_hadamard(len(x)) @ x
    result = []
    for group in np.split(x, plane.groups):
        low = float(np.float16(group.min()))
        scale = float(np.float16((group.max() - low) / (2**plane.bits - 1)))
        for number in group:
            code = min(max(round((number - low) / (scale or 1.0)), 0), 2**plane.bits - 1)
            result.append(low + scale * code)
    return np.array(result)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_hadamard_equals_its_matrix_and_is_its_own_inverse(head_dim: int) -> None:
    x = torch.randn(3, 5, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = x @ torch.from_numpy(naive_hadamard(head_dim)).T
    torch.testing.assert_close(hadamard(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["int8", "k8v4", "int4"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_integer_formats_equal_the_naive_codec(name: str, head_dim: int) -> None:
    layout = kv_layout(name, head_dim=head_dim, dtype=torch.float64, block_size=16)
    generator = torch.Generator().manual_seed(head_dim)
    k, v = torch.randn(2, 2, 16, head_dim, dtype=torch.float64, generator=generator) * 3
    k[..., 1] += 40  # keys have outlier channels
    v[0, 3] = 0.25  # a constant token has scale 0
    records = encode_blocks(k, v, layout)
    for which, plane, x in (("key", layout.key, k), ("value", layout.value, v)):
        decoded = decode_blocks(records, layout, which, dtype=torch.float64)  # type: ignore[arg-type]
        expected = np.stack([[naive_int_round_trip(token.numpy(), plane) for token in block] for block in x])
        torch.testing.assert_close(decoded, torch.from_numpy(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "dtype"), [("16", torch.float16), ("16", torch.bfloat16), ("32", torch.float32)])
def test_float_formats_keep_every_bit(name: str, dtype: torch.dtype) -> None:
    layout = kv_layout(name, head_dim=64, dtype=dtype)
    k, v = torch.randn(2, 3, 64, 64).to(dtype)
    records = encode_blocks(k, v, layout)
    assert torch.equal(decode_blocks(records, layout, "key", dtype=dtype), k)
    assert torch.equal(decode_blocks(records, layout, "value", dtype=dtype), v)


def test_float16_saturates_instead_of_overflowing() -> None:
    layout = kv_layout("16", head_dim=16, dtype=torch.float32, block_size=16)
    k = torch.full((1, 16, 16), 1e6)
    assert decode_blocks(encode_blocks(k, -k, layout), layout, "value", dtype=torch.float32).min() == -65504


def test_fp8_error_is_within_half_a_step() -> None:
    layout = kv_layout("fp8", head_dim=64, dtype=torch.float32)
    k = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0))
    decoded = decode_blocks(encode_blocks(k, k, layout), layout, "key", dtype=torch.float32)
    # e4m3 has 3 mantissa bits: half a step is 2^-4 of the number; subnormals and the fp16 scale add a little.
    largest = k.abs().amax(-1, keepdim=True)
    assert ((decoded - k).abs() <= k.abs() * 2**-4 * 1.01 + largest * 2**-14).all()


@given(
    name=st.sampled_from(KV_FORMATS),
    head_dim=st.sampled_from(HEAD_DIMS),
    block_size=st.sampled_from([16, 32, 64, 128]),
    magnitude=st.sampled_from([0.0, 1e-2, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_a_block_is_a_function_of_its_own_tokens(
    name: str, head_dim: int, block_size: int, magnitude: float, seed: int
) -> None:
    """Neighbouring blocks, and how many are encoded at once, change no byte; decoding stays finite and close."""
    layout = kv_layout(name, head_dim=head_dim, dtype=torch.float32, block_size=block_size)
    assert layout.record_bytes % 16 == 0
    k, v = torch.randn(2, 3, block_size, head_dim, generator=torch.Generator().manual_seed(seed)) * magnitude
    together = encode_blocks(k, v, layout)
    assert together.shape == (3, layout.record_bytes)
    assert torch.equal(together[1:2], encode_blocks(k[1:2], v[1:2], layout))
    for which, plane, x in (("key", layout.key, k), ("value", layout.value, v)):
        decoded = decode_blocks(together, layout, which, dtype=torch.float32)  # type: ignore[arg-type]
        wanted = hadamard(x) if plane.rotate else x
        step = {32: 0, 16: 2**-10, 8: 2**-4 if plane.kind == "fp8" else 2 / 255, 4: 2 / 15}[plane.bits]
        allowed = wanted.abs().amax(-1, keepdim=True) * step * 1.01 + 1e-6  # a float16 scale ends at 6e-8
        assert ((decoded - wanted).abs() <= allowed).all()


def test_bytes_per_token_are_those_of_the_design() -> None:
    """4.25 bits per number at head_dim 128: two planes of 64 bytes of codes and 4 of scale and minimum."""
    assert kv_layout("int4", head_dim=128, dtype=torch.bfloat16).bytes_per_token == 2 * (64 + 4)
    assert kv_layout("16", head_dim=128, dtype=torch.bfloat16).bytes_per_token == 2 * 256


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(
        SettingsError, match="unknown KV format 'int3': choose auto or one of 32, 16, int8, fp8, k8v4, int4"
    ):
        kv_layout("int3", head_dim=64, dtype=torch.float32)


def test_layout_spans_cover_the_record_without_overlap() -> None:
    layout = BlockLayout(Plane("int", 8), Plane("int", 4, groups=2), block_size=16, head_dim=64)
    spans = sorted((s.start, s.stop) for which in ("key", "value") for s in layout.spans(which))
    assert spans[0][0] == 0
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert layout.record_bytes - spans[-1][1] < 16
