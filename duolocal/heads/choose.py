"""From what --heads says to a plan: which pattern is meant, and at what ratio it is cut.

Owns the spellings of --heads and the order in which patterns are looked for: the one that ships for the weights, the
one remembered from their first use on this machine, the one that is published for the model. Finding a pattern that
nobody has yet is not done here; the choice says that it is needed, and the engine does it
(`duolocal.engine.head_choice`).
"""

import json
import random
import re
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from duolocal.errors import SettingsError
from duolocal.heads.known import LICENCE, SOURCE, KnownPattern, is_here, pattern_called, published_pattern
from duolocal.heads.pattern import (
    HeadPattern,
    parse_pattern,
    read_json_pattern,
    write_json_pattern,
)
from duolocal.heads.plan import DEFAULT_RECENT_SIZE, DEFAULT_SINK_SIZE, HeadPlan, uniform_plan
from duolocal.heads.published import read_published, write_published
from duolocal.paths import cache_folder, user_path

# Where nothing is measured for a model: careful: SmolLM2 is served by a half (docs/quality.md).
UNMEASURED_RATIO = 2 / 3
PUBLISHED = "published"
RANDOM = "random"  # a ranking by chance: what a method has to beat


@dataclass(frozen=True)
class HeadChoice:
    """What --heads comes to."""

    plan: HeadPlan  # where `unranked`: with as many retrieval heads as there will be, but not yet these
    note: str | None = None  # for people
    unranked: bool = False  # the model's heads have to be ranked first
    ratio: float | None = None  # asked for; None: the pattern's own


@dataclass(frozen=True)
class HeadsSpec:
    """--heads, taken apart: whose ranking of the heads, and the share of them that are retrieval heads."""

    pattern: str  # "auto", "all", "published", "published:NAME", "random", "random:SEED" or a path
    ratio: float | None = None  # None: the pattern's own

    @classmethod
    def parse(cls, heads: "str | float | HeadsSpec") -> "HeadsSpec":
        """Read what --heads says, as `choose_heads` describes it. Raises SettingsError for a ratio beyond 0..1."""
        if isinstance(heads, HeadsSpec):
            return heads
        if isinstance(heads, (int, float)):
            return cls("auto", _ratio(heads, heads))
        if (number := _number(heads.removeprefix("ratio="))) is not None:
            return cls("auto", _ratio(number, heads))
        pattern, at, tail = heads.rpartition("@")
        if at and pattern and (number := _number(tail)) is not None and not user_path(heads).exists():
            return cls(pattern, _ratio(number, heads))
        return cls(heads)

    def at(self, ratio: float) -> "HeadsSpec":
        """Return the same ranking of heads cut at another ratio; that of "all" is the model's own."""
        return HeadsSpec("auto" if self.pattern == "all" else self.pattern, ratio)

    @property
    def kind(self) -> str:
        """The pattern without the name or the seed after a colon."""
        return self.pattern.partition(":")[0]

    def __str__(self) -> str:
        """Write it as --heads takes it."""
        if self.ratio is None:
            return self.pattern
        return f"{self.ratio:g}" if self.pattern == "auto" else f"{self.pattern}@{self.ratio:g}"


def shipped_pattern(fingerprint: str) -> HeadPattern | None:
    """Return the pattern that ships for the weights with this fingerprint, or None."""
    for file in sorted(resources.files("duolocal.patterns").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".json"):
            data = json.loads(file.read_text(encoding="utf-8"))
            if fingerprint in data["fingerprints"]:
                return parse_pattern(data, where=f"shipped pattern {file.name.removesuffix('.json')}")
    return None


def remembered_file(fingerprint: str) -> Path:
    """Return where the pattern is kept that was found for these weights on this machine."""
    return cache_folder() / "head-patterns" / f"{fingerprint}.json"


def remembered_pattern(fingerprint: str) -> HeadPattern | None:
    """Return the pattern that was found for these weights on this machine, or None (also for a damaged file)."""
    try:
        pattern = read_json_pattern(remembered_file(fingerprint))
    except SettingsError:
        return None
    return pattern if fingerprint in pattern.fingerprints else None


def remember_pattern(pattern: HeadPattern, fingerprint: str) -> Path:
    """Keep a pattern for these weights: `--heads auto` takes it where none ships. Raises SettingsError."""
    path = remembered_file(fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"cannot make the folder {path.parent}: {error.strerror or error}") from None
    write_json_pattern(pattern, path)
    return path


