"""One set of weights with several caches: the dense 16-bit one that everything is measured against, and others.

The weights are loaded once and the caches made on demand, so that a machine that holds the model for a chat also holds
it here; what the caches take together is refused before the weights are loaded, with the numbers.
"""

import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from duolocal.cache import DuoCache, SelectionPolicy
from duolocal.engine.engine import DEFAULT_CHUNK_SIZE, Engine
from duolocal.engine.head_choice import can_rank, published_for
from duolocal.engine.kv_choice import choose_kv
from duolocal.engine.memory import GIB, MemoryNeeds, available_bytes, dense_16bit_bytes, memory_needs
from duolocal.engine.prefill_choice import prefill_policy
from duolocal.engine.select_choice import choose_channels, selection_budget
from duolocal.errors import MemoryLimitError, SettingsError
from duolocal.heads import HeadChoice, HeadPlan, KnownPattern, choose_heads, uniform_plan
from duolocal.kernels.sparse import SparsePrefill
from duolocal.models.config import ModelConfig
from duolocal.models.loader import ModelSource
from duolocal.models.transformer import Transformer
from duolocal.quant.kv import KV_FORMATS, kv_layout

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
        notes: Sequence[str] = (),
    ) -> None:
        self.transformer = transformer
        self.choices = _unique(choices)
        self.chunk_size = chunk_size
        self.source = source
        self.notes = list(notes)
        config = transformer.config
        plan = uniform_plan(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            retrieval=True,
            sink_size=None,
            recent_size=None,
        )
        self.dense = Choice(DENSE_NAME, plan, DENSE_KV)

    @classmethod
    def load(
        cls,
        source: ModelSource,
        settings: Sequence[Setting],
        *,
        context: int,
        name: str = "",
        side_by_side: bool = True,
        device: str = "auto",
        threads: int | None = None,
        kernels: str = "auto",
        on_layer: Callable[[int, int], None] | None = None,
        on_measure: Callable[[int, int], None] | None = None,
        on_identify: Callable[[int, int], None] | None = None,
        on_build: Callable[[], None] | None = None,
    ) -> "Lineup":
        """Load the weights for contexts of up to `context` tokens; device, threads, kernels as in `Engine.load`.

        name: what the user called the model. side_by_side: whether all caches will be in memory at once, or no more
        than two. The callbacks get (done, total). Raises DuoLocalError, MemoryLimitError before the weights are loaded.
        """
        assert settings
        published = published_for(source, name)
        wishes = [_heads(setting, source, context, published) for setting in settings]
        where, dtype = _expected(device)
        # Before the weights are loaded the smallest format stands for "auto".
        formats = [KV_FORMATS[-1] if setting.kv == "auto" else _known(setting.kv) for setting in settings]
        _check_memory(
            source.config,
            [(wish.plan, kv) for wish, kv in zip(wishes, formats, strict=True)],
            weight_bytes=source.size_bytes,
            context=context,
            device=where,
            dtype=dtype,
            kernels="torch" if kernels == "torch" else {"cpu": "compiled"}.get(where.type, "triton"),
            side_by_side=side_by_side,
        )
        # Heads that nobody has ranked are ranked by the engine; the other settings find the ranking remembered.
        lead = next((at for at, wish in enumerate(wishes) if wish.unranked), 0)
        engine = Engine.load(
            source,
            context=context,
            heads=settings[lead].heads,
            kv=settings[lead].kv,
            sink_size=settings[lead].sink_size,
            recent_size=settings[lead].recent_size,
            device=device,
            threads=threads,
            kernels=kernels,
            on_layer=on_layer,
            on_measure=on_measure,
            on_identify=on_identify,
            on_build=on_build,
        )
        transformer, chunk_size, notes = engine.transformer, engine.chunk_size, list(engine.notes)
        lead_plan, automatic = engine.plan, engine.kv if settings[lead].kv == "auto" else None
        del engine  # with its cache
        _give_back(transformer.device)
        choices = []
        for at, (setting, wish) in enumerate(zip(settings, wishes, strict=True)):
            kv = setting.kv
            if kv == "auto":
                if automatic is None:
                    automatic, kv_note = choose_kv(
                        source,
                        transformer.weights,
                        device=transformer.device,
                        dtype=transformer.dtype,
                        chunk_size=chunk_size,
                        kernels=transformer.kernels,
                        on_progress=on_measure,
                    )
                    notes.append(kv_note)
                kv = automatic
            plan, note = lead_plan, None
            if at != lead:
                wish = _heads(setting, source, context, published) if wish.unranked else wish
                plan, note = wish.plan, wish.note
                if wish.unranked:
                    raise SettingsError(f"the ranking of heads could not be kept: give --heads {setting.heads} alone")
            budget, policy = selection_budget(setting.select, context), None
            if budget is not None:
                policy = SelectionPolicy(budget, choose_channels(source, transformer, plan))
            sparse = prefill_policy(setting.prefill, chunk_size=chunk_size)
            choices.append(Choice(_name(setting, kv), plan, kv, setting, policy, sparse))
            notes += [note] if note and note not in notes else []
        lineup = cls(transformer, choices, chunk_size=chunk_size, source=source, notes=notes)
        if any(setting.kv == "auto" for setting in settings):
            lineup.check_memory(context=context, side_by_side=side_by_side)
        return lineup

    @property
    def everyone(self) -> list[Choice]:
        """The dense choice, then the others."""
        return [self.dense, *self.choices]

    def engine(self, choice: Choice, *, context: int | None = None) -> Engine:
        """Give the weights a new cache for `context` tokens (None: as many as the weights were loaded for)."""
        transformer = self.transformer
        assert context is None or context <= transformer.context
        _give_back(transformer.device)
        cache = DuoCache(
            choice.plan,
            kv_layout(choice.kv, head_dim=transformer.config.head_dim, dtype=transformer.dtype),
            num_heads=transformer.config.num_heads,
            context=transformer.context if context is None else context,
            device=transformer.device,
            dtype=transformer.dtype,
            kernels=transformer.kernels,
            select=choice.select,
            prefill=choice.prefill,
        )
        return Engine(transformer, cache, source=self.source, kv=choice.kv, chunk_size=self.chunk_size)

    def plan(self, heads: str, like: HeadPlan) -> HeadPlan:
        """Return the plan for another `--heads` with the window of `like`. Raises SettingsError where none is known."""
        config = self.transformer.config
        choice = choose_heads(
            heads,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            fingerprint=None if self.source is None else self.source.fingerprint,
            sink_size=like.sink_size,
            recent_size=like.recent_size,
            published=None if self.source is None else published_for(self.source),
        )
        return choice.plan

    def kv_bytes(self, choice: Choice, context: int) -> int:
        """Return what the cache of `choice` takes for `context` tokens, windows included."""
        config, dtype = self.transformer.config, self.transformer.dtype
        needs = _needs(config, choice.plan, choice.kv, context=context, dtype=dtype, kernels="compiled")
        return needs.blocks + needs.windows

    def bytes_per_token(self, choice: Choice) -> float:
        """Return what each further token takes once the windows are full: the blocks of the retrieval heads."""
        config, dtype = self.transformer.config, self.transformer.dtype
        layout = kv_layout(choice.kv, head_dim=config.head_dim, dtype=dtype)
        return choice.plan.num_retrieval * layout.bytes_per_token

    def dense_bytes(self, context: int) -> int:
        """Return what an ordinary 16-bit cache takes for `context` tokens."""
        return dense_16bit_bytes(self.transformer.config, context)

    def check_memory(self, *, context: int, side_by_side: bool = True, choices: Sequence[Choice] | None = None) -> None:
        """Raise MemoryLimitError where the caches do not fit beside the weights that are loaded."""
        chosen = self.choices if choices is None else choices
        _check_memory(
            self.transformer.config,
            [(choice.plan, choice.kv) for choice in chosen],
            weight_bytes=0,  # they are there
            context=context,
            device=self.transformer.device,
            dtype=self.transformer.dtype,
            kernels=self.transformer.kernels.name,
            side_by_side=side_by_side,
        )


