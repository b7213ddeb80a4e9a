"""Model files: GGUF, safetensors, AWQ, native, and their config files. They are opened, loaded and run."""

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from duolocal.engine.engine import Engine
from duolocal.models.config import ModelConfig
from duolocal.models.fingerprint import data_digest
from duolocal.models.loader import open_model
from tests.fuzz.base import Wrong, copy_seed, pick
from tests.fuzz.damage import NASTY_TEXTS, damaged_bytes, damaged_json, flipped_bits, json_bytes, set_number
from tests.fuzz.gguf_fields import gguf_fields


def read_model(path: Path) -> None:
    """Open and load a model and run a few tokens through it."""
    source = open_model(path)
    config = source.config
    check_config(config)
    window = config.sliding_window or 64
    engine = Engine.load(
        source,
        context=max(16, min(64, window, config.max_positions)),
        kv="16",
        heads="all",
        kernels="torch",
        device="cpu",
    )
    ids = [0, 1, config.vocab_size - 1, 2 % config.vocab_size]
    logits = engine.logits(ids)
    if logits.shape != (len(ids), config.vocab_size):
        raise Wrong(f"logits of shape {tuple(logits.shape)} for a vocabulary of {config.vocab_size}")
    if source.size_bytes < 0 or not source.fingerprint:
        raise Wrong(f"size {source.size_bytes}, fingerprint {source.fingerprint!r}")


def check_config(config: ModelConfig) -> None:
    sizes = [config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size]
    sizes += [config.intermediate_size, config.vocab_size, config.max_positions]
    numbers = (config.norm_eps, config.rope_theta, config.rope_scaling.factor)
    if not all(type(size) is int and 1 <= size < 2**32 for size in sizes):
        raise Wrong(f"sizes out of bounds: {config}")
    if not all(0 < number < float("inf") for number in numbers):
        raise Wrong(f"numbers out of bounds: {config}")
    if any(token is not None and not 0 <= token < config.vocab_size for token in (config.bos_id, *config.eos_ids)):
        raise Wrong(f"token ids out of bounds: {config}")


def damage_gguf(seeds: Path, out: Path, rng: random.Random) -> Path:
    path = copy_seed(pick(seeds, rng), out)
    content = path.read_bytes()
    fields, head = gguf_fields(content)
    if rng.random() < 0.6:
        kind = rng.choice(("count", "length", "type", "value", "dimension", "offset"))
        chosen = [field for field in fields if field.kind == kind] or fields
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            field = rng.choice(chosen)
            content = set_number(content, field.at, field.size, rng)
        offsets = [field for field in fields if field.kind == "offset"]
        if kind == "offset" and len(offsets) > 1 and rng.random() < 0.5:  # two tensors in one place, or swapped
            a, b = rng.sample(offsets, 2)
            first, second = content[a.at : a.at + 8], content[b.at : b.at + 8]
            content = _put(content, a.at, second)
            content = content if rng.random() < 0.5 else _put(content, b.at, first)
    elif rng.random() < 0.8:
        content = damaged_bytes(content, rng, head=head)
    else:
        content = content[:head] + flipped_bits(content[head:], rng)
    path.write_bytes(content)
    return path


def _put(content: bytes, at: int, data: bytes) -> bytes:
    return content[:at] + data + content[at + len(data) :]


def damage_shards(seeds: Path, out: Path, rng: random.Random) -> Path:
    folder = copy_seed(pick(seeds, rng), out)
    names = ("*.safetensors", "*.safetensors", "*.safetensors", "*.index.json")
    path = rng.choice(sorted(folder.glob(rng.choice(names))) or sorted(folder.glob("*.safetensors")))
    if path.suffix == ".json":
        path.write_bytes(json_bytes(damaged_json(json.loads(path.read_bytes()), rng), rng))
        return folder
    return damage_shard(folder, rng, path)


