"""The weights of a folder with config.json and safetensors files, one shard or many, dense or AWQ.

Owns transformers' tensor names and the checks that the shards hold exactly the tensors a ModelConfig asks for, with
the right shapes and dtypes. Reading goes through the `safetensors` library, which maps the files into memory: on the
CPU a weight is a view of its file.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from duolocal.errors import ConfigError, ModelFileError, ModelNotFoundError
from duolocal.models.assemble import Role, roles
from duolocal.models.config import ModelConfig, label, shown
from duolocal.models.hf_config import awq_settings, config_from_hf
from duolocal.models.stand_ins import stand_in_at
from duolocal.quant.awq import AWQSettings, AWQWeight
from duolocal.quant.weight import DenseWeight, Weight

_INDEX = "model.safetensors.index.json"
_MAX_JSON_BYTES = 1 << 26
_MAX_JSON_DEPTH = 32

_OUTER_NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
_UNUSED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # computed, not read
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4}
_DENSE = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class _Entry:
    """One tensor of the folder."""

    file: Path
    stored: str  # its name there
    shape: tuple[int, ...]
    dtype: str  # safetensors' name


@dataclass(frozen=True)
class Shards:
    """The opened safetensors files of a folder; tensors stay valid as long as anything refers to them."""

    folder: Path
    entries: Mapping[str, _Entry]
    handles: dict[Path, Any]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its own dtype, a view of the file."""
        entry = self.entries[name]
        try:
            return self.handles[entry.file].get_tensor(entry.stored)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelFileError(f"{entry.file}: tensor {name} cannot be read ({_one_line(error)})") from error

    def reopen(self, name: str) -> None:
        """Open the file of a tensor anew: the pages of the old map go when the last tensor that uses it does."""
        file = self.entries[name].file
        self.handles[file], _ = _open_shard(file)


