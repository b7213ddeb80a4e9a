"""One set of weights with several caches: the dense 16-bit one that everything is measured against, and others.

The weights are loaded once and the caches made on demand, so that a machine that holds the model for a chat also holds
it here; what the caches take together is refused before the weights are loaded, with the numbers.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from duolocal.cache import SelectionPolicy
from duolocal.engine.automatic import fit
from duolocal.engine.engine import Engine
from duolocal.engine.events import QUIET, LoadEvents
from duolocal.engine.known_model import OpenedModel
from duolocal.engine.loading import decide, load_notes, load_weights, selection_policy
from duolocal.engine.resolve import Resolved, resolve, settings_with
from duolocal.errors import MemoryLimitError
from duolocal.files import free_name
from duolocal.heads import HeadPlan, KnownPattern, plan_heads, uniform_plan
from duolocal.kernels.sparse import SparsePrefill
from duolocal.models.config import ModelConfig
from duolocal.models.loader import ModelSource, open_model
from duolocal.models.transformer import Transformer
from duolocal.paths import cache_folder
from duolocal.plan.fitting import Free
from duolocal.plan.free import available_bytes, free_places
from duolocal.plan.memory import GIB, bytes_per_token, dense_16bit_bytes, plan_memory
from duolocal.plan.request import Request
from duolocal.plan.weights import weights_of_size
from duolocal.quant.kv import kv_layout
from duolocal.settings import LoadSettings

DENSE_KV = "16"
DENSE_NAME = "dense"
LOGIT_ROWS = 256  # predictions compared at a time
_LOGIT_COPIES = 6  # float32 [LOGIT_ROWS, vocab_size]: two distributions, their logits, and what a difference takes


@dataclass(frozen=True)
class Setting:
    """What `--heads`, `--kv`, `--sink-size`, `--recent-size`, `--select` and `--prefill` ask for."""

    heads: str = "auto"
    kv: str = "auto"
    sink_size: int | None = None
    recent_size: int | None = None
    select: str = "off"
    prefill: str = "exact"


@dataclass(frozen=True)
class Choice:
    """A setting as it came out for a model: which heads, which format."""

    name: str  # different for each of a lineup
    plan: HeadPlan
    kv: str
    setting: Setting = Setting()
    select: SelectionPolicy | None = None
    prefill: SparsePrefill | None = None


def combinations(
    heads: Sequence[str],
    kv: Sequence[str],
    sink_sizes: Sequence[int | None] = (None,),
    recent_sizes: Sequence[int | None] = (None,),
    selects: Sequence[str] = ("off",),
    prefills: Sequence[str] = ("exact",),
) -> list[Setting]:
    """Return a Setting for every combination, the last list running fastest."""
    lists = (heads, kv, sink_sizes, recent_sizes, selects, prefills)
    return [Setting(*values) for values in itertools.product(*lists)]


class Lineup:
    """A Transformer and the caches to try with it; `dense` is the one they are measured against.

    Invariant: names are unique, and all engines compute with the same weights and chunk size.
    """

    def __init__(
        self,
        transformer: Transformer,
        choices: Sequence[Choice],
        *,
        chunk_size: int,
        source: ModelSource | None = None,
        published: KnownPattern | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.transformer = transformer
        self.choices = _unique(choices)
        self.chunk_size = chunk_size
        self.source = source
        self.published = published
        self.notes = list(notes)
        self.dense = Choice(DENSE_NAME, _dense_plan(transformer.config), DENSE_KV)

    @classmethod
    def load(
        cls,
        source: str | Path | ModelSource,
        choices: Sequence[Setting],
        settings: LoadSettings | None = None,
        *,
        side_by_side: bool = True,
        events: LoadEvents = QUIET,
        **changes: Any,
    ) -> "Lineup":
        """Load the weights once for every choice, each a change to `settings`, with their `context` for the caches.

        settings, events, changes: as of `Engine.load`. side_by_side: whether all caches will be in memory at once, or
        no more than two. Raises DuoLocalError, MemoryLimitError before the weights are loaded.
        """
        shared = replace(settings_with(source, settings, changes), kv_device_memory=None)
        source = open_model(source)
        model = OpenedModel(source, shared.model, events)
        asked = [replace(shared, **vars(choice)) for choice in choices]
        free = free_places(resolve(asked[0], model).device, cache_folder())
        resolved = [_fitted(resolve(one, model), free) for one in asked]
        _check_memory([one.request() for one in resolved], side_by_side=side_by_side)
        transformer = load_weights(resolved[0], events)
        if any(one.undecided for one in resolved):  # what the first of them has measured is remembered for the others
            resolved = [_fitted(decide(resolve(one, model), transformer, events), free) for one in asked]
            loaded = [replace(one.request(), weights=weights_of_size(0)) for one in resolved]
            _check_memory(loaded, side_by_side=side_by_side)
        made = [
            Choice(
                _name(choice, one.kv),
                one.heads.plan,
                one.kv,
                choice,
                selection_policy(one, transformer, events),
                one.sparse,
            )
            for choice, one in zip(choices, resolved, strict=True)
        ]
        first, notes = resolved[0], [note for one in resolved for note in load_notes(one, transformer)]
        return cls(
            transformer,
            made,
            chunk_size=first.chunk_size,
            source=first.model.source,
            published=first.model.published,
            notes=list(dict.fromkeys(notes)),
        )

    @property
    def everyone(self) -> list[Choice]:
        """The dense choice, then the others."""
        return [self.dense, *self.choices]

    def engine(self, choice: Choice, *, context: int | None = None) -> Engine:
        """Give the weights a new cache for `context` tokens (None: as many as the weights were loaded for)."""
        assert context is None or context <= self.transformer.context
        _give_back(self.transformer.device)
        engine = Engine.build(
            self.transformer,
            choice.plan,
            kv=choice.kv,
            chunk_size=self.chunk_size,
            context=context,
            source=self.source,
            select=choice.select,
            prefill=choice.prefill,
        )
        if self.transformer.kernels.capturable:
            engine.warm_up()
        return engine

    def plan(self, heads: str, like: HeadPlan) -> HeadPlan:
        """Return the plan for another `--heads` with the window of `like`. Raises SettingsError where none is known."""
        plan, _ = plan_heads(
            heads,
            num_layers=like.num_layers,
            num_kv_heads=like.num_kv_heads,
            fingerprint=None if self.source is None else self.source.fingerprint,
            sink_size=like.sink_size,
            recent_size=like.recent_size,
            published=self.published,
        )
        return plan

    def kv_bytes(self, choice: Choice, context: int) -> int:
        """Return what the cache of `choice` takes for `context` tokens, windows included."""
        return plan_memory(self._request(choice, context)).device.cache

    def bytes_per_token(self, choice: Choice) -> float:
        """Return what each further token takes once the windows are full: the blocks of the retrieval heads."""
        return bytes_per_token(self._request(choice, self.transformer.context))

    def dense_bytes(self, context: int) -> int:
        """Return what an ordinary 16-bit cache takes for `context` tokens."""
        return dense_16bit_bytes(self.transformer.config, context)

    def check_memory(self, *, context: int, side_by_side: bool = True, choices: Sequence[Choice] | None = None) -> None:
        """Raise MemoryLimitError where the caches do not fit beside the weights that are loaded."""
        chosen = self.choices if choices is None else choices
        _check_memory([self._request(choice, context) for choice in chosen], side_by_side=side_by_side)

    def _request(self, choice: Choice, context: int) -> Request:
        """Return what the memory beside the loaded weights depends on."""
        transformer = self.transformer
        return Request(
            config=transformer.config,
            heads=choice.plan,
            layout=kv_layout(choice.kv, head_dim=transformer.config.head_dim, dtype=transformer.dtype),
            weights=weights_of_size(0),
            context=context,
            chunk_size=self.chunk_size,
            dtype=transformer.dtype,
            kernels=transformer.kernels.name,
            device=transformer.device.type,
            select=None if choice.select is None else choice.select.budget,
            sparse=choice.prefill is not None,
        )


def _fitted(resolved: Resolved, free: Free) -> Resolved:
    """Return `resolved` as a chat would run it on these weights; where none fits, as it was asked for."""
    chosen = fit(resolved, free, loaded=resolved)
    return resolved if chosen is None else chosen.resolved


def _dense_plan(config: ModelConfig) -> HeadPlan:
    return uniform_plan(num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, retrieval=True)


def _give_back(device: torch.device) -> None:
    """Give the memory of dropped engines back to a GPU, which the allocator keeps for the next of the same size."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _name(setting: Setting, kv: str) -> str:
    """Write a setting shortly: `0.5 k8v4`, `my-pattern int4 16+256`."""
    heads = Path(setting.heads).stem if setting.heads.endswith((".json", "/")) else setting.heads
    sizes = (setting.sink_size, setting.recent_size)
    window = "" if sizes == (None, None) else " " + "+".join("auto" if size is None else str(size) for size in sizes)
    selected = "" if setting.select == "off" else f" select {setting.select}"
    read = "" if setting.prefill == "exact" else f" {setting.prefill}"
    return f"{heads.removeprefix('ratio=')} {kv}{window}{selected}{read}"


