"""The whole files that are damaged: tiny models and tokenizers of every kind that is read, made on the spot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType
from safetensors.torch import load_file, save_file

from duolocal.engine.kernels import arrange_rows
from duolocal.models.loader import open_model
from duolocal.models.native_writer import write_native
from duolocal.quant.grouped import group
from tests.fuzz.documents import make_documents
from tests.fuzz.sessions import make_session_seeds
from tests.model_files import random_awq, write_gguf
from tests.tiny import huggingface_model
from tests.tokenizer_files import LLAMA3, MISTRAL, SMOLLM2, Files, chatml, llama2, llama3, train_sentencepiece, write

_SIZES: dict[str, Any] = {"vocab_size": 64, "intermediate_size": 64}


def make_seeds(folder: Path) -> Path:
    """Write all seeds below `folder`, one folder for each kind, and return it."""
    torch.manual_seed(0)
    for name, make in (
        ("gguf", _gguf),
        ("gguf-vocab", _gguf_vocab),
        ("safetensors", _safetensors),
        ("awq", _awq),
        ("native", _native),
        ("tokenizer", _tokenizers),
        ("sentencepiece", _sentencepiece),
        ("session", make_session_seeds),
        ("documents", make_documents),
    ):
        place = folder / name
        place.mkdir(parents=True)
        make(place)
    return folder


def _gguf(place: Path) -> None:
    write_gguf(place / "q4_1.gguf", huggingface_model("llama", **_SIZES), "llama", kind=GGMLType.Q4_1)
    write_gguf(place / "q8_0.gguf", huggingface_model("qwen2", **_SIZES), "qwen2", kind=GGMLType.Q8_0)
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
    write_gguf(place / "f16.gguf", huggingface_model("qwen3", **_SIZES), "qwen3", kind=GGMLType.F16, keys=yarn)
    factors = {"rope_freqs.weight": np.linspace(1, 4, 8, dtype=np.float32)}
    tied = huggingface_model("llama", tie=True, **_SIZES)
    write_gguf(place / "tied.gguf", tied, "llama", extra=factors, keys={"attention.head_count_kv": [2, 2]})


def _vocab(path: Path, model: str, values: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    for key, value in values.items():
        add: Callable[[str, Any], None] = writer.add_array
        if isinstance(value, str):
            add = writer.add_string
        elif isinstance(value, bool):
            add = writer.add_bool
        elif isinstance(value, int):
            add = writer.add_uint32
        add(f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_vocab(place: Path) -> None:
    description = llama3()["tokenizer.json"]
    vocab: dict[str, int] = description["model"]["vocab"]
    tokens = sorted(vocab, key=lambda text: vocab[text])
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in description["model"]["merges"]]
    special = {token["content"] for token in description["added_tokens"]}
    kinds = [3 if token in special else 1 for token in tokens]
    kinds[-1] = 4
    common = {"ggml.tokens": tokens, "ggml.token_type": kinds, "ggml.bos_token_id": 0, "ggml.eos_token_id": 3}
    for pre in ("llama-bpe", "smollm", "qwen2"):
        more = {"ggml.merges": merges, "ggml.pre": pre, "chat_template": LLAMA3, "ggml.add_bos_token": True}
        _vocab(place / f"{pre}.gguf", "gpt2", common | more)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghe", "▁a", "ab"]
    pieces = list(dict.fromkeys(pieces))
    values = {
        "ggml.tokens": pieces,
        "ggml.scores": [-float(i) for i in range(len(pieces))],
        "ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "chat_template": MISTRAL,
    }
    _vocab(place / "llama.gguf", "llama", values)


def _safetensors(place: Path) -> None:
    huggingface_model("qwen2", **_SIZES).save_pretrained(place / "sharded", max_shard_size="40KB")
    huggingface_model("llama", rope="llama3", **_SIZES).to(torch.bfloat16).save_pretrained(place / "single")
    huggingface_model("mistral", rope="yarn", **_SIZES).to(torch.float16).save_pretrained(place / "mistral")
    huggingface_model("qwen3", tie=True, **_SIZES).save_pretrained(place / "tied")


def _awq(place: Path) -> None:
    for architecture, group_size in (("llama", 32), ("qwen2", 64)):
        folder = place / architecture
        huggingface_model(architecture, **_SIZES).half().save_pretrained(folder)  # type: ignore[arg-type]
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": None,
        }
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        for seed, name in enumerate(name for name in list(tensors) if name.endswith("_proj.weight")):
            rows, columns = tensors.pop(name).shape
            parts, _ = random_awq(seed, columns, rows, group_size)
            tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
        save_file(tensors, folder / "model.safetensors")


def _native(place: Path) -> None:
    sources = (
        ("gguf/q4_1.gguf", arrange_rows),
        ("gguf/q8_0.gguf", group),
        ("awq/llama", group),
        ("safetensors/tied", group),
    )
    for name, arrange in sources:
        source = open_model(place.parent / name)
        write_native(
            source,
            place / Path(name).stem,
            arrangement="planes" if arrange is group else "rows",
            arrange=arrange,
        )


def _tokenizers(place: Path) -> None:
    kinds: dict[str, Files] = {
        "llama3": llama3(),
        "chatml": chatml(),
        "smollm2": chatml(SMOLLM2),
        "llama2": llama2(),
        "mistral": llama2(MISTRAL, scheme="first"),
    }
    for name, files in kinds.items():
        (place / name).mkdir()
        write(place / name, files)
    (place / "llama3" / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    named = [{"name": "default", "template": LLAMA3}, {"name": "tool_use", "template": "x"}]
    config = kinds["llama3"]["tokenizer_config.json"] | {"chat_template": named}
    config["added_tokens_decoder"] = {"0": {"content": "<|begin_of_text|>", "special": True}}
    (place / "llama3" / "tokenizer_config.json").write_text(json.dumps(config))


def _sentencepiece(place: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": MISTRAL, "legacy": False}
    for name, options in (("llama", {}), ("symbols", {"symbols": ("<tool>", "<think>")})):
        (place / name).mkdir()
        (place / name / "tokenizer.model").write_bytes(train_sentencepiece(**options))
        (place / name / "tokenizer_config.json").write_text(json.dumps(config))
    (place / "symbols" / "added_tokens.json").write_text(json.dumps({"<extra>": 900}))
