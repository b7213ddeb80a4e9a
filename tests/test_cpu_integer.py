"""Compiled products of integers: activations in 8 bits, quantized token by token, against float64.

The judge quantizes x as integer.h says, in float32, and multiplies in float64 with the weight as decoded.
"""

import itertools

import pytest
import torch
from torch import Tensor

from duolocal.kernels.cpu.operations import FINE_FROM, INTEGER_PACKINGS, CpuKernels
from duolocal.quant.awq import AWQWeight
from duolocal.quant.gguf import GGUFWeight
from duolocal.quant.weight import Linear
from tests.compiled import GGUF_KINDS, THREADS, compiled, compiled_kernels, normal, poisoned, random_weight, surrounded
from tests.test_cpu_linear import Matrix, assert_near, matrices, matrix

pytestmark = compiled_kernels

NUM_ROWS = (1, 2, 5, 6, 7, 11, 13, 64)  # few rows, panels; multiples of what they take at once and others


def integers(num_threads: int = 2, activations: str = "int8") -> CpuKernels:
    return CpuKernels(num_threads, activations=activations)


def activations(num_rows: int, cols: int, *, seed: int = 0) -> Tensor:
    """Return normal numbers, some far beyond the others, as a model's are; one token is 0."""
    x = normal(num_rows, cols, seed=seed)
    x[:, 5::97] *= 30.0
    if num_rows > 2:
        x[1] = 0.0
    return surrounded(x, offset=4)


def inputs(m: Matrix, x: Tensor, activations: str = "int8") -> Tensor:
    """Return what meets the matrix: x as its codes have it, or x where there are none."""
    straddles = isinstance(m.weight, AWQWeight) and m.weight.group_size % 32 > 0
    return x if straddles else quantized(x, activations)


def quantized(x: Tensor, activations: str = "int8") -> Tensor:
    """Return x [n, cols] as its codes have it, float64."""
    units = x.view(x.shape[0], -1, 32)
    most = units.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 1e-30, 127.0 / most, torch.zeros_like(most))
    codes = (units * inverse).round()
    rests = ((units * inverse - codes) * 128.0).round()
    fine = most > FINE_FROM[activations] * x.double().square().mean(1).sqrt()[:, None, None]
    return ((128 * codes + rests * fine).double() * (most.double() / (127 * 128))).view(x.shape)


@pytest.mark.parametrize("kind", FINE_FROM)
@pytest.mark.parametrize("packing", INTEGER_PACKINGS)
def test_products_equal_float64(packing: str, kind: str) -> None:
    for m, num_rows in itertools.product(matrices(packing), NUM_ROWS):
        x = activations(num_rows, m.in_features, seed=num_rows)
        with poisoned():
            (got,) = integers(activations=kind).linear(x, (Linear(m.weight),))
        assert_near(got, m.times(inputs(m, x, kind)))


@pytest.mark.parametrize("packing", INTEGER_PACKINGS)
def test_bias_residual_and_layers_side_by_side(packing: str) -> None:
    """Beside a format without codes, which sees x in float32."""
    m, dense = matrices(packing)[-1], matrix("F16", 7, matrices(packing)[-1].in_features)
    for num_rows in NUM_ROWS:
        x, bias = activations(num_rows, m.in_features), normal(m.out_features, seed=1)
        residual = normal(num_rows, m.out_features, seed=2)
        with poisoned():
            (got,) = integers().linear(x, (Linear(m.weight, bias),), residual=residual)
            of_codes, of_floats = integers().linear(x, (Linear(m.weight), Linear(dense.weight)))
        assert_near(got, m.times(inputs(m, x), bias, residual))
        assert_near(of_codes, m.times(inputs(m, x)))
        assert_near(of_floats, dense.times(x))