def _give_back(device: torch.device) -> None:
    """Let go of what dropped engines held: on a GPU a decoder and its engine hold each other."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _heads(setting: Setting, source: ModelSource, context: int, published: KnownPattern | None) -> HeadChoice:
    return choose_heads(
        setting.heads,
        num_layers=source.config.num_layers,
        num_kv_heads=source.config.num_kv_heads,
        fingerprint=source.fingerprint,
        sink_size=setting.sink_size,
        recent_size=setting.recent_size,
        published=published,
        can_rank=can_rank(source, context),
    )


def _known(kv: str) -> str:
    if kv not in KV_FORMATS:
        raise SettingsError(f"unknown KV format {kv!r}: choose auto or one of {', '.join(KV_FORMATS)}")
    return kv


def _name(setting: Setting, kv: str) -> str:
    """Write a setting shortly: `0.5 k8v4`, `my-pattern int4 16+256`."""
    heads = Path(setting.heads).stem if setting.heads.endswith((".json", "/")) else setting.heads
    sizes = (setting.sink_size, setting.recent_size)
    window = "" if sizes == (None, None) else " " + "+".join("auto" if size is None else str(size) for size in sizes)
    selected = "" if setting.select == "off" else f" select {setting.select}"
    read = "" if setting.prefill == "exact" else f" {setting.prefill}"
    return f"{heads.removeprefix('ratio=')} {kv}{window}{selected}{read}"


def _unique(choices: Sequence[Choice]) -> list[Choice]:
    seen: dict[str, int] = {DENSE_NAME: 1}
    out = []
    for choice in choices:
        count = seen[choice.name] = seen.get(choice.name, 0) + 1
        out.append(choice if count == 1 else replace(choice, name=f"{choice.name} ({count})"))
    return out


def _expected(device: str) -> tuple[torch.device, torch.dtype]:
    """Return where `Engine.load` will compute and how wide: for what can be refused before it."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def _needs(
    config: ModelConfig,
    plan: HeadPlan,
    kv: str,
    *,
    context: int,
    dtype: torch.dtype,
    kernels: str,
    weight_bytes: int = 0,
    chunk_size: int = 1,
) -> MemoryNeeds:
    return memory_needs(
        config,
        plan,
        kv_layout(kv, head_dim=config.head_dim, dtype=dtype),
        weight_bytes=weight_bytes,
        context=context,
        chunk_size=chunk_size,
        dtype=dtype,
        kernels=kernels,
    )


