"""Regrouped weights decode to the bits of the original, whatever the format, the shape and the chunk."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duolocal.kernels.matrix import GROUPED_ORDER, GroupedMatrix
from duolocal.quant import grouped
from duolocal.quant.awq import AWQWeight
from duolocal.quant.gguf import GGUFWeight
from duolocal.quant.grouped import GroupedWeight, group
from duolocal.quant.weight import Weight
from tests.compiled import DENSE, GGUF_KINDS, decoded, random_weight

FORMATS = ("Q4_0", "Q4_1", "Q8_0", "AWQ")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def regrouped(weight: Weight) -> GroupedWeight:
    result = group(weight)
    assert isinstance(result, GroupedWeight)
    return result


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32)  # tells 0 from -0


@given(
    name=st.sampled_from(FORMATS),
    rows=st.integers(1, 6),
    groups=st.integers(1, 5),
    runs=st.integers(1, 4),
    chunk=st.sampled_from((1, 300, 1 << 22)),
    seed=st.integers(0, 1000),
)
def test_values_are_the_originals_bit_for_bit(
    name: str, rows: int, groups: int, runs: int, chunk: int, seed: int
) -> None:
    weight = random_weight(name, 8 * rows, 32 * runs * groups, seed=seed, group_size=32 * runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "_CHUNK_ELEMENTS", chunk)
        found = regrouped(weight)
        whole = found.dequantize(torch.float32)
    exact = decoded(weight)
    assert torch.equal(bits(whole), bits(exact))
    for dtype in DTYPES:
        assert torch.equal(found.dequantize(dtype), exact.to(dtype))
    index = torch.tensor([8 * rows - 1, 0, 0])
    assert torch.equal(found.rows(index, torch.float16), exact[index].half())
    assert torch.equal(found.row_range(1, 8 * rows - 1, torch.float16), exact[1:-1].half())
    assert found.row_range(3, 3, torch.float32).shape == (0, weight.in_features)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_kept(name: str) -> None:
    weight = random_weight(name, 16, 192, group_size=64)
    found = regrouped(weight)
    assert (found.out_features, found.in_features, found.format) == (16, 192, weight.format)
    matrix = found.matrix
    assert (matrix.bits, matrix.zero) == {"Q4_0": (4, 8), "Q4_1": (4, 0), "Q8_0": (8, 128), "AWQ": (4, 0)}[name]
    assert (matrix.zeros is not None) == (name == "AWQ") and (matrix.minima is not None) == (name == "Q4_1")
    assert matrix.group_size == (64 if name == "AWQ" else 32)
    zeros = 16 * 3 // 2 if name == "AWQ" else 0  # a byte each, where the file has four bits
    assert found.nbytes == weight.nbytes + zeros
    with pytest.raises(AssertionError, match="no packing"):
        found.packed()


@pytest.mark.parametrize("bits_per_code", [4, 8])
def test_the_order_of_bytes_is_the_one_documented(bits_per_code: int) -> None:
    codes = torch.arange(32) % 16 if bits_per_code == 4 else torch.arange(16) + 100
    order = list(GROUPED_ORDER)
    packed = codes[:16][order] | (codes[16:][order] << 4 if bits_per_code == 4 else 0)
    packed = packed.to(torch.uint8).repeat(1, 8 // bits_per_code)[:, : 32 * bits_per_code // 8]
    if bits_per_code == 8:
        packed = torch.cat((packed[:, :16], packed[:, :16]), dim=1)
        codes = codes.repeat(2)
    matrix = GroupedMatrix(packed[:, : 4 * bits_per_code].contiguous(), torch.ones(1, 1).half(), bits_per_code)
    assert torch.equal(GroupedWeight(matrix, "x").dequantize(torch.float32), codes.float()[None])


def test_extreme_scales_codes_and_zeros() -> None:
    """Subnormal and largest scales, both signs; every code; AWQ zeros 0 and 15."""
    weight = random_weight("AWQ", 16, 64)
    assert isinstance(weight, AWQWeight)
    scales = torch.tensor([6e-8, -6e-8, 65504.0, -65504.0, 0.0, 1.0, 2.0**-14, -1.0]).half().repeat(2, 2)
    zeros = torch.tensor([[0, -1], [-1, 0]], dtype=torch.int32)
    weight = AWQWeight(weight.qweight, zeros, scales)
    assert torch.equal(bits(regrouped(weight).dequantize(torch.float32)), bits(weight.dequantize(torch.float32)))


def test_other_weights_stay_as_they_are() -> None:
    others = [random_weight(name, 8, 256) for name in (*DENSE, "Q4_K", "Q5_0", "Q6_K")]
    others.append(random_weight("AWQ", 8, 48, group_size=16))
    assert all(group(weight) is weight for weight in others)
    kind = GGUF_KINDS["F16"]
    raw = GGUFWeight(torch.zeros(4, 64, dtype=torch.uint8), kind, 32)
    assert group(raw) is raw
