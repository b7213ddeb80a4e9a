"""Writer of duolocal's native format (`native.py` says what it is): one tensor after the other, memory bounded.

The folder appears whole or not at all: it is made under a temporary name beside its place and renamed. The header of
the safetensors file is written last, into room left for it, because it names digests of what follows.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from duolocal.errors import ModelFileError
from duolocal.files import free_bytes, replacing_folder
from duolocal.models.assemble import Role, roles
from duolocal.models.config import ModelConfig
from duolocal.models.fingerprint import data_digest
from duolocal.models.loader import ModelSource
from duolocal.models.native import (
    CONFIG_FILE,
    GGUF_METADATA_FILE,
    MODEL_TYPE,
    PAD,
    VERSION,
    WEIGHTS_FILE,
    NativeMetadata,
    role_key,
)
from duolocal.models.native_config import config_as_json
from duolocal.models.native_layout import DTYPES, SEPARATOR, parts_of
from duolocal.models.quantized import DenseSource
from duolocal.quant.weight import Weight

_ALIGNMENT = 64  # bytes: a cache line, and more than any kernel asks for
_ENTRY_BYTES = 200  # of the header, for one tensor: more than its longest
_MAX_PARTS = 4
_METADATA_BYTES = 4096
_CPU = torch.device("cpu")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What a model folder may hold for its tokenizer, as `duolocal.tokenizer.folder` reads it; licences go with every copy.
_BESIDE = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    GGUF_METADATA_FILE,  # of a native folder
)
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class NativeWritten:
    """A finished native folder."""

    folder: Path
    arrangement: str
    num_bytes: int  # of the weights file


def write_native(
    source: ModelSource,
    folder: Path,
    *,
    arrangement: str,
    arrange: Callable[[Weight], Weight],
    on_progress: Callable[[int, int], None] | None = None,
) -> NativeWritten:
    """Write `source` to `folder`, which must not exist or be empty, every matrix as `arrange` makes it.

    `arrange` must not change a value; "rows" or "planes" is what it arranges for (`native.ARRANGEMENTS`).
    `on_progress` gets (tensors done, in all). Raises ModelFileError where the folder cannot be written: no room is
    seen before, and nothing is left behind.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelFileError(f"{folder}: is there already; give a folder that is new or empty")
    try:
        free = free_bytes(folder)
        if free < source.size_bytes:
            raise ModelFileError(
                f"{folder}: about {source.size_bytes / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make "
                "room, or use another place"
            )
        with replacing_folder(folder) as work:
            config_sha256 = _write_config(source.config, work / CONFIG_FILE)
            _write_beside(source, work)
            metadata = NativeMetadata(
                arrangement=arrangement,
                fingerprint=source.fingerprint,
                weight_format=source.weight_format,
                source_name=_name(source),
                config_sha256=config_sha256,
                data_sha256="",
            )
            num_bytes = _write_weights(source, work / WEIGHTS_FILE, metadata, arrange, on_progress)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room, or use another place" if full else "give a folder that can be written"
        raise ModelFileError(f"{folder}: cannot be written ({error.strerror or error}); {advice}") from error
    return NativeWritten(folder, arrangement, num_bytes)


def _name(source: ModelSource) -> str:
    """Return what people call the source: a pattern may be known by that name."""
    name = source.metadata.get("general.name")
    name = name if isinstance(name, str) and name else source.path.stem if source.kind == "gguf" else source.path.name
    return "".join(character for character in name if character.isprintable())[:200]


def _write_config(config: ModelConfig, path: Path) -> str:
    """Write config.json and return its digest."""
    whole = {"model_type": MODEL_TYPE, "version": VERSION, "config": config_as_json(config)}
    data = json.dumps(whole, indent=1).encode()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _write_beside(source: ModelSource, folder: Path) -> None:
    """Write what belongs to the tokenizer, and licences."""
    if source.kind == "gguf":
        kept = {key: value for key, value in source.metadata.items() if key.startswith(("general.", "tokenizer."))}
        text = json.dumps(kept, ensure_ascii=False, separators=(",", ":"))
        (folder / GGUF_METADATA_FILE).write_bytes(text.encode())
        return
    licences = [path for pattern in _LICENCES for path in source.path.glob(pattern)]
    for path in (*(source.path / name for name in _BESIDE), *licences):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


@dataclass
class _Table:
    """What has been written after the header, as the header will name it."""

    entries: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    num_pads: int = 0

    def add(self, name: str, dtype: str, shape: list[int], num_bytes: int) -> None:
        end = self.size + num_bytes
        self.entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [self.size, end]}
        self.size = end


def _write_weights(
    source: ModelSource,
    path: Path,
    metadata: NativeMetadata,
    arrange: Callable[[Weight], Weight],
    on_progress: Callable[[int, int], None] | None,
) -> int:
    """Write every tensor, then the header; return the bytes of the file."""
    wanted = list(roles(source.config))
    room = _METADATA_BYTES + 2 * _MAX_PARTS * _ENTRY_BYTES * len(wanted)
    room += -(8 + room) % _ALIGNMENT
    table = _Table()
    with path.open("w+b") as file:
        file.seek(8 + room)
        for done, role in enumerate(wanted, 1):
            for part, tensor in _tensors(source, role, arrange).items():
                name = f"{role_key(role)}{SEPARATOR}{part}" if part else role_key(role)
                _append(file, table, name, tensor)
            tensors = source.tensors
            if isinstance(tensors, DenseSource) and tensors.dense_bytes(role) is not None:
                tensors.release(role)
            if on_progress is not None:
                on_progress(done, len(wanted))
        file.flush()
        digest = data_digest(path, 8 + room)
        strings = metadata.as_strings() | {"data_sha256": digest}
        header = json.dumps({"__metadata__": strings, **table.entries}, separators=(",", ":")).encode()
        assert len(header) <= room, (len(header), room)
        file.seek(0)
        file.write(room.to_bytes(8, "little") + header.ljust(room))
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size


def _tensors(source: ModelSource, role: Role, arrange: Callable[[Weight], Weight]) -> Mapping[str, Tensor]:
    if len(role.shape) == 1:
        return {"": source.tensors.vector(role, _CPU, torch.float32)}
    return parts_of(arrange(source.tensors.weight(role, _CPU)))


def _append(file: IO[bytes], table: _Table, name: str, tensor: Tensor) -> None:
    """Write a tensor, and what is missing to the next multiple of the alignment."""
    file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    table.add(name, _NAMES[tensor.dtype], list(tensor.shape), tensor.nbytes)
    gap = -table.size % _ALIGNMENT
    if gap:
        file.write(bytes(gap))
        table.add(f"{PAD}{SEPARATOR}{table.num_pads}", "U8", [gap], gap)
        table.num_pads += 1
