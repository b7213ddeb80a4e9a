"""One call for all methods: load what a method needs, run it, yield progress and then the scores."""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from duolocal.errors import SettingsError
from duolocal.heads import DEFAULT_RECENT_SIZE, DEFAULT_SINK_SIZE
from duolocal.identify.attribution import TEXTS as ATTRIBUTION_TEXTS
from duolocal.identify.attribution import attribution_scores
from duolocal.identify.copying import SHAPE as COPY_SHAPE
from duolocal.identify.copying import copy_scores, copy_texts
from duolocal.identify.distill import PRESSURE, TEXT_SHARE, DistillSettings, distill
from duolocal.identify.drift import TEXTS as DRIFT_TEXTS
from duolocal.identify.drift import drift_scores
from duolocal.identify.echo import check_tokens, default_tokens, echo_scores
from duolocal.identify.mix import decoded
from duolocal.identify.results import METHODS, IdentifyProgress, IdentifyResult, Method, Scores, last_of
from duolocal.identify.state_file import load_state, save_state
from duolocal.identify.text import PasskeyShape, PasskeyText, PasskeyTexts
from duolocal.models.layer_state import LayerState
from duolocal.models.loader import ModelSource
from duolocal.models.transformer import Transformer
from duolocal.sample_text import sample_text
from duolocal.tokenizer import load_tokenizer

COPY_TOKENS = 2048  # of the longest text
DRIFT_TOKENS = 4096
ATTRIBUTION_TOKENS = 3072
LONG_SHAPE = PasskeyShape(num_passkeys=4, num_words=8)  # of drift and attribution
SHORTEST = 0.5  # of distill's texts, as a share of the longest


class LoadTransformer(Protocol):
    """Loads the model; how and where is its caller's business."""

    def __call__(self, context: int, *, reference: bool) -> Transformer:
        """Return the model for `context` tokens; reference: with the torch kernels, which gradients pass through."""
        ...


@dataclass(frozen=True)
class DistillDefaults:
    """What suits a kind of device."""

    steps: int
    num_tokens: int
    passkeys: PasskeyShape


# On two CPU cores a small model in under an hour; on a GPU nearer to what was published (2,000 steps of up to 32K
# tokens on eight of them).
DISTILL_DEFAULTS = {
    "cpu": DistillDefaults(steps=200, num_tokens=1024, passkeys=PasskeyShape(num_passkeys=4, num_words=8)),
    "cuda": DistillDefaults(steps=500, num_tokens=8192, passkeys=PasskeyShape(num_passkeys=10, num_words=32)),
}


