"""Products with grouped weights and their decoding on the GPU, against float64 and the weight as decoded in torch."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from duolocal.kernels.gpu import dequantize as dequantize_module
from duolocal.kernels.gpu import linear as linear_module
from duolocal.kernels.gpu import pointwise
from duolocal.kernels.gpu.dequantize import dequantize
from duolocal.kernels.gpu.linear import FUSED_ROWS, gated_linear, linear
from duolocal.kernels.matrix import GroupedMatrix
from duolocal.quant.grouped import GroupedWeight, group
from tests.compiled import decoded, normal, random_weight
from tests.triton_device import COMPUTE_DTYPES, DEVICE, INTERPRETED
from tests.triton_poison import poison, surrounded

FORMATS = ("Q4_0", "Q4_1", "Q8_0", "AWQ")
NUM_ROWS = (1, 2, 17, FUSED_ROWS, FUSED_ROWS + 1)
# in_features that fill no tile, one, several, and several with a rest; group sizes for AWQ.
SHAPES = ((32, 32), (576, 64), (1024, 128), (1184, 32), (1536, 96))
EPS = 1e-5


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(linear_module, "_WARPS_WANTED", 1)  # as many rows per program as large matrices have
    with poison(monkeypatch, linear_module, dequantize_module, pointwise):
        yield


@cache
def matrix(name: str, out_features: int, in_features: int, group_size: int = 32) -> tuple[GroupedMatrix, Tensor]:
    """Return a random matrix, poison around each of its planes, and its values in float64."""
    weight = random_weight(name, out_features, in_features, seed=out_features + in_features, group_size=group_size)
    found = group(weight)
    assert isinstance(found, GroupedWeight)
    planes: dict[str, Any] = {
        plane: surrounded(getattr(found.matrix, plane).to(DEVICE))
        for plane in ("codes", "scales", "zeros", "minima")
        if getattr(found.matrix, plane) is not None
    }
    return replace(found.matrix, **planes), decoded(weight).double().to(DEVICE)


def tensor(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return surrounded(normal(*shape, seed=seed, scale=scale).to(dtype).to(DEVICE))


def assert_near(got: Tensor, exact: Tensor, x: Tensor, values: Tensor, dtype: torch.dtype | None = None) -> None:
    """Fail unless `got` is x valuesᵀ (with what was added: `exact`) within the roundings that are allowed.

    The result: one to its dtype, and one more for a residual that the library's product does not take. The weight: one
    to x's dtype where it is decoded to that, random in sign: sqrt(n) of them. Float32 sums: sqrt(n) units, 2^8 times
    that for the start of a sum of 4-bit codes (see `linear.py`), of the sum of all sizes.
    """
    dtype = x.dtype if dtype is None else dtype
    assert got.dtype == dtype and got.shape == exact.shape
    norm = x.double().norm(dim=1, keepdim=True)
    top = values.abs().amax(1)
    limit = 4 * norm * top * (torch.finfo(x.dtype).eps / 2 if x.shape[0] > 1 else 0.0)
    limit = limit + 2.0**-24 * (x.shape[1] ** 0.5 + 2**8) * norm * top * 2
    limit = limit + 2.0 * (torch.finfo(dtype).eps / 2) * (exact.abs() + limit)
    error = (got.double() - exact).abs()
    assert bool((error <= limit).all()), f"{tuple(got.shape)}: {float((error / limit).max())} times too far"


def normed(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


@pytest.mark.parametrize("dtype", COMPUTE_DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_decoding_is_exact(name: str, dtype: torch.dtype) -> None:
    for in_features, group_size in SHAPES:
        m, values = matrix(name, 8, in_features, group_size)
        assert torch.equal(dequantize(m, dtype), values.to(dtype))
    assert torch.equal(dequantize(m, dtype, start=3, stop=6), values[3:6].to(dtype))
    assert dequantize(m, dtype, start=3, stop=3).shape == (0, in_features)


@pytest.mark.parametrize("name", FORMATS)
def test_every_column_is_the_weight_as_decoded(name: str) -> None:
    """Rows of x with a single one: a feature that is read from the wrong place shows as another number."""
    m, values = matrix(name, 8, 64, 32)
    ones = torch.eye(64, dtype=torch.float16, device=DEVICE)
    for start in range(0, 64, FUSED_ROWS):
        (got,) = linear(ones[start : start + FUSED_ROWS], ((m, None),))
        assert torch.equal(got, values.T[start : start + FUSED_ROWS].half())
    for i in range(0, 64, 5):
        (got,) = linear(ones[i : i + 1], ((m, None),), out_dtype=torch.float32)
        # 1 + c/256 less 1 is exact; with a scale of at most 0.02 a float32 sum loses nothing that a half holds.
        assert bool(((got[0].double() - values[:, i]).abs() <= 2.0**-20 * values[:, i].abs()).all())


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", COMPUTE_DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_products_equal_float64(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, (in_features, group_size) in enumerate(SHAPES):
        m, values = matrix(name, (8, 40, 72)[i % 3], in_features, group_size)
        monkeypatch.setattr(linear_module, "_WARPS_WANTED", (1, 20, 1000)[i % 3])  # one, two or four rows of a tile
        for num_rows in (1, NUM_ROWS[1 + i % 4]):
            x = tensor(num_rows, in_features, dtype=dtype, seed=num_rows)
            (got,) = linear(x, ((m, None),))
            assert_near(got, x.double() @ values.T, x, values)


@pytest.mark.cover(1)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("name", ["AWQ", "Q8_0"])
def test_layers_with_bias_share_a_launch(name: str, num_rows: int) -> None:
    """Three of different sizes, none a multiple of what a program takes, as q, k and v; float32 results too."""
    dtype = COMPUTE_DTYPES[0]
    x = tensor(num_rows, 192, dtype=dtype, seed=3)
    rows = (72, 8, 16) if name == "AWQ" else (67, 5, 18)
    layers, expected = [], []
    for i, size in enumerate(rows):
        m, values = matrix(name, size, 192, 64)
        bias = tensor(size, dtype=dtype, seed=i, scale=5.0)
        layers.append((m, bias))
        expected.append((x.double() @ values.T + bias.double(), values))
    for count, out_dtype in ((1, None), (2, None), (3, torch.float32)):
        results = linear(x, layers[:count], out_dtype=out_dtype)
        assert len(results) == count
        for got, (exact, values) in zip(results, expected, strict=False):
            assert got.dtype == (dtype if out_dtype is None else out_dtype)
            if num_rows > FUSED_ROWS:  # the library's product is rounded to x's dtype before it is widened
                assert_near(got.to(dtype), exact, x, values)
            else:
                assert_near(got, exact, x, values, out_dtype)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_layers_of_different_kinds(num_rows: int) -> None:
    dtype = COMPUTE_DTYPES[0]
    x = tensor(num_rows, 128, dtype=dtype)
    parts = [matrix("Q4_0", 9, 128), matrix("Q4_1", 20, 128), matrix("Q8_0", 33, 128)]
    biases = [None, tensor(20, dtype=dtype), None]
    results = linear(x, [(m, bias) for (m, _), bias in zip(parts, biases, strict=True)])
    for got, (_, values), bias in zip(results, parts, biases, strict=True):
        assert_near(got, x.double() @ values.T + (0.0 if bias is None else bias.double()), x, values)


@pytest.mark.cover(1)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("name", ["Q4_1", "AWQ"])
def test_residual_is_added(name: str, num_rows: int) -> None:
    dtype = COMPUTE_DTYPES[0]
    m, values = matrix(name, 40, 576, 64)
    x = tensor(num_rows, 576, dtype=dtype)
    residual = tensor(num_rows, 40, dtype=dtype, seed=1, scale=20.0)
    (got,) = linear(x, ((m, None),), residual=residual)
    assert_near(got, x.double() @ values.T + residual.double(), x, values)


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", COMPUTE_DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_fused_norm_is_the_norm(name: str, num_rows: int, dtype: torch.dtype) -> None:
    """Also of an x whose product with the norm's weight would be beyond float16."""
    m, values = matrix(name, 40, 576)
    weight = tensor(576, dtype=dtype, seed=2, scale=3.0)
    for scale in (1e-3, 1.0, 8000.0):
        x = tensor(num_rows, 576, dtype=dtype, seed=4, scale=scale)
        exact = normed(x, weight)
        (got,) = linear(x, ((m, None),), norm=(weight, EPS))
        assert_near(got, exact @ values.T, exact.to(dtype), values)


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", COMPUTE_DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("kinds", [("AWQ", "AWQ"), ("Q4_1", "Q4_1"), ("Q8_0", "Q8_0"), ("Q4_0", "Q8_0")], ids=str)
def test_gated(kinds: tuple[str, str], num_rows: int, dtype: torch.dtype) -> None:
    (gate, gate_values), (up, up_values) = (
        matrix(name, size, 192, 64) for name, size in zip(kinds, (72, 72), strict=True)
    )
    if kinds[0] == "AWQ":
        up, up_values = matrix("Q4_0", 72, 192)[0], matrix("Q4_0", 72, 192)[1]
        zeros = torch.full((72, 6), 8, dtype=torch.uint8, device=DEVICE)
        up = replace(up, zero=0, zeros=zeros)
        gate, gate_values = matrix("AWQ", 72, 192, 32)
    x, weight = tensor(num_rows, 192, dtype=dtype), tensor(192, dtype=dtype, seed=2)
    biases = [tensor(72, dtype=dtype, seed=i) for i in (5, 6)] if num_rows % 2 else [None, None]
    got = gated_linear(x, (gate, biases[0]), (up, biases[1]), norm=(weight, EPS))
    wide = normed(x, weight)
    a, b = wide @ gate_values.T, wide @ up_values.T
    if biases[0] is not None and biases[1] is not None:
        a, b = a + biases[0].double(), b + biases[1].double()
    exact = a / (1 + (-a).exp()) * b
    # Errors of gate and up, each as of a product, times what they are multiplied with; silu's slope is at most 1.1.
    unit = torch.finfo(dtype).eps / 2
    size = wide.norm(dim=1, keepdim=True)
    error_a = (4 * unit + 2.0**-14) * size * gate_values.abs().amax(1) + 2 * unit * a.abs()
    error_b = (4 * unit + 2.0**-14) * size * up_values.abs().amax(1) + 2 * unit * b.abs()
    limit = 1.1 * error_a * (b.abs() + error_b) + a.abs() * error_b + 2 * unit * exact.abs()
    assert got.shape == exact.shape and got.dtype == dtype
    assert bool(((got.double() - exact).abs() <= limit).all())


