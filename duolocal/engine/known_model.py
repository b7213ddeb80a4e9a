"""What is known of a model before it is loaded: from its file where it is here, else from its name or its config.json.

Owns the one interface to both; nothing is fetched, and of weights no more than headers is read.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from duolocal.engine.events import QUIET, LoadEvents
from duolocal.engine.head_choice import published_for, shape_of
from duolocal.errors import ModelNotFoundError
from duolocal.heads import KnownPattern, known_pattern
from duolocal.models.config import ModelConfig
from duolocal.models.hub import parse_hub_id
from duolocal.models.loader import ModelSource, open_model
from duolocal.models.names import MODELS
from duolocal.models.outer_weights import outer_note, quantize_outer
from duolocal.models.quantized import kept_dense_note, quantize_on_load
from duolocal.models.registry import cached_path
from duolocal.models.safetensors_folder import read_folder_config, read_json
from duolocal.plan.weights import AWQ_GROUP, NAMED_FORMATS, Weights, weights_by_arithmetic, weights_of

_TORCH_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class KnownModel(Protocol):
    """A model as far as decisions about loading it need it."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def source(self) -> ModelSource | None:
        """Return the opened model; None: it is not on this machine."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Say for people what is special about its weights."""
        ...

    @property
    def published(self) -> KnownPattern | None:
        """Return the head pattern that is published for it."""
        ...

    def quantized(self, weights: str, outer_weights: str) -> "KnownModel":
        """Return it as `--weights` and `--outer-weights` make it. Raises SettingsError where they cannot be applied."""
        ...

    def sizes(self, *, kernels: str, dtype: torch.dtype, device: str) -> Weights:
        """Return what its weights take where these kernels compute."""
        ...


@dataclass(frozen=True)
class OpenedModel:
    """A model whose file is here; name: what the user called it; `events` are told when its weights are rounded."""

    source: ModelSource
    name: str = ""
    events: LoadEvents = QUIET
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    @property
    def published(self) -> KnownPattern | None:
        return published_for(self.source, self.name)

    def quantized(self, weights: str, outer_weights: str) -> "OpenedModel":
        layers = quantize_on_load(self.source, weights)
        source = quantize_outer(layers, outer_weights, on_progress=self.events.quantizing)
        notes = tuple(note for note in (kept_dense_note(layers), outer_note(source)) if note)
        return replace(self, source=source, notes=notes)

    def sizes(self, *, kernels: str, dtype: torch.dtype, device: str) -> Weights:
        return weights_of(self.source, kernels=kernels, dtype=dtype, device=device)


@dataclass(frozen=True)
class ModelByArithmetic:
    """A model of known shapes: matrices of layers in the format `layers`, embedding and lm_head in `outer`."""

    config: ModelConfig
    layers: str
    outer: str
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    group: int = AWQ_GROUP
    weights: str = "auto"
    outer_weights: str = "auto"

    @property
    def source(self) -> None:
        return None

    @property
    def published(self) -> KnownPattern | None:
        return known_pattern(self.names, shape_of(self.config))

    def quantized(self, weights: str, outer_weights: str) -> "ModelByArithmetic":
        return replace(self, weights=weights, outer_weights=outer_weights)

    def sizes(self, *, kernels: str, dtype: torch.dtype, device: str) -> Weights:
        return weights_by_arithmetic(
            self.config,
            layers=self.layers,
            outer=self.outer,
            kernels=kernels,
            dtype=dtype,
            device=device,
            weights=self.weights,
            outer_weights=self.outer_weights,
            group=self.group,
        )


def known_model(name: str) -> KnownModel:
    """Return what this machine knows of a model by its name, hub id or path. Raises ModelNotFoundError."""
    path = cached_path(name)
    if path is not None:
        if path.is_dir() and (path / "config.json").is_file() and not any(path.glob("*.safetensors")):
            return _from_config(path, name)
        return OpenedModel(open_model(path), name)
    known = MODELS.get(name)
    if known is None:
        hint = "`duolocal models fetch` fetches it" if parse_hub_id(name) is not None else "check the path"
        raise ModelNotFoundError(
            f"{name}: is not on this machine; {hint}, or name a folder with its config.json, or one of "
            f"{', '.join(MODELS)}"
        )
    layers, outer = NAMED_FORMATS[name]
    note = f"{name} is not on this machine: its weights are counted from its shapes ({layers} and {outer})"
    return ModelByArithmetic(known.config, layers, outer, (name, known.repo or ""), (note,))


def _from_config(folder: Path, name: str) -> ModelByArithmetic:
    config, awq = read_folder_config(folder)
    raw = read_json(folder / "config.json")
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    dense = _TORCH_DTYPES.get(dtype if isinstance(dtype, str) else "", "BF16")
    layers, group = dense, AWQ_GROUP
    if awq is not None:
        layers, dense, group = "AWQ", "F16", awq.group_size if awq.group_size > 0 else config.hidden_size
    note = f"{folder.name} has no weights: they are counted from its config.json ({layers})"
    return ModelByArithmetic(config, layers, dense, (name, folder.name), (note,), group)