def _unique(choices: Sequence[Choice]) -> list[Choice]:
    taken, out = {DENSE_NAME}, []
    for choice in choices:
        out.append(replace(choice, name=free_name(choice.name, taken=taken.__contains__)))
        taken.add(out[-1].name)
    return out


def _check_memory(requests: Sequence[Request], *, side_by_side: bool) -> None:
    """Refuse caches that do not fit together with the dense one, the weights and the distributions compared."""
    first = requests[0]
    config, weights = first.config, first.weights.nbytes
    layout = kv_layout(DENSE_KV, head_dim=config.head_dim, dtype=first.dtype)
    dense = replace(first, heads=_dense_plan(config), layout=layout, select=None, sparse=False)
    plans = [plan_memory(request).device for request in (dense, *requests)]
    sizes = [plan.cache for plan in plans]
    caches = sum(sizes if side_by_side else sorted(sizes)[-2:])
    working = max(plan.transient for plan in plans) + LOGIT_ROWS * config.vocab_size * 4 * _LOGIT_COPIES
    if side_by_side:
        working += len(plans) * first.chunk_size * config.hidden_size * first.dtype.itemsize
    available = available_bytes(torch.device(first.device))
    total = weights + caches + working
    if total > available:
        count = len(sizes) if side_by_side else 2
        raise MemoryLimitError(
            f"{count} caches of {first.context:,} tokens, one of them dense, need {total / GIB:.1f} GiB on "
            f"{first.device} (weights {weights / GIB:.1f}, KV {caches / GIB:.1f}, working {working / GIB:.1f}), and "
            f"{available / GIB:.1f} GiB are free: measure fewer tokens at a time, or fewer settings"
        )
