"""Decoding of weights: GGUF types against the gguf package bit for bit, AWQ against a plain loop."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from hypothesis import given
from hypothesis import strategies as st

from duolocal.quant import gguf as quant_gguf
from duolocal.quant.awq import AWQSettings, AWQWeight
from duolocal.quant.gguf import GGUF_TYPES, GGUFWeight
from tests.model_files import pack_awq, random_awq

# Where the float16 scales of a block stand: random bytes there would be NaN or infinite.
HALVES = {
    "F16": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
TYPES = sorted(GGUF_TYPES.values(), key=lambda kind: kind.name)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_weight(name: str, rows: int, blocks: int, seed: int = 0) -> GGUFWeight:
    """Return a weight of random bits with finite scales of both signs, some zero and some subnormal."""
    kind = next(kind for kind in TYPES if kind.name == name)
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, kind.block_bytes), dtype=np.uint8)
    if name in ("F32", "BF16"):
        values = rng.standard_normal((rows, blocks)).astype(np.float32)
        raw = values.view(np.uint8).reshape(rows, blocks, 4)[:, :, 4 - kind.block_bytes :].copy()
    for start in HALVES.get(name, ()):
        scales = rng.standard_normal((rows, blocks)) * rng.choice([1.0, 1e-6, 0.0], (rows, blocks))
        raw[:, :, start : start + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    return GGUFWeight(torch.from_numpy(raw).view(rows, -1), kind, blocks * kind.block_size)


def reference(weight: GGUFWeight) -> torch.Tensor:
    values = gguf.quants.dequantize(weight.raw.numpy(), GGMLType[weight.type.name])
    return torch.from_numpy(np.array(values, dtype=np.float32))


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32)  # tells 0 from -0


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_type_table_agrees_with_the_gguf_package(kind):
    assert GGMLType(kind.id).name == kind.name
    assert gguf.GGML_QUANT_SIZES[GGMLType(kind.id)] == (kind.block_size, kind.block_bytes)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_decoding_is_the_gguf_package_bit_for_bit(kind):
    weight = random_weight(kind.name, rows=24, blocks=5)
    assert torch.equal(bits(weight.dequantize(torch.float32)), bits(reference(weight)))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_the_float32_value_rounded_once(kind, dtype):
    weight = random_weight(kind.name, rows=6, blocks=3, seed=1)
    whole = weight.dequantize(dtype)
    assert whole.dtype == dtype and whole.shape == (weight.out_features, weight.in_features)
    assert torch.equal(whole, reference(weight).to(dtype))
    index = torch.tensor([5, 0, 0, 3])
    assert torch.equal(weight.rows(index, dtype), whole[index])


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_chunks_join_without_a_seam(kind, monkeypatch):
    weight = random_weight(kind.name, rows=7, blocks=3, seed=2)
    monkeypatch.setattr(quant_gguf, "_CHUNK_ELEMENTS", 2 * kind.block_size)  # 21 blocks in chunks of 2
    assert torch.equal(bits(weight.dequantize(torch.float32)), bits(reference(weight)))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_rows_need_not_be_neighbours_in_memory(kind):
    weight = random_weight(kind.name, rows=8, blocks=3, seed=3)
    every_other = GGUFWeight(weight.raw[::2], weight.type, weight.in_features)
    assert torch.equal(every_other.dequantize(torch.float32), reference(weight)[::2])


def test_gguf_weight_says_what_it_holds():
    weight = random_weight("Q4_1", rows=4, blocks=2)
    assert (weight.format, weight.nbytes, weight.out_features, weight.in_features) == ("Q4_1", 4 * 2 * 20, 4, 64)


AWQ_SHAPES = [(32, 16, 32), (64, 24, 16), (96, 8, 32), (16, 40, 8)]  # in, out, group


@pytest.mark.parametrize(("in_features", "out_features", "group"), AWQ_SHAPES)
def test_awq_is_the_plain_loop_bit_for_bit(in_features, out_features, group):
    parts, dense = random_awq(in_features, in_features, out_features, group)
    weight = AWQWeight(**parts)
    whole = weight.dequantize(torch.float32)
    assert torch.equal(whole, torch.from_numpy(dense))
    assert (weight.out_features, weight.in_features, weight.group_size) == (out_features, in_features, group)
    assert weight.format == f"awq-int4-g{group}"
    groups = in_features // group
    assert weight.nbytes == in_features * out_features // 2 + groups * out_features // 2 + groups * out_features * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awq_rounds_once_and_rows_are_rows(dtype):
    parts, dense = random_awq(3, 48, 32, 16)
    weight = AWQWeight(**parts)
    whole = weight.dequantize(dtype)
    assert whole.dtype == dtype
    assert torch.equal(whole, torch.from_numpy(dense).to(dtype))
    index = torch.tensor([31, 0, 7, 8, 8, 13])
    rows = weight.rows(index, dtype)
    assert rows.dtype == dtype
    assert torch.equal(rows, whole[index])


@given(seed=st.integers(0, 2**32 - 1))
def test_awq_unpacking_inverts_packing(seed):
    codes = np.random.default_rng(seed).integers(0, 16, (16, 24))
    ones = torch.ones(1, 24, dtype=torch.float16)
    weight = AWQWeight(pack_awq(codes), pack_awq(np.zeros((1, 24), dtype=np.int64)), ones)
    assert torch.equal(weight.dequantize(torch.float32), torch.from_numpy(codes.T.astype(np.float32)))


def test_awq_chunks_join_without_a_seam(monkeypatch):
    parts, dense = random_awq(4, 96, 16, 16)
    monkeypatch.setattr("duolocal.quant.awq._CHUNK_ELEMENTS", 4 * 16 * 16)  # 6 groups in chunks of 4
    assert torch.equal(AWQWeight(**parts).dequantize(torch.float32), torch.from_numpy(dense))


def test_awq_settings_match_parts_of_module_names():
    settings = AWQSettings(group_size=128, dense_modules=("mlp.up_proj",))
    assert settings.is_dense("model.layers.3.mlp.up_proj")
    assert not settings.is_dense("model.layers.3.mlp.down_proj")
