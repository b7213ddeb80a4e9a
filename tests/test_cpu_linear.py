"""Compiled products and embedding lookups against float64, for every packing of a weight.

Two judges: a row of x with a single one picks a column of the matrix, exactly; and random rows, within what float32
sums can hold.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from duolocal.kernels.matrix import PACKINGS, Packing
from duolocal.quant.gguf import GGUFWeight
from duolocal.quant.weight import Linear, Weight
from tests.compiled import (
    DENSE,
    GGUF_KINDS,
    THREADS,
    UNIT,
    compiled,
    compiled_kernels,
    decoded,
    normal,
    poisoned,
    random_weight,
    surrounded,
)

pytestmark = compiled_kernels

NUM_ROWS = (1, 2, 3, 12, 13, 31, 64)  # one row, few rows, panels; multiples of what they take at once and others


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight as packed, and what it holds."""

    weight: Weight
    values: Tensor  # float32 [out_features, in_features]

    @property
    def out_features(self) -> int:
        return self.weight.out_features

    @property
    def in_features(self) -> int:
        return self.weight.in_features

    def times(self, x: Tensor, *added: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the product with x plus what is `added`, float64, and how far a float32 result may be from it.

        n roundings of sums of either sign add up like a random walk: sqrt(n) units of the sum of all sizes. The size
        of a term is at most |x| times the row's largest weight; twice that, since a kernel may take a block's
        minimum, or a zero point, out of the sum.
        """
        exact = x.double() @ self.values.double().T
        for tensor in added:
            if tensor is not None:
                exact += tensor.double()
        size = x.double().abs().sum(1, keepdim=True) * self.values.double().abs().amax(1) + exact.abs()
        return exact, 2 * self.in_features**0.5 * UNIT * size


@cache
def matrix(packing: str, out_features: int, in_features: int, group_size: int = 32) -> Matrix:
    seed = out_features + in_features
    weight = random_weight(packing, out_features, in_features, seed=seed, group_size=group_size)
    return Matrix(weight, decoded(weight))


def matrices(packing: str) -> list[Matrix]:
    """Return matrices with sizes below, at and beyond what is worked on at once, wherever the packing allows.

    That is 32, 256 and 1024 input features, 16 or 32 output features (AWQ: 64 or 128).
    """
    if packing == "AWQ":
        grouped = (32, 32), (264, 24), (640, 128), (1100, 1100)
        return [matrix("AWQ", rows, *sizes) for sizes in grouped for rows in (8, 40, 200, 264)]
    sizes = (5, 32, 300, 1100) if packing in DENSE else (256, 1280) if packing.endswith("_K") else (32, 288, 1056)
    if packing in ("NF4", "INT8"):
        sizes = (64, 320, 1088)
    return [matrix(packing, rows, size) for size in sizes for rows in (1, 7, 40, 200)]


def assert_near(got: Tensor, wanted: tuple[Tensor, Tensor]) -> None:
    exact, limit = wanted
    assert got.dtype == torch.float32 and got.shape == exact.shape
    error = (got.double() - exact).abs()
    assert bool((error <= limit).all()), f"{tuple(got.shape)}: {(error / limit).max()} times too far"


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_column_is_the_weight_as_decoded(packing: str) -> None:
    """Rows of x with a single one: nothing else is added, so there is no rounding, in any order of summation."""
    for m in matrices(packing)[1::2]:
        ones = surrounded(torch.eye(m.in_features), offset=4)
        with poisoned():
            assert torch.equal(compiled(1).linear(ones, (Linear(m.weight),))[0], m.values.T)
            for start in range(0, m.in_features, 12):
                few = slice(start, start + 12)
                assert torch.equal(compiled(1).linear(ones[few], (Linear(m.weight),))[0], m.values.T[few])
    for i in range(m.in_features):  # of the largest
        (one,) = compiled(1).linear(ones[i : i + 1], (Linear(m.weight),))
        assert torch.equal(one[0], m.values[:, i]), i


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_products_equal_float64(packing: str, num_threads: int) -> None:
    kernels = compiled(num_threads)
    for m, num_rows in itertools.product(matrices(packing), NUM_ROWS):
        x = surrounded(normal(num_rows, m.in_features, seed=num_rows), offset=4)
        with poisoned():
            (got,) = kernels.linear(x, (Linear(m.weight),))
        assert_near(got, m.times(x))


@pytest.mark.parametrize("packing", PACKINGS)
def test_logits_are_products(packing: str) -> None:
    m = matrices(packing)[-1]
    for num_rows in NUM_ROWS:
        x = normal(num_rows, m.in_features)
        with poisoned():
            assert torch.equal(compiled(2).logits(x, m.weight), compiled(2).linear(x, (Linear(m.weight),))[0])


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_bias_and_residual_are_added(packing: str, num_rows: int) -> None:
    for m in matrices(packing)[-4:]:
        x = normal(num_rows, m.in_features)
        bias = surrounded(normal(m.out_features, seed=1, scale=100.0), offset=4)
        residual = surrounded(normal(num_rows, m.out_features, seed=2, scale=100.0), offset=4)
        for b, r in ((bias, None), (None, residual), (bias, residual)):
            with poisoned():
                (got,) = compiled(2).linear(x, (Linear(m.weight, b),), residual=r)
            assert_near(got, m.times(x, b, r))


# Sizes and packings side by side, as q, k and v of a Q4_K_M file have them, and every number of layers.
TOGETHER: tuple[tuple[tuple[Packing, int], ...], ...] = (
    (("AWQ", 200), ("F16", 7), ("Q6_K", 64), ("Q4_0", 1)),
    (("F32", 1), ("BF16", 1), ("Q5_0", 1)),
    (("Q4_K", 40), ("Q6_K", 7)),
    (("NF4", 40), ("F16", 7), ("INT8", 33)),
)


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("kinds", TOGETHER, ids=lambda kinds: "+".join(packing for packing, _ in kinds))
def test_layers_of_one_call_do_not_mix(kinds: Sequence[tuple[str, int]], num_rows: int, num_threads: int) -> None:
    x = surrounded(normal(num_rows, 512), offset=4)
    parts = [matrix(packing, rows, 512) for packing, rows in kinds]
    biases = [normal(m.out_features, seed=i) if i % 2 else None for i, m in enumerate(parts)]
    layers = [Linear(m.weight, bias) for m, bias in zip(parts, biases, strict=True)]
    with poisoned():
        results = compiled(num_threads).linear(x, layers)
    assert len(results) == len(layers)
    for got, m, bias in zip(results, parts, biases, strict=True):
        assert_near(got, m.times(x, bias))


@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_the_number_of_threads_changes_no_bit(num_rows: int) -> None:
    """Threads take whole outputs: how many there are does not change the order of any sum."""
    for packing in PACKINGS:
        m = matrices(packing)[-1]
        x = normal(num_rows, m.in_features)
        alone, *others = (compiled(num_threads).linear(x, (Linear(m.weight),))[0] for num_threads in THREADS)
        assert all(torch.equal(alone, other) for other in others), packing


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("packing", [packing for packing in PACKINGS if packing != "AWQ"])
def test_embedding_rows_are_the_weight_as_decoded(packing: str, num_threads: int) -> None:
    for m in matrices(packing):
        for count in (0, 1, 2, 33):
            ids = torch.randint(0, m.out_features, (count,), generator=torch.Generator().manual_seed(count))
            with poisoned():
                got = compiled(num_threads).embed(m.weight, ids)
            assert torch.equal(got, m.values[ids])


@pytest.mark.parametrize("packing", DENSE)
def test_dense_rows_of_a_file_may_begin_at_any_byte(packing: str) -> None:
    values = normal(9, 45).to(DENSE[packing])
    kind = GGUF_KINDS[packing]
    rows = torch.full((9, kind.row_bytes(45) + 1), 0xFF, dtype=torch.uint8)
    rows[:, 1:] = values.view(torch.uint8)
    weight = GGUFWeight(surrounded(rows, offset=0)[:, 1:], kind, 45)
    m = Matrix(weight, values.float())
    assert torch.equal(compiled(2).embed(weight, torch.arange(9)), m.values)
    for num_rows in (1, 4, 20):
        x = normal(num_rows, 45)
        assert_near(compiled(2).logits(x, weight), m.times(x))


def test_no_rows_give_no_rows() -> None:
    (got,) = compiled(2).linear(torch.empty(0, 32), (Linear(random_weight("Q8_0", 7, 32)),))
    assert got.shape == (0, 7)


@pytest.mark.parametrize("num_rows", [1, 4, 20])
def test_x_may_be_a_part_of_wider_rows(num_rows: int) -> None:
    m = matrix("Q5_1", 40, 64)
    wide = torch.full((num_rows, 99), float("nan"))
    wide[:, 11:75] = x = normal(num_rows, 64)
    with poisoned():
        (got,) = compiled(2).linear(wide[:, 11:75], (Linear(m.weight),))
    assert_near(got, m.times(x))


def test_what_does_not_fit_is_refused() -> None:
    kernels = compiled(1)
    weight = random_weight("Q8_0", 7, 32)
    x, plain = torch.ones(2, 32), Linear(weight)
    for wrong in (torch.ones(2, 31), torch.ones(2, 64), torch.ones(32), torch.ones(1, 2, 32)):
        with pytest.raises(ValueError, match="in_features 32"):
            kernels.linear(wrong, (plain,))
        with pytest.raises(ValueError, match="in_features 32"):
            kernels.logits(wrong, weight)
    with pytest.raises(ValueError, match="in_features 64"):
        kernels.linear(x, (plain, Linear(random_weight("Q8_0", 7, 64))))
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=f"{dtype} on cpu"):
            kernels.linear(x.to(dtype), (plain,))
        with pytest.raises(ValueError, match=f"{dtype} on cpu"):
            kernels.linear(x, (Linear(weight, torch.zeros(7, dtype=dtype)),))
        with pytest.raises(ValueError, match=f"{dtype} on cpu"):
            kernels.linear(x, (plain,), residual=torch.zeros(2, 7, dtype=dtype))
    for shape in ((2, 8), (1, 7), (7,), (7, 2)):
        with pytest.raises(ValueError, match=r"wanted \(2, 7\)"):
            kernels.linear(x, (plain,), residual=torch.zeros(shape))


@pytest.mark.parametrize("shape", [(6,), (8,), (1,), (1, 7), ()])
def test_a_bias_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"bias .* wanted \[out_features 7\]"):
        compiled(1).linear(torch.ones(2, 32), (Linear(random_weight("Q8_0", 7, 32), torch.zeros(shape)),))
