"""Every kind of weight to tensors and back, and the way from planes back to rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duolocal.engine.kernels import arrange_rows, arrangement
from duolocal.errors import ModelFileError
from duolocal.kernels.cpu import build
from duolocal.models.native_layout import DTYPES, find_kind, parts_of
from duolocal.quant import grouped
from duolocal.quant.awq import AWQWeight
from duolocal.quant.bitsandbytes import BLOCK_SIZE, Int8Weight, NF4Weight, in_rows
from duolocal.quant.gguf import GGUFWeight
from duolocal.quant.grouped import GroupedWeight, group, ungroup
from duolocal.quant.weight import Weight
from tests.compiled import DENSE, GGUF_KINDS, compiled, random_weight

NAMES = {dtype: name for name, dtype in DTYPES.items()}
GROUPED = ("Q4_0", "Q4_1", "Q8_0", "AWQ")


def nf4(rows: int, columns: int) -> NF4Weight:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    return NF4Weight(codes, torch.rand(rows, columns // BLOCK_SIZE, generator=generator))


def int8(rows: int, columns: int) -> Int8Weight:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    return Int8Weight(codes, torch.rand(rows, generator=generator))


def every_kind() -> dict[str, Weight]:
    kinds = {name: random_weight(name, 16, 256, group_size=64) for name in (*DENSE, *GGUF_KINDS, "AWQ")}
    kinds |= {f"{name} planes": group(kinds[name]) for name in GROUPED}
    kinds |= {"nf4": nf4(16, 256), "int8": int8(16, 256)}
    kinds |= {f"{name} rows": in_rows(kinds[name]) for name in ("nf4", "int8")}
    return kinds


@pytest.mark.parametrize("name", list(every_kind()))
def test_to_tensors_and_back(name: str) -> None:
    weight = every_kind()[name]
    parts = {part: tensor.contiguous() for part, tensor in parts_of(weight).items()}
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    kind, wanted = find_kind(shapes, 16, 256, "here")
    for part, tensor in parts.items():
        dtypes, shape = wanted[part]
        assert tuple(tensor.shape) == shape and NAMES[tensor.dtype] in dtypes
    back = kind.build(parts, 256)
    assert type(back) is type(weight) and back.format == weight.format
    assert torch.equal(back.dequantize(torch.float32), torch.as_tensor(exact(weight)))


def exact(weight: Weight) -> torch.Tensor:
    if isinstance(weight, GGUFWeight):  # torch does not read float16 numbers at odd bytes
        weight = GGUFWeight(weight.raw.clone(), weight.type, weight.in_features)
    return weight.dequantize(torch.float32)


@pytest.mark.parametrize(
    ("shapes", "rows", "columns", "said"),
    [
        ({}, 8, 64, "here consists of nothing, which is no kind of weight"),
        ({"qweight": (64, 1)}, 8, 64, "here consists of qweight, which is no kind"),
        ({"": (8, 64), "Q4_1": (8, 40)}, 8, 64, "here consists of (whole), Q4_1, which is no kind"),
        ({"Q4_1": (8, 40)}, 8, 48, "here is 8 x 48, which its format cannot hold"),
        ({"Q4_K": (8, 40)}, 8, 64, "here is 8 x 64, which its format cannot hold"),
        ({"nf4.rows": (8, 36)}, 8, 96, "here is 8 x 96, which its format cannot hold"),
        ({"qweight": (64, 1), "qzeros": (2, 1), "scales": (2, 12)}, 12, 64, "here is 12 x 64, which its format"),
        ({"qweight": (64, 1), "qzeros": (5, 1), "scales": (5, 8)}, 8, 64, "here has 5 groups of scales for 64"),
        ({"qweight": (64, 1), "qzeros": (0, 1), "scales": (0, 8)}, 8, 64, "here has 0 groups of scales"),
        ({"qweight": (64, 1), "qzeros": (2, 1), "scales": (2,)}, 8, 64, "here has 0 groups of scales"),
        ({"Q4_0.codes": (8, 32), "Q4_0.scales": (8, 1)}, 8, 64, "here is 8 x 64, which its format cannot hold"),
        ({"AWQ.codes": (8, 32), "AWQ.scales": (8, 4), "AWQ.zeros": (8, 4)}, 8, 64, "which its format cannot hold"),
    ],
)
def test_parts_that_make_no_matrix(shapes: dict, rows: int, columns: int, said: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        find_kind(shapes, rows, columns, "here")
    assert said in str(caught.value)


@given(
    name=st.sampled_from(GROUPED),
    rows=st.integers(1, 6),
    groups=st.integers(1, 5),
    runs=st.integers(1, 4),
    chunk=st.sampled_from((1, 2000, 1 << 22)),
    seed=st.integers(0, 1000),
)
def test_grouping_and_ungrouping_are_inverse(
    name: str, rows: int, groups: int, runs: int, chunk: int, seed: int
) -> None:
    weight = random_weight(name, 8 * rows, 32 * runs * groups, seed=seed, group_size=32 * runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "_CHUNK_ELEMENTS", chunk)
        planes = group(weight)
        back = ungroup(planes)
    assert isinstance(planes, GroupedWeight) and type(back) is type(weight) and back.format == weight.format
    if isinstance(weight, AWQWeight):
        assert isinstance(back, AWQWeight)
        assert torch.equal(back.qweight, weight.qweight) and torch.equal(back.qzeros, weight.qzeros)
        assert torch.equal(back.scales.view(torch.int16), weight.scales.view(torch.int16))
    else:
        assert isinstance(weight, GGUFWeight) and isinstance(back, GGUFWeight)
        assert torch.equal(back.raw, weight.raw)


def test_other_weights_are_not_touched() -> None:
    others = [random_weight(name, 8, 256) for name in (*DENSE, "Q4_K", "Q8_0", "AWQ")]
    assert all(ungroup(weight) is weight for weight in others)


@pytest.mark.skipif(build.unsupported() is not None, reason="compiled kernels")
@pytest.mark.parametrize("name", GROUPED)
def test_compiled_kernels_take_planes_apart(name: str) -> None:
    arrange = arrangement(compiled(1), torch.float32)
    assert arrange is arrange_rows
    weight = random_weight(name, 16, 128)
    assert arrange(weight) is weight
    assert arrange(group(weight)).packed().packing == name
