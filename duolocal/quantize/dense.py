"""A model of any kind as a 16-bit folder in transformers' own form: what other tools, `quantize` and `--weights` take.

Values are the decoded ones rounded to float16, which holds those of 4- and 8-bit files to three digits; nothing is
quantized here. Memory: one shard, up to a gibibyte.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from duolocal.errors import ModelFileError
from duolocal.files import replacing_folder
from duolocal.models.assemble import Role, roles
from duolocal.models.loader import ModelSource, open_model
from duolocal.models.safetensors_folder import hf_module
from duolocal.quantize.checkpoint import SHARD_BYTES, beside_weights, check_room
from duolocal.quantize.files import write_bytes, write_json, write_tensors
from duolocal.quantize.layer import to_half
from duolocal.quantize.model_config import config_to_hf, generation_config

_CPU = torch.device("cpu")
_INDEX = "model.safetensors.index.json"


def write_dense(
    source: str | Path | ModelSource, folder: Path, *, on_progress: Callable[[int, int], None] | None = None
) -> int:
    """Write a model (`open_model`) to `folder`, new or empty, as float16 safetensors; return the bytes of its weights.

    `on_progress` gets (tensors done, in all). Raises DuoLocalError where the folder is not empty, where there is no
    room, and for a model that transformers has no config for.
    """
    source = open_model(source)
    if source.kind == "native":
        raise ModelFileError(f"{source.path}: is a native folder; give the model that it was made of")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelFileError(f"{folder}: is there already; give a folder that is new or empty")
    config = {**config_to_hf(source.config, str(source.path)), "torch_dtype": "float16"}
    beside, generation = beside_weights(source), generation_config(source)
    num_bytes = 2 * sum(torch.Size(role.shape).numel() for role in roles(source.config))
    check_room(folder, num_bytes)
    try:
        with replacing_folder(folder) as work:
            _write_shards(source, work, num_bytes, on_progress)
            for name, data in beside.items():
                write_bytes(work / name, data)
            if generation is not None:
                write_json(work / "generation_config.json", generation)
            write_json(work / "config.json", config)
    except OSError as error:
        raise ModelFileError(
            f"{folder}: cannot be written ({error.strerror or error}); make room, or use another place"
        ) from error
    return num_bytes


def _write_shards(
    source: ModelSource, folder: Path, num_bytes: int, on_progress: Callable[[int, int], None] | None
) -> None:
    shards = list(_planned(source))
    weight_map: dict[str, str] = {}
    done, total = 0, sum(map(len, shards))
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for role in shard:
            tensor_name = f"{hf_module(role)}.{role.name.partition('.')[2]}"
            tensors[tensor_name] = _half(source, role, tensor_name)
            done += 1
            if on_progress is not None:
                on_progress(done, total)
        write_tensors(folder / name, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        write_json(folder / _INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})


def _planned(source: ModelSource) -> Iterator[list[Role]]:
    """Yield the roles of each shard."""
    shard: list[Role] = []
    size = 0
    for role in roles(source.config):
        num_bytes = 2 * torch.Size(role.shape).numel()
        if shard and size + num_bytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(role)
        size += num_bytes
    yield shard


def _half(source: ModelSource, role: Role, name: str) -> Tensor:
    if len(role.shape) == 1:
        return to_half(source.tensors.vector(role, _CPU, torch.float32), name)
    return to_half(source.tensors.weight(role, _CPU).dequantize(torch.float16), name).contiguous()
