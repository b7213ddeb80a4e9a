"""What is left to us is chosen together for the memory there is: heads, KV format, lm_head, chunks, where blocks lie.

Owns which values each of these may take for a resolved load and what they were measured to cost, the line that says
what was chosen, and the refusal where nothing fits. The choice itself is `duolocal.plan.dials`'s arithmetic; the
engine, the planner and the evaluation share it, so that their verdicts are one.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from duolocal.engine.measured import measured
from duolocal.engine.resolve import Resolved, resolve
from duolocal.errors import DuoLocalError, MemoryLimitError, SettingsError
from duolocal.heads import UNMEASURED_RATIO, HeadPlan, HeadsSpec
from duolocal.plan.dials import (
    FREE_OF_COST,
    Cost,
    Dials,
    Solution,
    Space,
    least,
    smaller_chunks,
    solve,
    usable,
    with_kept_back,
)
from duolocal.plan.fitting import AUTO_HEADS, MIN_CONTEXT, Free, Freedom, Setting, fits, nearest
from duolocal.plan.memory import GIB, plan_memory
from duolocal.plan.request import Request
from duolocal.plan.weights import Weights
from duolocal.settings import LoadSettings
from duolocal.sizes import format_tokens, parse_bytes, parse_tokens

_SHARES = (0.75, 0.5, 0.25)  # of retrieval heads; those that docs/quality.md has figures for
_UNKNOWN = Cost(0.0, 0.0, measured=False)  # of heads that somebody else has ranked
_KV = ("16", "int8", "k8v4", "int4")  # by falling size


@dataclass(frozen=True)
class Chosen:
    """A load with nothing left to choose."""

    resolved: Resolved  # its notes say what had to be given up
    request: Request  # with its blocks placed
    line: str  # for people: what was chosen, what it costs, what would buy more
    measured_first: bool  # as what fits depends on what nobody has measured of this model yet


def choose(resolved: Resolved, free: Free, *, loaded: Resolved | None = None) -> Chosen:
    """Return `resolved` with the best settings that fit, changing nothing that the user fixed.

    loaded: where weights are loaded already, what they were loaded with: it stays. Raises MemoryLimitError, before
    anything is allocated, naming the numbers and the nearest settings that fit.
    """
    chosen = fit(resolved, free, loaded=loaded)
    if chosen is None:
        raise _refusal(resolved, free)
    return chosen


def fit(resolved: Resolved, free: Free, *, loaded: Resolved | None = None) -> Chosen | None:
    """Do as `choose`, and return None where nothing fits."""
    ways = _Ways(resolved, loaded)
    best = ways.request(ways.best)
    if fits(plan_memory(best), usable(free)):  # the first of all; what the others are takes a second look at the file
        solution: Solution | None = Solution(ways.best, best)
    else:
        solution = solve(ways.space, ways.request, free)
    if solution is None:
        return None
    found, given_up = ways.apply(solution.dials), solution.dials != ways.best
    line = _line(ways, solution.dials, solution.request, free)
    if given_up:
        found = replace(found, fit_note=f"so that it fits: {line}")
    unranked = resolved.heads.unranked and found.heads.plan.num_streaming > 0
    unmeasured = resolved.unmeasured and found.kv != resolved.kv
    return Chosen(found, solution.request, line, unranked or unmeasured)


def suggestions(resolved: Resolved, free: Free, *, offload: bool = True) -> tuple[Resolved, list[Setting]]:
    """Return the least that costs little, for where nothing fits, and up to three settings that do.

    Each has the request that would then be chosen. offload: whether blocks may lie beyond the device.
    """
    ways = _Ways(resolved, None)
    modest = replace(ways.space.little[-1], chunk_size=ways.space.chunk_sizes[-1])
    freedom = ways.freedom(modest, offload=offload)
    found = nearest(ways.request(modest), usable(free), freedom) or nearest(
        ways.request(least(ways.space, ways.request)), free, freedom
    )
    return ways.apply(modest), [setting for one in found if (setting := _as_chosen(resolved, one, free)) is not None]


def _as_chosen(resolved: Resolved, setting: Setting, free: Free) -> Setting | None:
    """Return `setting` with the request that the command line with its options comes to."""
    asked = resolve(
        _with_options(resolved.settings, setting.options), resolved.known, on_card=resolved.on_card, fetch=False
    )
    chosen = fit(asked, free)
    if chosen is None:
        return None
    return Setting(setting.options, setting.effect, chosen.request, plan_memory(chosen.request))


def _with_options(settings: LoadSettings, options: tuple[str, ...]) -> LoadSettings:
    read: dict[str, Callable[[str], object]] = {
        "context": parse_tokens,
        "chunk_size": int,
        "kv_device_memory": lambda text: parse_bytes(text, "--kv-device-memory"),
    }
    given = {}
    for option, value in zip(options[::2], options[1::2], strict=True):
        name = option.removeprefix("--").replace("-", "_")
        given[name] = read.get(name, str)(value)
    return replace(settings, **given)  # type: ignore[arg-type]


class _Ways:
    """The settings that a resolved load may take, and what it becomes with each."""

    def __init__(self, resolved: Resolved, loaded: Resolved | None) -> None:
        if loaded is not None:
            resolved = replace(resolved, model=loaded.model, weights=loaded.weights, chunk_size=loaded.chunk_size)
        self._resolved = resolved
        settings, plan = resolved.settings, resolved.heads.plan
        self._spec = HeadsSpec.parse(settings.heads)
        self._measured = measured(resolved.fingerprint)
        self._is_loaded = loaded is not None
        self.automatic_placement = settings.kv_device_memory is None
        self._num_heads = plan.num_retrieval + plan.num_streaming
        self._cut = functools.cache(resolved.cut)
        self._rounded = functools.cache(resolved.with_outer)
        self.best = Dials(None, resolved.kv, settings.outer_weights, resolved.chunk_size)

    @functools.cached_property
    def space(self) -> Space:
        """The values that each may take, and their costs."""
        resolved, settings, known = self._resolved, self._resolved.settings, self._measured
        heads: list[float | None] = [None]
        if self._spec == AUTO_HEADS:
            shares = (UNMEASURED_RATIO, *_SHARES[1:]) if resolved.heads.unranked else _SHARES
            heads += [share for share in shares if self._sees_less(share)]
        kv = _KV[_KV.index(resolved.kv) :] if settings.kv == "auto" else (resolved.kv,)
        outer, chunks = [settings.outer_weights], [resolved.chunk_size]
        if not self._is_loaded:
            if settings.outer_weights == "auto":
                outer += self._smaller_outer()
            if settings.chunk_size is None and resolved.sparse is None:
                chunks = smaller_chunks(resolved.chunk_size)
        return Space(
            {share: self._heads_cost(share) for share in heads},
            {name: known.of_kv(name) for name in kv},
            {name: known.of_outer(name) for name in outer},
            chunks,
        )

    def costs(self, dials: Dials) -> dict[str, Cost]:
        """Return what each of the settings costs, by what people call it."""
        return {
            "the heads": self._heads_cost(dials.heads),
            "the KV format": self._measured.of_kv(dials.kv),
            "lm_head": self._measured.of_outer(dials.outer),
        }

    def _heads_cost(self, share: float | None) -> Cost:
        if self._spec.pattern not in ("auto", "all"):
            return _UNKNOWN
        own = (
            self._resolved.heads.plan.num_retrieval / self._num_heads if self._spec.ratio is None else self._spec.ratio
        )
        return self._measured.of_heads(own if share is None else share)

    def apply(self, dials: Dials) -> Resolved:
        """Return the load with these settings."""
        found = self._rounded(dials.outer) if dials.outer != self.best.outer else self._resolved
        if dials.heads is not None:
            found = replace(found, heads=replace(found.heads, plan=self._cut(dials.heads)))
        if dials.kv != found.kv:
            found = replace(found, kv=dials.kv, kv_note=None)
        return replace(found, chunk_size=dials.chunk_size)

    def request(self, dials: Dials) -> Request:
        """Return what memory depends on with these settings."""
        return self.apply(dials).request()

    def dense(self) -> Request | None:
        """Return the request with every head a retrieval head, None where that is asked for or not to be had."""
        if self._spec != AUTO_HEADS or self._resolved.heads.plan.num_streaming == 0:
            return None
        return replace(self.request(self.best), heads=self._cut(1.0))

    def freedom(self, dials: Dials, *, offload: bool) -> Freedom:
        """Return what a suggestion may change of these settings."""
        resolved = self._resolved
        settings, weights = resolved.settings, resolved.weights

        @functools.cache
        def sizes(layers: str, outer: str) -> Weights:
            return resolved.with_formats(layers, outer).weights

        rounds = settings.weights == "auto" and weights.layer_format in ("F16", "BF16") and _has_bitsandbytes()
        return Freedom(
            dials.kv,
            cut=self._cut if self._can_cut(0.5) else None,
            heads=self._spec,
            outer_weights=(lambda name: sizes(settings.weights, name)) if settings.outer_weights == "auto" else None,
            weights=(lambda name: sizes(name, dials.outer)) if rounds else None,
            offload=offload,
        )

    def _can_cut(self, share: float) -> bool:
        try:
            self._cut(share)
        except DuoLocalError:
            return False  # there is no ranking of the heads, and none can be made
        return True

    def _sees_less(self, share: float) -> bool:
        return self._can_cut(share) and self._cut(share).num_retrieval < self._resolved.heads.plan.num_retrieval

    def _smaller_outer(self) -> list[str]:
        found, least_bytes = [], self._resolved.weights.nbytes
        for name in ("int8", "int4"):
            try:
                nbytes = self._rounded(name).weights.nbytes
            except SettingsError:  # rows that are no whole groups: not to be had for this model
                break
            if nbytes < least_bytes:
                found.append(name)
                least_bytes = nbytes
        return found


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _line(ways: _Ways, dials: Dials, request: Request, free: Free) -> str:
    """Say what was chosen, what it was measured to cost, and what would buy the next better."""
    best, plan = ways.best, plan_memory(request)
    chosen = [_seen(request.heads), _kv(dials.kv)]
    if dials.outer != best.outer:
        chosen.append(f"{dials.outer} lm_head and embedding")
    if dials.chunk_size != best.chunk_size:
        chosen.append(f"chunks of {dials.chunk_size:,} tokens")
    if plan.offloaded:
        chosen.append("blocks beyond the device")
    better: list[str] = []
    target: Request | None = None
    if dials != best:
        target = ways.request(replace(best, chunk_size=ways.space.chunk_sizes[-1]))
        if dials.heads is not None:
            better.append(_share(target.heads))
        if dials.kv != best.kv:
            better.append(_kv(best.kv))
        if dials.outer != best.outer:
            better.append("lm_head and embedding as in the file")
        if not better:
            target, better = ways.request(best), [f"chunks of {best.chunk_size:,} tokens"]
    elif plan.offloaded and ways.automatic_placement:
        target, better = replace(request, kv_device_memory=None), ["all blocks on the device"]
    elif (dense := ways.dense()) is not None:
        if fits(plan_memory(dense), usable(free)):
            return f"{', '.join(chosen)}: {_cost(ways.costs(dials))}; --heads all fits too, and answers slower"
        target, better = dense, ["every head (--heads all)"]
    said = f"{', '.join(chosen)}: {_cost(ways.costs(dials))}"
    return said if target is None else f"{said}; {_price(target, free)} would keep {' and '.join(better)}"


def _seen(heads: HeadPlan) -> str:
    if heads.num_streaming == 0:
        return "every KV head keeps the whole context"
    return f"{_percent(heads)} of the KV heads keep the whole context ({heads.source})"


def _share(heads: HeadPlan) -> str:
    return f"{_percent(heads)} of the heads" if heads.num_streaming else "every head"


def _kv(name: str) -> str:
    return f"{name}-bit KV" if name.isdecimal() else f"{name} KV"


def _percent(heads: HeadPlan) -> str:
    return f"{heads.num_retrieval / (heads.num_retrieval + heads.num_streaming):.0%}"


def _cost(costs: Mapping[str, Cost]) -> str:
    """Say what was measured of the cost, and what was not; a sum of what was measured one by one."""
    parts = {name: cost for name, cost in costs.items() if cost != FREE_OF_COST}
    known = [name for name, cost in parts.items() if cost.measured]
    if not parts:
        return "nothing is given up"
    if not known:
        return "what that costs is not measured for this model"
    kl, rise = (sum(getattr(parts[name], field) for name in known) for field in ("kl", "perplexity_rise"))
    figures = f"KL about {kl:.2g}, perplexity about {rise:+.1%}"
    if len(known) == len(parts):
        return f"measured {figures}"
    unknown = " and ".join(name for name in parts if name not in known)
    return f"measured {figures} for {' and '.join(known)}, not for {unknown}"


def _price(target: Request, free: Free) -> str:
    """Say in which context `target` fits, and in how much memory."""
    plan, kept = plan_memory(target), usable(free)
    tenths = -(-10 * (with_kept_back(plan.total) + plan.process) // GIB)
    memory = f"{-(-tenths // 10) if tenths > 100 else tenths / 10:g} GiB"
    low, high = 0, target.context // 1024
    while high - low > 1:
        middle = (low + high) // 2
        if fits(plan_memory(replace(target, context=middle * 1024)), kept):
            low = middle
        else:
            high = middle
    context = low * 1024
    return memory if context < MIN_CONTEXT else f"--context {format_tokens(context)} or {memory}"


def _refusal(resolved: Resolved, free: Free) -> MemoryLimitError:
    """Return the error for a load that has no room: one line with the numbers and up to three settings that fit."""
    modest, found = suggestions(resolved, free)
    request = modest.request()
    plan = plan_memory(request)
    device = plan.device
    if found:
        advice = f"this fits: {' or '.join(setting.words for setting in found)}"
    else:
        advice = "use a smaller model, or a machine with more memory"
    if request.heads.num_streaming == 0:
        advice += "; streaming heads would need less (--heads with a pattern file)"
    beyond = ""
    for where, needed, there in (("host", plan.host_blocks, free.host), ("disk", plan.disk_blocks, free.disk)):
        if needed > there:
            beyond = f" and {needed / GIB:.1f} GiB on the {where}, where {there / GIB:.1f} GiB are free"
    return MemoryLimitError(
        f"context {request.context:,} needs {plan.total / GIB:.1f} GiB on {request.device} "
        f"(weights {device.weights / GIB:.1f}, KV blocks {(device.blocks + device.digests) / GIB:.1f}, "
        f"windows {device.windows / GIB:.1f}, working {device.transient / GIB:.1f}){beyond}, "
        f"and {free.device / GIB:.1f} GiB are free; {advice}"
    )
