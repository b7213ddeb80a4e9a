"""--weights nf4|int8: what bitsandbytes makes of a 16-bit model while it is loaded, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from duolocal.cli import main
from duolocal.engine.engine import Engine
from duolocal.engine.kernels import arrangement
from duolocal.errors import MemoryLimitError, ModelFileError, SettingsError
from duolocal.kernels.torch_kernels import TorchKernels
from duolocal.models.loader import ModelSource, open_model
from duolocal.models.outer_weights import quantize_outer
from duolocal.models.quantized import quantize_on_load
from duolocal.quant import bitsandbytes as ours
from duolocal.quant.awq import AWQWeight
from duolocal.quant.bitsandbytes import KINDS, InRows, Int8Weight, Kind, NF4Weight, in_rows, quantize, quantized_bytes
from duolocal.quant.weight import DenseWeight, Linear, Weight
from duolocal.settings import LoadSettings
from tests.compiled import compiled, compiled_kernels
from tests.loading import LINEARS
from tests.model_files import random_awq, write_gguf
from tests.test_loader_memory import many_shards
from tests.tiny import huggingface_model, save_checkpoint

HALVES = (torch.float32, torch.bfloat16, torch.float16)
# The 16 values of appendix E of the QLoRA paper (arXiv 2305.14314).
PAPER_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)


@pytest.fixture(scope="module")
def library():
    """Return bitsandbytes' functional module, imported the way the package does it; skip without the package."""
    try:
        return ours.require("nf4").functional
    except SettingsError as error:
        pytest.skip(str(error))


