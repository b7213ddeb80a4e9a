"""Section: decode of the whole model by context: milliseconds per token, bytes, memory, and where the time goes."""

import contextlib
import time
from pathlib import Path
from typing import Any

import torch

from duolocal.bench.decode import bytes_per_token
from duolocal.bench.gpu.engines import (
    bench_weights,
    engine_for,
    fill,
    reserved_for,
    room_to_decode,
    tokens_s,
    warm_tokens,
)
from duolocal.bench.gpu.measure import Bench
from duolocal.bench.timing import spread
from duolocal.engine.engine import Engine
from duolocal.models.weights import ModelWeights

_MARGIN_BYTES = 2 << 30  # left free beside the largest cache: the graph's buffers, the library's workspaces
_PROFILED_ROWS = 14


def run(bench: Bench) -> None:
    """Measure contexts in caches reserved for short and for long ones, dense beside duo, then the largest that fits."""
    sizes = bench.sizes
    weights = bench_weights(bench)
    for contexts in (sizes.small_contexts, sizes.large_contexts):
        measure(bench, weights, "50%", contexts)
    measure(bench, weights, "all", (sizes.dense_context,))
    for context in sizes.profiled_contexts:
        if bench.fits(8, "profile", context=context):
            with bench.item("profile", context=context):
                _profile(bench, weights, context)
    if bench.fits(10, "decode", heads="50%", kv="int4", largest=True):
        with bench.item("decode", heads="50%", kv="int4", largest=True):
            _largest(bench, weights)


def measure(
    bench: Bench, weights: ModelWeights, heads: str, contexts: tuple[int, ...], what: str = "decode", **more: Any
) -> None:
    """Record decode at each of the ascending contexts, in one cache that has room for the last."""
    reserved = reserved_for(contexts[-1], bench.sizes.decode_tokens)
    with bench.item(what, heads=heads, kv="int4", context=contexts[-1], **more):
        bench.forget_peak()
        engine = engine_for(bench, weights, heads=heads, context=reserved)
        for context in contexts:
            if bench.fits(4, what, heads=heads, kv="int4", context=context, **more):
                _one(bench, engine, heads, context, what, **more)


def _one(bench: Bench, engine: Engine, heads: str, context: int, what: str, **more: Any) -> None:
    fill(engine, context, seed=bench.seed)
    needed = sum(bytes_per_token(engine))
    times = spread(tokens_s(engine, bench.sizes.decode_tokens))
    cache = engine.memory().cache
    bench.record(
        what,
        weights="random",
        heads=heads,
        kv="int4",
        context=context,
        reserved_tokens=engine.context,
        ms=round(1e3 * times.median, 4),
        ms_min=round(1e3 * times.least, 4),
        ms_max=round(1e3 * times.most, 4),
        runs=times.runs,
        bytes=needed,
        gb_per_s=round(needed / times.median / 1e9, 2),
        floor_ms=round(1e3 * needed / bench.ceilings.copy_bytes_per_s, 4),
        of_floor=round(needed / bench.ceilings.copy_bytes_per_s / times.median, 4),
        cache_bytes=cache.total,
        weight_bytes=engine.memory().weights,
        **bench.memory(),
        **more,
    )


def _largest(bench: Bench, weights: ModelWeights) -> None:
    """Record decode at the largest context whose cache can be reserved, found by asking for it."""
    bench.forget_peak()
    context = _largest_context(bench, weights)
    engine = None
    while engine is None:
        with contextlib.suppress(torch.OutOfMemoryError):
            engine = engine_for(bench, weights, heads="50%", context=context)
        if engine is None:
            context = _steps(0.97 * context, bench.sizes.largest_step)
            bench.forget_peak()
    filled = context - room_to_decode(bench.sizes.decode_tokens)
    _one(bench, engine, "50%", filled, "decode", largest=True)


def _largest_context(bench: Bench, weights: ModelWeights) -> int:
    step = bench.sizes.largest_step
    small = engine_for(bench, weights, heads="50%", context=step)
    per_token = small.cache.pool.nbytes / step
    del small
    bench.release()
    if not bench.on_gpu:
        return 2 * step
    free, _ = torch.cuda.mem_get_info()
    return _steps((free - _MARGIN_BYTES) / per_token, step)


def _profile(bench: Bench, weights: ModelWeights, context: int) -> None:
    """Record the kernels of one step by their time, and append the whole table to the profile file."""
    sizes = bench.sizes
    engine = engine_for(bench, weights, heads="50%", context=reserved_for(context, sizes.profiled_tokens))
    fill(engine, context, seed=bench.seed)
    tokens = warm_tokens(engine, sizes.profiled_tokens)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        steps = sum(1 for _ in tokens)
        elapsed = time.perf_counter() - began
    averages = profiler.key_averages()
    key = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    kernels = sorted(
        (event for event in averages if _is_kernel(event, bench.on_gpu)),
        key=lambda event: -getattr(event, key),
    )
    rows = [
        {
            "name": event.key[:80],
            "calls": round(event.count / steps, 2),
            "us": round(getattr(event, key) / steps, 2),
        }
        for event in kernels
    ]
    bench.record(
        "profile",
        weights="random",
        heads="50%",
        kv="int4",
        context=context,
        steps=steps,
        step_us=round(1e6 * elapsed / steps, 1),  # with the profiler's own cost
        kernels_us=round(sum(row["us"] for row in rows), 1),
        rows=rows[:_PROFILED_ROWS],
    )
    if bench.profile_path is not None:
        table = averages.table(sort_by=key, row_limit=60, max_name_column_width=90)
        with Path(bench.profile_path).open("a", encoding="utf-8") as file:
            file.write(f"decode after {context:,} tokens, {steps} steps, random weights\n{table}\n")


def _is_kernel(event: Any, on_gpu: bool) -> bool:
    return not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA


def _steps(tokens: float, step: int) -> int:
    """Round down to whole steps, one at least."""
    return max(step, int(tokens) // step * step)
