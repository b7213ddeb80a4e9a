"""Prefill speed of duolocal over real text, by length, by chunk size, and exact beside sparse."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from duolocal.bench.timing import Spread, spread
from duolocal.engine.engine import Engine


@dataclass(frozen=True)
class PrefillSpeed:
    """Prefill from an empty cache."""

    context: int  # tokens
    chunk_size: int  # tokens
    elapsed_s: Spread
    prefill: str = "exact"
    density: float | None = None  # of a sparse prefill: blocks read of those behind the window

    def report(self) -> dict[str, object]:
        """Return the figures as JSON holds them."""
        return {
            "context": self.context,
            "chunk_size": self.chunk_size,
            "ms": self.elapsed_s.milliseconds(),
            "tokens_per_s": self.elapsed_s.per_s(self.context),
            "prefill": self.prefill,
            "density": None if self.density is None else round(self.density, 4),
        }


def distinct(contexts: Sequence[int], chunk_sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs to measure: of the chunk sizes that hold a whole context, only the smallest."""
    return [
        (context, chunk_size)
        for context in contexts
        for chunk_size in chunk_sizes
        if chunk_size <= min((size for size in chunk_sizes if size >= context), default=chunk_size)
    ]


def measure_prefill(
    engines: Mapping[str, Engine],
    token_ids: Sequence[int],
    contexts: Sequence[int],
    chunk_sizes: Sequence[int],
    *,
    repeats: int,
    on_step: Callable[[str], None] = lambda _: None,
) -> list[PrefillSpeed]:
    """Time the first tokens of `token_ids` into an empty cache, for every context and chunk size, taking turns.

    engines: by how they prefill; they are left empty, with their own chunk sizes.
    """
    ways = [(context, size, name) for context, size in distinct(contexts, chunk_sizes) for name in engines]
    times: dict[tuple[int, int, str], list[float]] = {way: [] for way in ways}
    density: dict[tuple[int, int, str], float] = {}
    own = {name: engine.chunk_size for name, engine in engines.items()}
    try:
        for engine in engines.values():
            engine.reset()
            _fill(engine, token_ids[: min(contexts)])  # the first pass over weights and code is another matter
        for run in range(repeats):
            for way in ways:
                context, chunk_size, name = way
                on_step(f"{context:,} tokens in chunks of {chunk_size:,}, {name}: run {run + 1} of {repeats}")
                engine = engines[name]
                engine.reset()
                engine.chunk_size = chunk_size
                counts = engine.cache.sparse_counts
                if counts is not None:
                    counts.reset()
                began_s = time.perf_counter()
                _fill(engine, token_ids[:context])
                times[way].append(time.perf_counter() - began_s)
                if counts is not None:
                    density[way] = counts.density
    finally:
        for name, engine in engines.items():
            engine.chunk_size = own[name]
            engine.reset()
    return [PrefillSpeed(way[0], way[1], spread(times[way]), way[2], density.get(way)) for way in ways]


def _fill(engine: Engine, token_ids: Sequence[int]) -> None:
    engine.prefill(token_ids)
    if engine.transformer.device.type == "cuda":
        torch.cuda.synchronize(engine.transformer.device)
