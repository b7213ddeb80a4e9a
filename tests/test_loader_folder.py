"""Loading folders of safetensors: against transformers' own state, sharded, tied, AWQ, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from duolocal.errors import ConfigError, DuoLocalError, ModelFileError, ModelNotFoundError
from duolocal.models.loader import open_model
from duolocal.quant.awq import AWQWeight
from duolocal.quant.weight import DenseWeight
from tests.loading import LINEARS, assert_same_state, loaded_state
from tests.model_files import random_awq
from tests.tiny import ARCHITECTURES, Architecture, huggingface_model, save_checkpoint

INDEX = "model.safetensors.index.json"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_one_file_is_transformers_own_state(tmp_path: Path, architecture: Architecture, tie: bool):
    model = save_checkpoint(tmp_path, architecture, tie=tie)
    source = open_model(tmp_path)
    assert (source.kind, source.weight_format, source.metadata) == ("safetensors", "F32", {})
    assert source.config.architecture == architecture
    weights = source.load()
    assert_same_state(loaded_state(weights), model)
    assert (weights.lm_head is weights.embedding) == tie


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_many_shards_are_transformers_own_state(tmp_path: Path, architecture: Architecture):
    model = huggingface_model(architecture)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_state(loaded_state(open_model(tmp_path).load()), model)


@pytest.mark.parametrize("file_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matrices_keep_the_dtype_of_the_file_and_vectors_get_the_compute_dtype(tmp_path: Path, file_dtype):
    model = huggingface_model("qwen2").to(file_dtype)
    model.save_pretrained(tmp_path)
    source = open_model(tmp_path)
    assert source.weight_format == {torch.bfloat16: "BF16", torch.float16: "F16"}[file_dtype]
    weights = source.load(dtype=torch.float64)
    layer = weights.layers[0]
    assert isinstance(layer.q_proj.weight, DenseWeight)
    assert layer.q_proj.weight.tensor.dtype == file_dtype
    assert layer.q_proj.bias is not None
    assert layer.q_proj.bias.dtype == layer.attention_norm.dtype == weights.norm.dtype == torch.float64
    assert_same_state(loaded_state(weights, torch.float64), model)


def test_llama_with_every_bias(tmp_path: Path):
    model = save_checkpoint(tmp_path, "llama", attention_bias=True, mlp_bias=True)
    weights = open_model(tmp_path).load()
    assert weights.layers[1].down_proj.bias is not None
    assert_same_state(loaded_state(weights), model)


def test_on_layer_counts_and_device_is_honoured(tmp_path: Path):
    save_checkpoint(tmp_path, "qwen2")
    seen: list[tuple[int, int]] = []
    weights = open_model(tmp_path).load(device="meta", on_layer=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    on_host = {name for name, tensor in loaded_state(weights).items() if tensor.device.type != "meta"}
    assert on_host == {"model.embed_tokens.weight"}  # untied: of it one row per token is read


def test_fingerprint_names_the_weights(tmp_path: Path):
    save_checkpoint(tmp_path / "a", seed=1)
    save_checkpoint(tmp_path / "b", seed=2)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    prints = {name: open_model(tmp_path / name).fingerprint for name in "abc"}
    assert prints["a"] == prints["c"] != prints["b"]
    change_config(tmp_path / "c", rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
    assert open_model(tmp_path / "c").fingerprint != prints["a"]


def test_inverse_frequencies_and_a_tied_head_in_the_file_are_ignored(tmp_path: Path):
    model = save_checkpoint(tmp_path, tie=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_state(loaded_state(open_model(tmp_path).load()), model)
    del tensors["model.embed_tokens.weight"]  # some writers keep the other one of the two
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_state(loaded_state(open_model(tmp_path).load()), model)


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(K_PROJ), [K_PROJ, "missing", "[32, 64]"]),
        (lambda t: t.update({K_PROJ: t[K_PROJ][:-1].clone()}), [K_PROJ, "[31, 64]", "[32, 64]", "model.safetensors"]),
        (lambda t: t.update({K_PROJ: t[K_PROJ].to(torch.int8)}), [K_PROJ, "I8", "F32 or F16 or BF16"]),
        (lambda t: t.update({K_PROJ: t[K_PROJ].to(torch.float8_e4m3fn)}), [K_PROJ, "F8_E4M3"]),
        (
            lambda t: t.update({"model.layers.2.mlp.x.weight": torch.ones(2)}),
            ["model.layers.2.mlp.x.weight", "no llama"],
        ),
        (lambda t: t.update({"evil\nname": torch.ones(2)}), ["evil", "no llama"]),
        (
            lambda t: t.update({K_PROJ.replace("weight", "qweight"): t.pop(K_PROJ).int()}),
            [K_PROJ, "does not say that it is quantized"],
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path: Path, edit, said):
    save_checkpoint(tmp_path)
    edit_tensors(tmp_path, edit)
    with pytest.raises(ModelFileError) as caught:
        open_model(tmp_path)
    message = str(caught.value)
    assert all(part in message for part in [*said, str(tmp_path)])
    assert "\n" not in message


def damage_index(folder: Path, edit) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: m.clear(), "weight_map is {}"),
        (lambda m: m.update({K_PROJ: "../other.safetensors"}), "../other.safetensors"),
        (lambda m: m.update({K_PROJ: 7}), "is in 7"),
        (lambda m: m.update({K_PROJ: "absent.safetensors"}), "absent.safetensors: is missing"),
        (lambda m: m.update({"ghost": m[K_PROJ]}), "ghost is missing"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, edit, said):
    huggingface_model().save_pretrained(tmp_path, max_shard_size="60KB")
    damage_index(tmp_path, edit)
    with pytest.raises(ModelFileError) as caught:
        open_model(tmp_path)
    assert said in str(caught.value)


def test_a_missing_or_truncated_shard_is_named(tmp_path: Path):
    huggingface_model().save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ModelFileError, match=shard.name):
        open_model(tmp_path)
    shard.unlink()
    with pytest.raises(ModelFileError, match=f"{shard.name}: is missing"):
        open_model(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ModelFileError, match="safetensors files but no"):
        open_model(tmp_path)


def test_folders_without_a_model_say_what_is_wanted(tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match=r"neither config\.json nor a \.gguf"):
        open_model(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        open_model(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelNotFoundError, match="not a model"):
        open_model(tmp_path / "notes.txt")
    save_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no \*\.safetensors"):
        open_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a":' * 20000, b"[" * 200 + b"]" * 200])
def test_a_config_that_is_no_json_object_is_one_line(tmp_path: Path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        open_model(tmp_path)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_where_a_file_should_be_is_refused(tmp_path: Path):
    save_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(DuoLocalError):
        open_model(tmp_path)


AWQ_CONFIG = {"bits": 4, "group_size": 16, "quant_method": "awq", "version": "gemm", "zero_point": True}


def save_awq(folder: Path, *, dense: tuple[str, ...] = (), group: int = 16, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a tiny AWQ folder; return the matrices it stands for, transformers' names."""
    model = save_checkpoint(folder, "qwen2")
    change_config(
        folder,
        quantization_config=AWQ_CONFIG | {"group_size": group, "modules_to_not_convert": list(dense) or None} | changes,
    )
    wanted = dict(model.state_dict())

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for seed, name in enumerate(sorted(tensors)):
            module = name.removesuffix(".weight")
            if not module.endswith(tuple(LINEARS.values())) or any(part in module for part in dense):
                continue
            out_features, in_features = tensors.pop(name).shape
            parts, matrix = random_awq(seed, in_features, out_features, in_features if group == -1 else group)
            tensors.update({f"{module}.{part}": tensor for part, tensor in parts.items()})
            wanted[name] = torch.from_numpy(matrix)

    edit_tensors(folder, quantize)
    return wanted


