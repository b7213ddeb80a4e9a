"""Prefill speed of duolocal over real text, by length and by chunk size."""

import time
from collections.abc import Callable, Sequence
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

    def report(self) -> dict[str, object]:
        """Return the figures as JSON holds them."""
        return {
            "context": self.context,
            "chunk_size": self.chunk_size,
            "ms": self.elapsed_s.milliseconds(),
            "tokens_per_s": self.elapsed_s.per_s(self.context),
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
    engine: Engine,
    token_ids: Sequence[int],
    contexts: Sequence[int],
    chunk_sizes: Sequence[int],
    *,
    repeats: int,
    on_step: Callable[[str], None] = lambda _: None,
) -> list[PrefillSpeed]:
    """Time the first tokens of `token_ids` into an empty cache, for every context and chunk size, taking turns.

    The engine is left empty, with its own chunk size.
    """
    pairs = distinct(contexts, chunk_sizes)
    times: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
    own = engine.chunk_size
    engine.reset()
    try:
        _fill(engine, token_ids[: min(contexts)])  # the first pass over weights and code is another matter
        for run in range(repeats):
            for context, chunk_size in pairs:
                on_step(f"{context:,} tokens in chunks of {chunk_size:,}: run {run + 1} of {repeats}")
                engine.reset()
                engine.chunk_size = chunk_size
                began_s = time.perf_counter()
                _fill(engine, token_ids[:context])
                times[context, chunk_size].append(time.perf_counter() - began_s)
    finally:
        engine.chunk_size = own
        engine.reset()
    return [PrefillSpeed(context, chunk_size, spread(times[context, chunk_size])) for context, chunk_size in pairs]


def _fill(engine: Engine, token_ids: Sequence[int]) -> None:
    for _ in engine.prefill(token_ids):
        pass
    if engine.transformer.device.type == "cuda":
        torch.cuda.synchronize(engine.transformer.device)
