"""Models for which a head pattern is published, and fetching one with its model, or where it is asked for.

The patterns are those of the authors of DuoAttention (arXiv 2410.10819): github.com/mit-han-lab/duo-attention, folder
attn_patterns, MIT licence, some 7 KB each. None of them comes with duolocal. They were made with the original 16-bit
weights; for quantized ones of the same model they are a good guess, not a measurement.

$DUOLOCAL_HEAD_PATTERNS replaces the address by that of a mirror, or by a local folder that holds attn_patterns'
folders.
"""

import os
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from duolocal.downloads import UnreachableError, fetch_small
from duolocal.errors import DownloadError, SettingsError
from duolocal.heads.pattern import MAX_FILE_BYTES, HeadPattern
from duolocal.heads.published import CONFIG_FILE, SCORES_FILE, read_published
from duolocal.paths import cache_folder, user_path

SOURCE = "github.com/mit-han-lab/duo-attention"
LICENCE = "MIT"
ADDRESS_VARIABLE = "DUOLOCAL_HEAD_PATTERNS"
# One commit, so that what is fetched is the same tomorrow.
_ADDRESS = "https://raw.githubusercontent.com/mit-han-lab/duo-attention/aa978305524d2a2706eff6db70f2c477ae225f5f"
_TO_32K = "lr=0.02-reg=0.05-ctx=1000_32000-multi_passkey10"
_TO_128K = "lr=0.02-reg=0.05-ctx=1000_128000-multi_passkey10"