@pytest.mark.parametrize("packing", INTEGER_PACKINGS)
def test_a_token_gives_the_same_integers_alone_and_among_others(packing: str) -> None:
    """Scales of powers of two make every sum exact, so that one integer more or less would show."""
    rng = torch.Generator().manual_seed(1)
    weight = random_weight(packing, 40, 512, seed=3)
    if isinstance(weight, GGUFWeight):
        kind = GGUF_KINDS[packing]
        raw = weight.raw.clone().view(40, -1, kind.block_bytes)
        half = torch.tensor([2.0**-8], dtype=torch.float16).view(torch.uint8)
        for at in {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(packing, (0,)):
            raw[:, :, at : at + 2] = half
        ones = {"Q4_K": (4, [1] * 8 + [0x11] * 4), "Q5_K": (4, [1] * 8 + [0x11] * 4), "Q6_K": (192, [1] * 16)}
        if packing in ones:  # the scales and minima of its units
            at, scales = ones[packing]
            raw[:, :, at : at + len(scales)] = torch.tensor(scales, dtype=torch.uint8)
        weight = GGUFWeight(raw.view(40, -1), kind, 512)
    x = torch.randint(-127, 128, (13, 512), generator=rng).float()
    x[:, ::32] = 127.0
    x[:, 64:96] *= 32.0
    x[:, 65:96:2] += 3.0  # what needs rests
    x[:, 64] = 127.0 * 32.0
    together = integers().linear(x, (Linear(weight),))[0]
    for count in (1, 2, 5, 6):
        for start in range(0, 13 - count + 1, count):
            some = slice(start, start + count)
            got = integers().linear(x[some].contiguous(), (Linear(weight),))[0]
            if packing in ("INT8", "AWQ"):  # their scales are no powers of two
                assert (got - together[some]).abs().max() <= 1e-5 * together.abs().max()
            else:
                assert torch.equal(got, together[some]), (count, start)


@pytest.mark.parametrize("packing", INTEGER_PACKINGS)
def test_infinite_numbers_and_nan_come_out_as_in_float32(packing: str) -> None:
    m = matrices(packing)[-1]
    for num_rows in (1, 3, 13):
        x = normal(num_rows, m.in_features)
        x[0, 3] = float("inf")
        if num_rows > 1:
            x[2, 5], x[2, 40] = float("nan"), float("-inf")
        with poisoned():
            (got,) = integers().linear(x, (Linear(m.weight),))
        one_by_one = [compiled(2).linear(x[i : i + 1], (Linear(m.weight),))[0] for i in range(num_rows)]
        for i in (0, 2) if num_rows > 1 else (0,):
            if packing == "AWQ":  # whose float32 products are of other sums for one token than for several
                assert not got[i].isfinite().any()
                continue
            assert torch.equal(got[i].nan_to_num(1.5, 2.5, -2.5), one_by_one[i][0].nan_to_num(1.5, 2.5, -2.5)), i
        finite = [i for i in range(num_rows) if i not in (0, 2)]
        if finite:
            assert_near(got[finite], m.times(inputs(m, x[finite])))


@pytest.mark.parametrize("kind", FINE_FROM)
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e34])
def test_tokens_of_any_size(size: float, kind: str) -> None:
    """Below 1e-30 all is 0, as in a sum with anything else."""
    m = matrix("Q4_K", 40, 256)
    x = normal(7, 256) * size
    (got,) = integers(activations=kind).linear(x, (Linear(m.weight),))
    assert_near(got, m.times(inputs(m, x, kind)))


@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_the_number_of_threads_changes_no_bit(num_rows: int) -> None:
    for packing in INTEGER_PACKINGS:
        m = matrices(packing)[-1]
        x = activations(num_rows, m.in_features)
        alone, *others = (integers(num_threads).linear(x, (Linear(m.weight),))[0] for num_threads in THREADS)
        assert all(torch.equal(alone, other) for other in others), packing


@pytest.mark.parametrize("kind", FINE_FROM)
def test_what_a_code_loses(kind: str) -> None:
    """Half a step of 127 to the largest of 32 values; a 128th of that if it is far above the token's others."""
    x = activations(9, 512, seed=4)
    lost = (quantized(x, kind) - x.double()).abs().view(9, -1, 32)
    most = x.view(9, -1, 32).abs().amax(-1, keepdim=True).double()
    fine = most > FINE_FROM[kind] * x.double().square().mean(1).sqrt()[:, None, None]
    assert fine.any() and (kind == "int16" or not fine.all())
    assert (lost <= most / 127 * torch.where(fine, 0.5 / 128, 0.5) * (1 + 1e-2)).all()
