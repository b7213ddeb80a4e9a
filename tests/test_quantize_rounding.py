"""Rounding in groups and AWQ's packing, against loops written from the layout alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duolocal.errors import ModelFileError
from duolocal.quant.awq import AWQWeight
from duolocal.quant.awq_pack import pack_awq, pack_nibbles
from duolocal.quant.rounding import GroupCodes, round_to_nearest, rounded
from tests import model_files


def random_codes(seed: int, out_features: int, in_features: int, group_size: int) -> GroupCodes:
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group_size
    return GroupCodes(
        codes=torch.randint(0, 16, (out_features, in_features), generator=generator, dtype=torch.uint8),
        zeros=torch.randint(0, 16, (out_features, groups), generator=generator, dtype=torch.uint8),
        scales=(torch.rand(out_features, groups, generator=generator) + 0.01).half(),
    )


def naive(weight: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes, zeros and scales by the formula, one number at a time."""
    out_features, in_features = weight.shape
    codes = np.zeros(weight.shape, dtype=np.uint8)
    zeros = np.zeros((out_features, in_features // group_size), dtype=np.uint8)
    scales = np.zeros(zeros.shape, dtype=np.float16)
    for row in range(out_features):
        for group in range(zeros.shape[1]):
            part = weight[row, group * group_size : (group + 1) * group_size]
            low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
            scale = max(np.float16((high - low) / np.float32(15)), np.float16(2**-24))
            zero = int(np.clip(np.round(-low / np.float32(scale)), 0, 15))
            scales[row, group], zeros[row, group] = scale, zero
            for i, value in enumerate(part):
                code = int(np.round(value / np.float32(scale))) + zero
                codes[row, group * group_size + i] = min(max(code, 0), 15)
    return codes, zeros, scales


@given(st.integers(0, 2**31), st.sampled_from([(8, 32, 32), (16, 64, 32), (24, 128, 64), (8, 128, 128)]))
def test_packing_is_the_layout_and_reading_undoes_it(seed: int, shape: tuple[int, int, int]):
    out_features, in_features, group_size = shape
    codes = random_codes(seed, out_features, in_features, group_size)
    packed = pack_awq(codes)
    assert torch.equal(packed.qweight, model_files.pack_awq(codes.codes.T.numpy()))
    assert torch.equal(packed.qzeros, model_files.pack_awq(codes.zeros.T.numpy()))
    assert torch.equal(packed.scales, codes.scales.T)
    assert packed.group_size == group_size
    assert all(part.is_contiguous() for part in (packed.qweight, packed.qzeros, packed.scales))
    assert torch.equal(packed.dequantize(torch.float32), codes.decode())


def test_what_is_out_of_range_is_clamped_and_leaves_its_neighbours_alone():
    values = torch.tensor([[16, -1, 3, 0, 200, 15, 7, 1]])
    packed = pack_nibbles(values)
    clamped = np.array([[15, 0, 3, 0, 15, 15, 7, 1]])
    assert torch.equal(packed, model_files.pack_awq(clamped))


@pytest.mark.parametrize("group_size", [32, 64])
def test_rounding_is_the_formula(group_size: int):
    generator = torch.Generator().manual_seed(group_size)
    weight = torch.randn(16, 128, generator=generator) * torch.logspace(-6, 2, 16)[:, None]
    weight[3] = weight[3].abs() + 1  # all positive: 0 stays in range
    weight[4] = -weight[4].abs() - 1
    weight[5] = 0
    codes = round_to_nearest(weight, group_size=group_size)
    wanted = naive(weight.numpy(), group_size)
    for found, expected in zip((codes.codes, codes.zeros, codes.scales), wanted, strict=True):
        assert np.array_equal(found.numpy(), expected)
    assert torch.equal(rounded(weight.unflatten(1, (-1, group_size))).flatten(1), codes.decode())
    assert torch.equal(codes.decode()[5], torch.zeros(128))


def test_no_value_is_farther_off_than_half_a_step_and_the_rounding_of_its_scale():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    codes = round_to_nearest(weight, group_size=64)
    step = codes.scales.float().repeat_interleave(64, dim=1)
    # A zero point rounded by half a step shifts both ends of a group by as much; 15 steps of a scale rounded by 2^-11.
    assert ((codes.decode() - weight).abs() <= step * (1 + 15 * 2**-11)).all()
    inside = (codes.codes > 0) & (codes.codes < 15)
    assert ((codes.decode() - weight).abs()[inside] <= 0.5001 * step[inside]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_weights_that_no_scale_can_hold_are_refused(bad: float):
    weight = torch.randn(8, 32)
    weight[1, 2] = bad
    with pytest.raises(ModelFileError, match="float16"):
        round_to_nearest(weight, group_size=32)


def test_widths_up_to_the_largest_scale_are_kept():
    weight = torch.zeros(8, 32)
    weight[0, 0], weight[0, 1] = 900_000.0, -60_000.0
    decoded = AWQWeight(*vars(pack_awq(round_to_nearest(weight, group_size=32))).values()).dequantize(torch.float32)
    assert torch.allclose(decoded[0, :2], weight[0, :2], atol=70_000)