def load_pattern(path: str | Path) -> HeadPattern:
    """Read a pattern: a file of ours, or a folder in the published layout.

    Raises SettingsError naming the file and what is wrong with it.
    """
    path = user_path(path)
    return read_published(path) if path.is_dir() else read_json_pattern(path)


def save_pattern(pattern: HeadPattern, path: str | Path, *, published: bool | None = None) -> Path:
    """Write a pattern as our JSON, or as a folder in the published layout; return its path.

    published: None goes by the path: a folder where it ends with a slash or is one. Raises SettingsError.
    """
    folder = str(path).endswith(("/", "\\")) or user_path(path).is_dir()
    path = user_path(path)
    if folder if published is None else published:
        write_published(pattern, path)
    else:
        write_json_pattern(pattern, path)
    return path


def choose_heads(
    heads: str | float | HeadsSpec,
    *,
    num_layers: int,
    num_kv_heads: int,
    fingerprint: str | None,
    sink_size: int | None = None,
    recent_size: int | None = None,
    published: KnownPattern | None = None,
    can_rank: bool = False,
    ranked_recent_size: int = DEFAULT_RECENT_SIZE,
    fetch: bool = True,
) -> HeadChoice:
    """Return the plan that `heads` asks for, or that the heads have to be ranked first.

    `heads`: "auto", "all", a ratio 0..1 as number or text ("0.5", "ratio=0.5"), "published" or "published:NAME",
    "random" or "random:SEED" (heads by chance, to compare with), the path of a pattern file or folder; after all of
    these but "all" and a ratio, "@0.5" cuts at another ratio than the pattern's own. published: the pattern that is
    published for the model, if any. can_rank: whether the caller can find a pattern; without, "auto" for an unknown
    model keeps the whole context in every head. ranked_recent_size: tokens, of streaming heads in what it would find.
    fetch: whether a published pattern that is not on this machine is fetched; without, a plan with as many retrieval
    heads stands for it, and the note says so.
    Raises SettingsError, and DownloadError for a published pattern that cannot be fetched.
    """
    uniform = partial(
        uniform_plan,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        sink_size=sink_size,
        recent_size=recent_size,
    )
    wish = HeadsSpec.parse(heads)
    if wish.pattern == "all":
        return HeadChoice(uniform(retrieval=True))
    if wish.pattern == "auto" and wish.ratio in (0.0, 1.0):
        return HeadChoice(uniform(retrieval=wish.ratio == 1.0))
    note = None
    if wish.pattern == "auto":
        pattern, note = _known(fingerprint, num_layers, num_kv_heads)
        # It comes with the model: of one that is not here, it is counted on; nothing is fetched at a later start.
        if pattern is None and published is not None and (is_here(published) or fingerprint is None):
            pattern, note = _published(PUBLISHED, published, fetch=False)
        if pattern is None and can_rank:
            pattern = replace(_unranked(num_layers, num_kv_heads), recent_size=ranked_recent_size)
            return HeadChoice(_cut(pattern, wish.ratio, sink_size, recent_size), None, True, wish.ratio)
        if pattern is None and wish.ratio is None:
            return HeadChoice(
                uniform(retrieval=True),
                "no head pattern is known for this model: every KV head keeps the whole context "
                "(give --heads a pattern file to save memory)",
            )
        if pattern is None:
            raise SettingsError(
                f"--heads {wish}: a ratio needs a ranking of heads, and none ships for this model; "
                "use --heads all or a pattern file"
            )
    elif wish.kind == PUBLISHED:
        pattern, note = _published(wish.pattern, published, fetch=fetch)
    elif wish.kind == RANDOM:
        pattern, note = _random(wish.pattern, num_layers, num_kv_heads)
    else:
        pattern = _load(wish.pattern)
    if (pattern.num_layers, pattern.num_kv_heads) != (num_layers, num_kv_heads):
        raise SettingsError(
            f"{pattern.source} is for {pattern.num_layers} layers × {pattern.num_kv_heads} KV heads, "
            f"but the model has {num_layers} × {num_kv_heads}"
        )
    return HeadChoice(_cut(pattern, wish.ratio, sink_size, recent_size), note, False, wish.ratio)


def plan_heads(heads: str | float | HeadsSpec, **options: Any) -> tuple[HeadPlan, str | None]:
    """Return the plan that `heads` asks for, and a note for people or None; options as of `choose_heads`."""
    choice = choose_heads(heads, **options)
    return choice.plan, choice.note


