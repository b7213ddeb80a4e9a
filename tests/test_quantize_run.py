"""`quantize` end to end on tiny checkpoints: what is written, going on after an interruption, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from duolocal.engine.engine import Engine
from duolocal.errors import DuoLocalError, SettingsError
from duolocal.models.loader import ModelSource, open_model
from duolocal.models.observe import ObservedCache
from duolocal.models.transformer import Transformer
from duolocal.quant.awq import AWQWeight
from duolocal.quantize import QuantizeProgress, QuantizeResult, QuantizeSettings, checkpoint, files, quantize, run
from duolocal.quantize.work_area import NAME as WORK_AREA
from duolocal.quantize.work_area import WorkArea
from duolocal.tokenizer import load_tokenizer
from tests import tokenizer_files
from tests.model_files import write_gguf
from tests.test_quantize_files import byte_level_metadata
from tests.tiny import ARCHITECTURES, Architecture, save_checkpoint, weights_of

SMALL = QuantizeSettings(group_size=32, num_samples=3, num_tokens=48)
TEXT = tokenizer_files.CORPUS[:6000]
VOCAB = 1024  # room for the tokenizers of tokenizer_files


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny_folder(folder: Path, architecture: Architecture = "llama", **changes: Any) -> Any:
    """Write a tiny checkpoint with hot channels and a tokenizer; return transformers' model."""
    folder.mkdir(exist_ok=True)
    model = save_checkpoint(folder, architecture, vocab_size=VOCAB, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter[[5, 20, 44]] *= 30
            if any(part in name for part in ("q_proj", "k_proj", "q_norm", "k_norm")):
                parameter *= 0.1  # else hot channels make attention one-hot, and a small error another token
    model.save_pretrained(folder)
    tokenizer_files.write(folder, tokenizer_files.chatml(tokenizer_files.CHATML))
    return model


def finish(source: ModelSource, out: Path, settings: QuantizeSettings = SMALL, **options: Any) -> QuantizeResult:
    *events, result = quantize(source, out, settings, text=TEXT, device="cpu", **options)
    assert isinstance(result, QuantizeResult) and all(isinstance(event, QuantizeProgress) for event in events)
    return result


def hidden(source: ModelSource, ids: list[int]) -> torch.Tensor:
    """Return the last hidden states in float64, from plain attention."""
    model = Transformer(
        source.config,
        source.load(dtype=torch.float64),
        context=64,
        device=torch.device("cpu"),
        dtype=torch.float64,
    )
    return model.hidden(torch.tensor(ids), torch.arange(len(ids)), ObservedCache())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_folder_loads_and_computes_nearly_what_the_model_did(tmp_path: Path, architecture: Architecture):
    tiny_folder(tmp_path / "model", architecture, seed=2)
    source = open_model(tmp_path / "model")
    ids = load_tokenizer(source).encode(TEXT[3000:])[:60]
    exact = hidden(source, ids)
    errors = {}
    for method in ("awq", "rtn"):
        result = finish(source, tmp_path / method, QuantizeSettings(**(vars(SMALL) | {"method": method})))
        made = open_model(tmp_path / method)
        assert (made.kind, made.weight_format, made.config) == ("awq", "AWQ int4 g32", source.config)
        assert isinstance(made.load().layers[0].down_proj.weight, AWQWeight)
        assert load_tokenizer(made).encode(TEXT) == load_tokenizer(source).encode(TEXT)
        assert result.bytes_after == sum(path.stat().st_size for path in made.path.glob("*.safetensors"))
        assert not (made.path / WORK_AREA).exists()
        assert len({path.stat().st_mode for path in made.path.iterdir()}) == 1  # who may read one may read all
        errors[method] = float((hidden(made, ids) - exact).square().sum() / exact.square().sum())
    assert errors["awq"] < 0.6 * errors["rtn"] < 0.1  # 0.1 to 0.35 of it


def test_everything_but_the_layers_matrices_is_float16(tmp_path: Path):
    model = tiny_folder(tmp_path / "model", "qwen2")
    finish(open_model(tmp_path / "model"), tmp_path / "out", QuantizeSettings(method="rtn"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    state = model.state_dict()
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.int32", "torch.float16"}
    for name, tensor in state.items():
        if name in tensors:
            assert torch.equal(tensors[name], tensor.half()), name
        else:
            assert name.endswith("_proj.weight") and name.replace(".weight", ".qweight") in tensors
    layer = weights_of(model).layers[1].up_proj.weight.dequantize(torch.float32)
    packed = AWQWeight(*(tensors[f"model.layers.1.mlp.up_proj.{part}"] for part in ("qweight", "qzeros", "scales")))
    step = packed.scales.float().max()
    assert (packed.dequantize(torch.float32) - layer).abs().max() <= step * 1.01


def test_config_tokenizer_and_generation_config_are_the_models_own(tmp_path: Path):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tiny_folder(tmp_path / "model", "qwen3")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "top_k": 20}))
    (tmp_path / "model" / "LICENSE").write_text("do as you like")
    finish(open_model(tmp_path / "model"), out := tmp_path / "out")
    raw, before = (json.loads((folder / "config.json").read_text()) for folder in (out, tmp_path / "model"))
    quantization = raw.pop("quantization_config")
    assert quantization == {
        "bits": 4,
        "group_size": 32,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    assert raw == before | {"dtype": "float16"}
    for name in ("LICENSE", "generation_config.json", "tokenizer.json"):
        kept, was = (out / name).read_text(), (tmp_path / "model" / name).read_text()
        assert (json.loads(kept) == json.loads(was)) if name.endswith("json") else kept == was
    assert AutoConfig.from_pretrained(out, local_files_only=True).quantization_config == quantization
    assert GenerationConfig.from_pretrained(out, local_files_only=True).eos_token_id == [2, 3]
    theirs = AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert theirs.encode(TEXT) == load_tokenizer(open_model(out)).encode(TEXT)


def test_a_gguf_becomes_a_folder(tmp_path: Path):
    model = tiny_folder(tmp_path / "model", "llama", tie=True)
    path = tmp_path / "model.gguf"
    write_gguf(path, model, "llama")
    source = open_model(path)
    vocabulary = byte_level_metadata(tokenizer_files.chatml(tokenizer_files.CHATML), "qwen2")
    source = ModelSource(**(vars(source) | {"metadata": {**source.metadata, **vocabulary}}))
    finish(source, tmp_path / "out")
    made = open_model(tmp_path / "out")
    assert made.config == source.config
    assert load_tokenizer(made).encode(TEXT) == load_tokenizer(source).encode(TEXT)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    ids = load_tokenizer(source).encode(TEXT)[:50]
    exact = hidden(source, ids)
    assert float((hidden(made, ids) - exact).square().sum() / exact.square().sum()) < 0.15
    # The same weights from the folder, up to how they are stored: float32 in both.
    finish(open_model(tmp_path / "model"), tmp_path / "other")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_shards_hold_what_one_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_folder(tmp_path / "model")
    source = open_model(tmp_path / "model")
    finish(source, tmp_path / "one")
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 60_000)
    finish(source, tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert open_model(tmp_path / "many").config == source.config


@pytest.mark.parametrize("method", ["awq", "rtn"])
@pytest.mark.parametrize("stop_at", ["layer 1 of 2 done", "layer 2 of 2", "layer 2 of 2 done", "writing"])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bits(tmp_path: Path, method: str, stop_at: str):
    tiny_folder(tmp_path / "model")
    source = open_model(tmp_path / "model")
    settings = QuantizeSettings(**(vars(SMALL) | {"method": method}))
    whole = finish(source, tmp_path / "whole", settings)
    run_one = quantize(source, tmp_path / "cut", settings, text=TEXT, device="cpu")
    for event in run_one:
        assert isinstance(event, QuantizeProgress)
        if event.doing.startswith(stop_at):
            break
    run_one.close()
    with pytest.raises(DuoLocalError):  # what is not finished is no model
        open_model(tmp_path / "cut")
    result = finish(source, tmp_path / "cut", settings)
    assert result.resumed == (1 if stop_at in ("layer 1 of 2 done", "layer 2 of 2") else 2)
    assert whole.resumed == 0 and result.layers == whole.layers
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_folder(tmp_path / "model")
    source = open_model(tmp_path / "model")
    save = files.save_file
    left = [1]

    def failing(tensors: Any, path: Path, metadata: Any) -> None:
        if not left:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        left.pop()
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(files, "save_file", failing)
    with pytest.raises(SettingsError, match=r"No space left on device.*goes on"):
        finish(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / WORK_AREA).glob("*layer*")) == ["layer-00000.safetensors"]
    monkeypatch.setattr(files, "save_file", save)
    assert finish(source, tmp_path / "out").resumed == 1


