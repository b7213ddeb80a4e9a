"""Which kernels a GPU computes with, and what is done to weights for them; no GPU is needed to choose."""

import importlib.util
from typing import Any

import pytest
import torch

from duolocal.engine.kernels import arrangement, kernels_named, make_kernels, undecoded_note
from duolocal.errors import SettingsError
from duolocal.kernels.torch_kernels import TorchKernels
from duolocal.models.weights import ModelWeights
from duolocal.quant.grouped import GroupedWeight
from duolocal.quant.weight import DenseWeight, Linear
from tests.compiled import random_weight
from tests.tiny import random_model, tiny_config

CUDA = torch.device("cuda")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def choose(name: str, *, dtype: torch.dtype = torch.bfloat16, **shapes: Any) -> tuple[Any, str | None]:
    found, note = kernels_named(name, tiny_config(**({"head_dim": 64} | shapes)), device=CUDA, dtype=dtype)
    return make_kernels(found, device=CUDA, dtype=dtype), note


@pytest.fixture(autouse=True)
def ampere(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def refuses(reason: str, **settings: Any) -> None:
    """auto falls back and says so; compiled is refused with the same reason."""
    kernels, note = choose("auto", **settings)
    assert isinstance(kernels, TorchKernels)
    assert note is not None and reason in note and "\n" not in note
    with pytest.raises(SettingsError, match="--kernels torch") as caught:
        choose("compiled", **settings)
    assert reason in str(caught.value)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_kernels_are_the_first_choice(dtype: torch.dtype) -> None:
    for name in ("auto", "compiled"):
        kernels, note = choose(name, dtype=dtype)
        assert kernels.name == "triton" and kernels.dtype == dtype and note is None
    kernels, note = choose("torch", dtype=dtype)
    assert isinstance(kernels, TorchKernels) and note is None


@needs_triton
def test_compiling_is_announced_where_nothing_is_compiled_yet(tmp_path: Any) -> None:
    said: list[str] = []
    for wanted in (["compiling"], ["compiling"]):
        make_kernels("triton", device=CUDA, dtype=torch.float16, on_build=lambda: said.append("compiling"))
        assert said == wanted
        (tmp_path / "something").touch()


def test_other_dtypes() -> None:
    refuses("they compute in 16 bits, --dtype is float32", dtype=torch.float32)


@needs_triton
def test_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    refuses("they need compute capability 8.0, this GPU has 7.5")


@needs_triton
def test_shapes_beyond_the_kernels() -> None:
    refuses("this model has 512 and 2", head_dim=512)
    refuses("this model has 72 and 2", head_dim=72)
    refuses("this model has 64 and 32", num_heads=32, num_kv_heads=1)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else real(name, *rest)
    )
    refuses("the package triton is not installed")


@needs_triton
def test_matrices_are_arranged_once() -> None:
    kernels, _ = choose("auto")
    arrange = arrangement(kernels, torch.bfloat16)
    assert arrange is not None
    assert isinstance(arrange(random_weight("Q4_1", 8, 64)), GroupedWeight)
    dense = arrange(DenseWeight(torch.randn(8, 64)))
    assert isinstance(dense, DenseWeight) and dense.tensor.dtype == torch.bfloat16
    assert arrangement(TorchKernels(torch.bfloat16), torch.bfloat16) is None


@needs_triton
def test_formats_that_a_gpu_decodes_at_every_step_are_named() -> None:
    kernels, _ = choose("auto")
    _, weights = random_model()
    assert undecoded_note(kernels, weights) is None
    slow = Linear(random_weight("Q4_K", weights.layers[0].o_proj.weight.out_features, 256))
    layers = tuple(layer.__class__(**{**vars(layer), "o_proj": slow}) for layer in weights.layers)
    note = undecoded_note(kernels, ModelWeights(weights.embedding, layers, weights.norm, weights.lm_head))
    assert note is not None and "weights in Q4_K are decoded anew" in note
    assert undecoded_note(TorchKernels(torch.bfloat16), weights) is None
