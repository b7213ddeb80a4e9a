"""AWQ's GEMM layout against AutoAWQ's own packing code; skipped where the (archived) package is not installed.

pip install --no-deps autoawq==0.2.9 accelerate
"""

import importlib.util
import sys
import types

import pytest
import torch

from duolocal.quant.awq import AWQWeight

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