def test_too_small_a_disk_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_folder(tmp_path / "model")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(SettingsError, match=r"GB are needed .* free"):
        finish(open_model(tmp_path / "model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"group_size": 64}, "input"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"num_samples": 2}, "samples 3, not 2"),
        ({"num_tokens": 40}, "tokens 48, not 40"),
        ({"method": "rtn"}, "method awq, not rtn"),
        ({"text": TEXT[100:]}, "another text"),
        ({"model": 5}, "another model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_work_of_other_settings_is_refused(tmp_path: Path, changes: dict[str, Any], said: str):
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}  # 32 and 64 fit
    tiny_folder(tmp_path / "model", **sizes)
    events = quantize(open_model(tmp_path / "model"), tmp_path / "out", SMALL, text=TEXT, device="cpu")
    while "done" not in next(events).doing:  # type: ignore[union-attr]
        pass
    events.close()
    before = contents(tmp_path / "out" / WORK_AREA)
    if "model" in changes:
        tiny_folder(tmp_path / "model", seed=changes.pop("model"), **sizes)
    text = changes.pop("text", TEXT)
    settings = QuantizeSettings(**(vars(SMALL) | changes))
    with pytest.raises(SettingsError) as caught:
        list(quantize(open_model(tmp_path / "model"), tmp_path / "out", settings, text=text, device="cpu"))
    assert (said if said != "input" else "group size 32, not 64") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "out" / WORK_AREA) == before


def damage_settings(work: Path) -> None:
    (work / "settings.json").write_text("{")


def damage_layer(work: Path) -> None:
    (work / "layer-00000.safetensors").write_bytes(b"nothing")


@pytest.mark.parametrize("damage", [damage_settings, damage_layer])
def test_damaged_work_is_one_line(tmp_path: Path, damage: Callable[[Path], None]):
    tiny_folder(tmp_path / "model")
    source = open_model(tmp_path / "model")
    events = quantize(source, tmp_path / "out", SMALL, text=TEXT, device="cpu")
    while "done" not in next(events).doing:  # type: ignore[union-attr]
        pass
    events.close()
    damage(tmp_path / "out" / WORK_AREA)
    with pytest.raises(DuoLocalError, match=r"damaged.*remove") as caught:
        finish(source, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_an_output_that_is_something_else_is_refused(tmp_path: Path):
    tiny_folder(tmp_path / "model")
    source = open_model(tmp_path / "model")
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "model"):
        with pytest.raises(SettingsError, match="exists and is not empty"):
            finish(source, out)
    (tmp_path / "empty").mkdir()
    finish(source, tmp_path / "empty")


def test_two_runs_do_not_share_a_folder(tmp_path: Path):
    tiny_folder(tmp_path / "model")
    source = open_model(tmp_path / "model")
    events = quantize(source, tmp_path / "out", SMALL, text=TEXT, device="cpu")
    next(events)
    with pytest.raises(SettingsError, match="another process"):
        WorkArea(tmp_path / "out", {})
    events.close()
    finish(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (QuantizeSettings(group_size=128, num_tokens=48), ["--group-size 128", "64, 96", "use 32"]),
        (QuantizeSettings(group_size=64, num_tokens=48), ["--group-size 64", "use 32"]),
        (QuantizeSettings(method="gptq"), ["'gptq'", "awq or rtn"]),
        (QuantizeSettings(num_tokens=65), ["--tokens", "65", "64"]),
        (QuantizeSettings(num_tokens=8), ["--tokens", "8", "16"]),
        (QuantizeSettings(num_samples=0, num_tokens=48), ["--samples", "0"]),
        (QuantizeSettings(num_samples=900, num_tokens=60), ["--samples", "900", "54,000"]),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_work(
    tmp_path: Path, settings: QuantizeSettings, said: list[str]
):
    tiny_folder(tmp_path / "model")
    with pytest.raises(SettingsError) as caught:
        list(quantize(open_model(tmp_path / "model"), tmp_path / "out", settings, text=TEXT, device="cpu"))
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_quantized_already_is_refused(tmp_path: Path):
    tiny_folder(tmp_path / "model")
    finish(open_model(tmp_path / "model"), tmp_path / "out")
    with pytest.raises(SettingsError, match=r"AWQ int4 g32.*16-bit"):
        finish(open_model(tmp_path / "out"), tmp_path / "again")


def test_shapes_that_the_layout_cannot_hold_are_refused(tmp_path: Path):
    tiny_folder(tmp_path / "odd", intermediate_size=100)
    with pytest.raises(SettingsError, match=r"100 output features|no group size"):
        finish(open_model(tmp_path / "odd"), tmp_path / "out")


def test_values_beyond_float16_are_refused(tmp_path: Path):
    model = tiny_folder(tmp_path / "model")
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(DuoLocalError, match=r"model\.norm\.weight.*float16"):
        finish(open_model(tmp_path / "model"), tmp_path / "out")


def test_progress_counts_layers_and_tells_the_losses(tmp_path: Path):
    tiny_folder(tmp_path / "model")
    source = open_model(tmp_path / "model")
    events = list(quantize(source, tmp_path / "out", SMALL, text=TEXT, device="cpu"))
    shown = [event for event in events if isinstance(event, QuantizeProgress)]
    assert [event.done for event in shown] == sorted(event.done for event in shown)
    assert shown[0].done == 0 and shown[-1].done == shown[-1].total == 2
    finished = [event for event in shown if event.losses is not None]
    assert [(event.done, event.fresh) for event in finished] == [(1, 1), (2, 2)]
    assert all(event.losses.mean < event.losses.plain_mean for event in finished if event.losses)
    result = events[-1]
    assert isinstance(result, QuantizeResult)
    assert result.layers == tuple(event.losses for event in finished)
    assert result.num_tokens == 3 * 48
    assert result.linear_bits == 4 + 16 / 32 + 4 / 32
    linears = sum(
        weight.nbytes for weight in open_model(tmp_path / "out").load().matrices() if isinstance(weight, AWQWeight)
    )
    assert result.linear_bytes == linears
    assert result.num_linear_weights == 8 * linears / result.linear_bits


def test_the_same_seed_gives_the_same_bits_and_another_other_ones(tmp_path: Path):
    tiny_folder(tmp_path / "model")
    source = open_model(tmp_path / "model")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        finish(source, tmp_path / name, QuantizeSettings(**(vars(SMALL) | {"seed": seed})))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_an_engine_runs_what_was_written(tmp_path: Path):
    tiny_folder(tmp_path / "model", hidden_size=128, intermediate_size=128, head_dim=32)
    finish(open_model(tmp_path / "model"), tmp_path / "out", QuantizeSettings(num_samples=2, num_tokens=32))
    made = open_model(tmp_path / "out")
    assert made.weight_format == "AWQ int4 g128"  # the largest that fits
    engine = Engine.load(made, context=64, heads="all", kv="16", device="cpu", kernels="torch")
    ids = load_tokenizer(made).encode(TEXT)[:30]
    assert engine.logits(ids).isfinite().all()


def test_windows_do_not_overlap_and_begin_with_bos(tmp_path: Path):
    tokenizer_files.write(tmp_path, tokenizer_files.llama3())
    from duolocal.tokenizer import Tokenizer
    from duolocal.tokenizer.folder import read_folder

    tokenizer = Tokenizer(read_folder(tmp_path))
    ids = tokenizer.encode(TEXT)
    windows = run.calibration_windows(tokenizer, TEXT, num_samples=9, num_tokens=50, seed=3)
    assert all(window[0] == tokenizer.bos_id and len(window) == 50 for window in windows)
    at = 0
    for window in windows:
        at = next(i for i in range(at, len(ids)) if ids[i : i + 49] == window[1:]) + 49
    assert windows != run.calibration_windows(tokenizer, TEXT, num_samples=9, num_tokens=50, seed=4)
