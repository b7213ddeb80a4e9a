"""Reader of duolocal's native format: a folder that `duolocal models convert` wrote for one arrangement of kernels.

    config.json          {"model_type": "duolocal-native", "version": 1, "config": ModelConfig field by field}
    model.safetensors    every tensor where and as the kernels want it; `__metadata__` says which layout and of what
    tokenizer files      of the source's folder, or gguf_metadata.json with the key/values of a GGUF

Loading is a memory map: no row changes its place, nothing is repacked or decoded. Matrices are kept as
`native_layout.py` has it, vectors in float32, which holds any of them exactly; every tensor begins at a multiple of 64
bytes (gaps are tensors named `pad:N`). `arrangement` is "rows" for CPU kernels, "planes" for GPU kernels; the other
kind of machine takes the file too and rearranges matrices while loading.

The fingerprint is the source's: the values are the source's, bit for bit, so what was measured with it (head patterns,
KV formats) holds. Where an option changed values (`--weights`), it is that of the changed source; lm_head and embedding
made smaller by `--outer-weights` do not change it, as the layers are the same. So that the claim is worth something,
config.json is checked against a digest, and the data against one of its size and of samples of 4 KB.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duolocal.errors import ConfigError, ModelFileError
from duolocal.models.assemble import Role, roles
from duolocal.models.config import ModelConfig, label, shown
from duolocal.models.fingerprint import data_digest
from duolocal.models.native_config import config_from_json
from duolocal.models.native_layout import SEPARATOR, Kind, Wanted, find_kind
from duolocal.models.safetensors_folder import Shards, header_bytes, open_shards, read_json
from duolocal.quant.weight import Weight

MODEL_TYPE = "duolocal-native"
VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
GGUF_METADATA_FILE = "gguf_metadata.json"
ARRANGEMENTS = ("rows", "planes")
PAD = "pad"
_AGAIN = "convert the model again with `duolocal models convert`"
_HEX = re.compile(r"[0-9a-f]{64}")
_MAX_NAME = 200  # characters of a name for people


@dataclass(frozen=True)
class NativeMetadata:
    """What `__metadata__` of the safetensors file says."""

    arrangement: str  # of ARRANGEMENTS
    fingerprint: str  # of the source
    weight_format: str  # of the source, for people
    source_name: str  # the file or folder it was made of, for people and for patterns known by name
    config_sha256: str
    data_sha256: str  # of the size and samples (`data_digest`)

    def as_strings(self) -> dict[str, str]:
        """Return what the file holds: the fields, and which format and version this is."""
        return {"format": MODEL_TYPE, "version": str(VERSION), **vars(self)}


@dataclass(frozen=True)
class NativeModel:
    """An opened native folder."""

    config: ModelConfig
    metadata: NativeMetadata
    key_values: Mapping[str, Any]  # of the GGUF it was made of; else {}
    size_bytes: int
    tensors: "NativeWeights"


def is_native(folder: Path) -> bool:
    """Return whether the config.json of `folder` says that it is of the native format, whatever version."""
    return read_json(folder / CONFIG_FILE).get("model_type") == MODEL_TYPE


def open_native(folder: Path) -> NativeModel:
    """Open a native folder and check all of it but the data.

    Raises ModelFileError or ConfigError, one line with the reason, where the version or layout is unknown, or
    config.json, table and samples of the data are not what was written.
    """
    config_file, file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    raw = read_json(config_file)
    if raw.get("version") != VERSION or isinstance(raw.get("version"), bool):
        raise ConfigError(
            f"{config_file}: is version {shown(raw.get('version'))} of the native format, this duolocal reads "
            f"{VERSION}; {_AGAIN}"
        )
    if raw.keys() != {"model_type", "version", "config"} or not isinstance(raw["config"], dict):
        raise ConfigError(f"{config_file}: wanted model_type, version and config, and nothing else; {_AGAIN}")
    config = config_from_json(raw["config"], str(config_file))
    if not file.is_file():
        raise ModelFileError(f"{file}: is missing; {_AGAIN}")
    shards = open_shards(folder)
    if file not in shards.handles or len(shards.handles) > 1:
        raise ModelFileError(f"{folder}: wanted its weights in {WEIGHTS_FILE} and no other file; {_AGAIN}")
    metadata = _read_metadata(shards.handles[file].metadata(), file)
    if hashlib.sha256(config_file.read_bytes()).hexdigest() != metadata.config_sha256:
        raise ConfigError(f"{config_file}: is not the one that was written with {WEIGHTS_FILE}; {_AGAIN}")
    if data_digest(file, header_bytes(file)) != metadata.data_sha256:
        raise ModelFileError(f"{file}: the weights are not those that were written (damaged, or edited); {_AGAIN}")
    beside = folder / GGUF_METADATA_FILE
    return NativeModel(
        config=config,
        metadata=metadata,
        key_values=_checked_key_values(read_json(beside), beside) if beside.is_file() else {},
        size_bytes=file.stat().st_size,
        tensors=NativeWeights(shards, place(config, shards, file)),
    )


def _read_metadata(found: Mapping[str, str] | None, file: Path) -> NativeMetadata:
    found = dict(found or {})
    said, version = found.pop("format", None), found.pop("version", None)
    if said != MODEL_TYPE:
        raise ModelFileError(f"{file}: is not of the native format, though {CONFIG_FILE} says so; {_AGAIN}")
    if version != str(VERSION):
        raise ModelFileError(
            f"{file}: is version {shown(version)} of the native format, this duolocal reads {VERSION}; {_AGAIN}"
        )
    names = set(NativeMetadata.__dataclass_fields__)
    if found.keys() != names:
        odd = sorted(found.keys() ^ names)[0]
        raise ModelFileError(f"{file}: the metadata key {label(odd)} is missing or unknown; {_AGAIN}")
    metadata = NativeMetadata(**found)
    if metadata.arrangement not in ARRANGEMENTS:
        raise ModelFileError(
            f"{file}: has the layout {shown(metadata.arrangement)}, wanted {' or '.join(ARRANGEMENTS)}; {_AGAIN}"
        )
    for name in ("fingerprint", "config_sha256", "data_sha256"):
        if not _HEX.fullmatch(found[name]):
            raise ModelFileError(f"{file}: {name} is {shown(found[name])}, wanted 64 hex digits; {_AGAIN}")
    for name in ("weight_format", "source_name"):
        if not found[name].isprintable() or len(found[name]) > _MAX_NAME:
            raise ModelFileError(f"{file}: {name} is {shown(found[name])}, wanted a short name; {_AGAIN}")
    return metadata


def _checked_key_values(raw: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return key/values of the kinds that a GGUF has: numbers, strings, and lists of either."""
    for key, value in raw.items():
        items = value if isinstance(value, list) else [value]
        kinds = {type(item) for item in items}
        if len(kinds) > 1 or not kinds <= {bool, int, float, str}:
            raise ModelFileError(f"{path}: {label(key)} is {shown(value)}, wanted numbers or strings; {_AGAIN}")
    return raw


