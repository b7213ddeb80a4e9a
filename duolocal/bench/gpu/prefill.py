"""Section: prefill of the whole model by length and chunk size, 50% retrieval heads, beside our own dense.

What does not fit into the time is not left out but sampled: some chunks at even distances are timed after a fill with
random tokens, and the time of the others interpolated. A chunk's time is a straight line over its position, so this
is close; such a record says `sampled`.
"""

import time
from typing import Any

from duolocal.bench.gpu.engines import bench_weights, engine_for, fill, random_ids
from duolocal.bench.gpu.floors import prefill_flop
from duolocal.bench.gpu.measure import Bench
from duolocal.engine.engine import Engine
from duolocal.models.weights import ModelWeights

_MARGIN = 1.3  # on a predicted time
_SETUP_S = 3.0  # warming up and filling


def run(bench: Bench) -> None:
    """Measure ascending lengths, duo over all chunk sizes, dense with the middle one; then whole what was sampled."""
    sizes = bench.sizes
    weights = bench_weights(bench)
    middle = sizes.chunk_sizes[len(sizes.chunk_sizes) // 2]
    runs = [(context, "50%", chunk) for context in sizes.prefill_contexts for chunk in sizes.chunk_sizes]
    runs += [(context, "all", middle) for context in sizes.prefill_contexts]
    runs.sort(key=lambda run: run[0])
    runs += [(sizes.long_prefill, heads, middle) for heads in ("50%", "all")]
    rate = 0.4 * bench.ceilings.matmul_flop_per_s  # a guess until the first is measured
    sampled_ones = []
    for context, heads, chunk in runs:
        if chunk > context:
            continue
        fields = {"context": context, "heads": heads, "chunk": chunk}
        flop = _flop(bench, context, heads)
        share = min(1.0, sizes.sampled_chunks * chunk / context)
        sampled = share < 1 and _MARGIN * flop / rate > sizes.whole_prefill_s
        predicted = _MARGIN * flop / rate * (share if sampled else 1)
        if bench.fits(_SETUP_S + predicted, "prefill", **fields):
            with bench.item("prefill", **fields):
                rate = flop / one(bench, weights, heads, context, chunk, sampled=sampled)
                if sampled and chunk == middle:
                    sampled_ones.append((context, heads, chunk))
    for context, heads, chunk in sampled_ones:  # whether sampling is right, where time is left
        if bench.left_s > _SETUP_S + _MARGIN * _flop(bench, context, heads) / rate:
            with bench.item("prefill", context=context, heads=heads, chunk=chunk):
                one(bench, weights, heads, context, chunk, sampled=False)


def one(
    bench: Bench,
    weights: ModelWeights,
    heads: str,
    context: int,
    chunk: int,
    *,
    sampled: bool,
    what: str = "prefill",
    **more: Any,
) -> float:
    """Record one prefill from an empty cache; return its seconds."""
    bench.forget_peak()
    engine = engine_for(bench, weights, heads=heads, context=max(16, context), chunk_size=chunk)
    began = time.monotonic()
    _warm_up(bench, engine, chunk)
    warm_s = time.monotonic() - began
    elapsed, chunks = (_sampled if sampled else _whole)(bench, engine, context, chunk)
    flop = _flop(bench, context, heads)
    bench.record(
        what,
        weights="random",
        heads=heads,
        kv="int4",
        context=context,
        chunk=chunk,
        sampled=sampled,
        timed_chunks=chunks,
        seconds=round(elapsed, 4),
        tokens_per_s=round(context / elapsed, 1),
        warm_up_s=round(warm_s, 2),
        **bench.of_matmul(flop, elapsed),
        **bench.memory(),
        **more,
    )
    return elapsed


def _warm_up(bench: Bench, engine: Engine, chunk: int) -> None:
    """Compile what a chunk needs, at a place where all of it runs: after a block that is seen."""
    before = min(engine.context - chunk, 2 * engine.cache.exact_recent + engine.cache.plan.sink_size)
    if before > 0:
        fill(engine, before, seed=bench.seed)
    engine.step(random_ids(bench, chunk))
    bench.synchronize()


def _whole(bench: Bench, engine: Engine, context: int, chunk: int) -> tuple[float, int]:
    engine.reset()
    ids = random_ids(bench, context)
    bench.synchronize()
    began = time.perf_counter()
    chunks = sum(1 for _ in engine.prefill(ids))
    bench.synchronize()
    return time.perf_counter() - began, chunks


def _sampled(bench: Bench, engine: Engine, context: int, chunk: int) -> tuple[float, int]:
    """Return the seconds of all chunks, those of some being timed and the others interpolated; and how many were."""
    ids = random_ids(bench, chunk)
    starts = range(0, context - chunk + 1, chunk)
    wanted = min(len(starts), bench.sizes.sampled_chunks)
    places = sorted({round(i * (len(starts) - 1) / max(1, wanted - 1)) for i in range(wanted)})
    seconds = []
    for place in places:
        fill(engine, starts[place], seed=bench.seed)
        bench.synchronize()
        began = time.perf_counter()
        engine.step(ids)
        bench.synchronize()
        seconds.append(time.perf_counter() - began)
    total = sum(interpolated(places, seconds, place) for place in range(len(starts)))
    return total * context / (len(starts) * chunk), len(places)  # a last, shorter chunk counts by its tokens


def interpolated(places: list[int], seconds: list[float], place: int) -> float:
    """Return the value at `place` of the line through the neighbours in `places` (ascending)."""
    for (left, low), (right, high) in zip(
        zip(places, seconds, strict=True), zip(places[1:], seconds[1:], strict=True), strict=False
    ):
        if left <= place <= right:
            return low + (high - low) * (place - left) / (right - left)
    return seconds[0] if place <= places[0] else seconds[-1]


def _flop(bench: Bench, context: int, heads: str) -> float:
    sizes = bench.sizes
    window = sizes.sink_size + sizes.recent_size
    return prefill_flop(sizes.config, context, retrieval=0.5 if heads == "50%" else 1.0, window=window)
