"""What a chat with some settings would take, without loading the model: the same decisions, and arithmetic.

Owns what stands for those decisions that only a loaded model can make, and what there is to plan for: this machine, or
a card. Decisions are `duolocal.engine.resolve`'s, the arithmetic is `duolocal.plan`'s.
"""

from dataclasses import dataclass, replace

import torch

from duolocal.engine.automatic import fit, suggestions
from duolocal.engine.known_model import known_model
from duolocal.engine.resolve import Resolved, resolve
from duolocal.errors import SettingsError
from duolocal.models.loader import ModelSource
from duolocal.paths import cache_folder
from duolocal.plan.cards import Card, card_named
from duolocal.plan.fitting import Free, Setting
from duolocal.plan.free import free_places
from duolocal.plan.memory import MemoryPlan, plan_memory
from duolocal.plan.request import Request
from duolocal.settings import LoadSettings


@dataclass(frozen=True)
class Planned:
    """A request as it would be run, what it takes, and what there is."""

    name: str
    request: Request  # with its blocks placed; where nothing fits, the least that costs little
    plan: MemoryPlan
    fits: bool
    line: str | None  # what was chosen, what it costs, what would buy more; None where nothing fits
    nearest: tuple[Setting, ...]  # that fit where it does not, or have all blocks on the device where it has not
    free: Free  # for this plan: the process's own bytes are taken off
    memory: int  # bytes of the device that may be used, the process's own included
    card: Card | None
    source: ModelSource | None  # None: it is not on this machine
    kv: str
    automatic: bool  # where blocks lie was not asked for
    trained: int  # tokens that the model was trained for
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
    found = fit(resolved, free)
    automatic = settings.kv_device_memory is None
    if found is None:
        shown, settings_that_fit = suggestions(resolved, free)
        request = shown.request()
    else:
        request, shown, settings_that_fit = found.request, found.resolved, []
        if automatic and plan_memory(request).offloaded:
            _, settings_that_fit = suggestions(resolved, free, offload=False)
    return Planned(
        name=settings.model,
        request=request,
        plan=plan_memory(request),
        fits=found is not None,
        line=None if found is None else found.line,
        nearest=tuple(settings_that_fit),
        free=free,
        memory=free.device + process,
        card=chosen,
        source=model.source,
        kv=shown.kv,
        automatic=automatic,
        trained=model.config.max_positions,
        notes=tuple(_notes(shown, measured_first=found is None or found.measured_first)),
    )


def _notes(resolved: Resolved, *, measured_first: bool) -> list[str]:
    """Return what is to be said of a load: the line of its settings is said elsewhere."""
    notes = [note for note in resolved.notes if note != resolved.fit_note]
    if resolved.undecided and measured_first:
        what = [*["its heads are ranked"] * resolved.heads.unranked, *["KV formats are measured"] * resolved.unmeasured]
        notes.append(
            f"{' and '.join(what)} on first use, once, as memory does not hold the model as it would start (then it is "
            "chosen again); planned with the figures of another model"
        )
    elif resolved.undecided:
        notes.append("this model is not measured yet: planned as it starts; `duolocal tune` may save memory")
    return notes


def _free(device: torch.device, card: Card | None, *, process: int) -> Free:
    """Return what may be taken beyond the process itself, which `duolocal plan` is one of already.

    A card may be anyone's: what is free here says nothing of the host memory beside it.
    """
    return free_places(device, cache_folder()) if card is None else Free(card.memory_bytes - process)