def role_key(role: Role) -> str:
    """Return the name of a role's tensors, without the part."""
    return role.name if role.layer is None else f"layers.{role.layer}.{role.name}"


@dataclass(frozen=True)
class _Placed:
    """Where one role lies: its tensors' names by part, and what they make (None: a vector)."""

    names: Mapping[str, str]
    kind: Kind | None


@dataclass(frozen=True)
class NativeWeights:
    """A TensorSource over a native file whose table fits its config (`place`)."""

    shards: Shards
    placed: Mapping[str, _Placed]  # by `role_key`

    def weight(self, role: Role, device: torch.device) -> Weight:
        """Return a matrix as it lies in the file; on the CPU a view of it."""
        placed = self.placed[role_key(role)]
        assert placed.kind is not None
        parts = {part: self.shards.tensor(name).to(device) for part, name in placed.names.items()}
        return placed.kind.build(parts, role.shape[1])

    def vector(self, role: Role, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a norm weight or a bias in `dtype` on `device`, a copy."""
        return self.shards.tensor(role_key(role)).to(device=device, dtype=dtype, copy=True)

    def dense_bytes(self, role: Role) -> int | None:
        """Return the bytes of a tensor in the file, None where it is quantized."""
        names = self.placed[role_key(role)].names
        return self.shards.tensor(names[""]).nbytes if "" in names else None

    def release(self, role: Role) -> None:
        """Give back the pages that reading a dense tensor has left in memory."""
        self.shards.reopen(role_key(role))


def place(config: ModelConfig, shards: Shards, file: Path) -> Mapping[str, _Placed]:
    """Return where every role of `config` lies; raise ModelFileError where the table is not exactly theirs."""
    by_role: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in shards.entries:
        key, _, part = name.partition(SEPARATOR)
        if key != PAD:
            by_role[key][part] = name
    placed = {}
    for role in roles(config):
        key = role_key(role)
        names = by_role.pop(key, None)
        if names is None:
            raise ModelFileError(f"{file}: tensor {key} is missing; {_AGAIN}")
        placed[key] = _Placed(names, _checked(role, names, shards, file))
    if by_role:
        raise ModelFileError(f"{file}: tensor {label(next(iter(by_role)))} belongs to no model like this; {_AGAIN}")
    return placed


def _checked(role: Role, names: Mapping[str, str], shards: Shards, file: Path) -> Kind | None:
    """Check dtype and shape of every tensor of one role; return what they make."""
    where = f"{file}: {role_key(role)}"
    kind = None
    wanted: Wanted = {"": (("F32",), role.shape)}
    if len(role.shape) == 2:
        shapes = {part: shards.entries[name].shape for part, name in names.items()}
        kind, wanted = find_kind(shapes, *role.shape, where=where)
    if names.keys() != wanted.keys():
        raise ModelFileError(f"{where} is no single vector; {_AGAIN}")
    for part, name in names.items():
        entry, (dtypes, shape) = shards.entries[name], wanted[part]
        if entry.shape != shape or entry.dtype not in dtypes:
            raise ModelFileError(
                f"{file}: tensor {name} is {entry.dtype} {shown(list(entry.shape))}, wanted {' or '.join(dtypes)} "
                f"{list(shape)}; {_AGAIN}"
            )
    return kind
