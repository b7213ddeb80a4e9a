"""From what is asked for to what is run: device, dtype, context, kernels, heads, KV format, sizes.

Owns every decision about a load that headers, shapes and what is remembered can make, memory aside: what has to be
given up for that is `duolocal.engine.automatic`'s. `Engine.load`, the planner and the evaluation share both, so that
they cannot differ; nothing is built, loaded or computed here. What the loaded weights can tell beyond that
(`Resolved.undecided`) is `duolocal.engine.loading`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from duolocal.engine.head_choice import can_rank, ranked_recent_size
from duolocal.engine.kernels import activations_named, kernels_named
from duolocal.engine.known_model import KnownModel
from duolocal.engine.kv_choice import known_kv
from duolocal.engine.measured import measured
from duolocal.engine.place import device_named, dtype_named
from duolocal.engine.prefill_choice import prefill_note, prefill_policy
from duolocal.engine.select_choice import selection_budget, selection_note
from duolocal.engine.speculation import LOOK_AHEAD
from duolocal.errors import SettingsError
from duolocal.heads import HeadChoice, HeadPlan, HeadsSpec, choose_heads, uniform_plan
from duolocal.kernels.cpu.operations import SAME_BITS
from duolocal.kernels.cpu.threads import default_threads
from duolocal.kernels.sparse import SparsePrefill
from duolocal.models.config import ModelConfig
from duolocal.models.loader import ModelSource
from duolocal.models.rope import extended, parse_rope_scaling
from duolocal.options import refuse_unknown
from duolocal.plan.request import Request
from duolocal.plan.weights import Weights
from duolocal.quant.kv import KV_FORMATS, kv_layout
from duolocal.settings import AUTO_MODEL, LoadSettings

DEFAULT_CONTEXT = 32 * 1024  # tokens; a million are asked for
DEFAULT_CHUNK_SIZE = {"cpu": 512, "cuda": 4096}  # tokens
MIN_CONTEXT = 16  # tokens
RUINOUS_KL = 0.2  # nats per token, from which on a KV format is warned of
SAFE_KV = "int8"  # of a model that nobody measured: indistinguishable from 16 bits (docs/kv-formats.md)


@dataclass(frozen=True)
class Resolved:
    """A load, decided but for memory: what is left to us is at its best (`duolocal.engine.automatic`)."""

    settings: LoadSettings  # what was asked for
    known: KnownModel  # as its file has it
    model: KnownModel  # as it will be loaded: `--weights` and `--outer-weights` applied
    weights: Weights  # its sizes
    config: ModelConfig  # with the RoPE scaling for `context`
    device: torch.device
    dtype: torch.dtype
    context: int  # tokens
    chunk_size: int  # tokens
    kernels: str  # "compiled", "torch" or "triton"
    activations: str  # "float32", "int16" or "int8": what CPU kernels multiply with integer codes
    threads: int  # of the CPU
    heads: HeadChoice
    kv: str  # a name of KV_FORMATS
    unmeasured: bool  # `kv` was left to us, and nobody has measured what this model bears
    select: int | None  # the token budget of selected decode, None for reading all
    sparse: SparsePrefill | None
    rope_note: str | None
    kernels_note: str | None
    kv_note: str | None
    on_card: bool = False  # for a GPU that this machine need not have
    fit_note: str | None = None  # what had to be given up for memory

    @property
    def undecided(self) -> bool:
        """Whether the loaded weights can tell more: a ranking of their heads, or the KV format they bear."""
        return self.heads.unranked or self.unmeasured

    @property
    def fingerprint(self) -> str | None:
        """Of the weights; None: they are not here."""
        return None if self.model.source is None else self.model.source.fingerprint

    @property
    def notes(self) -> list[str]:
        """Say for people what was decided beyond what they asked for."""
        read = self.model.source.notes if self.model.source is not None else ()
        found = [
            *read,
            *self.model.notes,
            self.rope_note,
            self.heads.note,
            self.kv_note,
            self.fit_note,
            self.kernels_note,
        ]
        found.append(None if self.select is None else selection_note(self.select))
        found.append(None if self.sparse is None else prefill_note(self.sparse))
        return [note for note in found if note]

    def request(self) -> Request:
        """Return what the memory depends on."""
        return Request(
            config=self.config,
            heads=self.heads.plan,
            layout=kv_layout(self.kv, head_dim=self.config.head_dim, dtype=self.dtype),
            weights=self.weights,
            context=self.context,
            chunk_size=self.chunk_size,
            dtype=self.dtype,
            kernels=self.kernels,
            device=self.device.type,
            threads=self.threads,
            kv_device_memory=self.settings.kv_device_memory,
            outer="memory" if self.device.type == "cuda" else "disk",
            select=self.select,
            sparse=self.sparse is not None,
            ahead=LOOK_AHEAD if self._looks_ahead else (),
        )

    @property
    def _looks_ahead(self) -> bool:
        """Whether decode steps look ahead, as far as the formats of most weights tell (`Engine.speculation`)."""
        formats = {self.weights.layer_format, self.weights.outer_format}
        wanted = self.settings.speculate == "auto" and self.activations != "float32" and self.select is None
        return wanted and formats.issubset(SAME_BITS)

    def with_formats(self, weights: str, outer_weights: str) -> "Resolved":
        """Return it with these `--weights` and `--outer-weights`. Raises SettingsError where they cannot be applied."""
        model = self.known.quantized(weights, outer_weights)
        sizes = model.sizes(kernels=self.kernels, dtype=self.dtype, device=self.device.type)
        return replace(self, model=model, weights=sizes)

    def with_outer(self, name: str) -> "Resolved":
        """Return it with another `--outer-weights`. Raises SettingsError where that cannot be applied."""
        return self.with_formats(self.settings.weights, name)

    def cut(self, ratio: float) -> HeadPlan:
        """Return the plan of the same ranking of heads at another ratio, fetching none. Raises DuoLocalError."""
        spec = HeadsSpec.parse(self.settings.heads).at(ratio)
        return _heads(spec, self.model, self.settings, self.context, fetch=False).plan


def resolve(settings: LoadSettings, model: KnownModel, *, on_card: bool = False, fetch: bool = True) -> Resolved:
    """Decide how `model` is loaded with `settings`.

    on_card: for a GPU that this machine need not have. fetch: whether a published head pattern may be fetched where it
    is asked for and not here; else an estimate stands for it (`choose_heads`). Raises DuoLocalError with one line
    saying what to do.
    """
    known, model = model, model.quantized(settings.weights, settings.outer_weights)
    device = torch.device("cuda") if on_card else device_named(settings.device)
    dtype = torch.bfloat16 if on_card and settings.dtype == "auto" else dtype_named(settings.dtype, device)
    context = default_context(model.config) if settings.context is None else settings.context
    if context < MIN_CONTEXT:
        raise SettingsError(f"context is {context}; it must be {MIN_CONTEXT} tokens or more")
    window = model.config.sliding_window
    if window is not None and context > window:
        raise SettingsError(
            f"this model attends to {window:,} tokens at most (sliding window); use --context {window} or less"
        )
    chunk_size = settings.chunk_size or DEFAULT_CHUNK_SIZE[device.type]
    override = parse_rope_scaling(settings.rope, model.config) if settings.rope else None
    config, rope_note = extended(model.config, context, override=override)
    kernels, kernels_note = kernels_named(
        settings.kernels, config, device=device, dtype=dtype, num_threads=settings.threads, here=not on_card
    )
    kv, kv_note, unmeasured = _kv(settings.kv, model)
    return Resolved(
        settings=settings,
        known=known,
        model=model,
        weights=model.sizes(kernels=kernels, dtype=dtype, device=device.type),
        config=config,
        device=device,
        dtype=dtype,
        context=context,
        chunk_size=chunk_size,
        kernels=kernels,
        activations=activations_named(settings.activations, kernels, config),
        threads=settings.threads or (default_threads() if device.type == "cpu" else 1),
        heads=_heads(HeadsSpec.parse(settings.heads), model, settings, context, fetch=fetch),
        kv=kv,
        unmeasured=unmeasured,
        select=selection_budget(settings.select, context, config=config, kernels=kernels),
        sparse=prefill_policy(settings.prefill, chunk_size=chunk_size),
        rope_note=rope_note,
        kernels_note=kernels_note,
        kv_note=kv_note,
        on_card=on_card,
    )


def default_context(config: ModelConfig) -> int:
    """Return the context where none is asked for: what the model was trained for, but no more than DEFAULT_CONTEXT."""
    return min(config.max_positions, DEFAULT_CONTEXT)


def settings_with(
    model: str | Path | ModelSource, settings: LoadSettings | None, changes: Mapping[str, Any]
) -> LoadSettings:
    """Return `settings`, None for the default ones, with fields of LoadSettings in place of theirs.

    `heads`, `kv` and `select` may be numbers. Raises SettingsError for a name that is no field, and as LoadSettings
    does.
    """
    if settings is not None and not isinstance(settings, LoadSettings):
        raise SettingsError(f"settings is {type(settings).__name__}: give a LoadSettings, or context=4096 and the like")
    settings = settings or LoadSettings()
    refuse_unknown(changes, [field.name for field in fields(LoadSettings)])
    if isinstance(model, ModelSource):
        name = model.path.name if settings.model == AUTO_MODEL else settings.model
    elif model == AUTO_MODEL:
        name = settings.model
    elif isinstance(model, str | Path):
        name = str(model)
    else:
        raise SettingsError(f"the model is {model!r}: give a name, a path, or what open_model returns")
    given = {**changes, "model": name}
    given |= {option: str(given[option]) for option in ("heads", "kv", "select") if option in given}
    return replace(settings, **given)


def _heads(spec: HeadsSpec, model: KnownModel, settings: LoadSettings, context: int, *, fetch: bool) -> HeadChoice:
    choice = choose_heads(
        spec,
        num_layers=model.config.num_layers,
        num_kv_heads=model.config.num_kv_heads,
        fingerprint=None if model.source is None else model.source.fingerprint,
        sink_size=settings.sink_size,
        recent_size=settings.recent_size,
        published=model.published,
        can_rank=can_rank(model.config, context),
        ranked_recent_size=ranked_recent_size(model.config),
        fetch=fetch,
    )
    if not choice.unranked or choice.ratio is not None:
        return choice
    plan = uniform_plan(
        num_layers=model.config.num_layers,
        num_kv_heads=model.config.num_kv_heads,
        sink_size=settings.sink_size,
        recent_size=settings.recent_size,
        retrieval=True,
    )
    return replace(choice, plan=plan)  # until they are ranked: it costs memory, and no quality


def _harm(kv: str, model: KnownModel) -> str | None:
    """Return a warning of a KV format that is known to ruin what this model says."""
    cost = measured(None if model.source is None else model.source.fingerprint).kv_costs.get(kv)
    if cost is None or cost.kl < RUINOUS_KL:
        return None
    return (
        f"KV format {kv} was measured to ruin what this model says: KL {cost.kl:.1f}, perplexity "
        f"{cost.perplexity_rise:+,.0%}; --kv auto takes one that does not"
    )


def _kv(wanted: str, model: KnownModel) -> tuple[str, str | None, bool]:
    if wanted not in ("auto", *KV_FORMATS):
        raise SettingsError(f"unknown KV format {wanted!r}: choose auto or one of {', '.join(KV_FORMATS)}")
    if wanted != "auto":
        return wanted, _harm(wanted, model), False
    known = None if model.source is None else known_kv(model.source.fingerprint)
    return (SAFE_KV, None, True) if known is None else (*known, False)
