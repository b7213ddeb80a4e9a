"""Fetch a safetensors model, or a pinned file, from the hub through huggingface-hub.

Owns: which files are wanted, progress in bytes, space, and one-line errors. Not: names of models
(models/registry.py). Endpoint, cache folder, offline mode and token are huggingface-hub's own settings: HF_ENDPOINT,
HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN.

Files that are complete stay when a fetch is cut short; the file in flight starts again.
"""

import errno
import io
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from duolocal.errors import DownloadError, DuoLocalError, ModelNotFoundError
from duolocal.files import Lock
from duolocal.models.fetching import PinnedFile, Progress, UnreachableError, check_space
from duolocal.models.gguf_names import parts_of, without_parts

# Weights as safetensors only: pickled weights (.bin, .pth) run code when they are opened.
_ALLOW = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]
# Folders hold other formats; consolidated* is a second copy of the weights in Mistral's own layout.
_IGNORE = ["*/*", "consolidated*.safetensors"]
_HUB_ID = re.compile(
    r"(?:(?:https?://)?(?:hf\.co|huggingface\.co)/)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?::(\w+))?/?"
)
_USUAL_QUANT = "Q4_K_M"


class HoldsGGUF(Exception):
    """A repository has .gguf files and no safetensors."""


@dataclass(frozen=True)
class HubId:
    """A repository, and which of its .gguf files is meant (None: none was named)."""

    repo: str
    quant: str | None = None


def parse_hub_id(text: str) -> HubId | None:
    """Read "org/name" or "org/name:Q4_K_M", also after hf.co/ or https://huggingface.co/; None: it is another thing."""
    found = _HUB_ID.fullmatch(text)
    return None if found is None else HubId(found[1], found[2])


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
        if not _matching({ready.name: 0}, _USUAL_QUANT):
            on_note(f"{repo}: {ready.name} is taken, the one that is cached")
        return ready
    try:
        folder = _fetch(
            repo, _wanted, _by_hand(repo), revision=revision, token=token, offline=offline, on_progress=on_progress
        )
    except HoldsGGUF:
        return fetch_gguf(repo, None, revision=revision, token=token, on_progress=on_progress, on_note=on_note)
    missing = missing_files(folder)
    if missing:
        raise DownloadError(f"{_called(repo, revision)} lacks {', '.join(missing[:3])} on the hub; use another model")
    return folder


def cached_file(repo: str, file: PinnedFile) -> Path | None:
    """Return a pinned file from the library's cache, or None; touches no network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file.name)
    if not isinstance(found, str):
        return None
    path = Path(found)  # a link to a blob, which the library names by its SHA-256 where the hub knows that
    return path if path.resolve().name == file.sha256 or file.difference(path) is None else None


def fetch_file(repo: str, file: PinnedFile, *, token: str | None = None, on_progress: Progress | None = None) -> Path:
    """Return one pinned file of a hub repository. Raises ModelNotFoundError and DownloadError."""

    def wanted(repo: str, sizes: dict[str, int]) -> dict[str, int]:
        if sizes.get(file.name) != file.nbytes:
            raise ModelNotFoundError(f"{repo} has no {file.name} of {file.nbytes} bytes on the hub")
        return {file.name: file.nbytes}

    path = _fetch(repo, wanted, _by_hand(repo), token=token, on_progress=on_progress) / file.name
    wrong = file.difference(path)
    if wrong is not None:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise DownloadError(f"{file.name} of {repo} {wrong}; nothing of it is kept")
    return path


def _fetch(
    repo: str,
    choose: Callable[[str, dict[str, int]], dict[str, int]],
    by_hand: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Return the local folder of a repository with the files that `choose` takes of all (name: size) in it."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import logging

    if offline or constants.HF_HUB_OFFLINE:
        raise DownloadError(f"{_called(repo, revision)} is not cached and offline mode is on; {by_hand}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its retries are no news for the user; what fails in the end is raised
    try:
        info = HfApi(token=token).model_info(repo, revision=revision, files_metadata=True)
        wanted = choose(repo, {item.rfilename: item.size or 0 for item in info.siblings or []})
        cached = _cached_files(repo, info.sha, wanted)
        total, done = sum(wanted.values()), sum(wanted[name] for name in cached)
        _remove_leftovers(repo)
        check_space(repo, Path(constants.HF_HUB_CACHE), total - done, "HF_HOME")
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                token=token,
                allow_patterns=[escape(name) for name in wanted],
                tqdm_class=_progress_bar(on_progress, done, total),
            )
        )
    # HTTPError is the HTTP library's own (httpx, later httpx2); hf-xet raises RuntimeError.
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        raise _explain(repo, revision, error) from error
    finally:
        logging.set_verbosity(verbosity)
    if on_progress is not None:
        on_progress(total, total)
    return folder


def cached_gguf(repo: str, quant: str | None, *, revision: str | None = None) -> Path | None:
    """Return the .gguf of `quant` (None: the usual one, or the only one) from the library's cache, or None."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    name = revision or "main"
    try:
        commit = (folder / "refs" / name).read_text().strip()
    except OSError:
        commit = name
    snapshot = folder / "snapshots" / commit
    names = {path.relative_to(snapshot).as_posix(): 0 for path in snapshot.rglob("*.gguf") if path.is_file()}
    found = _matching(names, quant or _USUAL_QUANT) or ({} if quant else names)
    first = without_parts(found)
    return snapshot / first[0] if len(first) == 1 and set(parts_of(first[0])) <= set(found) else None