def damage_shard(folder: Path, rng: random.Random, path: Path | None = None) -> Path:
    path = folder / "model.safetensors" if path is None else path
    content = path.read_bytes()
    if rng.random() < 0.4:
        _rewrite(path, rng)
        return folder
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.7:
        header = json.loads(content[8 : 8 + length])
        if rng.random() < 0.3:
            _swap_tensors(header, rng)
        else:
            header = damaged_json(header, rng)
        text = json_bytes(header, rng)
        size = len(text) if rng.random() < 0.95 else rng.randrange(2 * len(text))
        content = size.to_bytes(8, "little") + text + content[8 + length :]
    elif rng.random() < 0.3:
        content = set_number(content, 0, 8, rng)
    elif rng.random() < 0.4:
        content = content[: 8 + length] + flipped_bits(content[8 + length :], rng)
    else:
        content = damaged_bytes(content, rng, head=8 + length)
    path.write_bytes(content)
    return folder


_DIGEST = re.compile(rb'"(config_sha256|data_sha256)"\s*:\s*"([0-9a-f]{64})"')


def damage_native(seeds: Path, out: Path, rng: random.Random) -> Path:
    """Damage a native folder; in most, its digests then say that all is well, so that the checks behind are reached."""
    seed = pick(seeds, rng)
    name = rng.choice(("config.json", "config.json", "model.safetensors", "model.safetensors", "gguf_metadata.json"))
    if name == "model.safetensors":
        folder = damage_shard(copy_seed(seed, out), rng)
    else:
        folder = copy_seed(seed, out)
        path = folder / name
        value = json.loads(path.read_bytes()) if path.exists() else {"a": 1}
        path.write_bytes(json_bytes(damaged_json(value, rng), rng))
    if rng.random() < 0.8:
        weights = folder / "model.safetensors"
        content = weights.read_bytes()
        length = min(int.from_bytes(content[:8], "little"), len(content))
        digests = {
            b"config_sha256": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest().encode(),
            b"data_sha256": data_digest(weights, 8 + length).encode(),
        }
        for found in list(_DIGEST.finditer(content, 0, 8 + length)):
            content = _put(content, found.start(2), digests[found[1]])
        weights.write_bytes(content)
    return folder


def _rewrite(path: Path, rng: random.Random) -> None:
    """Write a file in good form that holds other tensors than the config asks for."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        kind = rng.randrange(8)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[name] = tensor.to(rng.choice((torch.int32, torch.float64, torch.float16, torch.bool, torch.int64)))
        elif kind == 2:
            tensors[name] = tensor.view(rng.choice((torch.uint8, torch.int16, torch.bfloat16)))
        elif kind == 3:
            tensors[name] = tensor.reshape(rng.choice(((-1,), (1, -1), (-1, 1), (*tensor.shape, 1), (2, -1))))
        elif kind == 4:
            tensors[name] = tensor[: rng.randrange(tensor.shape[0] + 1)].clone()
        elif kind == 5:
            tensors[rng.choice(NASTY_TEXTS).encode("utf-8", "replace").decode() + name] = tensors.pop(name)
        elif kind == 6:
            tensors[rng.choice(("lm_head.weight", "model.layers.9.mlp.up_proj.weight", name + ".bias"))] = (
                tensor.clone()
            )
        else:
            tensors[name] = torch.full_like(tensor, rng.choice((0, -1, 127)))
        if not tensors:
            break
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def _swap_tensors(header: dict[str, Any], rng: random.Random) -> None:
    """Let two tensors overlap, share a place, or take each other's shape, type or offsets."""
    names = [name for name in header if name != "__metadata__"]
    a, b = (header[name] for name in rng.sample(names, 2))
    key = rng.choice(("shape", "dtype", "data_offsets"))
    if rng.random() < 0.5:
        a[key], b[key] = b[key], a[key]
    else:
        a[key] = b[key]


_MORE_CONFIG = (
    "head_dim",
    "rope_scaling",
    "rope_theta",
    "rope_parameters",
    "quantization_config",
    "mlp_bias",
    "attention_bias",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "original_max_position_embeddings",
    "tie_word_embeddings",
    "unknown_key",
)


def damage_config(seeds: Path, out: Path, rng: random.Random) -> Path:
    every = sorted((seeds.parent / "safetensors").iterdir()) + sorted((seeds.parent / "awq").iterdir())
    folder = copy_seed(rng.choice(every), out)
    names = ["config.json"] * 4 + [path.name for path in folder.glob("*.json")]
    path = folder / rng.choice(sorted(names))
    path.write_bytes(json_bytes(damaged_json(json.loads(path.read_bytes()), rng, more=_MORE_CONFIG), rng))
    return folder
