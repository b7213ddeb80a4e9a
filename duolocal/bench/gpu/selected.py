"""Section: decode that reads selected blocks, resident and offloaded, beside decode that reads everything.

All of it in one run, in caches reserved for the longest context. Keys, values and weights are random, so what is chosen
means nothing, and it changes more from step to step than with a text: copies from host memory are rather overrated.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from duolocal.bench.decode import bytes_per_token
from duolocal.bench.gpu import engines
from duolocal.bench.gpu.layers import angles, appending, layers_of, new_tokens
from duolocal.bench.gpu.measure import Bench
from duolocal.bench.timing import spread
from duolocal.cache import ON_DEVICE, Placement
from duolocal.cache.selection import REUSE, SelectionPolicy
from duolocal.engine.engine import Engine
from duolocal.kernels.digest import CANDIDATES, DigestChannels, digest_channels
from duolocal.kernels.gpu.append import append_token
from duolocal.kernels.gpu.decode import decode_attention
from duolocal.kernels.gpu.select import select_blocks
from duolocal.models.weights import ModelWeights

_FILL_S = 25.0  # for the longest context beyond the device: pinned memory is slow to get
_KERNELS_S = 6.0


@dataclass(frozen=True)
class Way:
    """How a decode step reads blocks."""

    name: str
    selects: bool
    offloaded: bool = False


WAYS = (Way("all", False), Way("selected", True), Way("selected, offloaded", True, True))


def run(bench: Bench) -> None:
    """Measure every way at every context, and the kernels of one layer alone."""
    weights = engines.bench_weights(bench)
    for way in WAYS:
        with bench.item("selected decode", way=way.name):
            bench.forget_peak()
            engine = engine_for(bench, weights, way)
            for context in bench.sizes.selected_contexts:
                fields = {"way": way.name, "context": context}
                if bench.fits(_FILL_S if way.offloaded else 6.0, "selected decode", **fields):
                    with bench.item("selected decode", **fields):
                        _one(bench, engine, way, context)
                if way.selects and not way.offloaded and bench.fits(_KERNELS_S, "selection kernels", context=context):
                    with bench.item("selection kernels", context=context):
                        _kernels(bench, engine, context)
            del engine


def engine_for(bench: Bench, weights: ModelWeights, way: Way) -> Engine:
    """Return an engine for the longest context that reads blocks in this way."""
    sizes = bench.sizes
    context = engines.reserved_for(sizes.selected_contexts[-1], _num_tokens(bench) + REUSE + _warm_tokens())
    select = None
    if way.selects:
        rows = engines.plan_of(bench, "50%").num_retrieval
        count = digest_channels(sizes.config.head_dim)
        channels = torch.arange(count, dtype=torch.int32).expand(rows, count)
        select = SelectionPolicy(sizes.selected_budget, DigestChannels(channels, torch.zeros(rows, count)))
    placement = Placement(sizes.selected_device_bytes) if way.offloaded else ON_DEVICE
    return engines.engine_for(bench, weights, heads="50%", context=context, placement=placement, select=select)


def _one(bench: Bench, engine: Engine, way: Way, context: int) -> None:
    engines.fill(engine, context, seed=bench.seed)
    count, cache = _num_tokens(bench), engine.cache
    tokens = engines.warm_tokens(engine, count + REUSE, warm=_warm_tokens())
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(count):
        choosing = engine.position % REUSE == 0
        began = time.perf_counter()
        next(tokens)
        times[choosing].append(time.perf_counter() - began)
    everything = [*times[True], *times[False]]
    mean, needed = sum(everything) / count, _bytes_per_token(engine)
    more = {}
    if way.selects:
        more = {
            "budget": bench.sizes.selected_budget,
            "ms_choosing": round(1e3 * spread(times[True]).median, 4),
            "ms_reusing": round(1e3 * spread(times[False]).median, 4),
            "digest_bytes": engine.memory().cache.digests,
        }
    if cache.pool.tiered:
        more["copies_per_choice"] = round(_copies(engine, tokens), 2)
    bench.record(
        "selected decode",
        weights="random",
        heads="50%",
        kv="int4",
        way=way.name,
        context=context,
        reserved_tokens=engine.context,
        ms=round(1e3 * mean, 4),  # the mean: one step of some chooses for all of them
        ms_min=round(1e3 * min(everything), 4),
        ms_max=round(1e3 * max(everything), 4),
        runs=count,
        bytes=needed,
        floor_ms=round(1e3 * needed / bench.ceilings.copy_bytes_per_s, 4),
        of_floor=round(needed / bench.ceilings.copy_bytes_per_s / mean, 4),
        cache_bytes=engine.memory().cache.total,
        outer_bytes=cache.pool.outer_bytes,
        slots_per_row=cache.pool.num_slots,
        weight_bytes=engine.memory().weights,
        **more,
        **bench.memory(),
    )


def _copies(engine: Engine, tokens: Iterator[int]) -> float:
    """Return how many blocks of a retrieval head are copied to the device per choice, over the next steps."""
    pool = engine.cache.pool
    before = pool.tags.clone()
    for _ in range(REUSE):
        next(tokens)
    return float((pool.tags != before).sum()) / pool.num_rows


def _bytes_per_token(engine: Engine) -> int:
    """Return the bytes that a decoded token must read: of digests and of candidates' keys once in REUSE steps."""
    selection, layout, plan = engine.cache.selection, engine.cache.layout, engine.plan
    weights, dense = bytes_per_token(engine)
    if selection is None:
        return weights + dense
    first = plan.sink_size // layout.block_size
    seen = max(0, -(-(engine.position + 1 - engine.cache.exact_recent) // layout.block_size) - first)
    read = min(seen, selection.budget_blocks + 1)
    blocks = plan.num_retrieval * layout.record_bytes
    digests = plan.num_retrieval * selection.digests.shape[2] // REUSE
    candidates = min(seen, CANDIDATES * selection.budget_blocks) * plan.num_retrieval * layout.key_bytes // REUSE
    return weights + dense - seen * blocks + read * blocks + seen * digests + candidates


def _kernels(bench: Bench, engine: Engine, context: int) -> None:
    """Record what choosing costs beside the attention to what is chosen, in one layer after the other."""
    cache = engine.cache
    q, k, v = new_tokens(bench, 1)
    cos, sin = angles(bench, context)
    with appending(cache, 1):
        layers = layers_of(cache)
        queries = [append_token(layer, q, k, v, cos, sin) for layer in layers]

        def choose(layer: int) -> None:
            selection = layers[layer].selection
            assert selection is not None
            selection.made_at.fill_(-1)  # a list is due; timed with the rest
            select_blocks(layers[layer], *queries[layer])

        def attend(layer: int) -> torch.Tensor:
            return decode_attention(layers[layer], *queries[layer])

        for layer in range(len(layers)):
            choose(layer)
        timings = {}
        parts: dict[str, Callable[[int], object]] = {"select_blocks": choose, "decode_attention": attend}
        for name, call in parts.items():
            timings[name] = bench.time([partial(call, layer) for layer in range(len(layers))])
    for name, timing in timings.items():
        bench.record(
            "selection kernels", name=name, context=context, budget=bench.sizes.selected_budget, **timing.report()
        )


def _num_tokens(bench: Bench) -> int:
    """Return how many tokens are timed: whole rounds of a choice and the steps that share it."""
    return -(-bench.sizes.decode_tokens // REUSE) * REUSE


def _warm_tokens() -> int:
    """Return how many tokens come first: a step that chooses comes once in REUSE, and is captured the second time."""
    return 3 * engines.WARM_TOKENS
