"""From what a user asks for to what is planned with, without loading: model, heads, KV format, kernels, places.

Owns the decisions that `Engine.load` makes, as far as they can be made from headers, shapes and what is remembered, and
the notes on those that only a loaded model can make. The arithmetic is `duolocal.plan`'s.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from duolocal.engine.engine import DEFAULT_CHUNK_SIZE, MIN_CONTEXT
from duolocal.engine.head_choice import LEAST_POSITIONS, WINDOW, published_for
from duolocal.engine.kernels import unsupported_cpu
from duolocal.engine.kv_choice import known_kv
from duolocal.engine.memory import free_places
from duolocal.engine.place import device_named, dtype_named
from duolocal.engine.select_choice import selection_budget
from duolocal.errors import DuoLocalError, ModelNotFoundError, SettingsError
from duolocal.heads import HeadChoice, HeadPlan, KnownPattern, ModelShape, choose_heads, known_pattern
from duolocal.models.config import ModelConfig
from duolocal.models.fetch_hub import is_repo_id
from duolocal.models.loader import ModelSource, open_model
from duolocal.models.outer_weights import quantize_outer
from duolocal.models.quantized import quantize_on_load
from duolocal.models.registry import MODELS, cached_path
from duolocal.models.rope import extended, parse_rope_scaling
from duolocal.models.safetensors_folder import read_folder_config, read_json
from duolocal.paths import cache_folder
from duolocal.plan.cards import Card, card_named
from duolocal.plan.fitting import Free, Freedom, place
from duolocal.plan.memory import MemoryPlan, Request, plan_memory
from duolocal.plan.weights import AWQ_GROUP, NAMED_FORMATS, Weights, weights_by_arithmetic, weights_of
from duolocal.quant.kv import KV_FORMATS, kv_layout
from duolocal.settings import LoadSettings

DEFAULT_CONTEXT = 32 * 1024  # without --context: what the model was trained for, but no more than this
# Of a model that nobody measured: large ones bear a 4-bit cache, small ones often do not (docs/kv-formats.md).
ASSUMED_KV, ASSUMED_SMALL_KV = "int4", "int8"
LARGE_ELEMENTS = 3_000_000_000
_TORCH_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Planned:
    """A request as it would be run, what it takes, and what there is."""

    name: str
    request: Request  # with its blocks placed; as it was asked where nothing fits
    plan: MemoryPlan
    fits: bool
    free: Free  # for this plan: the process's own bytes are taken off
    freedom: Freedom
    memory: int  # bytes of the device that may be used, the process's own included
    card: Card | None
    source: ModelSource | None  # None: it is not on this machine
    kv: str
    automatic: bool  # where blocks lie was not asked for
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Model:
    """What is known of a model without loading it."""

    config: ModelConfig
    source: ModelSource | None
    names: tuple[str, ...]
    sizes: Callable[[str, torch.dtype, str, str, str], Weights]  # kernels, dtype, device, weights, outer_weights
    note: str | None = None

    @property
    def fingerprint(self) -> str | None:
        return None if self.source is None else self.source.fingerprint


def plan_settings(
    settings: LoadSettings,
    *,
    memory: int | None = None,
    host_memory: int | None = None,
    disk: int | None = None,
    card: str | None = None,
) -> Planned:
    """Return what a chat with `settings` would take, loading nothing and fetching nothing.

    memory, host_memory, disk: bytes that may be used on the device, beside a GPU and for a file of blocks; None for
    what is free now (of a `card`: all it has). card: a GPU of `CARDS` to plan for instead of this machine. Raises
    DuoLocalError as loading would, MemoryLimitError aside.
    """
    model = _find(settings)
    config, notes = model.config, [model.note]
    chosen = None if card is None else card_named(card)
    if chosen is not None and settings.device == "cpu":
        raise SettingsError(f"--card {card} is a GPU and --device is cpu: leave one of them out")
    where = torch.device("cuda") if chosen is not None else device_named(settings.device)
    dtype = torch.bfloat16 if chosen is not None and settings.dtype == "auto" else dtype_named(settings.dtype, where)
    context = settings.context or min(config.max_positions, DEFAULT_CONTEXT)
    if context < MIN_CONTEXT:
        raise SettingsError(f"context is {context}; it must be {MIN_CONTEXT} tokens or more")
    if config.sliding_window is not None and context > config.sliding_window:
        raise SettingsError(
            f"this model attends to {config.sliding_window:,} tokens at most (sliding window); "
            f"use --context {config.sliding_window} or less"
        )
    override = parse_rope_scaling(settings.rope, config) if settings.rope else None
    config, rope_note = extended(config, context, override=override)
    kernels, kernels_note = _kernels(settings, config, where, dtype)
    heads, cut, base, heads_note = _heads(settings, model, context)
    weights = model.sizes(kernels, dtype, where.type, settings.weights, settings.outer_weights)
    kv, kv_note = _kv(settings.kv, model, weights)
    request = Request(
        config=config,
        heads=heads,
        layout=kv_layout(kv, head_dim=config.head_dim, dtype=dtype),
        weights=weights,
        context=context,
        chunk_size=settings.chunk_size or DEFAULT_CHUNK_SIZE[where.type],
        dtype=dtype,
        kernels=kernels,
        device=where.type,
        threads=settings.threads or _threads(where),
        kv_device_memory=settings.kv_device_memory,
        outer="memory" if where.type == "cuda" else "disk",
        select=selection_budget(settings.select, context),
        sparse=settings.prefill == "sparse",
    )
    plan = plan_memory(request)
    free = _free(where, chosen, memory=memory, host_memory=host_memory, disk=disk, process=plan.process)

    def sizes(chosen: str, outer: str) -> Weights:
        return model.sizes(kernels, dtype, where.type, chosen, outer)

    rounded = settings.weights == "auto" and weights.layer_format in ("F16", "BF16")
    freedom = Freedom(
        kv,
        cut=cut,
        heads=base,
        outer_weights=partial(sizes, settings.weights) if settings.outer_weights == "auto" else None,
        weights=(lambda name: sizes(name, settings.outer_weights)) if rounded and _can_round() else None,
    )
    placed = place(request, free)
    found = (*notes, rope_note, kernels_note, heads_note, kv_note)
    return Planned(
        name=settings.model,
        request=placed or request,
        plan=plan_memory(placed or request),
        fits=placed is not None,
        free=free,
        freedom=freedom,
        memory=free.device + plan.process,
        card=chosen,
        source=model.source,
        kv=kv,
        automatic=settings.kv_device_memory is None,
        notes=tuple(note for note in found if note),
    )


def _find(settings: LoadSettings) -> _Model:
    """Return what is known of the model: from its file where it is here, else from its name or its config."""
    path = cached_path(settings.model)
    if path is not None:
        if path.is_dir() and (path / "config.json").is_file() and not any(path.glob("*.safetensors")):
            return _from_config(path, settings.model)
        return _from_source(open_model(path), settings.model)
    known = MODELS.get(settings.model)
    if known is None:
        hint = "`duolocal models fetch` fetches it" if is_repo_id(settings.model) else "check the path"
        raise ModelNotFoundError(
            f"{settings.model}: is not on this machine; {hint}, or name a folder with its config.json, or one of "
            f"{', '.join(MODELS)}"
        )
    layers, outer = NAMED_FORMATS[known.name]
    return _by_arithmetic(
        known.config,
        layers,
        outer,
        names=(known.name, known.repo or ""),
        note=f"{known.name} is not on this machine: its weights are counted from its shapes ({layers} and {outer})",
    )


def _from_source(source: ModelSource, name: str) -> _Model:
    def sizes(kernels: str, dtype: torch.dtype, device: str, weights: str, outer: str) -> Weights:
        changed = quantize_outer(quantize_on_load(source, weights), outer)
        return weights_of(changed, kernels=kernels, dtype=dtype, device=device)

    return _Model(source.config, source, (name,), sizes)


def _from_config(folder: Path, name: str) -> _Model:
    config, awq = read_folder_config(folder)
    raw = read_json(folder / "config.json")
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    dense = _TORCH_DTYPES.get(dtype if isinstance(dtype, str) else "", "BF16")
    layers, group = dense, AWQ_GROUP
    if awq is not None:
        layers, dense, group = "AWQ", "F16", awq.group_size if awq.group_size > 0 else config.hidden_size
    note = f"{folder.name} has no weights: they are counted from its config.json ({layers})"
    return _by_arithmetic(config, layers, dense, names=(name, folder.name), note=note, group=group)


def _by_arithmetic(
    config: ModelConfig, layers: str, outer: str, *, names: tuple[str, ...], note: str, group: int = AWQ_GROUP
) -> _Model:
    def sizes(kernels: str, dtype: torch.dtype, device: str, weights: str, outer_weights: str) -> Weights:
        return weights_by_arithmetic(
            config,
            layers=layers,
            outer=outer,
            kernels=kernels,
            dtype=dtype,
            weights=weights,
            outer_weights=outer_weights,
            group=group,
        )

    return _Model(config, None, names, sizes, note)


def _kernels(
    settings: LoadSettings, config: ModelConfig, where: torch.device, dtype: torch.dtype
) -> tuple[str, str | None]:
    """Return the name of the kernels that `choose_kernels` would take, building none."""
    if settings.kernels == "torch":
        return "torch", None
    if where.type == "cuda":
        return "triton", None
    reason = unsupported_cpu(config, dtype)
    if reason is None:
        return "compiled", None
    if settings.kernels == "compiled":
        raise SettingsError(f"compiled kernels cannot be used: {reason}; use --kernels torch")
    return "torch", f"the slow torch kernels compute here: {reason}"


def _heads(
    settings: LoadSettings, model: _Model, context: int
) -> tuple[HeadPlan, Callable[[float], HeadPlan] | None, str, str | None]:
    """Return the head plan, how to cut it elsewhere and under which name, and a note."""
    config = model.config
    published = _published(model)
    reach = min(config.max_positions, config.sliding_window or config.max_positions)
    can_rank = context > WINDOW and reach >= LEAST_POSITIONS

    def choose(heads: str) -> HeadChoice:
        return choose_heads(
            heads,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            fingerprint=model.fingerprint,
            sink_size=settings.sink_size,
            recent_size=settings.recent_size,
            published=published,
            can_rank=can_rank,
        )

    choice = choose(settings.heads)
    note = choice.note
    if choice.unranked:
        share = choice.plan.num_retrieval / (config.num_layers * config.num_kv_heads)
        note = (
            f"no head pattern is known for this model yet: its heads are ranked on first use; planned with {share:.0%} "
            "of them retrieval heads, which ones changes nothing here"
        )
    pattern, at, tail = settings.heads.rpartition("@")
    bare = settings.heads.removeprefix("ratio=").replace(".", "", 1).isdigit()
    base = "" if bare or settings.heads in ("auto", "all") else (pattern if at and tail else settings.heads)

    def cut(ratio: float) -> HeadPlan:
        return choose(f"{base}@{ratio}" if base else f"{ratio}").plan

    try:
        cut(0.5)
    except DuoLocalError:
        return choice.plan, None, base, note  # there is no ranking, and none can be made
    return choice.plan, cut, base, note


def _published(model: _Model) -> KnownPattern | None:
    if model.source is not None:
        return published_for(model.source, model.names[0])
    config = model.config
    return known_pattern(
        model.names, ModelShape(config.num_layers, config.num_heads, config.num_kv_heads, config.hidden_size)
    )


def _kv(wanted: str, model: _Model, weights: Weights) -> tuple[str, str | None]:
    if wanted != "auto":
        if wanted not in KV_FORMATS:
            raise SettingsError(f"unknown KV format {wanted!r}: choose auto or one of {', '.join(KV_FORMATS)}")
        return wanted, None
    known = None if model.fingerprint is None else known_kv(model.fingerprint)
    if known is not None:
        return known, f"KV format {known}: the smallest that passed this model's measurement"
    assumed = ASSUMED_KV if weights.layer_elements >= LARGE_ELEMENTS else ASSUMED_SMALL_KV
    return assumed, (
        f"KV format {assumed} is assumed: --kv auto measures this model on first use and takes a larger one where that "
        "is needed (then memory is checked again)"
    )


def _can_round() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _threads(where: torch.device) -> int:
    if where.type != "cpu":
        return 1
    from duolocal.kernels.cpu.threads import default_threads

    return default_threads()


def _free(
    where: torch.device,
    card: Card | None,
    *,
    memory: int | None,
    host_memory: int | None,
    disk: int | None,
    process: int,
) -> Free:
    """Return what may be taken beyond the process itself, which `duolocal plan` is one of already."""
    if card is not None:
        here = free_places(torch.device("cpu"), cache_folder())
        here = Free(card.memory_bytes - process, here.device, here.disk)
    else:
        here = free_places(where, cache_folder())
    if memory is not None:
        here = replace(here, device=memory - process)
    if host_memory is not None:
        here = replace(here, host=host_memory)
    return here if disk is None else replace(here, disk=disk)
