"""Fetch a .gguf file from the hub: which one is meant, all parts of a split one, and what is refused before.

A file of another architecture is refused by the first bytes of its header. Not: how files come here (models/hub.py).
"""

import re
from collections.abc import Callable
from pathlib import Path

from duolocal.downloads import Progress
from duolocal.errors import ModelNotFoundError
from duolocal.models.gguf_names import parts_of, without_parts
from duolocal.models.hub import Listing, fetch

_USUAL_QUANT = "Q4_K_M"
_BEGINNING_BYTES = 1 << 16  # the architecture is the first key, or among the first


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

    def choose(listing: Listing) -> dict[str, int]:
        files = {name: size for name, size in listing.sizes.items() if name.endswith(".gguf") and "mmproj" not in name}
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
        _check_header(listing, first[0])
        if quant is None and several:
            on_note(f"{repo}: {_USUAL_QUANT} is taken; {repo}:QUANT takes another of {listed}")
        taken.extend(first)
        return found

    by_hand = f"place one of its .gguf files on this machine and give its path (`hf download {repo} FILE.gguf`)"
    folder = fetch(
        repo, choose, by_hand=by_hand, revision=revision, token=token, offline=offline, on_progress=on_progress
    )
    return folder / taken[0]


def is_usual(name: str) -> bool:
    """Say whether a file of this name is the one that is taken unasked."""
    return bool(_matching({name: 0}, _USUAL_QUANT))


def _check_header(listing: Listing, name: str) -> None:
    """Raise ModelFileError or ConfigError where a file is no GGUF, or of an architecture that duolocal does not run."""
    from duolocal.models.gguf import first_value
    from duolocal.models.gguf_config import ARCHITECTURE, check_architecture

    where = f"{listing.repo}: {name}"
    architecture = first_value(listing.beginning(name, _BEGINNING_BYTES), ARCHITECTURE, where)
    if architecture is not None:  # else it comes later in the file, and is checked with the rest
        check_architecture(architecture, where)


def _matching(sizes: dict[str, int], quant: str) -> dict[str, int]:
    """Return the files whose name ends in `quant`, whatever its case."""
    ending = re.compile(rf"(^|[-._/]){re.escape(quant)}(-\d{{5}}-of-\d{{5}})?\.gguf$", re.IGNORECASE)
    return {name: size for name, size in sizes.items() if ending.search(name)}