def identify(
    source: ModelSource,
    load: LoadTransformer,
    *,
    method: str,
    device: torch.device,
    sink_size: int | None = None,
    recent_size: int | None = None,
    seed: int = 0,
    num_tokens: int | None = None,
    steps: int | None = None,
    text_share: float | None = None,
    pressure: float | None = None,
    text: str | None = None,
    state_file: Path | None = None,
) -> Iterator[IdentifyProgress | IdentifyResult]:
    """Yield progress and at last one IdentifyResult: a score for every KV head, higher for a retrieval head.

    load: called once, when the settings have been checked, for the model of `source` on `device`; method: a name of
    METHODS; sink_size, recent_size: tokens, the window of a streaming head, None for the usual one; seed: results are
    the same for the same seed on the same machine; num_tokens: of the longest sequence, None for what suits the method;
    steps, text_share, pressure: of distill, see DistillSettings; text: what passkeys are hidden in, None for Python's
    help texts; state_file: where distill and drift keep how far they are, to go on from when called with the same
    settings again (None: kept nowhere; it is deleted when the caller asks for more after the result). Raises
    DuoLocalError, for settings before any work.
    """
    began = time.monotonic()
    run = _METHODS.get(method)
    if run is None:
        raise SettingsError(f"method {method!r} is unknown: use {', '.join(METHODS)}")
    if method != "distill" and any(value is not None for value in (steps, text_share, pressure)):
        raise SettingsError(f"steps, text_share and pressure are of the method distill: leave them out with {method}")
    if text_share is not None and not 0 <= text_share <= 1:
        raise SettingsError(f"text_share is {text_share}: give a number from 0 to 1")
    if pressure is not None and not 0 <= pressure < math.inf:
        raise SettingsError(f"pressure is {pressure}: give 0 or more")
    job = _Job(
        source,
        device=device,
        seed=seed,
        sink_size=DEFAULT_SINK_SIZE if sink_size is None else sink_size,
        recent_size=DEFAULT_RECENT_SIZE if recent_size is None else recent_size,
        num_tokens=num_tokens,
        steps=steps,
        text_share=TEXT_SHARE if text_share is None else text_share,
        pressure=PRESSURE if pressure is None else pressure,
        text=text,
        state_file=state_file,
    )
    for event in run(job, partial(load, job.reach, reference=method in ("distill", "attribution"))):
        if isinstance(event, IdentifyProgress):
            yield event
        else:
            yield IdentifyResult(
                method=event.method,
                scores=_table(event.scores),
                secondary=_table(event.secondary),
                sink_size=job.sink_size,
                recent_size=job.recent_size,
                seed=seed,
                fingerprint=source.fingerprint,
                elapsed_s=time.monotonic() - began,
                details=event.details,
            )
    if state_file is not None:
        with suppress(OSError):
            state_file.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Job:
    """What all methods are given; settings are checked before a model is loaded."""

    source: ModelSource
    device: torch.device
    seed: int
    sink_size: int
    recent_size: int
    num_tokens: int | None
    steps: int | None
    text_share: float
    pressure: float
    text: str | None
    state_file: Path | None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num_tokens", self.num_tokens, 1),
            ("steps", self.steps, 1),
            ("sink_size", self.sink_size, 0),
            ("recent_size", self.recent_size, 1),
        ):
            if value is not None and value < least:
                raise SettingsError(f"{name} is {value}; it must be {least} or more")
        if self.num_tokens is not None and self.num_tokens > self.reach:
            raise SettingsError(f"num_tokens is {self.num_tokens:,}; this model reaches {self.reach:,}: use fewer")

    @property
    def reach(self) -> int:
        """The most tokens that the model was made for."""
        config = self.source.config
        return min(config.max_positions, config.sliding_window or config.max_positions)

    def tokens(self, default: int) -> int:
        return min(default, self.reach) if self.num_tokens is None else self.num_tokens

    @property
    def around(self) -> str:
        """The text that passkeys are hidden in."""
        return sample_text() if self.text is None else self.text

    def texts(self, shape: PasskeyShape) -> PasskeyTexts:
        return PasskeyTexts(load_tokenizer(self.source), self.around, shape)


@dataclass(frozen=True)
class _Found:
    """What a method found: tables [num_layers, num_kv_heads]."""

    method: Method
    scores: Tensor
    secondary: Tensor
    details: dict[str, Any]


_Load = Callable[[], Transformer]
_Events = Iterator[IdentifyProgress | _Found]


def _echo(job: _Job, load: _Load) -> _Events:
    window = {"sink_size": job.sink_size, "recent_size": job.recent_size}
    num_tokens = job.tokens(default_tokens(**window))
    check_tokens(num_tokens, **window)
    yield _LOADING
    scores = yield from last_of(echo_scores(load(), **window, seed=job.seed, num_tokens=num_tokens))
    details = {"num_tokens": scores.num_tokens, "draws": scores.draws}
    yield _Found("echo", *scores.per_kv_head(job.source.config.num_kv_heads), details)


def _copy(job: _Job, load: _Load) -> _Events:
    texts = copy_texts(job.texts(COPY_SHAPE), num_tokens=job.tokens(COPY_TOKENS), seed=job.seed)
    yield _LOADING
    scores = yield from last_of(copy_scores(load(), texts))
    details = {
        "num_tokens": [len(text.token_ids) for text in texts],
        "passkeys": asdict(COPY_SHAPE),
        "copied_tokens": scores.num_copied,
    }
    yield _Found("copy", *scores.per_kv_head(job.source.config.num_kv_heads), details)


