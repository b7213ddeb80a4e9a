"""What a chat with some settings would take, without loading the model: the same decisions, and arithmetic.

Owns what stands for those decisions that only a loaded model can make, and what there is to plan for: this machine, or
a card. Decisions are `duolocal.engine.resolve`'s, the arithmetic is `duolocal.plan`'s.
"""

import importlib.util
from dataclasses import dataclass, replace

import torch

from duolocal.engine.first_use import unmeasured
from duolocal.engine.known_model import known_model
from duolocal.engine.resolve import MEASURE, Resolved, resolve
from duolocal.errors import DuoLocalError, SettingsError
from duolocal.heads import HeadsSpec
from duolocal.models.loader import ModelSource
from duolocal.paths import cache_folder
from duolocal.plan.cards import Card, card_named
from duolocal.plan.fitting import Free, Freedom, place
from duolocal.plan.free import free_places
from duolocal.plan.memory import MemoryPlan, plan_memory
from duolocal.plan.request import Request
from duolocal.plan.weights import Weights
from duolocal.settings import LoadSettings

# Of a model that nobody measured: large ones bear a 4-bit cache, small ones often do not (docs/kv-formats.md).
ASSUMED_KV, ASSUMED_SMALL_KV = "int4", "int8"
LARGE_ELEMENTS = 3_000_000_000


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
    what is free now (of a `card`: all that it has, and nothing beside it). card: a GPU of `CARDS` to plan for instead
    of this machine. Raises DuoLocalError as loading would, MemoryLimitError aside.
    """
    model = known_model(settings.model)
    chosen = None if card is None else card_named(card)
    if chosen is not None and settings.device == "cpu":
        raise SettingsError(f"--card {card} is a GPU and --device is cpu: leave one of them out")
    resolved = resolve(settings, model, on_card=chosen is not None, fetch=False)
    process = plan_memory(resolved.request()).process
    free = _free(resolved.device, chosen, process=process)
    given = {"device": None if memory is None else memory - process, "host": host_memory, "disk": disk}
    free = replace(free, **{place: size for place, size in given.items() if size is not None})
    resolved = _assume(resolved, free)
    request = resolved.request()

    def sizes(weights: str, outer_weights: str) -> Weights:
        changed = model.quantized(weights, outer_weights)
        return changed.sizes(kernels=resolved.kernels, dtype=resolved.dtype, device=resolved.device.type)

    rounds = settings.weights == "auto" and request.weights.layer_format in ("F16", "BF16") and _has_bitsandbytes()
    freedom = Freedom(
        resolved.kv,
        cut=resolved.cut if _can_cut(resolved) else None,
        heads=HeadsSpec.parse(settings.heads),
        outer_weights=(lambda name: sizes(settings.weights, name)) if settings.outer_weights == "auto" else None,
        weights=(lambda name: sizes(name, settings.outer_weights)) if rounds else None,
    )
    placed = place(request, free)
    return Planned(
        name=settings.model,
        request=placed or request,
        plan=plan_memory(placed or request),
        fits=placed is not None,
        free=free,
        freedom=freedom,
        memory=free.device + process,
        card=chosen,
        source=model.source,
        kv=resolved.kv,
        automatic=settings.kv_device_memory is None,
        notes=tuple(resolved.notes),
    )


def _assume(resolved: Resolved, free: Free) -> Resolved:
    """Return `resolved` with nothing undecided, and notes: as an unmeasured model starts, where that fits the device.

    Where it does not, the model is measured first, and its usual results stand for the heads' ranking and KV format.
    """
    quick = unmeasured(resolved)
    if resolved.undecided and plan_memory(quick.request()).total <= free.device:
        note = "this model is not measured yet: planned as it starts; `duolocal tune` may save memory"
        resolved = replace(quick, kv_note=note)
    heads = resolved.heads
    if heads.unranked:
        share = heads.plan.num_retrieval / (heads.plan.num_retrieval + heads.plan.num_streaming)
        note = (
            f"no head pattern is known for this model yet: its heads are ranked on first use, once; planned with "
            f"{share:.0%} of them retrieval heads"
        )
        resolved = replace(resolved, heads=replace(heads, note=note, unranked=False))
    if resolved.kv == MEASURE:
        kv = ASSUMED_KV if resolved.weights.layer_elements >= LARGE_ELEMENTS else ASSUMED_SMALL_KV
        note = (
            f"KV format {kv} is assumed: --kv auto measures this model on first use and takes a larger one where that "
            "is needed (then memory is checked again)"
        )
        resolved = replace(resolved, kv=kv, kv_note=note)
    return resolved


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _can_cut(resolved: Resolved) -> bool:
    try:
        resolved.cut(0.5)
    except DuoLocalError:
        return False  # there is no ranking of the heads, and none can be made
    return True


def _free(device: torch.device, card: Card | None, *, process: int) -> Free:
    """Return what may be taken beyond the process itself, which `duolocal plan` is one of already.

    A card may be anyone's: what is free here says nothing of the host memory beside it.
    """
    return free_places(device, cache_folder()) if card is None else Free(card.memory_bytes - process)
