"""`--heads auto` for a model that no head pattern is known for: its heads are ranked once.

Whether that is on first use or left to `duolocal tune` is `duolocal.engine.first_use`'s to decide.

Owns what makes a model fit for that, the progress, and keeping the result in the cache folder. The ranking itself is
`duolocal.identify`; the method is drift, or echo for models that reach less far than drift's texts: both need forward
passes only.
"""

from collections.abc import Callable
from dataclasses import replace

from duolocal.errors import SettingsError
from duolocal.heads import (
    DEFAULT_RECENT_SIZE,
    DEFAULT_SINK_SIZE,
    UNMEASURED_RATIO,
    WIDE_RECENT_SIZE,
    HeadChoice,
    HeadPattern,
    KnownPattern,
    ModelShape,
    known_pattern,
    remember_pattern,
    remembered_file,
)
from duolocal.identify import IdentifyResult, identify
from duolocal.models.config import ModelConfig
from duolocal.models.loader import ModelSource
from duolocal.models.transformer import Transformer

WINDOW = DEFAULT_SINK_SIZE + DEFAULT_RECENT_SIZE  # tokens, of the heads while they are ranked
# Echo looks from one copy of random tokens back into the other, past a whole window: two copies have to fit.
LEAST_POSITIONS = 2 * (WINDOW + 2)
DRIFT_POSITIONS = 4096  # tokens of drift's texts, as in duolocal.identify, which is not imported until it is needed


def can_rank(config: ModelConfig, context: int) -> bool:
    """Say whether ranking the heads of this model means anything: contexts beyond the window, and room for echo."""
    return context > WINDOW and ranking_context(config) >= LEAST_POSITIONS


def ranking_context(config: ModelConfig) -> int:
    """Return how many tokens of context a ranking takes."""
    return min(config.max_positions, config.sliding_window or config.max_positions, DRIFT_POSITIONS)


def ranked_recent_size(config: ModelConfig) -> int:
    """Return how many recent tokens streaming heads are given after a ranking: more than while they are ranked."""
    return WIDE_RECENT_SIZE if ranking_context(config) == DRIFT_POSITIONS else DEFAULT_RECENT_SIZE


def shape_of(config: ModelConfig) -> ModelShape:
    """Return what of a model a published pattern has to fit."""
    return ModelShape(config.num_layers, config.num_heads, config.num_kv_heads, config.hidden_size)


def published_for(source: ModelSource, name: str = "") -> KnownPattern | None:
    """Return the published pattern for an opened model, by its shape and its names, or None.

    name: what the user called it. The others are those of the file or folder, of a hub's cache folder, and the
    metadata's.
    """
    names = [name, source.path.name, *(part for part in source.path.parts if part.startswith("models--"))]
    for key in ("general.name", "general.basename"):
        value = source.metadata.get(key)
        if isinstance(value, str):
            names.append(value)
    return known_pattern(names, shape_of(source.config))


def as_pattern(
    result: IdentifyResult, *, source: str, model: str = "", default_ratio: float = UNMEASURED_RATIO
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


def rank_on_first_use(
    choice: HeadChoice,
    source: ModelSource,
    transformer: Transformer,
    *,
    sink_size: int | None,
    recent_size: int | None,
    published: KnownPattern | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> HeadChoice:
    """Rank the heads of a model, remember that, and return the choice with its plan and a note for people.

    transformer: of the model, for any context; `on_progress` gets (done, total).
    """
    config = source.config
    context = ranking_context(config)
    result, method = None, "drift" if context == DRIFT_POSITIONS else "echo"

    device, dtype, kernels = transformer.device, transformer.dtype, transformer.kernels
    short = Transformer(config, transformer.weights, context=context, device=device, dtype=dtype, kernels=kernels)
    state_file = remembered_file(source.fingerprint).with_suffix(".state.safetensors")
    # Both methods take forward passes only, which any kernels compute.
    for event in identify(
        source, lambda context, *, reference: short, method=method, device=device, state_file=state_file
    ):
        if isinstance(event, IdentifyResult):  # kept before more is asked for: then its state is deleted
            result, pattern = event, as_pattern(event, source=f"pattern found here by {method}")
            pattern = replace(pattern, recent_size=ranked_recent_size(config))
            try:
                remember_pattern(pattern, source.fingerprint)
                kept = "remembered"
            except SettingsError as error:
                kept = f"not remembered ({error})"
        elif on_progress is not None:
            on_progress(event.done, event.total)
    assert result is not None
    ratio = pattern.default_ratio if choice.ratio is None else choice.ratio
    note = (
        f"retrieval heads found by {method} in {result.elapsed_s:.0f} s, as no pattern is known for this "
        f"model, and {kept} (`duolocal heads identify` looks more closely; --heads all keeps the whole context)"
    )
    if published is not None:
        note += f"; the pattern that is published for {published.name} could not be fetched"
    plan = pattern.cut(ratio, sink_size=sink_size, recent_size=recent_size)
    return replace(choice, plan=plan, note=note, unranked=False)
