"""`--heads auto` for a model that no head pattern is known for: its heads are ranked once, on first use.

Owns what makes a model fit for that, the progress, and keeping the result in the cache folder. The ranking itself is
`duolocal.identify`; the method is drift, or echo for models that reach less far than drift's texts: both need forward
passes only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from duolocal.errors import SettingsError
from duolocal.heads import (
    DEFAULT_RECENT_SIZE,
    DEFAULT_SINK_SIZE,
    UNMEASURED_RATIO,
    HeadChoice,
    HeadPattern,
    HeadPlan,
    KnownPattern,
    ModelShape,
    known_pattern,
    remember_pattern,
)
from duolocal.models.loader import ModelSource
from duolocal.models.transformer import Transformer

if TYPE_CHECKING:
    from duolocal.identify import IdentifyResult

WINDOW = DEFAULT_SINK_SIZE + DEFAULT_RECENT_SIZE  # tokens
# Echo looks from one copy of random tokens back into the other, past a whole window: two copies have to fit.
LEAST_POSITIONS = 2 * (WINDOW + 2)
DRIFT_POSITIONS = 4096  # tokens of drift's texts, as in duolocal.identify, which is not imported until it is needed


def can_rank(source: ModelSource, context: int) -> bool:
    """Say whether ranking the heads of this model means anything: contexts beyond the window, and room for echo."""
    return context > WINDOW and ranking_context(source) >= LEAST_POSITIONS


def ranking_context(source: ModelSource) -> int:
    """Return the context that the Transformer for `rank_on_first_use` needs, tokens."""
    config = source.config
    return min(config.max_positions, config.sliding_window or config.max_positions, DRIFT_POSITIONS)


def published_for(source: ModelSource, name: str = "") -> KnownPattern | None:
    """Return the published pattern for an opened model, by its shape and its names, or None.

    name: what the user called it. The others are those of the file or folder, of a hub's cache folder, and the
    metadata's.
    """
    config = source.config
    shape = ModelShape(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        hidden_size=config.hidden_size,
    )
    names = [name, source.path.name, *(part for part in source.path.parts if part.startswith("models--"))]
    for key in ("general.name", "general.basename"):
        value = source.metadata.get(key)
        if isinstance(value, str):
            names.append(value)
    return known_pattern(names, shape)


def as_pattern(
    result: "IdentifyResult", *, source: str, model: str = "", default_ratio: float = UNMEASURED_RATIO
) -> HeadPattern:
    """Return what an identification found as a pattern; `source` and `model` are for people."""
    return HeadPattern(
        scores=result.scores,
        sink_size=result.sink_size,
        recent_size=result.recent_size,
        default_ratio=round(default_ratio, 4),
        source=source,
        secondary=result.secondary,
        method=result.method,
        model=model,
        fingerprints=(result.fingerprint,) if result.fingerprint else (),
        seed=result.seed,
        details=result.details,  # no times: the same seed gives the same file
    )


@dataclass(frozen=True)
class _Loaded:
    """A loaded model, as `identify` takes it."""

    source: ModelSource
    transformer: Transformer


def rank_on_first_use(
    choice: HeadChoice,
    source: ModelSource,
    transformer: Transformer,
    *,
    sink_size: int | None,
    recent_size: int | None,
    published: KnownPattern | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[HeadPlan, str]:
    """Rank the heads of a model, remember that, and return the plan and a note for people.

    transformer: for `ranking_context` tokens; `on_progress` gets (done, total).
    """
    from duolocal.identify import IdentifyResult, identify  # its methods are needed here only

    result, method = None, "drift" if ranking_context(source) == DRIFT_POSITIONS else "echo"
    for event in identify(_Loaded(source, transformer), method=method):
        if isinstance(event, IdentifyResult):
            result = event
        elif on_progress is not None:
            on_progress(event.done, event.total)
    assert result is not None
    pattern = as_pattern(result, source=f"pattern found here by {method}")
    try:
        remember_pattern(pattern, source.fingerprint)
        kept = "remembered"
    except SettingsError as error:
        kept = f"not remembered ({error})"
    plan = pattern.cut(
        pattern.default_ratio if choice.ratio is None else choice.ratio, sink_size=sink_size, recent_size=recent_size
    )
    note = (
        f"retrieval heads found by {method} in {result.elapsed_s:.0f} s, as no pattern is known for this "
        f"model, and {kept} (`duolocal heads identify` looks more closely; --heads all keeps the whole context)"
    )
    if published is not None:
        note += f"; a pattern is published for {published.name}: --heads published fetches it"
    return plan, note
