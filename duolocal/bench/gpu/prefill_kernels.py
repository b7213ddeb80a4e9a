"""Section: attention of one prefill chunk, the band and the two routes over the blocks, beside the library's."""

from functools import partial

from duolocal.bench.gpu.layers import appending, filled_cache, layers_of, new_tokens
from duolocal.bench.gpu.library_attention import best_backend, device_allows, folded_query, keys_and_values
from duolocal.bench.gpu.measure import Bench
from duolocal.kernels.gpu.prefill import Route, band_attention, blocks_attention, prefill_attention

# The two routes differ in how they round weights and decoded keys to 16 bits.
TOLERANCE = 2e-2
ROUTES: tuple[Route, ...] = ("library", "fused")
_GUESS_S = 4.0


def run(bench: Bench) -> None:
    """Measure each chunk size after `chunk_start` random tokens, half of the KV heads being retrieval heads."""
    for chunk in bench.sizes.chunk_sizes:
        if bench.fits(_GUESS_S, "prefill chunk", chunk=chunk):
            with bench.item("prefill chunk", chunk=chunk):
                ours(bench, chunk)
        if bench.fits(_GUESS_S, "sdpa prefill", chunk=chunk):
            with bench.item("sdpa prefill", chunk=chunk):
                library(bench, chunk)


def ours(bench: Bench, chunk: int) -> None:
    """Record band, both routes and the whole for one chunk."""
    sizes, config = bench.sizes, bench.sizes.config
    start, retrieval = sizes.chunk_start, config.num_kv_heads // 2
    cache = filled_cache(bench, "int4", retrieval, start, room=chunk)
    group = config.num_heads // config.num_kv_heads
    q, k, v = new_tokens(bench, chunk)
    fields = {"start": start, "chunk": chunk, "kv": "int4", "retrieval": retrieval, "heads": config.num_kv_heads}
    repeats = max(1, sizes.repeats // 4)
    with appending(cache, chunk):
        # The blocks that the chunk itself fills are new and unwritten.
        table, records = cache.pool.table, cache.pool.records
        records[table[:, start // cache.layout.block_size : cache.pool.num_blocks]] = records[table[0, 0]].clone()
        layer = layers_of(cache)[0]
        exact = sizes.sink_size + cache.exact_recent
        window = 4 * config.num_heads * config.head_dim * chunk * exact
        bench.check(lambda: band_attention(layer, q, k, v, start)[0])
        timing = bench.time([partial(band_attention, layer, q, k, v, start)], graph=False, repeats=repeats)
        bench.record("band", **fields, **timing.report(), **bench.of_matmul(window, timing.median))

        pairs = chunk * (start - exact) + chunk * (chunk + 1) / 2
        flop = 4 * retrieval * group * config.head_dim * pairs
        results = {}
        for route in ROUTES:
            if not bench.fits(_GUESS_S / 2, "blocks", **fields, route=route):
                continue
            with bench.item("blocks", **fields, route=route):
                found = blocks_attention(layer, q, start, route=route)
                assert found is not None
                results[route] = found[0]
                error = None
                if route == "fused" and "library" in results:
                    error = bench.check(lambda: results["fused"], results["library"], tolerance=TOLERANCE)
                timing = bench.time([partial(blocks_attention, layer, q, start, route=route)], graph=False, repeats=3)
                bench.record(
                    "blocks",
                    **fields,
                    route=route,
                    **timing.report(),
                    **bench.of_matmul(flop, timing.median),
                    relative_error=error,
                )
        results.clear()
        timing = bench.time([partial(prefill_attention, layer, q, k, v, start)], graph=False, repeats=3)
        bench.record("chunk", **fields, **timing.report(), **bench.of_matmul(flop + window, timing.median))


def library(bench: Bench, chunk: int) -> None:
    """Record the library's attention of a chunk to itself, causal, and to all that came before it, in 16 bits."""
    config, start = bench.sizes.config, bench.sizes.chunk_start
    retrieval, group = config.num_kv_heads // 2, config.num_heads // config.num_kv_heads
    fields = {"start": start, "chunk": chunk, "retrieval": retrieval}
    heads = retrieval * group
    for what, keys, causal in (("sdpa causal", chunk, True), ("sdpa before", start, False)):
        if not device_allows(bench, 8 * heads * max(chunk, keys) * config.head_dim * bench.dtype.itemsize):
            bench.record(what, **fields, skipped="does not fit on this device")
            continue
        if causal:
            q = bench.randn(1, heads, chunk, config.head_dim)
            k, v = keys_and_values(bench, heads, keys)
            flop = 4 * heads * config.head_dim * chunk * (chunk + 1) / 2
        else:
            # The query group folded: a library then reads the keys of a KV head once for all of it.
            q = folded_query(bench, retrieval, chunk)
            k, v = keys_and_values(bench, retrieval, keys)
            flop = 4 * heads * config.head_dim * chunk * keys
        found = best_backend(bench, [(q, k, v)], causal=causal, graph=False)
        if found is None:
            bench.record(what, **fields, skipped="no backend takes these shapes here")
            continue
        backend, timing, times = found
        bench.record(
            what,
            **fields,
            backend=backend,
            **timing.report(),
            **bench.of_matmul(flop, timing.median),
            backends_us=times,
        )