def fetch_gguf(
    repo: str,
    quant: str | None,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool | None = None,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Path:
    """Return a .gguf of a hub repository: of `quant`, whatever its case; None: the only one, else the usual one.

    `on_note` is told what there is where one of several was taken unasked. Errors are those of `fetch_repo`; of what
    is not there, or there more than once, ModelNotFoundError lists the files with their sizes.
    """
    ready = cached_gguf(repo, quant, revision=revision)
    if ready is not None:
        return ready
    taken: list[str] = []

    def choose(repo: str, sizes: dict[str, int]) -> dict[str, int]:
        files = {name: size for name, size in sizes.items() if name.endswith(".gguf") and "mmproj" not in name}
        listed = ", ".join(f"{name} ({size / 1e9:.2f} GB)" for name, size in sorted(files.items()))
        if not files:
            raise ModelNotFoundError(f"{repo} has no .gguf files: leave out :{quant}")
        several = len(without_parts(files)) > 1
        found = _matching(files, quant or _USUAL_QUANT) if quant or several else files
        first = without_parts(found)
        if len(first) != 1:
            what = f"no single file for {quant!r}" if quant else f"several .gguf files and no single {_USUAL_QUANT}"
            raise ModelNotFoundError(f"{repo} has {what}: give {repo}:QUANT for one of {listed}")
        if missing := sorted(set(parts_of(first[0])) - set(found)):
            raise ModelNotFoundError(
                f"{repo} lacks {', '.join(missing)}, of the parts of {first[0]}: take another of {listed}"
            )
        if quant is None and several:
            on_note(f"{repo}: {_USUAL_QUANT} is taken; {repo}:QUANT takes another of {listed}")
        taken.extend(first)
        return found

    by_hand = f"place one of its .gguf files on this machine and give its path (`hf download {repo} FILE.gguf`)"
    folder = _fetch(repo, choose, by_hand, revision=revision, token=token, offline=offline, on_progress=on_progress)
    return folder / taken[0]


def _matching(sizes: dict[str, int], quant: str) -> dict[str, int]:
    """Return the files whose name ends in `quant`, whatever its case."""
    ending = re.compile(rf"(^|[-._/]){re.escape(quant)}(-\d{{5}}-of-\d{{5}})?\.gguf$", re.IGNORECASE)
    return {name: size for name, size in sizes.items() if ending.search(name)}


def missing_files(folder: Path) -> list[str]:
    """Return the names that a safetensors model in `folder` still needs: config, a tokenizer, every shard."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        missing.append("tokenizer.json")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            return [*missing, index.name]  # unreadable: as good as missing
        return missing + [name for name in names if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    return missing


def _wanted(repo: str, sizes: dict[str, int]) -> dict[str, int]:
    from huggingface_hub.utils import filter_repo_objects

    names = list(filter_repo_objects(sizes, allow_patterns=_ALLOW, ignore_patterns=_IGNORE))
    if any(name.endswith(".safetensors") for name in names):
        return {name: sizes[name] for name in names}
    if any(name.endswith(".gguf") for name in sizes):
        raise HoldsGGUF
    raise ModelNotFoundError(f"{repo} has no safetensors weights (pickled .bin and .pth weights are not loaded)")


def _cached_files(repo: str, commit: str | None, wanted: dict[str, int]) -> list[str]:
    from huggingface_hub import try_to_load_from_cache

    return [name for name in wanted if isinstance(try_to_load_from_cache(repo, name, revision=commit), str)]


def _remove_leftovers(repo: str) -> None:
    """Remove what killed fetches of this repository left, file by file, unless someone is writing the file.

    huggingface-hub 2 names them BLOB.RANDOM.incomplete and never uses them again (1.x's BLOB.incomplete is resumed).
    It holds a lock per blob while it writes.
    """
    from huggingface_hub import constants

    folder = f"models--{repo.replace('/', '--')}"
    locks = Path(constants.HF_HUB_CACHE) / ".locks" / folder
    for leftover in (Path(constants.HF_HUB_CACHE) / folder / "blobs").glob("*.*.incomplete"):
        lock = locks / f"{leftover.name.split('.')[0]}.lock"
        with suppress(OSError), Lock(lock):  # being written, or not ours to remove
            leftover.unlink(missing_ok=True)


def _progress_bar(on_progress: Progress | None, start: int, total: int) -> Any:
    """Return a tqdm class that draws nothing and reports the bytes of all files together."""
    from tqdm import tqdm

    class _Bar(tqdm):
        monitor_interval = 0  # no watching thread

        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = options.get("unit") == "B"
            options.update(file=io.StringIO(), disable=False)
            options.pop("name", None)  # huggingface-hub's own bars only
            super().__init__(*args, **options)

        def display(self, *args: Any, **options: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self._counts_bytes and on_progress is not None:
                on_progress(min(start + int(self.n), total), total)
            return shown

    return _Bar


def _explain(repo: str, revision: str | None, error: Exception) -> DuoLocalError:
    """Return the one line that says what failed and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return DownloadError(
            f"{repo} is gated: accept its licence on its page ({constants.ENDPOINT}/{repo}), then set HF_TOKEN to a "
            f"read token of that account (or run `hf auth login`)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFoundError(
            f"the hub has no model {repo} that you may see: check the spelling, or set HF_TOKEN if it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFoundError(f"{repo} has no revision {revision!r} on the hub: give a branch, tag or commit of it")
    if isinstance(error, HFValidationError):
        return ModelNotFoundError(f"{repo!r} is not a hub id: wanted the form org/name")
    if status in (401, 403):
        return DownloadError(
            f"the hub refused {repo} (HTTP {status}): set HF_TOKEN to a valid read token of an account with access"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return DownloadError(f"no space left while fetching {repo} into {constants.HF_HUB_CACHE}: make room and retry")
    if status is not None:
        return DownloadError(f"the hub answered HTTP {status} for {repo}: try again later, or {_by_hand(repo)}")
    detail = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return UnreachableError(
        f"cannot fetch {_called(repo, revision)} ({detail}): check the network, or {_by_hand(repo)}"
    )


def _called(repo: str, revision: str | None) -> str:
    return repo if revision is None else f"{repo} at {revision}"


def _by_hand(repo: str) -> str:
    return (
        f"run `hf download {repo} --local-dir FOLDER` on a machine with network, copy FOLDER here and give its path "
        "as the model"
    )