@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("dense", [(), ("mlp.down_proj", "layers.0.self_attn")], ids=["all", "some dense"])
def test_awq_folder(tmp_path: Path, dense: tuple[str, ...], group: int):
    wanted = save_awq(tmp_path, dense=dense, group=group)
    source = open_model(tmp_path)
    assert source.kind == "awq"
    assert source.weight_format == ("AWQ int4" if group == -1 else "AWQ int4 g16")
    weights = source.load()
    assert isinstance(weights.layers[1].q_proj.weight, AWQWeight)
    assert isinstance(weights.layers[0].down_proj.weight, DenseWeight if dense else AWQWeight)
    assert isinstance(weights.lm_head, DenseWeight)
    found = loaded_state(weights)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.scales"), f"{Q_PROJ}.scales is missing"),
        (lambda t: t.update({f"{Q_PROJ}.scales": t[f"{Q_PROJ}.scales"].float()}), "F32, wanted F16"),
        (lambda t: t.update({f"{Q_PROJ}.qzeros": t[f"{Q_PROJ}.qzeros"][:-1].clone()}), "[3, 8], wanted [4, 8]"),
        (lambda t: t.update({f"{Q_PROJ}.g_idx": torch.arange(64)}), f"{Q_PROJ}.g_idx belongs to no qwen2"),
    ],
)
def test_awq_tensors_that_do_not_fit_are_refused(tmp_path: Path, edit, said):
    save_awq(tmp_path)
    edit_tensors(tmp_path, edit)
    with pytest.raises(ModelFileError) as caught:
        open_model(tmp_path)
    assert said in str(caught.value)


def test_awq_group_size_must_divide_the_rows(tmp_path: Path):
    save_awq(tmp_path, group=16)
    change_config(tmp_path, quantization_config=AWQ_CONFIG | {"group_size": 48})
    with pytest.raises(ModelFileError, match="group_size = 48"):
        open_model(tmp_path)
