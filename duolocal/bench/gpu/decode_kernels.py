"""Section: decode attention of one layer by context and KV format, beside the library's 16-bit attention."""

from functools import partial

import torch
from torch import Tensor

from duolocal.bench.gpu.layers import angles, appending, filled_cache, layers_of, new_tokens, read_bytes
from duolocal.bench.gpu.library_attention import best_backend, device_allows, folded_query, keys_and_values
from duolocal.bench.gpu.measure import Bench
from duolocal.cache import DuoCache
from duolocal.kernels.attention import block_attention, merge, window_attention
from duolocal.kernels.gpu.append import append_token
from duolocal.kernels.gpu.decode import decode_attention
from duolocal.kernels.pointwise import rotary_embedding

# Codes are exact; query, weights and result are rounded to 16 bits, scores of outliers are some tens.
TOLERANCE = 2e-2
_GUESS_S = 3.0  # for one configuration, compilation included


def run(bench: Bench) -> None:
    """Measure all heads retrieval first: there a 16-bit kernel reads the same tokens."""
    for retrieval in sorted(bench.sizes.kernel_retrieval, reverse=True):
        for context in bench.sizes.kernel_contexts:
            if bench.fits(_GUESS_S, "sdpa decode", context=context, retrieval=retrieval):
                with bench.item("sdpa decode", context=context, retrieval=retrieval):
                    library(bench, retrieval, context)
            for kv in bench.sizes.kernel_formats:
                fields = {"kv": kv, "context": context, "retrieval": retrieval}
                if bench.fits(_GUESS_S, "decode_attention", **fields):
                    with bench.item("decode_attention", **fields):
                        ours(bench, kv, retrieval, context)


def ours(bench: Bench, kv: str, retrieval: int, context: int) -> None:
    """Record our kernel on one layer."""
    cache = filled_cache(bench, kv, retrieval, context)
    q, k, v = new_tokens(bench, 1)
    cos, sin = angles(bench, context)
    with appending(cache, 1):
        layers = layers_of(cache)
        queries = [append_token(layer, q, k, v, cos, sin) for layer in layers]
        wanted = None
        if context <= bench.sizes.checked_context:
            wanted = reference(cache, rotary_embedding(q.float(), cos, sin))
        error = bench.check(lambda: decode_attention(layers[0], *queries[0]), wanted, tolerance=TOLERANCE)
        calls = [partial(decode_attention, layer, *pair) for layer, pair in zip(layers, queries, strict=True)]
        timing = bench.time(calls)
    num_bytes = read_bytes(cache, context + 1)
    bench.record(
        "decode_attention",
        kv=kv,
        context=context,
        retrieval=retrieval,
        heads=bench.sizes.config.num_kv_heads,
        bytes=num_bytes,
        **timing.report(),
        **bench.of_copy(num_bytes, timing.median),
        relative_error=error,
    )


def reference(cache: DuoCache, q: Tensor) -> Tensor:
    """Return what the first layer's attention should be, in float32 torch, for a rotated q [1, num_heads, head_dim]."""
    plan, seen = cache.plan, cache.num_tokens + 1
    positions = torch.tensor([seen - 1], device=q.device)
    scale = cache.layout.head_dim**-0.5
    grouped = q.view(1, plan.num_kv_heads, cache.query_group, -1).permute(1, 2, 0, 3)
    flags = plan.retrieval[0]
    heads = torch.tensor([head for head, retrieval in enumerate(flags) if retrieval], device=q.device)
    widths = [cache.exact_recent if retrieval else plan.recent_size for retrieval in flags]
    keys, values = cache.ring.data[:, 0].float()
    out, lse = window_attention(
        grouped,
        keys,
        values,
        q_positions=positions,
        k_positions=cache.ring.positions(seen),
        sink_size=plan.sink_size,
        recent_sizes=torch.tensor(widths, device=q.device),
        scale=scale,
    )
    if heads.shape[0]:
        block_out, block_lse = block_attention(
            grouped[heads],
            cache.pool.take,
            cache.pool.table[: heads.shape[0], : cache.pool.num_blocks],
            cache.layout,
            q_positions=positions,
            sink_size=plan.sink_size,
            recent_size=cache.exact_recent,
            scale=scale,
        )
        out[heads] = merge(out[heads], lse[heads], block_out, block_lse)
    return out.permute(2, 0, 1, 3).reshape(q.shape)


def library(bench: Bench, heads: int, context: int) -> None:
    """Record the library's best backend on 16-bit keys and values of `heads` heads, the query group as rows."""
    config = bench.sizes.config
    num_bytes = 2 * heads * context * config.head_dim * bench.dtype.itemsize
    copies = bench.copies(num_bytes)
    fields = {"context": context, "retrieval": heads}
    if not device_allows(bench, copies * num_bytes):
        bench.record("sdpa decode", **fields, skipped="the 16-bit keys and values do not fit on this device")
        return
    inputs = [(folded_query(bench, heads), *keys_and_values(bench, heads, context)) for _ in range(copies)]
    found = best_backend(bench, inputs, causal=False, graph=True)
    if found is None:
        bench.record("sdpa decode", **fields, skipped="no backend takes these shapes here")
        return
    backend, timing, times = found
    bench.record(
        "sdpa decode",
        **fields,
        backend=backend,
        bytes=num_bytes,
        **timing.report(),
        **bench.of_copy(num_bytes, timing.median),
        backends_us=times,
    )
