"""Loading GGUF: against transformers' own state and the gguf package, the real file, and what is refused."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType

from duolocal.errors import ConfigError, DuoLocalError, ModelFileError, ModelNotFoundError
from duolocal.models.gguf import open_gguf
from duolocal.models.gguf_weights import half_split_order
from duolocal.models.loader import open_model
from duolocal.models.registry import resolve
from duolocal.quant.gguf import GGUFWeight
from tests.loading import assert_same_state, loaded_state
from tests.model_files import gguf_tensor_name, interleave_rows, write_gguf
from tests.tiny import Architecture, huggingface_model

ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_float32_file_is_transformers_own_state(tmp_path: Path, architecture: Architecture, tie: bool):
    model = huggingface_model(architecture, tie=tie)
    write_gguf(tmp_path / "tiny.gguf", model, architecture)
    source = open_model(tmp_path / "tiny.gguf")
    assert (source.kind, source.weight_format, source.config.architecture) == ("gguf", "F32", architecture)
    assert len(source.metadata["tokenizer.ggml.tokens"]) == model.config.vocab_size
    assert source.metadata["tokenizer.ggml.tokens"][5] == "<5>é"
    weights = source.load()
    assert_same_state(loaded_state(weights), model)
    assert (weights.lm_head is weights.embedding) == tie


def test_llama_biases_are_put_back_in_order_too(tmp_path: Path):
    model = huggingface_model("llama", attention_bias=True)
    write_gguf(tmp_path / "tiny.gguf", model, "llama")
    weights = open_model(tmp_path / "tiny.gguf").load()
    assert weights.layers[0].q_proj.bias is not None
    assert_same_state(loaded_state(weights), model)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_quantized_file_is_what_the_gguf_package_decodes(tmp_path: Path, kind: str, architecture: Architecture):
    model = huggingface_model(architecture)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, architecture, kind=GGMLType[kind])
    source = open_model(path)
    assert source.weight_format == kind
    found = loaded_state(source.load())
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert source.size_bytes == sum(int(tensor.n_bytes) for tensor in read.values())
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    assert len(found) == len(read)
    for name, tensor in found.items():
        entry = read[gguf_tensor_name(name)]
        wanted = gguf.quants.dequantize(entry.data, entry.tensor_type)
        stored = tensor.numpy()
        part = name.split(".")[-2]
        if architecture == "llama" and part in heads:
            stored = interleave_rows(stored, heads[part])
        assert np.array_equal(stored, wanted), name


def test_half_split_order_inverts_the_converter():
    rows = np.arange(6 * 8 * 3).reshape(48, 3)
    assert np.array_equal(interleave_rows(rows, 6)[half_split_order(6, 8).numpy()], rows)


def test_vectors_get_the_compute_dtype_and_everything_the_device(tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf", huggingface_model("qwen2"), "qwen2", kind=GGMLType.Q8_0)
    source = open_model(tmp_path / "tiny.gguf")
    weights = source.load(dtype=torch.bfloat16)
    assert {weights.norm.dtype, weights.layers[0].k_proj.bias.dtype} == {torch.bfloat16}  # type: ignore[union-attr]
    seen: list[tuple[int, int]] = []
    on_meta = source.load(device="meta", on_layer=lambda done, total: seen.append((done, total)))
    on_host = {name for name, tensor in loaded_state(on_meta).items() if tensor.device.type != "meta"}
    assert on_host == {"model.embed_tokens.weight"}  # untied: of it one row per token is read
    assert seen == [(1, 2), (2, 2)]


def test_rope_factors_are_read(tmp_path: Path):
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    model = huggingface_model("llama")
    write_gguf(tmp_path / "tiny.gguf", model, "llama", extra={"rope_freqs.weight": factors})
    source = open_model(tmp_path / "tiny.gguf")
    assert source.config.rope_freq_factors == tuple(factors.tolist())
    assert_same_state(loaded_state(source.load()), model)


def test_a_folder_with_one_gguf_is_that_file(tmp_path: Path):
    write_gguf(tmp_path / "a.gguf", huggingface_model("llama"), "llama")
    source = open_model(tmp_path)
    assert (source.kind, source.path) == ("gguf", tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes())
    assert open_model(tmp_path / "b.gguf").fingerprint == source.fingerprint
    with pytest.raises(ModelNotFoundError, match=r"2 \.gguf files \(a\.gguf, b\.gguf"):
        open_model(tmp_path)


def test_fingerprint_names_the_weights(tmp_path: Path):
    for seed in (1, 2):
        write_gguf(tmp_path / f"{seed}.gguf", huggingface_model("llama", seed=seed), "llama")
    assert open_model(tmp_path / "1.gguf").fingerprint != open_model(tmp_path / "2.gguf").fingerprint


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, huggingface_model("llama"), "llama")
    return path


def refusal(path: Path, *, named: Path | None = None) -> str:
    with pytest.raises(DuoLocalError) as caught:
        open_model(path)
    message = str(caught.value)
    assert (named or path).name in message
    assert "\n" not in message
    assert len(message) < 500
    return message


def write_split(folder: Path, model: Any, architecture: Architecture) -> list[Path]:
    """Write a model in three parts, tensors dealt out in turn."""
    names = list(model.state_dict())
    paths = [folder / f"big-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    for index, path in enumerate(paths):
        drop = tuple(name for place, name in enumerate(names) if place % 3 != index)
        write_gguf(path, model, architecture, drop=drop, part=(index, 3, len(names)))
    return paths


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_split_files_are_read_as_one(tmp_path: Path, architecture: Architecture):
    model = huggingface_model(architecture)
    first, *others = write_split(tmp_path, model, architecture)
    source = open_model(first)
    assert_same_state(loaded_state(source.load()), model)
    assert source.path == first == open_model(tmp_path).path == resolve(str(tmp_path))
    assert source.size_bytes == sum(tensor.nbytes for path in (first, *others) for tensor in read_tensors(path))
    before = source.fingerprint
    data = bytearray(others[1].read_bytes())
    data[-40] ^= 255
    others[1].write_bytes(data)
    assert open_model(first).fingerprint != before  # all parts count


def read_tensors(path: Path) -> list[Any]:
    return [tensor.data for tensor in gguf.GGUFReader(path).tensors]


def test_a_part_alone_missing_or_renamed_is_refused_by_name(tmp_path: Path, tiny_file: Path):
    first, second, third = write_split(tmp_path, huggingface_model("llama"), "llama")
    assert "part 2 of 3 of a split GGUF; give the first, big-00001-of-00003.gguf" in refusal(second)
    kept = third.read_bytes()
    third.unlink()
    assert "big-00003-of-00003.gguf is not beside it" in refusal(first)
    third.write_bytes(second.read_bytes())
    assert third.name in (said := refusal(first, named=third)) and "says it is part 1 (from 0) of 3" in said
    third.write_bytes(kept)
    renamed = tmp_path / "renamed.gguf"
    second.rename(renamed)
    assert "says it is part 1 (from 0) of 3 of a split GGUF, wanted 0 of 1 by its name" in refusal(renamed)
    only = tmp_path / "one-00001-of-00001.gguf"
    tiny_file.rename(only)
    assert open_model(only).kind == "gguf"


def test_parts_that_lack_tensors_are_refused(tmp_path: Path):
    model = huggingface_model("llama")
    first, *_ = write_split(tmp_path, model, "llama")
    write_gguf(first, model, "llama", drop=tuple(model.state_dict())[1:], part=(0, 3, len(model.state_dict())))
    assert "its parts hold" in refusal(first)


@pytest.mark.parametrize(
    ("start", "value", "said"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "big endian"),
        (8, struct.pack("<Q", 2**63), "tensors, more than"),
        (16, struct.pack("<Q", 2**63), "keys, more than"),
        (16, struct.pack("<Q", 10_000), "a key has a string of"),
        (24, struct.pack("<Q", 2**63), "string of 9223372036854775808 bytes"),
    ],
)
def test_damaged_headers_are_refused(tiny_file: Path, start: int, value: bytes, said: str):
    content = bytearray(tiny_file.read_bytes())
    content[start : start + len(value)] = value
    tiny_file.write_bytes(content)
    assert said in refusal(tiny_file)


def test_truncation_anywhere_is_refused(tiny_file: Path):
    content = tiny_file.read_bytes()
    data_start = min(tensor.data_offset for tensor in gguf.GGUFReader(tiny_file).tensors)
    for length in (0, 3, 4, 20, 100, data_start // 2, data_start, len(content) // 2):
        cut = tiny_file.with_name("cut.gguf")
        cut.write_bytes(content[:length])
        refusal(cut)
    last = max(gguf.GGUFReader(tiny_file).tensors, key=lambda tensor: tensor.data_offset)
    cut.write_bytes(content[: int(last.data_offset) + int(last.n_bytes) - 1])
    assert f"truncated: tensor {last.name} ends" in refusal(cut)


def test_unsupported_types_are_named_with_the_supported_ones(tmp_path: Path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, huggingface_model("llama"), "llama", extra={"rope_freqs.weight": np.ones(8, dtype=np.float64)})
    message = refusal(path)
    assert "tensor rope_freqs.weight has type F64" in message
    assert "Q4_1" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drop": ("model.layers.1.mlp.up_proj.weight",)}, "blk.1.ffn_up.weight is missing"),
        ({"drop": ("model.embed_tokens.weight",)}, "token_embd.weight is missing"),
        ({"extra": {"blk.0.ffn_gate_exps.weight": np.ones(4, dtype=np.float32)}}, "blk.0.ffn_gate_exps.weight belongs"),
        ({"extra": {"rope_freqs.weight": np.ones(1 << 13, dtype=np.float32)}}, "rope_freqs.weight has 32768 bytes"),
        ({"extra": {"rope_freqs.weight": np.ones((2, 8), dtype=np.float32)}}, "wanted one dimension"),
        ({"keys": {"feed_forward_length": 97}}, "ffn_gate.weight has shape [96, 64], wanted [97, 64]"),
        ({"keys": {"block_count": 3}}, "blk.2.attn_norm.weight is missing"),
        ({"keys": {"block_count": None}}, "llama.*: block_count is missing"),
        ({"keys": {"expert_count": 8}}, "llama.expert_count is 8"),
    ],
)
def test_files_that_do_not_fit_their_own_keys_are_refused(tmp_path: Path, options: dict[str, Any], said: str):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, huggingface_model("llama"), "llama", **options)
    assert said in refusal(path)


def test_llama_cpp_architectures_we_do_not_run_are_refused(tmp_path: Path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, huggingface_model("llama"), "gemma")
    with pytest.raises(ConfigError, match="'gemma'"):
        open_model(path)


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path: Path):
    (tmp_path / "dir.gguf").mkdir()
    with pytest.raises(ModelFileError):
        open_gguf(tmp_path / "dir.gguf")
    with pytest.raises(ModelFileError, match="cannot be read"):
        open_gguf(tmp_path / "absent.gguf")


@pytest.mark.real
def test_the_real_file_is_what_the_gguf_package_decodes(smollm2_path: Path):
    source = open_model(smollm2_path)
    config = source.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (source.weight_format, config.tie_embeddings, config.rope_theta) == ("Q4_1", True, 100000.0)
    weights = source.load()
    assert weights.lm_head is weights.embedding
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_path).tensors}
    layer = weights.layers[17]
    for name, linear, heads in [
        ("attn_q", layer.q_proj, 9),
        ("attn_k", layer.k_proj, 3),
        ("attn_v", layer.v_proj, None),
        ("attn_output", layer.o_proj, None),
        ("ffn_gate", layer.gate_proj, None),
        ("ffn_up", layer.up_proj, None),
        ("ffn_down", layer.down_proj, None),
    ]:
        assert isinstance(linear.weight, GGUFWeight)
        entry = read[f"blk.17.{name}.weight"]
        stored = linear.weight.dequantize(torch.float32).numpy()
        if heads:
            stored = interleave_rows(stored, heads)
        assert np.array_equal(stored, gguf.quants.dequantize(entry.data, entry.tensor_type)), name
    index = torch.tensor([0, 49151, 1000])
    entry = read["token_embd.weight"]
    wanted = gguf.quants.dequantize(entry.data[index.numpy()], entry.tensor_type)
    assert np.array_equal(weights.embedding.rows(index, torch.float32).numpy(), wanted)
