"""The automatic settings of a load, chosen together: the best measured quality that fits.

Owns the order in which settings are tried and what fits; pure arithmetic, no file is read and nothing is loaded. What
a user fixed has one value here, so it cannot change. What settings cost in quality, and what the user hears, are the
engine's (`duolocal.engine.automatic`).

The order, best first, so that more memory never gives a worse quality:

1. what costs no more than LITTLE_KL beyond the defaults, all blocks on the device, by its cost;
2. what costs as much as the last of these, with blocks beyond the device: the same answers, slower;
3. what costs more, by its cost, each on the device and then beyond it.

Each is tried with smaller chunks, which change no answer, before the next. KEPT_BACK of the device stays free, of a
small one a sixteenth; where nothing leaves that, what needs least is taken if it fits at all.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from duolocal.plan.fitting import MIN_CHUNK, Free, fits, offloaded
from duolocal.plan.memory import GIB, plan_memory
from duolocal.plan.request import Request

KEPT_BACK = GIB // 2  # bytes: for other programs, and for what an estimate is off by
_KEPT_SHARE = 16
LITTLE_KL = 0.02  # nats per token: a split that costs no more is the goal of docs/quality.md
_CHUNK_STEPS = 3  # halvings
Value = TypeVar("Value")


@dataclass(frozen=True)
class Cost:
    """What a setting costs beside the 16-bit model with every head a retrieval head."""

    kl: float  # nats per token
    perplexity_rise: float  # relative
    measured: bool  # on this model; else figures of another one, which only decide what is tried first


FREE_OF_COST = Cost(0.0, 0.0, measured=True)


@dataclass(frozen=True)
class Dials:
    """One value of each."""

    heads: float | None  # share of retrieval heads; None: the plan as it was resolved
    kv: str
    outer: str  # of `--outer-weights`
    chunk_size: int


@dataclass(frozen=True)
class Space:
    """The values that each dial may take, the default first, and what they cost; a single one where it is fixed."""

    heads: Mapping[float | None, Cost]
    kv: Mapping[str, Cost]
    outer: Mapping[str, Cost]
    chunk_sizes: Sequence[int]

    @cached_property
    def rungs(self) -> list[Dials]:
        """All combinations, with the largest chunk, the best first; the defaults are the first of all."""
        combinations = itertools.product(self.heads, self.kv, self.outer)
        return sorted((Dials(*values, self.chunk_sizes[0]) for values in combinations), key=self.loss)

    @property
    def little(self) -> list[Dials]:
        """Those of the rungs that cost little."""
        return [rung for rung in self.rungs if self.loss(rung) <= LITTLE_KL]

    @property
    def modest(self) -> list[Dials]:
        """Those of `little` that cost as much as its last, the least rounded first."""
        little = self.little
        return [rung for rung in little if self.loss(rung) == self.loss(little[-1])]

    def chunks(self, rung: Dials) -> Iterator[Dials]:
        """Yield `rung` with every size of chunks, the largest first."""
        return (replace(rung, chunk_size=size) for size in self.chunk_sizes)

    def loss(self, rung: Dials) -> float:
        """Return the KL beyond that of the defaults; what is measured to be better by noise is no better."""
        return _beyond(self.heads, rung.heads) + _beyond(self.kv, rung.kv) + _beyond(self.outer, rung.outer)


def _beyond(dial: Mapping[Value, Cost], value: Value) -> float:
    return max(0.0, dial[value].kl - next(iter(dial.values())).kl)


@dataclass(frozen=True)
class Solution:
    """The first of the order that fits, and its request with the blocks placed."""

    dials: Dials
    request: Request


def smaller_chunks(size: int) -> list[int]:
    """Return `size` and the halves of it that are tried."""
    return [size >> step for step in range(_CHUNK_STEPS + 1) if step == 0 or size >> step >= MIN_CHUNK]


def usable(free: Free) -> Free:
    """Return `free` without what is kept back; never less of a device that has more."""
    return replace(free, device=free.device - min(KEPT_BACK, free.device // _KEPT_SHARE))


def with_kept_back(needed: int) -> int:
    """Return the bytes of a device of which `needed` are usable."""
    return needed + min(KEPT_BACK, needed // (_KEPT_SHARE - 1) + 1)


def solve(space: Space, request_of: Callable[[Dials], Request], free: Free) -> Solution | None:
    """Return the best dials that fit what is `usable`, or else the least that fits `free`; None: nothing does.

    request_of: what memory depends on with these dials, all blocks on the device unless the user said where they lie.
    """
    for rung, beyond in _order(space):
        for dials in space.chunks(rung):
            placed = _place(request_of(dials), usable(free), beyond=beyond)
            if placed is not None:
                return Solution(dials, placed)
    dials = least(space, request_of)
    request = request_of(dials)
    for beyond in (False, True):
        placed = _place(request, free, beyond=beyond)
        if placed is not None:
            return Solution(dials, placed)
    return None


def least(space: Space, request_of: Callable[[Dials], Request]) -> Dials:
    """Return the dials that need the least memory."""
    every = (dials for rung in space.rungs for dials in space.chunks(rung))
    return min(every, key=lambda dials: plan_memory(request_of(dials)).total)


def _order(space: Space) -> Iterator[tuple[Dials, bool]]:
    """Yield (dials, whether blocks may lie beyond the device) as the module says."""
    little = space.little
    yield from ((rung, False) for rung in little)
    yield from ((rung, True) for rung in space.modest)
    for rung in space.rungs[len(little) :]:
        yield rung, False
        yield rung, True


def _place(request: Request, free: Free, *, beyond: bool) -> Request | None:
    if not beyond or request.kv_device_memory is not None:
        return request if fits(plan_memory(request), free) else None
    return next(offloaded(request, free), None)