def pattern_meant(
    heads: str, *, fingerprint: str | None, published: KnownPattern | None = None
) -> tuple[HeadPattern | None, float | None]:
    """Return the pattern that `heads` names without cutting it (None: none is known), and the ratio it asks for.

    For "all" there is no pattern. Raises SettingsError and DownloadError.
    """
    wish = HeadsSpec.parse(heads)
    if wish.pattern == "all":
        return None, 1.0
    if wish.pattern == "auto":
        pattern = None
        if fingerprint is not None:
            pattern = shipped_pattern(fingerprint) or remembered_pattern(fingerprint)
        return pattern, wish.ratio
    if wish.kind == PUBLISHED:
        return _published(wish.pattern, published)[0], wish.ratio
    if wish.kind == RANDOM:
        raise SettingsError(f"--heads {heads}: heads by chance have no pattern to show; they are for comparisons")
    return _load(wish.pattern), wish.ratio


def _load(text: str) -> HeadPattern:
    if re.fullmatch(r"\w+", text) and not Path(text).exists():  # a word, mistyped
        raise SettingsError(
            f"--heads {text!r:.40} is unknown: give auto, all, a ratio such as 0.5, published, or a pattern file or "
            "folder"
        )
    return load_pattern(text)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _ratio(ratio: float, heads: str | float) -> float:
    if not 0 <= ratio <= 1:
        raise SettingsError(f"--heads {heads}: a ratio must lie between 0 and 1")
    return ratio


def _cut(pattern: HeadPattern, ratio: float | None, sink_size: int | None, recent_size: int | None) -> HeadPlan:
    return pattern.cut(pattern.default_ratio if ratio is None else ratio, sink_size=sink_size, recent_size=recent_size)


def _known(fingerprint: str | None, num_layers: int, num_kv_heads: int) -> tuple[HeadPattern | None, str | None]:
    if fingerprint is None:
        return None, None
    pattern = shipped_pattern(fingerprint)
    if pattern is not None:
        return pattern, None
    pattern = remembered_pattern(fingerprint)
    if pattern is None or (pattern.num_layers, pattern.num_kv_heads) != (num_layers, num_kv_heads):
        return None, None
    return pattern, (
        f"retrieval heads as found on this machine by {pattern.method or 'an unnamed method'} (--heads all keeps the "
        "whole context in every head)"
    )


def _published(spelled: str, known: KnownPattern | None, *, fetch: bool = True) -> tuple[HeadPattern, str]:
    name = spelled.partition(":")[2]
    if name:
        known = pattern_called(name)
    if known is None:
        raise SettingsError(
            "--heads published: no pattern is published for this model (`duolocal heads list` names those there are; "
            "published:NAME takes one for a model of another name)"
        )
    if not fetch and not is_here(known):
        stand_in = _unranked(known.shape.num_layers, known.shape.num_kv_heads)
        return replace(stand_in, default_ratio=known.default_ratio, source=f"published pattern {known.name}"), (
            f"the head pattern of {known.name} is not on this machine (loading fetches it): counted with its ratio and "
            f"a window of {stand_in.sink_size} + {stand_in.recent_size} tokens"
        )
    return published_pattern(known), f"head pattern of {known.name} from {SOURCE} ({LICENCE} licence)"


def _random(spelled: str, num_layers: int, num_kv_heads: int) -> tuple[HeadPattern, str]:
    seed = spelled.partition(":")[2] or "0"
    if not seed.isdecimal():
        raise SettingsError(f"--heads {spelled}: the seed of heads by chance is {seed!r}: give a whole number")
    draw = random.Random(int(seed)).random
    scores = tuple(tuple(draw() for _ in range(num_kv_heads)) for _ in range(num_layers))
    return replace(_unranked(num_layers, num_kv_heads), scores=scores, source=f"{RANDOM}:{seed}"), (
        f"retrieval heads by chance (seed {seed}): for comparisons, not for use"
    )


def _unranked(num_layers: int, num_kv_heads: int) -> HeadPattern:
    """Return a pattern that knows nothing: cut, it has the right number of heads, spread over the layers."""
    return HeadPattern(
        scores=((0.0,) * num_kv_heads,) * num_layers,
        sink_size=DEFAULT_SINK_SIZE,
        recent_size=DEFAULT_RECENT_SIZE,
        default_ratio=UNMEASURED_RATIO,
        source="heads not yet ranked",
    )