@dataclass(frozen=True)
class ModelShape:
    """What of an architecture a pattern has to fit."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int


_LLAMA2_7B = ModelShape(num_layers=32, num_heads=32, num_kv_heads=32, hidden_size=4096)
_LLAMA3_8B = ModelShape(num_layers=32, num_heads=32, num_kv_heads=8, hidden_size=4096)
_MISTRAL_7B = _LLAMA3_8B


@dataclass(frozen=True)
class KnownPattern:
    """A model that a pattern is published for."""

    name: str  # the folder below attn_patterns
    hub: str  # the model's id on the hub
    training: str  # the folder below `name`
    shape: ModelShape
    default_ratio: float  # the paper's: 0.25 where query heads have KV heads of their own, else 0.5
    spelling: str  # what every name of the model contains, lower case, words joined by "-"

    @property
    def folder(self) -> str:
        """Where the two files lie below attn_patterns."""
        return f"{self.name}/{self.training}"


KNOWN_PATTERNS: tuple[KnownPattern, ...] = (
    KnownPattern(
        name="Llama-2-7B-32K-Instruct",
        hub="togethercomputer/Llama-2-7B-32K-Instruct",
        training=_TO_32K,
        shape=_LLAMA2_7B,
        default_ratio=0.25,
        spelling="llama-2-7b-32k-instruct",
    ),
    KnownPattern(
        name="Llama-3-8B-Instruct-Gradient-1048k",
        hub="gradientai/Llama-3-8B-Instruct-Gradient-1048k",
        training=_TO_32K,
        shape=_LLAMA3_8B,
        default_ratio=0.5,
        spelling="llama-3-8b-instruct-gradient-1048k",
    ),
    KnownPattern(
        name="Llama-3-8B-Instruct-Gradient-4194k",
        hub="gradientai/Llama-3-8B-Instruct-Gradient-4194k",
        training=_TO_32K,
        shape=_LLAMA3_8B,
        default_ratio=0.5,
        spelling="llama-3-8b-instruct-gradient-4194k",
    ),
    KnownPattern(
        name="Meta-Llama-3.1-8B-Instruct",
        hub="meta-llama/Llama-3.1-8B-Instruct",
        training=_TO_128K,
        shape=_LLAMA3_8B,
        default_ratio=0.5,
        spelling="llama-3-1-8b-instruct",
    ),
    KnownPattern(
        name="Mistral-7B-Instruct-v0.2",
        hub="mistralai/Mistral-7B-Instruct-v0.2",
        training=_TO_32K,
        shape=_MISTRAL_7B,
        default_ratio=0.5,
        spelling="mistral-7b-instruct-v0-2",
    ),
    KnownPattern(
        name="Mistral-7B-Instruct-v0.3",
        hub="mistralai/Mistral-7B-Instruct-v0.3",
        training=_TO_32K,
        shape=_MISTRAL_7B,
        default_ratio=0.5,
        spelling="mistral-7b-instruct-v0-3",
    ),
)


def known_pattern(names: Sequence[str], shape: ModelShape) -> KnownPattern | None:
    """Return the published pattern for a model of this shape that one of `names` names, or None.

    names: whatever the model is called: a hub id, a file or folder name, the name in a file's metadata.
    """
    spelled = [re.sub(r"[^a-z0-9]+", "-", name.lower()) for name in names]
    return next(
        (
            known
            for known in KNOWN_PATTERNS
            if known.shape == shape and any(known.spelling in f"-{name}-" for name in spelled)
        ),
        None,
    )


def pattern_called(name: str) -> KnownPattern:
    """Return the published pattern of this name, or raise SettingsError listing all."""
    for known in KNOWN_PATTERNS:
        if name.lower() in (known.name.lower(), known.hub.lower()):
            return known
    names = ", ".join(known.name for known in KNOWN_PATTERNS)
    raise SettingsError(f"no head pattern is published as {name!r:.80}: there are {names}")


def is_here(known: KnownPattern) -> bool:
    """Say whether `published_pattern` would fetch nothing."""
    return _mirror() is not None or _is_complete(_kept(known))


def published_pattern(known: KnownPattern) -> HeadPattern:
    """Return a published pattern, fetching its two files into the cache folder when they are not there.

    Raises DownloadError saying what to place where, and SettingsError for files that are no pattern.
    """
    mirror, folder = _mirror(), _kept(known)
    if mirror is not None:
        return _read(mirror / known.folder, known)
    if not _is_complete(folder):
        _fetch(known, _address(), folder)
    return _read(folder, known)


def _address() -> str:
    return os.environ.get(ADDRESS_VARIABLE, "").rstrip("/") or f"{_ADDRESS}/attn_patterns"


def _mirror() -> Path | None:
    """Return the local folder that stands for the repository, or None."""
    address = _address()
    return None if re.match(r"https?://", address) else user_path(address)


def _kept(known: KnownPattern) -> Path:
    return cache_folder() / "head-patterns" / "published" / known.name


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (CONFIG_FILE, SCORES_FILE))


def _read(folder: Path, known: KnownPattern) -> HeadPattern:
    pattern = read_published(folder)
    found = (pattern.num_layers, pattern.num_kv_heads)
    if found != (known.shape.num_layers, known.shape.num_kv_heads):
        raise SettingsError(
            f"{folder} is for {found[0]} layers × {found[1]} KV heads, but {known.name} has "
            f"{known.shape.num_layers} × {known.shape.num_kv_heads}: remove the folder and fetch it again"
        )
    return replace(
        pattern, source=f"published pattern {known.name}", model=known.hub, default_ratio=known.default_ratio
    )


def _fetch(known: KnownPattern, address: str, folder: Path) -> None:
    """Put both files into `folder`, or neither."""
    names = (CONFIG_FILE, SCORES_FILE)
    urls = {name: f"{address}/{urllib.parse.quote(f'{known.folder}/{name}')}" for name in names}
    try:
        fetch_small(urls, folder, most=MAX_FILE_BYTES, check=lambda work: _read(work, known))
    except UnreachableError as error:
        raise DownloadError(
            f"cannot fetch the head pattern of {known.name} from {address} ({error}): check the network, or place "
            f"{CONFIG_FILE} and {SCORES_FILE} of {SOURCE} (attn_patterns/{known.folder}) in a folder and give it to "
            "--heads"
        ) from None
    except OSError as error:
        raise DownloadError(
            f"the head pattern of {known.name} cannot be kept in {folder.parent} ({error.strerror or error}): "
            "set DUOLOCAL_CACHE to a folder that can be written"
        ) from None
