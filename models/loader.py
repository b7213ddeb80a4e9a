"""Opening a model from disk: what it is (ModelSource), then its weights.

Owns the choice of the reader by what lies at a path. Opening reads headers and configs only; loading never
dequantizes. The readers are `gguf.py`, `safetensors_folder.py` and `native.py`; names of models and downloads
belong to `registry.py`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from duolocal.errors import ModelFileError, ModelNotFoundError
from duolocal.files import read_json
from duolocal.models import safetensors_folder
from duolocal.models.assemble import TensorSource, assemble
from duolocal.models.config import ModelConfig, stray_ids
from duolocal.models.fingerprint import fingerprint
from duolocal.models.gguf import open_gguf
from duolocal.models.gguf_names import gguf_files
from duolocal.models.gguf_weights import GGUFWeights, main_format, read_config
from duolocal.models.names import MODELS
from duolocal.models.native import is_native, open_native
from duolocal.models.registry import resolve
from duolocal.models.safetensors_folder import FolderWeights, header_bytes, open_shards, read_folder_config
from duolocal.models.stand_ins import stand_in_at
from duolocal.models.weights import ModelWeights
from duolocal.paths import user_path
from duolocal.quant.weight import Weight


@dataclass(frozen=True)
class ModelSource:
    """A model that is opened and checked but not loaded."""

    path: Path
    kind: str  # "gguf", "safetensors", "awq", "native"
    config: ModelConfig
    metadata: Mapping[str, Any]  # GGUF key/values, also of the GGUF that a native folder was made of; else {}
    size_bytes: int  # of the weights on disk
    weight_format: str  # for people: "Q4_1", "AWQ int4 g128", "BF16"
    fingerprint: str  # hex; of headers, configs, tensor table and samples of the data
    tensors: TensorSource
    notes: tuple[str, ...] = ()  # for people: what of the file is not taken as it stands

    def load(
        self,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        arrange: Callable[[Weight], Weight] | None = None,
        on_layer: Callable[[int, int], None] | None = None,
    ) -> ModelWeights:
        """Return the weights, matrices in the bits of the file on `device`, norm weights and biases in `dtype`.

        On the CPU matrices are views of the memory-mapped file wherever their layout allows it. `arrange` is applied
        to every matrix as soon as it is read. `on_layer` is called with (layers done, layers in all). Raises
        ModelFileError where the file cannot be read.
        """
        return assemble(
            self.config, self.tensors, device=torch.device(device), dtype=dtype, arrange=arrange, on_layer=on_layer
        )


def open_model(model: "str | Path | ModelSource") -> ModelSource:
    """Open a .gguf file, a folder with config.json and *.safetensors or one .gguf, or what a name or hub id means.

    A name or hub id is fetched where it is not on this machine; what is open already is returned.
    Raises ModelNotFoundError where there is no model, ModelFileError and ConfigError where it cannot be used.
    """
    if isinstance(model, ModelSource):
        return model
    if not isinstance(model, str | Path):
        raise ModelNotFoundError(f"the model is {model!r}: give a name, a hub id or a path")
    path = user_path(model)
    if isinstance(model, str) and (model in MODELS or not os.path.exists(path)):
        path = resolve(model)
    if os.path.isdir(path):  # unlike Path.is_dir false, not an exception, where access is denied
        return _open_folder(path)
    if not os.path.exists(path):
        raise ModelNotFoundError(f"{path}: no such file or folder; give a .gguf file, a model folder or a model name")
    if path.suffix.lower() == ".gguf" or _begins_with_gguf(path):
        return _open_gguf(path)
    if (instead := stand_in_at(path)) is not None:
        raise ModelFileError(f"{path}: {instead}")
    raise ModelNotFoundError(
        f"{path}: not a model; give a .gguf file, or the folder that holds config.json and *.safetensors"
    )


def _begins_with_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error})") from error


def _open_folder(folder: Path) -> ModelSource:
    configured = (folder / "config.json").is_file()
    if not configured or not any(folder.glob("*.safetensors")):
        found = gguf_files(folder)
        if len(found) == 1:
            return _open_gguf(found[0])
        if found:
            raise ModelNotFoundError(
                f"{folder}: has {len(found)} .gguf files ({found[0].name}, {found[1].name} …): name one of them"
            )
    if not configured:
        raise ModelNotFoundError(
            f"{folder}: has neither config.json nor a .gguf file; give a model folder, a .gguf file or a model name"
        )
    if is_native(folder):
        return _open_native(folder)
    config, settings = read_folder_config(folder)
    shards = open_shards(folder)
    tensors = FolderWeights(shards, config, settings)
    files = sorted(shards.handles)
    config_file = folder / "config.json"
    tables = [(config_file, config_file.stat().st_size), *((file, header_bytes(file)) for file in files)]
    return ModelSource(
        path=folder,
        kind="safetensors" if settings is None else "awq",
        config=config,
        metadata={},
        size_bytes=sum(file.stat().st_size for file in files),
        weight_format=safetensors_folder.main_format(shards, settings),
        fingerprint=fingerprint(tables),
        tensors=tensors,
        notes=_stray_ids(read_json(config_file) or {}, config, ""),
    )


def _open_native(folder: Path) -> ModelSource:
    model = open_native(folder)
    return ModelSource(
        path=folder,
        kind="native",
        config=model.config,
        metadata={"general.name": model.metadata.source_name, **model.key_values},
        size_bytes=model.size_bytes,
        weight_format=model.metadata.weight_format,
        fingerprint=model.metadata.fingerprint,
        tensors=model.tensors,
    )


def _open_gguf(path: Path) -> ModelSource:
    file = open_gguf(path)
    config = read_config(file)
    return ModelSource(
        path=path,
        kind="gguf",
        config=config,
        metadata=file.metadata,
        size_bytes=sum(tensor.nbytes for tensor in file.tensors.values()),
        weight_format=main_format(file),
        fingerprint=fingerprint([(part.path, part.header_bytes) for part in file.parts]),
        tensors=GGUFWeights(file, config),
        notes=_stray_ids(file.metadata, config, "tokenizer.ggml."),
    )


def _stray_ids(values: Mapping[str, Any], config: ModelConfig, prefix: str) -> tuple[str, ...]:
    names = "bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id"
    return stray_ids({name: values.get(prefix + name) for name in names}, config)