def hf_module(role: Role) -> str:
    """Return the module name that transformers gives to `role`, without ".weight" or ".bias"."""
    name = role.name.partition(".")[0]
    if role.layer is None:
        return _OUTER_NAMES[name]
    return f"model.layers.{role.layer}.{_LAYER_NAMES[name]}"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise ConfigError where it cannot be read or is something else."""
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise ConfigError(f"{path}: has {size} bytes, wanted at most {_MAX_JSON_BYTES}; the file is damaged")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        if (instead := stand_in_at(path)) is not None:
            raise ConfigError(f"{path}: {instead}") from error
        raise ConfigError(f"{path}: is not JSON ({_one_line(error)}); download it again") from error
    if _depth_exceeds(value, _MAX_JSON_DEPTH):
        raise ConfigError(f"{path}: is nested deeper than {_MAX_JSON_DEPTH} levels; the file is damaged")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {shown(value)}, wanted a JSON object")
    return value


def read_folder_config(folder: Path) -> tuple[ModelConfig, AWQSettings | None]:
    """Return the ModelConfig of a folder and how its weights are quantized."""
    path = folder / "config.json"
    raw = read_json(path)
    beside = folder / "generation_config.json"
    settings = awq_settings(raw, str(path))
    return config_from_hf(raw, str(path), generation=read_json(beside) if beside.is_file() else None), settings


def open_shards(folder: Path) -> Shards:
    """Open every shard of `folder` and read its tensor table; raise ModelFileError, ModelNotFoundError."""
    index = folder / _INDEX
    if index.is_file():
        listed = _read_index(index)
        files = sorted(set(listed.values()))
    else:
        listed = None
        found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
        single = folder / "model.safetensors"
        files = [single] if single in found else found
        if not files:
            raise ModelNotFoundError(f"{folder}: has a config.json but no *.safetensors; download the weights")
        if len(files) > 1:
            raise ModelFileError(
                f"{folder}: has {len(files)} safetensors files but no {_INDEX}; download the index as well"
            )
    entries: dict[str, _Entry] = {}
    handles: dict[Path, Any] = {}
    for file in files:
        handles[file], table = _open_shard(file)
        for name, entry in table.items():
            if name in entries:
                raise ModelFileError(f"{file}: tensor {label(name)} is in {entries[name].file.name} as well")
            entries[name] = entry
    for name, file in (listed or {}).items():
        if name not in entries or entries[name].file != file:
            raise ModelFileError(f"{file}: tensor {label(name)} is missing, though {_INDEX} lists it; download again")
    if "embed_tokens.weight" in entries:  # the model was saved without the class that holds it and its head
        entries = {name if name.startswith("lm_head.") else f"model.{name}": entry for name, entry in entries.items()}
    return Shards(folder, entries, handles)


def _read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = read_json(path).get("weight_map")
    except ConfigError as error:
        raise ModelFileError(str(error)) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{path}: weight_map is {shown(weight_map)}, wanted tensor names with their files")
    listed = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ModelFileError(f"{path}: tensor {label(name)} is in {shown(file)}, wanted a safetensors file name")
        listed[name] = path.parent / file
    return listed


def _open_shard(file: Path) -> tuple[Any, dict[str, _Entry]]:
    try:
        handle = safe_open(file, framework="pt", device="cpu")
        table = {}
        for name in handle.keys():  # noqa: SIM118  (not a mapping)
            part = handle.get_slice(name)
            table[name] = _Entry(file, name, tuple(part.get_shape()), part.get_dtype())
    except FileNotFoundError as error:
        raise ModelFileError(f"{file}: is missing; download the model again") from error
    except (SafetensorError, OSError, RuntimeError, OverflowError) as error:
        if (instead := stand_in_at(file)) is not None:
            raise ModelFileError(f"{file}: {instead}") from error
        raise ModelFileError(f"{file}: cannot be read ({_one_line(error)}); download it again") from error
    return handle, table


def header_bytes(file: Path) -> int:
    """Return the length of a safetensors header, its own length field included."""
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


def main_format(shards: Shards, settings: AWQSettings | None) -> str:
    """Return the format that holds most bytes, for people: "BF16", "AWQ int4 g128"."""
    if settings is not None:
        return f"AWQ int4 g{settings.group_size}" if settings.group_size > 0 else "AWQ int4"
    sizes: Counter[str] = Counter()
    for entry in shards.entries.values():
        sizes[entry.dtype] += prod(entry.shape) * _DTYPE_BYTES.get(entry.dtype, 1)
    return sizes.most_common(1)[0][0]


@dataclass(frozen=True)
class FolderWeights:
    """A TensorSource over the shards of a folder; their table has been checked against `config`."""

    shards: Shards
    config: ModelConfig
    settings: AWQSettings | None

    def __post_init__(self) -> None:
        wanted: set[str] = set()
        for role in roles(self.config):
            wanted.update(self._check_awq(role) if self._is_awq(role) else self._check_dense(role))
        for name, entry in self.shards.entries.items():
            tied_head = self.config.tie_embeddings and name == "lm_head.weight"
            if name not in wanted and not tied_head and not _UNUSED.fullmatch(name):
                raise ModelFileError(
                    f"{entry.file}: tensor {label(name)} belongs to no {self.config.architecture} model with this "
                    "config.json; use the config.json that came with the weights, or choose another model"
                )

    def weight(self, role: Role, device: torch.device) -> Weight:
        """Return a matrix in the bits of its file; on the CPU a view of it."""
        if not self._is_awq(role):
            return DenseWeight(self.shards.tensor(self._dense_name(role)).to(device))
        module = hf_module(role)
        packed = (self.shards.tensor(f"{module}.{part}").to(device) for part in ("qweight", "qzeros", "scales"))
        return AWQWeight(*packed)

    def vector(self, role: Role, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a norm weight or a bias in `dtype` on `device`, a copy."""
        return self.shards.tensor(self._dense_name(role)).to(device=device, dtype=dtype, copy=True)

    def dense_bytes(self, role: Role) -> int | None:
        """Return the bytes of a tensor in its file, None where it is quantized."""
        if self._is_awq(role):
            return None
        entry = self.shards.entries[self._dense_name(role)]
        return prod(entry.shape) * _DTYPE_BYTES[entry.dtype]

    def release(self, role: Role) -> None:
        """Give back the pages that reading a dense tensor has left in memory."""
        self.shards.reopen(self._dense_name(role))

    def _is_awq(self, role: Role) -> bool:
        linear = role.layer is not None and len(role.shape) == 2
        return linear and self.settings is not None and not self.settings.is_dense(hf_module(role))

    def _dense_name(self, role: Role) -> str:
        name = f"{hf_module(role)}.{role.name.partition('.')[2]}"
        if role.name == "embedding.weight" and self.config.tie_embeddings and name not in self.shards.entries:
            return "lm_head.weight"  # of two tied tensors some writers keep this one
        return name

    def _check_dense(self, role: Role) -> list[str]:
        name = self._dense_name(role)
        self._check(name, role.shape, _DENSE)
        return [name]

    def _check_awq(self, role: Role) -> list[str]:
        assert self.settings is not None
        module, (rows, columns) = hf_module(role), role.shape
        group = columns if self.settings.group_size == -1 else self.settings.group_size
        if rows % 8 or columns % group:
            raise ModelFileError(
                f"{self.shards.folder}: {module} is {rows} x {columns}, wanted a multiple of 8 rows and of "
                f"group_size = {group} columns for AWQ; the config.json belongs to other weights"
            )
        self._check(f"{module}.qweight", (columns, rows // 8), ("I32",))
        self._check(f"{module}.qzeros", (columns // group, rows // 8), ("I32",))
        self._check(f"{module}.scales", (columns // group, rows), ("F16",))
        return [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]

    def _check(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        entry = self.shards.entries.get(name)
        if entry is None:
            quantized = name.removesuffix("weight") + "qweight" in self.shards.entries
            reason = (
                "is there as qweight only, but config.json does not say that it is quantized"
                if quantized
                else f"is missing, wanted shape {list(shape)}"
            )
            raise ModelFileError(f"{self.shards.folder}: tensor {name} {reason}; download the whole model again")
        if entry.shape != shape:
            raise ModelFileError(
                f"{entry.file}: tensor {name} has shape {shown(list(entry.shape))}, wanted {list(shape)} from "
                "config.json; use the config.json that came with the weights"
            )
        if entry.dtype not in dtypes:
            raise ModelFileError(
                f"{entry.file}: tensor {name} has dtype {entry.dtype}, wanted {' or '.join(dtypes)}; choose another "
                "file of this model"
            )


def _one_line(error: BaseException) -> str:
    text = "".join(c if c.isprintable() else " " for c in str(error)[:200])
    return " ".join(text.split()) or type(error).__name__


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True
