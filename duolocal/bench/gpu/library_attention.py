"""The library's 16-bit attention by backend, to compare with: scaled_dot_product_attention of torch."""

import contextlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from duolocal.bench.gpu.measure import Bench, Timing

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def best_backend(
    bench: Bench, inputs: Sequence[tuple[Tensor, Tensor, Tensor]], *, causal: bool, graph: bool
) -> tuple[str, Timing, dict[str, float | None]] | None:
    """Time every backend on q, k, v [1, heads, tokens, head_dim]; return the fastest's name and time, and all in µs.

    A backend that refuses these shapes or this device is None among them; None where all do.
    """
    found: dict[str, Timing] = {}
    for name, backend in BACKENDS.items():

        def call(qkv: tuple[Tensor, Tensor, Tensor], backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*qkv, is_causal=causal)

        with contextlib.suppress(RuntimeError):  # "No available kernel"
            if not bool(call(inputs[0]).isfinite().all()):
                raise RuntimeError("not finite")
            found[name] = bench.time([partial(call, qkv) for qkv in inputs], graph=graph)
        bench.synchronize()
    if not found:
        return None
    best = min(found, key=lambda name: found[name].median)
    times = {name: found[name].report()["us"] if name in found else None for name in BACKENDS}
    return best, found[best], times


def folded_query(bench: Bench, heads: int, tokens: int = 1) -> Tensor:
    """Return q [1, heads, group · tokens, head_dim]: the query heads of a KV head as rows."""
    config = bench.sizes.config
    return bench.randn(1, heads, config.num_heads // config.num_kv_heads * tokens, config.head_dim)


def keys_and_values(bench: Bench, heads: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Return random k and v [1, heads, tokens, head_dim]."""
    shape = 1, heads, tokens, bench.sizes.config.head_dim
    return bench.randn(*shape), bench.randn(*shape)


def device_allows(bench: Bench, num_bytes: int) -> bool:
    """Say whether so many bytes are free on the device."""
    return not bench.on_gpu or torch.cuda.mem_get_info()[0] > num_bytes + (1 << 30)
