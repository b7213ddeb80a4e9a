"""What stands beside the weights: config.json in transformers' terms, and a GGUF's tokenizer as files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from duolocal.errors import ConfigError, TokenizerError
from duolocal.models.config import ModelConfig
from duolocal.models.hf_config import awq_settings, config_from_hf
from duolocal.models.loader import open_model
from duolocal.models.rope import rope_frequencies
from duolocal.quantize.model_config import config_to_hf, quantization_config
from duolocal.tokenizer import Message, Tokenizer, load_tokenizer
from duolocal.tokenizer.folder import read_folder
from duolocal.tokenizer.gguf_files import check_same, tokenizer_files
from duolocal.tokenizer.gguf_vocab import read_gguf
from tests import tokenizer_files as made
from tests.tiny import ARCHITECTURES, ROPE_SCALINGS, Architecture, tiny_config

TEXTS = ["", " ", "Hello, world! It's 12345.67 o'clock; we'll see.", "a  b   c\n\n\nd\te \n f  1 2\n", made.LICENCE]
TEXTS += [made.MULTI_BYTE, "<|im_end|><|im_start|>system <s></s>", made.CORPUS[:5000]]
TALK = [Message("user", "How much is 12 + 34?"), Message("assistant", "46"), Message("user", "thanks")]
P = "tokenizer.ggml."


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rope", ROPE_SCALINGS)
@pytest.mark.parametrize("eos", [(), (2,), (2, 7)], ids=str)
def test_a_config_comes_back_as_it_was(architecture: Architecture, rope: str, eos: tuple[int, ...]):
    config = tiny_config(architecture, rope=rope, eos_ids=eos, tie=True)
    assert config_from_hf(config_to_hf(config, "x"), "x") == config


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rope", ROPE_SCALINGS)
def test_transformers_understands_the_config(tmp_path: Path, architecture: Architecture, rope: str):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = tiny_config(architecture, rope=rope)
    raw = config_to_hf(config, "x") | {"quantization_config": quantization_config(32)}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = AutoConfig.from_pretrained(tmp_path, local_files_only=True)
    assert theirs.model_type == architecture
    assert (theirs.num_hidden_layers, theirs.num_key_value_heads, theirs.head_dim) == (
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
    )
    assert theirs.quantization_config["quant_method"] == "awq"
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("default" if rope == "none" else rope)
    if rope in ("yarn", "llama3"):
        inv_freq, scale = ROPE_INIT_FUNCTIONS[rope](theirs, device="cpu")
        wanted, wanted_scale = rope_frequencies(config, config.max_positions)
        assert torch.allclose(inv_freq.double(), wanted, rtol=1e-5)
        assert scale == pytest.approx(wanted_scale)


def test_how_the_weights_are_packed_is_read_back():
    settings = awq_settings({"quantization_config": quantization_config(64)}, "x")
    assert settings is not None and settings.group_size == 64 and settings.dense_modules == ()


def test_a_gguf_of_mistral_calls_itself_llama_and_one_of_llama3_brings_factors():
    windowed = tiny_config("llama", sliding_window=32)
    assert config_from_hf(config_to_hf(windowed, "x"), "x") == replace(windowed, architecture="mistral")
    scaled = tiny_config("llama", rope="llama3", head_dim=64, rope_theta=500000.0)
    scaling = replace(scaled.rope_scaling, factor=8.0, original_max_positions=8192)
    scaled = replace(scaled, rope_scaling=scaling, max_positions=131072)
    plain = replace(scaled, rope_scaling=ROPE_SCALINGS["none"])
    ours, _ = rope_frequencies(scaled, 64)
    unscaled, _ = rope_frequencies(plain, 64)
    from_gguf = replace(plain, rope_freq_factors=tuple((unscaled / ours).float().tolist()))
    assert config_from_hf(config_to_hf(from_gguf, "x"), "x") == scaled
    strange = replace(plain, rope_freq_factors=tuple(1.0 + i / 7 for i in range(32)))
    with pytest.raises(ConfigError, match="not those of Llama 3"):
        config_to_hf(strange, "x")


@pytest.mark.parametrize(
    "changes", [{"qkv_bias": True}, {"o_bias": True}, {"qkv_bias": True, "o_bias": True, "qk_norm": True}], ids=str
)
def test_what_a_config_json_cannot_say_is_refused(changes: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"x: \w+.* cannot be written in a config.json of llama"):
        config_to_hf(tiny_config("llama", **changes), "x")


def byte_level_metadata(files: made.Files, pre: str, **more: Any) -> dict[str, Any]:
    """Return the key/values of a GGUF made of a tokenizer.json, as llama.cpp's converter writes them."""
    description, config = files["tokenizer.json"], files["tokenizer_config.json"]
    ids = dict(description["model"]["vocab"])
    control = {token["content"]: token["special"] for token in description["added_tokens"]}
    ids |= {token["content"]: token["id"] for token in description["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    merges = description["model"]["merges"]
    return {
        P + "model": "gpt2",
        P + "pre": pre,
        P + "tokens": tokens,
        P + "token_type": [{True: 3, False: 4}.get(control.get(token), 1) for token in tokens],  # type: ignore[arg-type]
        P + "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        P + "eos_token_id": ids[config["eos_token"]],
        "tokenizer.chat_template": config["chat_template"],
        **({P + "bos_token_id": ids[config["bos_token"]]} if config.get("bos_token") else {}),
        **more,
    }


def sentencepiece_metadata(template: str, **more: Any) -> dict[str, Any]:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(made.train_sentencepiece(symbols=("<tool>",)))
    size = processor.GetPieceSize()

    def kind(i: int) -> int:
        if processor.IsUnknown(i):
            return 2
        return 3 if processor.IsControl(i) else 6 if processor.IsByte(i) else 1

    tokens = [processor.IdToPiece(i) for i in range(size)]
    return {
        P + "model": "llama",
        P + "tokens": tokens,
        P + "scores": [processor.GetScore(i) for i in range(size)],
        P + "token_type": [4 if token == "<tool>" else kind(i) for i, token in enumerate(tokens)],
        P + "bos_token_id": 1,
        P + "eos_token_id": 2,
        P + "unknown_token_id": 0,
        "tokenizer.chat_template": template,
        **more,
    }


VOCABULARIES = {
    "llama3": lambda: byte_level_metadata(made.llama3(), "llama-bpe"),
    "qwen2": lambda: byte_level_metadata(made.chatml(), "qwen2"),
    "smollm": lambda: byte_level_metadata(made.chatml(made.CHATML), "smollm"),
    "bos": lambda: byte_level_metadata(made.llama3(), "smollm", **{P + "add_bos_token": True}),
    "llama2": lambda: sentencepiece_metadata(made.LLAMA2),
    "no-space": lambda: sentencepiece_metadata(made.MISTRAL, **{P + "add_space_prefix": False}),
    "template-without-bos": lambda: sentencepiece_metadata(made.THINKS, **{P + "add_bos_token": True}),
}


def folder_of(folder: Path, metadata: dict[str, Any]) -> Path:
    for name, data in tokenizer_files(metadata, name="x.gguf", max_positions=2048).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_written_tokenizer_gives_the_ids_of_the_ggufs_own(tmp_path: Path, name: str):
    metadata = VOCABULARIES[name]()
    ours = Tokenizer(read_gguf(metadata, name="x.gguf"))
    written = Tokenizer(read_folder(folder_of(tmp_path, metadata), eos_ids=ours.eos_ids))
    check_same(ours, written, TEXTS)
    for text in TEXTS:
        for options in ({"special": True}, {"continues": True}, {"bos": True}):
            assert ours.encode(text, **options) == written.encode(text, **options)
    assert (ours.bos_id, ours.adds_bos, ours.eos_ids) == (written.bos_id, written.adds_bos, written.eos_ids)
    assert ours.encode_pieces(ours.chat_pieces(TALK)) == written.encode_pieces(written.chat_pieces(TALK))
    ids = ours.encode(made.CORPUS[:2000])
    assert ours.decode(ids) == written.decode(ids) == made.CORPUS[:2000]
    every = range(ours.vocab_size)
    assert [ours.token_bytes(i) for i in every] == [written.token_bytes(i) for i in every]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_transformers_reads_the_written_tokenizer(tmp_path: Path, name: str):
    from transformers import AutoTokenizer

    metadata = VOCABULARIES[name]()
    if metadata[P + "model"] == "llama":
        pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model only with protobuf")
    folder = folder_of(tmp_path, metadata)
    (folder / "config.json").write_text(json.dumps(config_to_hf(tiny_config("llama"), "x")))
    ours = Tokenizer(read_gguf(metadata, name="x.gguf"))
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in TEXTS[2:5] + TEXTS[7:]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text[:40]
        assert theirs.encode(text) == ours.encode(text, bos=True)
    dicts = [{"role": message.role, "content": message.content} for message in TALK]
    rendered = theirs.apply_chat_template(dicts, add_generation_prompt=True, tokenize=False)
    ids = theirs.encode(rendered, add_special_tokens=False)
    assert ids == ours.encode_pieces(ours.chat_pieces(TALK))


def test_a_tokenizer_that_differs_is_noticed():
    one = Tokenizer(read_gguf(VOCABULARIES["smollm"](), name="x"))
    other = Tokenizer(read_gguf(VOCABULARIES["qwen2"](), name="x"))
    with pytest.raises(TokenizerError, match="does not give the ids"):
        check_same(one, other, [made.CORPUS[:5000]])


@pytest.mark.real
def test_smollm2s_tokenizer_and_config_survive(tmp_path: Path, smollm2_path: Path):
    from transformers import AutoConfig, AutoTokenizer

    source = open_model(smollm2_path)
    folder = folder_of(tmp_path, dict(source.metadata))
    (folder / "config.json").write_text(json.dumps(config_to_hf(source.config, "x")))
    ours = load_tokenizer(source)
    written = Tokenizer(read_folder(folder, eos_ids=source.config.eos_ids), vocab_size=source.config.vocab_size)
    check_same(ours, written, [*TEXTS, made.CORPUS])
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert theirs.encode(made.CORPUS[:50_000]) == ours.encode(made.CORPUS[:50_000])
    dicts = [{"role": message.role, "content": message.content} for message in TALK]
    encoded: Any = theirs.apply_chat_template(dicts, add_generation_prompt=True)
    assert encoded["input_ids"] == ours.encode_pieces(ours.chat_pieces(TALK))
    config: ModelConfig = config_from_hf(json.loads((folder / "config.json").read_text()), "x")
    assert config == source.config
    assert AutoConfig.from_pretrained(folder, local_files_only=True).rope_parameters["rope_theta"] == 100000