def matrix(rows: int = 37, columns: int = 192, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return normal values with a row of zeros, a block of zeros, and values that repeat the absmax."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03
    values[3] = 0
    values[4, 64:128] = 0
    values[5, :64] = -values[5, :64].abs().max()
    return values.to(dtype)


def test_the_levels_are_quantiles_of_the_normal_distribution() -> None:
    """Section 3 of the paper: 8 levels below zero and 9 from zero up, zero exactly among them."""
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    below = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    made = np.array(sorted([*above, 0.0, *below]))
    np.testing.assert_allclose(made / made.max(), PAPER_LEVELS, atol=2e-6)
    assert np.array_equal(np.array(ours.NF4_LEVELS, dtype=np.float32), PAPER_LEVELS)


def numpy_nf4(weight: NF4Weight) -> np.ndarray:
    """Decode NF4 value by value."""
    codes, absmax = weight.codes.numpy(), weight.absmax.numpy()
    out = np.empty((weight.out_features, weight.in_features), dtype=np.float32)
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            byte = codes[row, column // 2]
            code = byte >> 4 if column % 2 == 0 else byte & 15
            out[row, column] = PAPER_LEVELS[code] * absmax[row, column // 64]
    return out


def test_nf4_decodes_as_the_paper_says_without_bitsandbytes() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (11, 96), generator=generator, dtype=torch.uint8)
    weight = NF4Weight(codes, torch.rand(11, 3, generator=generator))
    exact = torch.from_numpy(numpy_nf4(weight))
    other = in_rows(weight)
    assert isinstance(other, InRows) and other.nbytes == weight.nbytes == quantized_bytes("nf4", 11, 192)
    check_weight(weight, exact)
    check_weight(other, exact)


def test_int8_decodes_as_bitsandbytes_defines_it_without_bitsandbytes() -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(-127, 128, (11, 192), generator=generator).to(torch.int8)
    weight = Int8Weight(codes, torch.rand(11, generator=generator))
    wide = codes.numpy().astype(np.float32) * weight.absmax.numpy()[:, None]
    exact = torch.from_numpy(wide * np.float32(7.874015718698502e-3))
    other = in_rows(weight)
    assert isinstance(other, InRows) and other.nbytes == weight.nbytes == quantized_bytes("int8", 11, 192)
    check_weight(weight, exact)
    check_weight(other, exact)


def check_weight(weight: Weight, exact: Tensor) -> None:
    """Hold every way to read a weight to the float32 values `exact`, rounded once."""
    index = torch.tensor([10, 0, 10, 4])
    assert (weight.out_features, weight.in_features) == exact.shape
    for dtype in (*HALVES, torch.float64):
        assert torch.equal(weight.dequantize(dtype), exact.to(dtype))
        assert torch.equal(weight.rows(index, dtype), exact[index].to(dtype))
        assert torch.equal(weight.row_range(2, 9, dtype), exact[2:9].to(dtype))
        assert weight.row_range(5, 5, dtype).shape == (0, exact.shape[1])


@pytest.mark.parametrize("dtype", HALVES)
def test_nf4_is_what_bitsandbytes_makes_bit_for_bit(library, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(ours, "_CHUNK_ELEMENTS", 5 * 192)  # several parts
    values = matrix(dtype=dtype)
    weight = quantize(DenseWeight(values), "nf4", name="w")
    assert isinstance(weight, NF4Weight)
    codes, state = library.quantize_4bit(values, blocksize=64, quant_type="nf4")
    assert torch.equal(weight.codes.flatten(), codes.flatten())
    assert torch.equal(weight.absmax.flatten(), state.absmax)
    for wanted in HALVES:
        state.dtype = wanted
        decoded = library.dequantize_4bit(codes, state)
        assert decoded.dtype == wanted
        assert torch.equal(weight.dequantize(wanted), decoded)
        assert torch.equal(ours.decode_by_library(weight, wanted), decoded)  # the way of a GPU
        assert torch.equal(in_rows(weight).dequantize(wanted), decoded)
    # Every code is the level next to the value: no other is nearer by more than rounding.
    exact = torch.from_numpy(numpy_nf4(weight))
    assert torch.equal(weight.dequantize(torch.float32), exact)
    scale = weight.absmax.repeat_interleave(64, 1)
    nearest = (values.float().unsqueeze(-1) - torch.from_numpy(PAPER_LEVELS) * scale.unsqueeze(-1)).abs().amin(-1)
    assert bool(((values.float() - exact).abs() <= nearest + 1e-6 * scale).all())
    assert not exact[3].any() and not exact[4, 64:128].any()


@pytest.mark.parametrize("dtype", HALVES)
def test_int8_is_what_bitsandbytes_makes_bit_for_bit(library, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(ours, "_CHUNK_ELEMENTS", 5 * 192)
    values = matrix(dtype=dtype)
    weight = quantize(DenseWeight(values), "int8", name="w")
    assert isinstance(weight, Int8Weight)
    codes, absmax, _ = library.int8_vectorwise_quant(values.half())
    codes[3] = 0  # a row of zeros is 0 / 0 there
    assert torch.equal(weight.codes, codes) and torch.equal(weight.absmax, absmax)
    assert torch.equal(weight.dequantize(torch.float32), library.int8_vectorwise_dequant(codes, absmax))
    scaled = values.half().double().numpy() * (127 / np.maximum(absmax.double().numpy(), 1e-30))[:, None]
    assert np.abs(weight.codes.numpy() - scaled).max() <= 0.5 + 1e-4  # the nearest, up to float32's rounding
    assert not weight.dequantize(torch.float32)[3].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(library, kind: Kind, bad: float) -> None:
    values = matrix()
    values[20, 100] = bad
    with pytest.raises(ModelFileError, match=r"layer 2, q_proj\.weight holds NaN or infinite values"):
        quantize(DenseWeight(values), kind, name="layer 2, q_proj.weight")


# Of a model.

SHAPES: dict[str, Any] = {"intermediate_size": 128, "vocab_size": 64}


def linears(weights, layer: int) -> dict[str, Weight]:
    return {name: getattr(weights.layers[layer], name).weight for name in LINEARS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    huggingface_model("llama", **SHAPES).to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, huggingface_model("llama", **SHAPES), "llama", kind=GGMLType.F16)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["folder", "gguf_file"])
def test_matrices_of_layers_are_quantized_and_nothing_else(library, kind: Kind, which: str, request) -> None:
    plain = open_model(request.getfixturevalue(which))
    source = quantize_on_load(plain, kind)
    progress: list[tuple[int, int]] = []
    weights, dense = source.load(on_layer=lambda *at: progress.append(at)), plain.load()
    assert progress == [(1, 2), (2, 2)]
    for layer in range(2):
        for name, weight in linears(weights, layer).items():
            whole = linears(dense, layer)[name]
            assert isinstance(whole, DenseWeight)
            direct = quantize(DenseWeight(whole.tensor.clone()), kind, name=name)
            assert torch.equal(weight.dequantize(torch.float32), direct.dequantize(torch.float32)), name
        assert torch.equal(weights.layers[layer].attention_norm, dense.layers[layer].attention_norm)
    for name in ("embedding", "lm_head"):
        kept, was = getattr(weights, name), getattr(dense, name)
        assert isinstance(kept, DenseWeight) and torch.equal(kept.tensor, was.tensor)
    norms = (4 * plain.config.num_layers // 2 + 1) * 64 * (4 if which == "gguf_file" else 2)  # in the file
    assert source.size_bytes == sum(matrix.nbytes for matrix in weights.matrices()) + norms
    assert source.size_bytes < plain.size_bytes
    assert (
        source.weight_format == {"folder": f"{kind.upper()} from BF16", "gguf_file": f"{kind.upper()} from F16"}[which]
    )
    assert source.fingerprint not in (plain.fingerprint, quantize_on_load(plain, ({*KINDS} - {kind}).pop()).fingerprint)
    assert source.config == plain.config


def engine(model: Path | ModelSource, kernels: str, **settings) -> Engine:
    given = model if isinstance(model, ModelSource) else str(model)
    return Engine.load(given, context=64, kv="32", heads="all", kernels=kernels, device="cpu", **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["folder", "gguf_file"])
def test_the_engine_computes_with_the_quantized_weights(library, kind: Kind, which: str, request) -> None:
    ids = [1, 5, 9, 60, 33, 2, 8]
    path = request.getfixturevalue(which)
    quantized = engine(path, "torch", weights=kind)
    got = quantized.logits(ids)
    # The same model with the decoded matrices in float32.
    reference = engine(path, "torch")
    for there, here in zip(reference.transformer.weights.layers, quantized.transformer.weights.layers, strict=True):
        for name in LINEARS:
            decoded = DenseWeight(getattr(here, name).weight.dequantize(torch.float32))
            object.__setattr__(there, name, Linear(decoded, getattr(there, name).bias))
    assert torch.equal(got, reference.logits(ids))
    plain = engine(path, "torch").logits(ids)
    assert 1e-4 < float((got - plain).abs().max() / plain.abs().max()) < (0.5 if kind == "nf4" else 0.05)
    assert quantized.memory().weights < engine(path, "torch").memory().weights


@pytest.mark.parametrize("kind", KINDS)
class TestCompiled:
    pytestmark = compiled_kernels

    def test_the_compiled_kernels_decode_on_the_way(self, library, kind: Kind, folder: Path) -> None:
        ids = [1, 5, 9, 60, 33, 2, 8]
        fast, slow = (engine(folder, name, weights=kind, activations="float32") for name in ("compiled", "torch"))
        assert isinstance(fast.transformer.weights.layers[0].q_proj.weight, InRows)
        assert fast.memory().weights == slow.memory().weights
        torch.testing.assert_close(fast.logits(ids), slow.logits(ids), rtol=0, atol=2e-5)
        for token in (4, 5):  # the recorded decode step
            torch.testing.assert_close(fast.logits([token]), slow.logits([token]), rtol=0, atol=2e-5)

    def test_every_value_is_the_one_of_bitsandbytes(self, library, kind: Kind) -> None:
        weight = quantize(DenseWeight(matrix(70, 320)), kind, name="w")
        ones = torch.eye(320)
        for few in (slice(0, 1), slice(0, 9), slice(0, 320)):  # one row, few rows, panels
            (got,) = compiled(1).linear(ones[few], (Linear(in_rows(weight)),))
            assert torch.equal(got, weight.dequantize(torch.float32).T[few])


def test_rows_that_are_no_whole_blocks_stay_as_they_are(library, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, intermediate_size=96, vocab_size=64)
    loaded = engine(tmp_path, "torch", weights="nf4")
    layer = loaded.transformer.weights.layers[0]
    assert isinstance(layer.down_proj.weight, DenseWeight) and isinstance(layer.up_proj.weight, NF4Weight)
    assert "down_proj stay F32: their rows are no multiple of 64 values" in loaded.notes
    assert loaded.source is not None
    held = sum(matrix.nbytes for matrix in loaded.transformer.weights.matrices())
    assert held == loaded.source.size_bytes - 5 * 64 * 4  # the norms

    both = engine(tmp_path, "torch", weights="nf4", outer_weights="int8").notes
    for said in ("down_proj stay F32", "(--outer-weights int8)"):
        assert any(said in note for note in both)


def test_a_context_is_refused_by_the_size_after_quantizing(library, folder: Path, monkeypatch) -> None:
    plain = quantize_outer(open_model(folder), "int8")  # as is tried before it is refused
    sizes: dict[str, int] = {
        kind: quantize_outer(quantize_on_load(open_model(folder), kind), "int8").size_bytes for kind in KINDS
    }
    assert sizes["nf4"] < sizes["int8"] < plain.size_bytes
    seen = {}
    monkeypatch.setattr("duolocal.plan.free.available_bytes", lambda _device: 1000)
    monkeypatch.setattr("duolocal.engine.automatic.GIB", 1)  # the message then counts bytes
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("loaded before it was refused"))
    for name in ("auto", *KINDS):
        with pytest.raises(MemoryLimitError) as refused:
            engine(folder, "torch", weights=name)
        seen[name] = str(refused.value)
    for name, size in {"auto": plain.size_bytes, **sizes}.items():
        assert f"(weights {size:.1f}, " in seen[name]


CHILD = """
import json, sys
import torch
from duolocal.engine.heap import settle_heap
from duolocal.models.loader import open_model
from duolocal.models.quantized import quantize_on_load
from duolocal.quant.bitsandbytes import quantize
from duolocal.quant.weight import DenseWeight

settle_heap()  # as Engine.load does
torch.set_num_threads(1)

def peak():
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["VmHWM"].split()[0]) * 1024

quantize(DenseWeight(torch.randn(512, 2048)), sys.argv[2], name="warm-up")
before = peak()
source = quantize_on_load(open_model(sys.argv[1]), sys.argv[2])
weights = source.load()
print(json.dumps({"growth": peak() - before, "held": sum(m.nbytes for m in weights.matrices())}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc (Linux)")
@pytest.mark.parametrize("which", ["many", "one", "gguf"])
def test_the_16_bit_model_is_never_in_memory_whole(library, which: str, tmp_path: Path) -> None:
    """Pages of the file that were touched are counted, too."""
    model = tmp_path
    if which == "gguf":
        model = tmp_path / "model.gguf"
        big = huggingface_model("llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=16, vocab_size=64)
        write_gguf(model, big, "llama", kind=GGMLType.F16)
        size = model.stat().st_size
    else:
        many_shards(tmp_path, vocab=64)
        if which == "one":
            join_shards(tmp_path)
        size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(model), "nf4"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # Beside what is held: a matrix in 16 bits, and one that is put together.
    assert found["growth"] < found["held"] + 12 * 2**20 < 0.7 * size


def join_shards(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    save_file(tensors, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()


# Refusals: these need no bitsandbytes.


def refuse_to_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "require", lambda kind: pytest.fail("asked for bitsandbytes in vain"))


def quantized_already(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    model = huggingface_model("llama", **SHAPES)
    write_gguf(tmp_path / "q4_1.gguf", model, "llama", kind=GGMLType.Q4_1)
    awq = tmp_path / "awq"
    model.save_pretrained(awq)
    config = json.loads((awq / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    (awq / "config.json").write_text(json.dumps(config))
    from safetensors.torch import load_file, save_file

    tensors = load_file(awq / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        rows, columns = tensors.pop(name).shape
        parts, _ = random_awq(1, columns, rows, 32)
        tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    save_file(tensors, awq / "model.safetensors")
    return {"GGUF": (tmp_path / "q4_1.gguf", "Q4_1"), "AWQ": (awq, "AWQ int4 g32")}


@pytest.mark.parametrize("which", ["GGUF", "AWQ"])
def test_a_model_that_is_quantized_already_is_refused(which: str, tmp_path: Path, monkeypatch, capsys) -> None:
    refuse_to_import(monkeypatch)
    path, kind = quantized_already(tmp_path)[which]
    if which == "AWQ":
        assert isinstance(open_model(path).load().layers[0].q_proj.weight, AWQWeight)
    wanted = (
        f"--weights nf4 makes nf4 of 16-bit weights, and {path} is {kind} already: leave --weights out, "
        "or give the unquantized (BF16 or F16) model"
    )
    with pytest.raises(SettingsError) as refused:
        Engine.load(str(path), weights="nf4", context=64)
    assert str(refused.value) == wanted
    for command in (
        ["chat", "--prompt", "x"],
        ["eval", "kl", "--tokens", "1K"],
        ["bench", "decode"],
        ["bench", "memory"],
    ):
        monkeypatch.setattr(sys, "stdin", None)
        assert main([*command, "--model", str(path), "--weights", "nf4"]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"duolocal: {wanted}"


def test_a_mixture_with_quantized_layers_is_refused(tmp_path: Path, monkeypatch) -> None:
    refuse_to_import(monkeypatch)
    import gguf

    model, path = huggingface_model("llama", **SHAPES), tmp_path / "a.gguf"
    name, add = "blk.1.ffn_up.weight", gguf.GGUFWriter.add_tensor

    def one_in_q8(self, at, tensor, **options):
        if at == name:
            array = model.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
            tensor, options = gguf.quants.quantize(array, GGMLType.Q8_0), {"raw_dtype": GGMLType.Q8_0}
        add(self, at, tensor, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", one_in_q8)
    write_gguf(path, model, "llama", kind=GGMLType.F16)
    with pytest.raises(SettingsError, match="is F16 already"):
        quantize_on_load(open_model(path), "nf4")


def test_without_the_package_one_line_says_what_to_do(folder: Path, monkeypatch, capsys) -> None:
    ours.require.cache_clear()
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert main(["chat", "--model", str(folder), "--weights", "int8", "--prompt", "x"]) == 2
    assert capsys.readouterr().err.strip() == (
        "duolocal: --weights int8 needs the package bitsandbytes, which is not installed: "
        'pip install "duolocal[bitsandbytes]", or leave --weights out'
    )


def test_a_package_that_does_not_load_is_one_line(monkeypatch, tmp_path: Path) -> None:
    ours.require.cache_clear()
    before = sys.modules.get("kernels")
    broken = tmp_path / "bitsandbytes"
    broken.mkdir()
    (broken / "__init__.py").write_text("import kernels\nraise OSError('libcudart:\\n not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
            patch.delitem(sys.modules, name)
        with pytest.raises(SettingsError, match=r"bitsandbytes cannot be used here \(import of kernels halted"):
            ours.require("nf4")
        (broken / "__init__.py").write_text("raise OSError('libcudart:\\n not found')\n")
        with pytest.raises(SettingsError, match=r"bitsandbytes cannot be used here \(libcudart: not found\)"):
            ours.require("nf4")
    assert sys.modules.get("kernels") is before


def test_names(folder: Path) -> None:
    plain = open_model(folder)
    assert quantize_on_load(plain, "auto") is plain
    with pytest.raises(SettingsError, match="--weights is 'nf5': give one of auto, nf4, int8"):
        quantize_on_load(plain, "nf5")
    with pytest.raises(SettingsError, match="--weights is 'nf5': give one of auto, nf4, int8"):
        LoadSettings(model="a", weights="nf5")
    assert LoadSettings(model="a", weights="nf4").options() == ["--model", "a", "--weights", "nf4"]
    assert arrangement(TorchKernels(torch.float32), torch.float32) is None