def _check_memory(
    config: ModelConfig,
    kinds: Sequence[tuple[HeadPlan, str]],
    *,
    weight_bytes: int,
    context: int,
    device: torch.device,
    dtype: torch.dtype,
    kernels: str,
    side_by_side: bool,
) -> None:
    """Refuse caches that do not fit together with the dense one, the weights and the distributions compared."""
    dense = uniform_plan(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        retrieval=True,
        sink_size=None,
        recent_size=None,
    )
    chunk_size = DEFAULT_CHUNK_SIZE[device.type]
    needs = [
        _needs(config, plan, kv, context=context, dtype=dtype, kernels=kernels, chunk_size=chunk_size)
        for plan, kv in [(dense, DENSE_KV), *kinds]
    ]
    sizes = [need.blocks + need.windows for need in needs]
    caches = sum(sizes if side_by_side else sorted(sizes)[-2:])
    working = max(need.transient for need in needs) + LOGIT_ROWS * config.vocab_size * 4 * _LOGIT_COPIES
    if side_by_side:
        working += len(needs) * chunk_size * config.hidden_size * dtype.itemsize
    available = available_bytes(device)
    total = weight_bytes + caches + working
    if total > available:
        count = len(sizes) if side_by_side else 2
        raise MemoryLimitError(
            f"{count} caches of {context:,} tokens, one of them dense, need {total / GIB:.1f} GiB on {device.type} "
            f"(weights {weight_bytes / GIB:.1f}, KV {caches / GIB:.1f}, working {working / GIB:.1f}), and "
            f"{available / GIB:.1f} GiB are free: measure fewer tokens at a time, or fewer settings"
        )
