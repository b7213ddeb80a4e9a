"""Section: the small kernels of a layer: append of one token, norm, activation, and storing a chunk."""

from functools import partial

from duolocal.bench.gpu.layers import angles, appending, filled_cache, layers_of, new_tokens
from duolocal.bench.gpu.measure import Bench, Call
from duolocal.kernels.gpu.append import append_token
from duolocal.kernels.gpu.operations import TritonKernels
from duolocal.kernels.gpu.pointwise import rms_norm, rotate, silu_mul
from duolocal.kernels.gpu.store import close_blocks, write_ring
from duolocal.kernels.pointwise import rms_norm as reference_norm
from duolocal.kernels.pointwise import silu_mul as reference_silu

TOLERANCE = 1e-2  # one rounding to bfloat16 is at most 4e-3
_EPS = 1e-5


def run(bench: Bench) -> None:
    """Measure each; bytes are those read and written."""
    for rows in bench.sizes.pointwise_rows:
        with bench.item("pointwise", rows=rows):
            _norm_and_activation(bench, rows)
    with bench.item("append_token"):
        _append(bench)
    with bench.item("store"):
        _store(bench)


def _norm_and_activation(bench: Bench, rows: int) -> None:
    config, itemsize = bench.sizes.config, bench.dtype.itemsize
    hidden, ffn = config.hidden_size, config.intermediate_size
    inputs = [bench.randn(rows, hidden) for _ in range(bench.copies(2 * rows * hidden * itemsize))]
    weight = bench.randn(hidden).abs_()
    bench.check(
        lambda: TritonKernels(bench.dtype).rms_norm(inputs[0], weight, eps=_EPS),
        reference_norm(inputs[0].float(), weight.float(), eps=_EPS),
        tolerance=TOLERANCE,
    )
    timing = bench.time([partial(rms_norm, x, weight, eps=_EPS) for x in inputs])
    num_bytes = 2 * rows * hidden * itemsize
    bench.record("rms_norm", rows=rows, size=hidden, **timing.report(), **bench.of_copy(num_bytes, timing.median))

    num_bytes = 3 * rows * ffn * itemsize
    pairs = [(bench.randn(rows, ffn), bench.randn(rows, ffn)) for _ in range(bench.copies(num_bytes))]
    gate, up = pairs[0]
    bench.check(lambda: silu_mul(gate, up), reference_silu(gate.float(), up.float()), tolerance=TOLERANCE)
    timing = bench.time([partial(silu_mul, *pair) for pair in pairs])
    bench.record("silu_mul", rows=rows, size=ffn, **timing.report(), **bench.of_copy(num_bytes, timing.median))


def _append(bench: Bench) -> None:
    """Record RoPE and storing of one token in one layer, which is launch time rather than bytes."""
    context = bench.sizes.sweep_context
    cache = filled_cache(bench, "int4", bench.sizes.config.num_kv_heads // 2, context)
    q, k, v = new_tokens(bench, 1)
    cos, sin = angles(bench, context)
    with appending(cache, 1):
        timing = bench.time([partial(append_token, layer, q, k, v, cos, sin) for layer in layers_of(cache)])
    bench.record("append_token", context=context, **timing.report())


def _store(bench: Bench) -> None:
    """Record what a prefill chunk pays to be rotated and stored, per layer."""
    chunk, start = bench.sizes.chunk_sizes[0], bench.sizes.chunk_start
    cache = filled_cache(bench, "int4", bench.sizes.config.num_kv_heads // 2, start, room=chunk)
    q, k, v = new_tokens(bench, chunk)
    cos, sin = (part.expand(chunk, -1).contiguous() for part in angles(bench, start))
    with appending(cache, chunk):
        layer = layers_of(cache)[0]
        calls: dict[str, Call] = {
            "rotate": partial(rotate, q, k, cos, sin),
            "close_blocks": partial(close_blocks, layer, k, v, start),
            "write_ring": partial(write_ring, layer, k, v, start),
        }
        for name, call in calls.items():
            bench.record(name, chunk=chunk, start=start, **bench.time([call], graph=False).report())