def test_the_crossover_changes_only_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows as one, few and many: each within the limit of one exact product; a scratch in parts too."""
    dtype = COMPUTE_DTYPES[0]
    m, values = matrix("AWQ", 72, 192, 64)
    x = tensor(9, 192, dtype=dtype)
    exact = x.double() @ values.T
    (few,) = linear(x, ((m, None),))
    alone = torch.cat([linear(x[i : i + 1], ((m, None),))[0] for i in range(0, 9, 4)])
    monkeypatch.setattr(linear_module, "FUSED_ROWS", 0)
    (many,) = linear(x, ((m, None),))
    bias, residual = tensor(72, dtype=dtype), tensor(9, 72, dtype=dtype)
    (whole,) = linear(x, ((m, bias),), residual=residual)
    monkeypatch.setattr(linear_module, "SCRATCH_ELEMENTS", 192 * 25)
    (parts,) = linear(x, ((m, bias),), residual=residual)
    for got in (few, many):
        assert_near(got, exact, x, values)
    assert_near(alone, exact[::4], x[::4], values)
    for got in (whole, parts):
        assert_near(got, exact + bias.double() + residual.double(), x, values)


def test_no_rows_give_no_rows() -> None:
    m, _ = matrix("Q8_0", 9, 64)
    x = torch.empty(0, 64, dtype=torch.float16, device=DEVICE)
    assert linear(x, ((m, None),))[0].shape == (0, 9)
    assert gated_linear(x, (m, None), (m, None)).shape == (0, 9)


@pytest.mark.skipif(not INTERPRETED, reason="takes the interpreter's program numbers")
@pytest.mark.parametrize("num_rows", [1, 3])
def test_offsets_beyond_32_bits(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows of a matrix of more than 2^31 words of codes, by the last program alone; only they take memory."""
    in_features, rows = 1 << 13, (1 << 21) + 4
    tall, values = matrix("Q4_0", 4, in_features)
    codes = torch.empty((rows, in_features // 2), dtype=torch.uint8)
    scales = torch.empty((rows, in_features // 32), dtype=torch.float16)
    assert (rows - 4) * in_features // 8 >= 2**31
    codes[-4:], scales[-4:] = tall.codes, tall.scales
    block = 8 if num_rows == 1 else 32  # rows per program: the last four are the last program's
    number = InterpreterBuilder.create_get_program_id

    def last(self: InterpreterBuilder, axis: int) -> TensorHandle:
        handle = number(self, axis)
        return TensorHandle(handle.data + rows // block, handle.dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", last)
    one_program = SimpleNamespace(cdiv=lambda size, step: 1, next_power_of_2=triton.next_power_of_2)
    monkeypatch.setattr(linear_module, "triton", one_program)
    x = tensor(num_rows, in_features, dtype=torch.float16)
    (got,) = linear(x, ((GroupedMatrix(codes, scales, 4, zero=8), None),))
    assert got[:, :-4].isnan().all()
    assert_near(got[:, -4:], x.double() @ values.T, x, values)
