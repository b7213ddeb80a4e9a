"""Section: other values for the tuning constants of the kernels, one after the other; the best found so far is kept.

A finding is a proposal: it is printed, and nothing is changed by it.
"""

from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from duolocal.bench.gpu.layers import angles, appending, filled_cache, layers_of, new_tokens, read_bytes
from duolocal.bench.gpu.measure import Bench, Call, changed
from duolocal.kernels.gpu import append, decode, linear
from duolocal.kernels.gpu.operations import TritonKernels
from duolocal.quant.weight import Linear

# Named constants of the modules that hold the kernels, with the values to try beside the present one.
DECODE_VALUES: dict[str, tuple[Any, ...]] = {
    "PROGRAMS_PER_SM": (1, 2, 4, 6),
    "TILES": (1,),
    "TILE_TOKENS": (32,),
    "STAGES": (2, 4),
}
LINEAR_VALUES: dict[str, tuple[Any, ...]] = {
    "_WARPS_WANTED": (512, 2048, 4096),
    "_VECTOR_REGISTERS": (128, 168, 255),
}
_BETTER = 0.99  # of the best time so far: less is noise
_GUESS_S = 6.0  # compiling one variant, and measuring it


def run(bench: Bench) -> None:
    """Sweep decode attention, then the product with one row."""
    with bench.item("sweep", kernel="decode_attention"):
        _decode(bench)
    for name, gated in (("gate_up", True), ("down", False)):
        with bench.item("sweep", kernel=name):
            _product(bench, name, gated=gated)


def _decode(bench: Bench) -> None:
    sizes = bench.sizes
    context, heads = sizes.sweep_context, sizes.config.num_kv_heads
    cache = filled_cache(bench, "int4", heads, context)
    q, k, v = new_tokens(bench, 1)
    with appending(cache, 1):
        layers = layers_of(cache)
        pairs = [append.append_token(layer, q, k, v, *angles(bench, context)) for layer in layers]
        calls: list[Call] = [
            partial(decode.decode_attention, layer, *pair) for layer, pair in zip(layers, pairs, strict=True)
        ]
        _sweep(bench, "decode_attention", decode, DECODE_VALUES, calls, read_bytes(cache, context + 1))


def _product(bench: Bench, name: str, *, gated: bool) -> None:
    config = bench.sizes.config
    hidden, ffn = config.hidden_size, config.intermediate_size
    outs, ins = ((ffn, ffn), hidden) if gated else ((hidden,), ffn)

    def weights() -> list[Linear]:
        return [Linear(bench.int4(out, ins)) for out in outs]

    first = weights()
    num_bytes = sum(layer.weight.nbytes for layer in first)
    layers = [first] + [weights() for _ in range(bench.copies(num_bytes) - 1)]
    x = bench.randn(1, ins)
    kernels = TritonKernels(bench.dtype)
    calls: list[Call] = [
        partial(kernels.gated_linear, x, *some) if gated else partial(kernels.linear, x, some) for some in layers
    ]
    _sweep(bench, name, linear, LINEAR_VALUES, calls, num_bytes)


def _sweep(
    bench: Bench,
    kernel: str,
    module: ModuleType,
    candidates: dict[str, tuple[Any, ...]],
    calls: list[Call],
    num_bytes: int,
) -> None:
    """Try each value of each constant beside the best of those before it; record all, and the best last."""
    present = {name: getattr(module, name) for name in candidates}
    best = dict(present)
    reference = _result(calls[0])
    first_s = best_s = bench.time(calls).median
    bench.record("sweep", kernel=kernel, values=present, us=round(1e6 * first_s, 3), **bench.of_copy(num_bytes, best_s))
    for name, values in candidates.items():
        tried = dict(best)
        for value in values:
            tried[name] = value
            if not bench.fits(_GUESS_S, "sweep", kernel=kernel, values=dict(tried)):
                return
            with bench.item("sweep", kernel=kernel, values=dict(tried)), changed(module, tried):
                # Other tiles sum in another order; what is stored has 16 bits.
                bench.check(partial(_result, calls[0]), reference, tolerance=1e-2)
                elapsed = bench.time(calls).median
                bench.record(
                    "sweep",
                    kernel=kernel,
                    values=dict(tried),
                    us=round(1e6 * elapsed, 3),
                    **bench.of_copy(num_bytes, elapsed),
                )
                if elapsed < _BETTER * best_s:
                    best, best_s = dict(tried), elapsed
    bench.record(
        "sweep best",
        kernel=kernel,
        values={name: value for name, value in best.items() if value != present[name]},
        us=round(1e6 * best_s, 3),
        before_us=round(1e6 * first_s, 3),
        **bench.of_copy(num_bytes, best_s),
    )


def _result(call: Call) -> Tensor:
    result = call()
    return result[0] if isinstance(result, tuple) else result
