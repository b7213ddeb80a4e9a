"""The head plan: which KV heads are retrieval heads and which are streaming heads.

The head class is data: nothing is reordered in the weights, kernels index heads. Patterns are scores per layer and
KV head in a JSON file; a plan is a pattern cut at a ratio.
"""

import json
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Any

from duolocal.errors import SettingsError

DEFAULT_SINK_SIZE = 64  # tokens
DEFAULT_RECENT_SIZE = 256  # tokens
PATTERN_FORMAT = "duolocal-head-pattern"


@dataclass(frozen=True)
class HeadPlan:
    """Per layer and KV head: retrieval (sees everything) or streaming (sees sink and recent tokens)."""

    retrieval: tuple[tuple[bool, ...], ...]  # [num_layers][num_kv_heads]
    sink_size: int
    recent_size: int
    source: str  # for people

    def __post_init__(self) -> None:
        if self.sink_size < 0:
            raise SettingsError(f"sink_size is {self.sink_size}; it must be 0 or more")
        if self.recent_size < 1:
            raise SettingsError(f"recent_size is {self.recent_size}; it must be 1 or more")

    @property
    def num_layers(self) -> int:
        return len(self.retrieval)

    @property
    def num_kv_heads(self) -> int:
        return len(self.retrieval[0])

    @cached_property
    def num_retrieval(self) -> int:
        """Retrieval heads in all layers together."""
        return sum(map(sum, self.retrieval))

    @property
    def num_streaming(self) -> int:
        return self.num_layers * self.num_kv_heads - self.num_retrieval


@dataclass(frozen=True)
class HeadPattern:
    """Retrieval scores [num_layers][num_kv_heads], higher means more in need of the whole context."""

    scores: tuple[tuple[float, ...], ...]
    sink_size: int
    recent_size: int
    default_ratio: float
    source: str

    def cut(self, ratio: float, *, sink_size: int | None = None, recent_size: int | None = None) -> HeadPlan:
        """Return the plan whose round(ratio · heads) best-scored heads are retrieval heads.

        Ties are broken by layer, then head. Raises SettingsError for a ratio outside 0..1.
        """
        if not 0 <= ratio <= 1:
            raise SettingsError(f"the retrieval ratio is {ratio:g}; it must lie between 0 and 1")
        ranked = sorted(
            ((layer, head) for layer, row in enumerate(self.scores) for head in range(len(row))),
            key=lambda at: (-self.scores[at[0]][at[1]], at),
        )
        chosen = set(ranked[: round(ratio * len(ranked))])
        return HeadPlan(
            retrieval=tuple(
                tuple((layer, head) in chosen for head in range(len(row))) for layer, row in enumerate(self.scores)
            ),
            sink_size=self.sink_size if sink_size is None else sink_size,
            recent_size=self.recent_size if recent_size is None else recent_size,
            source=f"{self.source}, {len(chosen)} of {len(ranked)} KV heads",
        )


def uniform_plan(
    *, num_layers: int, num_kv_heads: int, retrieval: bool, sink_size: int | None, recent_size: int | None
) -> HeadPlan:
    """Return the plan in which all heads are retrieval heads, or none."""
    return HeadPlan(
        retrieval=((retrieval,) * num_kv_heads,) * num_layers,
        sink_size=DEFAULT_SINK_SIZE if sink_size is None else sink_size,
        recent_size=DEFAULT_RECENT_SIZE if recent_size is None else recent_size,
        source="all heads retrieval" if retrieval else "all heads streaming",
    )


def shipped_pattern(fingerprint: str) -> HeadPattern | None:
    """Return the pattern that ships for the weights with this fingerprint, or None."""
    for file in sorted(resources.files("duolocal.patterns").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".json"):
            data = json.loads(file.read_text(encoding="utf-8"))
            if fingerprint in data["fingerprints"]:
                return _parse_pattern(data, where=f"shipped pattern {file.name.removesuffix('.json')}")
    return None


def load_pattern(path: str | Path) -> HeadPattern:
    """Read a pattern file. Raises SettingsError naming the file and what is wrong with it."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"head pattern {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise SettingsError(f"head pattern {path} is not JSON: {error}") from None
    return _parse_pattern(data, where=str(path))


def plan_heads(
    heads: str | float,
    *,
    num_layers: int,
    num_kv_heads: int,
    fingerprint: str | None,
    sink_size: int | None = None,
    recent_size: int | None = None,
) -> tuple[HeadPlan, str | None]:
    """Return the plan that `heads` asks for, and a note for people or None.

    `heads`: "auto" (the model's shipped pattern, else all retrieval), "all" (every head retrieval), a ratio 0..1
    as number or text ("0.5", "ratio=0.5"), or the path of a pattern file. Raises SettingsError.
    """
    uniform = partial(
        uniform_plan,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        sink_size=sink_size,
        recent_size=recent_size,
    )
    if heads == "all":
        return uniform(retrieval=True), None
    shipped = shipped_pattern(fingerprint) if fingerprint else None
    ratio = None if heads == "auto" else _as_ratio(heads)
    if ratio in (0.0, 1.0):
        return uniform(retrieval=ratio == 1.0), None
    if heads != "auto" and ratio is None:
        pattern = load_pattern(str(heads))
    elif shipped is not None:
        pattern = shipped
    elif heads == "auto":
        return uniform(retrieval=True), (
            "no head pattern is known for this model: every KV head keeps the whole context "
            "(give --heads a pattern file to save memory)"
        )
    else:
        raise SettingsError(
            f"--heads {heads}: a ratio needs a ranking of heads, and none ships for this model; "
            "use --heads all or a pattern file"
        )
    layers, widths = len(pattern.scores), len(pattern.scores[0])
    if (layers, widths) != (num_layers, num_kv_heads):
        raise SettingsError(
            f"{pattern.source} is for {layers} layers × {widths} KV heads, "
            f"but the model has {num_layers} × {num_kv_heads}"
        )
    return pattern.cut(
        pattern.default_ratio if ratio is None else ratio, sink_size=sink_size, recent_size=recent_size
    ), None


def _as_ratio(heads: str | float) -> float | None:
    try:
        ratio = float(heads.removeprefix("ratio=") if isinstance(heads, str) else heads)
    except ValueError:
        return None
    if not 0 <= ratio <= 1:
        raise SettingsError(f"--heads {heads}: a ratio must lie between 0 and 1")
    return ratio


def _parse_pattern(data: Any, *, where: str) -> HeadPattern:
    if not isinstance(data, dict) or data.get("format") != PATTERN_FORMAT:
        raise SettingsError(f"{where} is not a head pattern: its format is not {PATTERN_FORMAT!r}")
    if data.get("version") != 1:
        raise SettingsError(f"{where}: version {data.get('version')!r} is unknown; this duolocal reads version 1")
    try:
        scores = tuple(tuple(float(score) for score in row) for row in data["scores"])
        pattern = HeadPattern(
            scores=scores,
            sink_size=int(data["sink_size"]),
            recent_size=int(data["recent_size"]),
            default_ratio=float(data["default_ratio"]),
            source=where,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SettingsError(f"{where}: {type(error).__name__}: {error}") from None
    if not scores or len({len(row) for row in scores}) != 1 or not scores[0]:
        raise SettingsError(f"{where}: scores must be a full table, one row per layer, one number per KV head")
    if any(score != score for row in scores for score in row):
        raise SettingsError(f"{where}: a score is not a number")
    return pattern
