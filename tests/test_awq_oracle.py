"""AWQ's GEMM layout against AutoAWQ's own packing code; skipped where the (archived) package is not installed.

pip install --no-deps autoawq==0.2.9 accelerate
"""

import importlib.util
import sys
import types

import pytest
import torch

from duolocal.quant.awq import AWQWeight
from duolocal.quant.awq_pack import pack_awq
from duolocal.quant.rounding import round_to_nearest

spec = importlib.util.find_spec("awq")
if spec is None or importlib.util.find_spec("accelerate") is None:
    pytest.skip("autoawq (extra awq-oracle) is not installed", allow_module_level=True)


@pytest.fixture
def gemm(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Return awq.modules.linear.gemm without awq/__init__, which imports model code that transformers 5 broke."""
    assert spec is not None
    package = types.ModuleType("awq")
    package.__path__ = list(spec.submodule_search_locations or ())
    monkeypatch.setitem(sys.modules, "awq", package)
    module = importlib.import_module("awq.modules.linear.gemm")
    monkeypatch.setattr(module, "TRITON_AVAILABLE", False)  # the CPU has neither of its kernels
    return module


@pytest.mark.parametrize(("out_features", "in_features", "group_size"), [(64, 128, 32), (96, 256, 128), (32, 64, 64)])
def test_what_autoawq_packs_is_read_bit_for_bit(
    gemm: types.ModuleType, out_features: int, in_features: int, group_size: int
) -> None:
    generator = torch.Generator().manual_seed(out_features)
    groups = in_features // group_size
    scales = (torch.rand(out_features, groups, generator=generator) * 0.02 + 0.001).half()
    zeros = torch.randint(0, 16, (out_features, groups), generator=generator)
    codes = torch.randint(0, 16, (out_features, in_features), generator=generator)
    wide = [x.repeat_interleave(group_size, dim=1) for x in (scales.float(), zeros)]
    linear = torch.nn.Linear(in_features, out_features, bias=False)
    linear.weight.data = ((codes - wide[1]) * wide[0]).half()
    packed = gemm.WQLinear_GEMM.from_linear(
        linear, w_bit=4, group_size=group_size, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    ours = AWQWeight(packed.qweight, packed.qzeros, packed.scales)
    assert ours.group_size == group_size
    expected = gemm.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, group_size)  # [in, out], fp16
    assert torch.equal(ours.dequantize(torch.float16), expected.T)
    assert torch.equal(ours.rows(torch.tensor([0, 5, 7]), torch.float16), expected.T[[0, 5, 7]])


@pytest.mark.parametrize(("out_features", "in_features", "group_size"), [(64, 128, 32), (96, 256, 128), (32, 64, 64)])
def test_what_we_pack_is_what_autoawq_packs_bit_for_bit(
    gemm: types.ModuleType, out_features: int, in_features: int, group_size: int
) -> None:
    generator = torch.Generator().manual_seed(in_features)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.03
    codes = round_to_nearest(weight, group_size=group_size)
    linear = torch.nn.Linear(in_features, out_features, bias=False)
    linear.weight.data = codes.decode().half()  # AutoAWQ packs what has been rounded, given its scales and zeros
    theirs = gemm.WQLinear_GEMM.from_linear(
        linear,
        w_bit=4,
        group_size=group_size,
        scales=codes.scales.T.contiguous(),
        zeros=codes.zeros.int().T.contiguous(),
    )
    ours = pack_awq(codes)
    for name in ("qweight", "qzeros", "scales"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    expected = gemm.dequantize_gemm(theirs.qweight, theirs.qzeros, theirs.scales, 4, group_size)  # [in, out], fp16
    assert torch.equal(ours.dequantize(torch.float16), expected.T)
    x = torch.randn(5, in_features, generator=generator)
    product = x @ ours.dequantize(torch.float16).float().T
    forward = theirs(x.half()).float()
    assert torch.allclose(product, forward, atol=2e-2 * float(product.abs().max()))  # float16 inputs and sums
