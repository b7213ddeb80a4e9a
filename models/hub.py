"""Fetching from the hub through huggingface-hub: what all of it shares.

Owns hub ids, what a repository holds before its files are here, progress in bytes, space, checksums, and one-line
errors. Not: which files are wanted (models/fetch_hub.py, models/fetch_gguf.py), nor names of models
(models/registry.py). Endpoint, cache folder, offline mode and token are huggingface-hub's own settings: HF_ENDPOINT,
HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN.

Files that are complete stay when a fetch is cut short; the file in flight starts again.
"""

import errno
import io
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from duolocal.downloads import Progress, UnreachableError, check_space, file_sha256, read_url, reason_of
from duolocal.errors import DownloadError, DuoLocalError, ModelNotFoundError
from duolocal.files import Lock

_HUB_ID = re.compile(
    r"(?:(?:https?://)?(?:hf\.co|huggingface\.co)/)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?::(\w+))?/?"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubId:
    """A repository, and which of its .gguf files is meant (None: none was named)."""

    repo: str
    quant: str | None = None


def parse_hub_id(text: str) -> HubId | None:
    """Read "org/name" or "org/name:Q4_K_M", also after hf.co/ or https://huggingface.co/; None: it is another thing."""
    found = _HUB_ID.fullmatch(text)
    return None if found is None else HubId(found[1], found[2])


@dataclass(frozen=True)
class Listing:
    """What a repository holds at a commit: sizes by name, and a look into a file before all of it is fetched."""

    repo: str
    commit: str | None
    sizes: Mapping[str, int]
    token: str | None = None

    def small_file(self, name: str) -> Path:
        """Return a file of some kilobytes, fetched."""
        from huggingface_hub import hf_hub_download

        bar = _progress_bar(None, 0, 0)
        return Path(hf_hub_download(self.repo, name, revision=self.commit, token=self.token, tqdm_class=bar))

    def beginning(self, name: str, nbytes: int) -> bytes:
        """Return the first bytes of a file."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repo, name, revision=self.commit)
        return read_url(url, most=nbytes, headers=build_hf_headers(token=self.token))


def fetch(
    repo: str,
    choose: Callable[[Listing], Mapping[str, int]],
    *,
    by_hand: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    offline: bool | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Return the local folder of a repository with the files that `choose` takes of it, by name, with their sizes.

    What `choose` raises ends the fetch before any of them. `by_hand` says in errors what to do without the network.
    Raises ModelNotFoundError and DownloadError.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import logging

    if offline or constants.HF_HUB_OFFLINE:
        raise DownloadError(
            f"{called(repo, revision)} is not cached and offline mode is on; {by_hand or _by_hand(repo)}"
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its retries are no news for the user; what fails in the end is raised
    try:
        info = HfApi(token=token).model_info(repo, revision=revision, files_metadata=True)
        sizes = {item.rfilename: item.size or 0 for item in info.siblings or []}
        wanted = choose(Listing(repo, info.sha, sizes, token))
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
        for name in wanted.keys() - cached:
            _check_sum(repo, folder / name)
    # HTTPError is the HTTP library's own (httpx, later httpx2); hf-xet raises RuntimeError.
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        raise _explain(repo, revision, error) from error
    finally:
        logging.set_verbosity(verbosity)
    if on_progress is not None:
        on_progress(total, total)
    return folder


def remove(path: Path) -> None:
    """Remove a file from the library's cache: the link in the snapshot and what it leads to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _check_sum(repo: str, path: Path) -> None:
    """Raise DownloadError, keeping nothing, where a large file is not the one that the hub named by its SHA-256.

    The library checks sizes only, and names its blobs by what the hub said.
    """
    wanted = path.resolve().name
    if _SHA256.fullmatch(wanted) and (seen := file_sha256(path)) != wanted:
        remove(path)
        raise DownloadError(
            f"{path.name} of {repo} has SHA-256 {seen}, wanted {wanted}; nothing of it is kept: fetch it again"
        )


def _cached_files(repo: str, commit: str | None, wanted: Mapping[str, int]) -> list[str]:
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
    return UnreachableError(
        f"cannot fetch {called(repo, revision)} ({reason_of(error)}): check the network, or {_by_hand(repo)}"
    )


def called(repo: str, revision: str | None) -> str:
    """Return a repository and its revision, for people."""
    return repo if revision is None else f"{repo} at {revision}"


def _by_hand(repo: str) -> str:
    return (
        f"run `hf download {repo} --local-dir FOLDER` on a machine with network, copy FOLDER here and give its path "
        "as the model"
    )