def _drift(job: _Job, load: _Load) -> _Events:
    texts, details = _long_texts(job, "drift", DRIFT_TOKENS, DRIFT_TEXTS)
    window = {"sink_size": job.sink_size, "recent_size": job.recent_size}
    ids = [text.token_ids for text in texts]
    kept = LayerState(job.state_file, method="drift", model=job.source.fingerprint, texts=ids, **window)
    yield _LOADING
    scores = yield from last_of(drift_scores(load(), texts, **window, kept=kept))
    yield _Found("drift", scores.score, scores.at_text, details)


def _attribution(job: _Job, load: _Load) -> _Events:
    texts, details = _long_texts(job, "attribution", ATTRIBUTION_TOKENS, ATTRIBUTION_TEXTS)
    yield _LOADING
    model = decoded(load())
    scores = yield from last_of(attribution_scores(model, texts, sink_size=job.sink_size, recent_size=job.recent_size))
    details |= {"kl_at_text": scores.kl_at_text, "kl_at_answers": scores.kl_at_answers}
    yield _Found("attribution", scores.score, scores.drift, details)


def _long_texts(job: _Job, method: str, default: int, count: int) -> tuple[list[PasskeyText], dict[str, Any]]:
    """Return texts that are longer than a window, and what is to be known of them."""
    num_tokens, texts = job.tokens(default), job.texts(LONG_SHAPE)
    least = texts.least_tokens + job.sink_size + job.recent_size
    if num_tokens < least:
        raise SettingsError(f"{method} needs {least:,} tokens or more with this window, not {num_tokens:,}: use more")
    drawn = [texts.draw(num_tokens, f"{method} {job.seed} {number}") for number in range(count)]
    return drawn, {"num_tokens": num_tokens, "texts": count, "passkeys": asdict(LONG_SHAPE)}


def _distill(job: _Job, load: _Load) -> _Events:
    defaults = DISTILL_DEFAULTS[job.device.type]
    settings = DistillSettings(
        steps=defaults.steps if job.steps is None else job.steps,
        num_tokens=job.tokens(defaults.num_tokens),
        seed=job.seed,
        sink_size=job.sink_size,
        recent_size=job.recent_size,
        passkeys=defaults.passkeys,
        text_share=job.text_share,
        pressure=job.pressure,
    )
    texts = job.texts(settings.passkeys)

    def draw(step: int) -> PasskeyText:
        length = random.Random(f"distill length {job.seed} {step}").randint(shortest, settings.num_tokens)
        return texts.draw(length, f"distill {job.seed} {step}")

    texts.draw(settings.num_tokens, "room")  # raises where there is none, before any work
    shortest = max(round(SHORTEST * settings.num_tokens), texts.least_tokens)
    state, save = None, None
    if job.state_file is not None:
        config, fingerprint = job.source.config, settings.fingerprint(job.source.fingerprint, job.around)
        state = load_state(job.state_file, fingerprint, num_layers=config.num_layers, num_kv_heads=config.num_kv_heads)
        save = partial(save_state, job.state_file, fingerprint=fingerprint)
    yield _LOADING
    final = yield from last_of(distill(decoded(load()), draw, settings, state=state, save=save))
    last = final.losses[-max(1, settings.steps // 10) :]
    details = asdict(settings) | {"loss": sum(last) / len(last), "open_share": final.open_share}
    # Gates tie where they are clipped; how long a head kept its gate open is a number of its own.
    yield _Found("distill", final.gates, final.mean_gates, details)


_METHODS: dict[str, Callable[[_Job, _Load], _Events]] = {
    "distill": _distill,
    "copy": _copy,
    "echo": _echo,
    "drift": _drift,
    "attribution": _attribution,
}
_LOADING = IdentifyProgress(0, 1, "models", "loading weights")


def _table(scores: Tensor) -> Scores:
    return tuple(tuple(row) for row in scores.tolist())
