"""Decode of one model in several ways, in turns: all blocks or selected ones, in memory or beyond it.

The cache is filled with random numbers (`models.synthetic`): what is measured is time, and whether two ways compute the
same to the last bit. Which blocks matter to a text is not measured here.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from duolocal.bench.timing import Spread, spread
from duolocal.cache import CacheMemory
from duolocal.engine.engine import Engine
from duolocal.models.synthetic import fill_with_random_tokens
from duolocal.settings import Sampling

FIRST_ID = 1  # what is decoded from; any id does
SEED = 7


@dataclass(frozen=True)
class Variant:
    """One way to decode: a name, how to make its engine, and whether its file is dropped from memory before each token.

    like: the name of the variant that must compute the same to the last bit, None for none.
    """

    name: str
    make: Callable[[], Engine]
    like: str | None = None
    cold: bool = False


@dataclass(frozen=True)
class VariantSpeed:
    """One variant at one length."""

    name: str
    context: int  # tokens in the cache
    token_s: Spread  # seconds per token
    memory: CacheMemory
    equal: bool | None  # to the variant it is like; None without one
    against: float  # times the speed of the first variant, by the medians

    def report(self) -> dict[str, object]:
        """Return the figures as JSON holds them."""
        return {
            "variant": self.name,
            "context": self.context,
            "ms_per_token": self.token_s.milliseconds(),
            "times_the_first": round(self.against, 3),
            "bit_for_bit": self.equal,
            "device_bytes": self.memory.total,
            "outer_bytes": self.memory.outer_blocks,
        }


def measure_variants(
    variants: Sequence[Variant],
    context: int,
    *,
    num_tokens: int,
    repeats: int,
    on_step: Callable[[str], None] = lambda _: None,
) -> list[VariantSpeed]:
    """Fill the cache of every variant with the same random tokens; time `num_tokens` greedy ones, in turns.

    One token before the timed ones is not timed; decoded tokens are removed again.
    """
    engines, results = [], {}
    for variant in variants:
        on_step(f"filling {context:,} tokens: {variant.name}")
        engine = variant.make()
        fill_with_random_tokens(engine.cache, context, seed=SEED)
        moment = engine.snapshot()
        results[variant.name] = engine.step([FIRST_ID], decode=True)
        engine.restore(moment)
        engines.append((engine, moment))
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for run in range(repeats):
        for variant, (engine, moment) in zip(variants, engines, strict=True):
            on_step(f"{context:,} tokens, run {run + 1} of {repeats}: {variant.name}")
            times[variant.name].append(_run(engine, num_tokens, cold=variant.cold) / num_tokens)
            engine.restore(moment)
    first = spread(times[variants[0].name]).median
    return [
        VariantSpeed(
            variant.name,
            context,
            spread(times[variant.name]),
            engine.memory().cache,
            None if variant.like is None else torch.equal(results[variant.name], results[variant.like]),
            first / spread(times[variant.name]).median,
        )
        for variant, (engine, _) in zip(variants, engines, strict=True)
    ]


def _run(engine: Engine, num_tokens: int, *, cold: bool) -> float:
    """Return the seconds of `num_tokens` tokens after one."""
    tokens = engine.generate(
        [FIRST_ID], replace(Sampling(temperature=0), max_tokens=num_tokens + 1), eos_ids=frozenset()
    )
    next(tokens)
    elapsed_s = 0.0
    for _ in range(num_tokens):
        if cold:
            assert engine.cache.pool.drop_from_memory()
        began_s = time.perf_counter()
        next(tokens)
        elapsed_s += time.perf_counter() - began_s
    return elapsed_s
