"""The finished folder: shards, index, tokenizer files, config.json last, because it is what makes a folder a model."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duolocal.errors import ModelFileError, SettingsError
from duolocal.files import free_bytes
from duolocal.models.assemble import Role, outer_roles
from duolocal.models.loader import ModelSource
from duolocal.models.safetensors_folder import hf_module
from duolocal.quantize.files import write_bytes, write_json, write_tensors
from duolocal.quantize.layer import to_half
from duolocal.quantize.work_area import WorkArea
from duolocal.sample_text import sample_text
from duolocal.tokenizer import Tokenizer, load_tokenizer
from duolocal.tokenizer.folder import read_folder
from duolocal.tokenizer.gguf_files import check_same, tokenizer_files

SHARD_BYTES = 1 << 30  # a shard is in memory while it is written; one tensor may be larger
_INDEX = "model.safetensors.index.json"
_CPU = torch.device("cpu")
# What a folder may have beside its weights; licences go with every copy.
_COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_CHECKED = 20_000  # characters, at either end of a text, on which a rewritten tokenizer must agree
_UNUSUAL = "naïve — 12,345.67\t½²\r\n  日本語 🙂 e\u0301 <|im_end|></s>"
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def beside_weights(source: ModelSource) -> dict[str, bytes]:
    """Return the tokenizer files and licences that go into the folder, by name. Raises DuoLocalError."""
    if source.kind == "gguf":
        files = tokenizer_files(source.metadata, name=source.path.name, max_positions=source.config.max_positions)
        _check_tokenizer(source, files)
        return files
    named = [source.path / name for name in _COPIED]
    licences = [path for pattern in _LICENCES for path in sorted(source.path.glob(pattern))]
    try:
        return {path.name: path.read_bytes() for path in (*named, *licences) if path.is_file()}
    except OSError as error:
        raise ModelFileError(f"{error.filename}: cannot be read ({error.strerror or error})") from error


def _check_tokenizer(source: ModelSource, files: Mapping[str, bytes]) -> None:
    """Read the files of a GGUF's tokenizer back and compare its ids: a wrong tokenizer would show in answers only."""
    with tempfile.TemporaryDirectory() as made:
        for name, data in files.items():
            (Path(made) / name).write_bytes(data)
        parts = read_folder(Path(made), eos_ids=source.config.eos_ids)
    text = sample_text()
    written = Tokenizer(parts, vocab_size=source.config.vocab_size)
    check_same(load_tokenizer(source), written, [text[:_CHECKED], text[-_CHECKED:], _UNUSUAL])


def outer_bytes(source: ModelSource) -> int:
    """Return what the 16-bit tensors that belong to no layer take."""
    sizes = (torch.Size(role.shape).numel() for role in outer_roles(source.config))
    return 2 * sum(sizes)


def write_checkpoint(
    work: WorkArea,
    source: ModelSource,
    *,
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    beside: Mapping[str, bytes],
) -> Iterator[tuple[int, int]]:
    """Write everything into `work.out` and remove the work area; yield (layers written, layers)."""
    out, num_layers = work.out, source.config.num_layers
    names: list[tuple[Path, list[str]]] = []  # shards under temporary names, and the tensors in each
    total = 0
    for shard, done in _shards(work, source):
        path = work.folder / f"shard-{len(names):05d}.safetensors"
        write_tensors(path, shard, {"format": "pt"})
        names.append((path, list(shard)))
        total += sum(tensor.nbytes for tensor in shard.values())
        yield done, num_layers
    weight_map: dict[str, str] = {}
    for index, (path, tensors) in enumerate(names, 1):
        name = "model.safetensors" if len(names) == 1 else f"model-{index:05d}-of-{len(names):05d}.safetensors"
        path.replace(out / name)  # within one folder: a move, never a copy
        weight_map |= dict.fromkeys(tensors, name)
    if len(names) > 1:
        write_json(out / _INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    for name, data in beside.items():
        write_bytes(out / name, data)
    if generation is not None:
        write_json(out / "generation_config.json", generation)
    write_json(out / "config.json", config)
    work.remove()


def check_room(out: Path, num_bytes: int) -> None:
    """Raise SettingsError where the disk of `out` has not `num_bytes` left."""
    free = free_bytes(out)
    if free < num_bytes:
        raise SettingsError(
            f"--out {out}: {num_bytes / 1e9:.1f} GB are needed while it is made and {free / 1e9:.1f} GB are free: "
            "make room, or use another place"
        )


def _shards(work: WorkArea, source: ModelSource) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Yield tensors in the order of the model, up to SHARD_BYTES at a time, with the layers begun so far."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor, layer in _tensors(work, source):
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard, layer
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard, source.config.num_layers


def _tensors(work: WorkArea, source: ModelSource) -> Iterator[tuple[str, Tensor, int]]:
    """Yield every tensor of the model by name, with the layers before it."""
    num_layers = source.config.num_layers
    embedding, *rest = outer_roles(source.config)
    yield (*_outer(source, embedding), 0)
    for layer in range(num_layers):
        for name, tensor in work.load(layer).tensors.items():
            yield name, tensor, layer
    for role in rest:
        yield (*_outer(source, role), num_layers)


def _outer(source: ModelSource, role: Role) -> tuple[str, Tensor]:
    """Return the name and the float16 values of what belongs to no layer."""
    name = f"{hf_module(role)}.weight"
    if len(role.shape) == 1:
        return name, to_half(source.tensors.vector(role, _CPU, torch.float32), name)
    # Straight to 16 bits: in float32 a large vocabulary would be the largest thing in memory.
    return name, to_half(source.tensors.weight(role, _CPU).dequantize(torch.float16), name)
