"""Fetch a safetensors model, or a pinned file, from the hub: which files those are, and what is refused before.

A model that duolocal does not run is refused by its config.json, one that lacks a shard by its index, before weights
are fetched. Not: how files come here (models/hub.py), and .gguf files (models/fetch_gguf.py).
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path

from duolocal.downloads import PinnedFile, Progress
from duolocal.errors import DownloadError, ModelNotFoundError
from duolocal.models.fetch_gguf import cached_gguf, fetch_gguf, is_usual
from duolocal.models.hub import Listing, fetch, remove

# Weights as safetensors only: pickled weights (.bin, .pth) run code when they are opened.
_ALLOW = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]
# Folders hold other formats; consolidated* is a second copy of the weights in Mistral's own layout.
_IGNORE = ["*/*", "consolidated*.safetensors"]
_INDEX = "model.safetensors.index.json"


class _HoldsGGUF(Exception):
    """A repository has .gguf files and no safetensors."""


def cached_repo(repo: str, *, revision: str | None = None) -> Path | None:
    """Return the folder of a completely cached repository, or None; touches no network.

    Complete is what lacks none of `missing_files`, nor, where huggingface-hub kept the list of the repository, anything
    of that.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=_ALLOW, ignore_patterns=_IGNORE, local_files_only=True
            )
        )
    except (OSError, ValueError):  # not cached, or an id the library refuses
        return None
    return None if missing_files(folder) else folder


def fetch_repo(
    repo: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool | None = None,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Path:
    """Return the local folder of a hub repository's safetensors model, or its usual .gguf, fetching what is missing.

    The hub is asked only where the cache lacks something: a branch stays at the commit that was fetched. `offline`
    True never touches the network; None leaves it to HF_HUB_OFFLINE. `on_progress` gets bytes.
    Raises ModelNotFoundError (no such repository or revision, no safetensors weights) and DownloadError (no network,
    gated, no space), each saying what to do.
    """
    ready = cached_repo(repo, revision=revision)
    if ready is not None:
        return ready
    ready = cached_gguf(repo, None, revision=revision)
    if ready is not None:
        if not is_usual(ready.name):
            on_note(f"{repo}: {ready.name} is taken, the one that is cached")
        return ready
    try:
        return fetch(repo, _choose, revision=revision, token=token, offline=offline, on_progress=on_progress)
    except _HoldsGGUF:
        return fetch_gguf(repo, None, revision=revision, token=token, on_progress=on_progress, on_note=on_note)


def cached_file(repo: str, file: PinnedFile) -> Path | None:
    """Return a pinned file from the library's cache, or None; touches no network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file.name)
    if not isinstance(found, str):
        return None
    path = Path(found)
    return path if _difference(path, file) is None else None


def _difference(path: Path, file: PinnedFile) -> str | None:
    """Say how a file of the cache differs from the pinned one; None where it is that."""
    # The blob that it leads to is named by its SHA-256 where the hub knows that, and was checked when it came.
    return None if path.resolve().name == file.sha256 else file.difference(path)


def fetch_file(repo: str, file: PinnedFile, *, token: str | None = None, on_progress: Progress | None = None) -> Path:
    """Return one pinned file of a hub repository. Raises ModelNotFoundError and DownloadError."""

    def choose(listing: Listing) -> dict[str, int]:
        if listing.sizes.get(file.name) != file.nbytes:
            raise ModelNotFoundError(f"{repo} has no {file.name} of {file.nbytes} bytes on the hub")
        return {file.name: file.nbytes}

    path = fetch(repo, choose, token=token, on_progress=on_progress) / file.name
    wrong = _difference(path, file)
    if wrong is not None:
        remove(path)
        raise DownloadError(f"{file.name} of {repo} {wrong}; nothing of it is kept")
    return path


def missing_files(folder: Path) -> list[str]:
    """Return the names that a safetensors model in `folder` still needs: config, a tokenizer, every shard."""
    index = folder / _INDEX
    return _missing({path.name for path in folder.glob("*") if path.is_file()}, index if index.is_file() else None)


def _missing(names: Collection[str], index: Path | None) -> list[str]:
    """Return what is not among `names` of what a model needs; index: of its shards, None where there is one only."""
    missing = [] if "config.json" in names else ["config.json"]
    if not {"tokenizer.json", "tokenizer.model"} & set(names):
        missing.append("tokenizer.json")
    if index is not None:
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            return [*missing, _INDEX]  # unreadable: as good as missing
        return missing + [name for name in shards if name not in names]
    if not any(name.endswith(".safetensors") for name in names):
        missing.append("*.safetensors")
    return missing


def _choose(listing: Listing) -> dict[str, int]:
    """Take the files of a safetensors model that can be run: its config is read before the weights are fetched."""
    from huggingface_hub.utils import filter_repo_objects

    repo, sizes = listing.repo, listing.sizes
    names = list(filter_repo_objects(sizes, allow_patterns=_ALLOW, ignore_patterns=_IGNORE))
    if not any(name.endswith(".safetensors") for name in names):
        if any(name.endswith(".gguf") for name in sizes):
            raise _HoldsGGUF
        raise ModelNotFoundError(f"{repo} has no safetensors weights (pickled .bin and .pth weights are not loaded)")
    missing = _missing(names, listing.small_file(_INDEX) if _INDEX in names else None)
    if missing:
        raise DownloadError(f"{repo} lacks {', '.join(missing[:3])} on the hub; use another model")
    _check_config(listing)
    return {name: sizes[name] for name in names}


def _check_config(listing: Listing) -> None:
    """Raise ConfigError where the model is one that duolocal does not run."""
    from duolocal.models.hf_config import awq_settings, config_from_hf
    from duolocal.models.native import is_native
    from duolocal.models.safetensors_folder import read_json

    path, where = listing.small_file("config.json"), f"{listing.repo}: config.json"
    raw = read_json(path)
    if not is_native(path.parent):  # written by duolocal, of a model that it runs
        awq_settings(raw, where)
        config_from_hf(raw, where)
