"""Good models as they are found: other suffixes, keys, ids, prefixes; and what only looks like a model."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from duolocal.errors import ConfigError, DuoLocalError
from duolocal.models.hf_config import awq_settings, config_from_hf
from duolocal.models.loader import open_model
from duolocal.models.registry import resolve
from duolocal.tokenizer import load_tokenizer
from tests.tiny import save_checkpoint

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"


@pytest.mark.parametrize("name", ["M.GGUF", "sha256-00ff", "m.gguf"])
def test_a_gguf_file_is_known_by_its_content(name: str, tmp_path: Path, smollm2_path: Path) -> None:
    (tmp_path / name).symlink_to(smollm2_path)
    assert open_model(resolve(str(tmp_path / name))).kind == "gguf"


def test_a_config_beside_the_only_gguf_does_not_matter(tmp_path: Path, smollm2_path: Path) -> None:
    (tmp_path / "model.GGUF").symlink_to(smollm2_path)
    (tmp_path / "config.json").write_text("{}")
    assert open_model(resolve(str(tmp_path))).kind == "gguf"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (LFS, "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\n <html lang=en>", "is a web page"),
        (b"", "is empty"),
    ],
)
def test_what_stands_in_place_of_a_model_is_named(content: bytes, what: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "folder", "llama")
    for file in (tmp_path / "m.gguf", tmp_path / "blob", tmp_path / "folder" / "model.safetensors"):
        file.write_bytes(content)
        place = file.parent if file.suffix == ".safetensors" else file
        with pytest.raises(DuoLocalError, match=f"{file.name}: {what}"):
            open_model(resolve(str(place)))
    (tmp_path / "folder" / "config.json").write_bytes(LFS)
    with pytest.raises(ConfigError, match=r"config\.json: is a Git LFS pointer"):
        open_model(tmp_path / "folder")


def test_a_model_saved_without_its_prefix_is_the_same(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "qwen2")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    wanted = open_model(tmp_path).load().layers[0].q_proj.weight.dequantize(tensors["model.norm.weight"].dtype)
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, file)
    found = open_model(tmp_path).load().layers[0].q_proj.weight.dequantize(wanted.dtype)
    assert bool((found == wanted).all())


RAW: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}


def test_keys_that_say_nothing_are_no_reason_to_refuse() -> None:
    plain = config_from_hf(RAW, "c")
    assert (
        config_from_hf({**RAW, "brand_new": None, "resid_pdrop": 0.1, "auto_map": {}, "loss_type": "x"}, "c") == plain
    )
    with pytest.raises(ConfigError, match="brand_new is 2"):
        config_from_hf({**RAW, "brand_new": 2}, "c")


# As transformers 5 writes an AwqConfig.
SAVED_AGAIN = {
    "zero_point": True, "modules_to_not_convert": None, "quant_method": "awq", "bits": 4, "tokenizer": None,
    "dataset": None, "group_size": 128, "damp_percent": 0.1, "desc_act": False, "act_group_aware": True, "sym": True,
    "true_sequential": True, "format": "gemm", "meta": None, "backend": "auto", "model_seqlen": None,
    "block_name_to_quantize": None, "module_name_preceding_first_block": None, "batch_size": 1, "pad_token_id": None,
    "max_input_length": None, "cache_block_outputs": True, "modules_in_block_to_quantize": None, "version": "gemm",
}  # fmt: skip


def test_awq_settings_that_were_saved_again() -> None:
    found = awq_settings({"quantization_config": SAVED_AGAIN}, "c")
    assert found is not None and found.group_size == 128
    for key, value in (("desc_act", True), ("format", "marlin"), ("brand_new", 1)):
        with pytest.raises(ConfigError, match=f"{key} is"):
            awq_settings({"quantization_config": {**SAVED_AGAIN, key: value}}, "c")


def test_ids_outside_the_vocabulary_are_dropped_and_told(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama", vocab_size=64)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({**raw, "bos_token_id": 64, "eos_token_id": [2, 99], "pad_token_id": -7}))
    source = open_model(tmp_path)
    assert (source.config.bos_id, source.config.eos_ids) == (None, (2,))
    (note,) = source.notes
    assert note.startswith("bos_token_id 64, eos_token_id 99: not in the vocabulary of 64 tokens")


def test_a_byte_order_mark_in_tokenizer_files(tmp_path: Path) -> None:
    from tests.tokenizer_files import chatml, write

    save_checkpoint(tmp_path, "llama", vocab_size=1024)
    write(tmp_path, chatml())
    wanted = load_tokenizer(open_model(tmp_path)).encode("some text")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        file = tmp_path / name
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_tokenizer(open_model(tmp_path)).encode("some text") == wanted


def test_a_name_that_is_not_utf8_is_no_reason_to_refuse(tmp_path: Path, smollm2_path: Path) -> None:
    data = bytearray(smollm2_path.read_bytes())
    at = data.index(b"general.name") + len(b"general.name") + 12  # after its kind and its length
    data[at] = 0xE9
    (tmp_path / "m.gguf").write_bytes(data)
    assert open_model(tmp_path / "m.gguf").metadata["general.name"].startswith("\ufffd")
    at = data.index(b"general.architecture") + len(b"general.architecture") + 12
    data[at] = 0xE9
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(DuoLocalError, match=r"general\.architecture has a string that is not UTF-8"):
        open_model(tmp_path / "m.gguf")
