"""Caches of single layers for benchmarks of attention kernels."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from duolocal.bench.gpu.floors import attention_read_bytes
from duolocal.bench.gpu.measure import Bench
from duolocal.cache import DuoCache
from duolocal.cache.gpu_backend import GpuBackend
from duolocal.heads import HeadPlan
from duolocal.kernels.gpu.layer_cache import LayerCache
from duolocal.kernels.gpu.operations import TritonKernels
from duolocal.models.synthetic import fill_with_random_tokens
from duolocal.quant.kv import kv_layout


def filled_cache(bench: Bench, kv: str, retrieval: int, context: int, *, room: int = 1) -> DuoCache:
    """Return a cache of `context` random tokens with `room` for more: as many equal layers as timing rotates among."""
    sizes, config = bench.sizes, bench.sizes.config
    layout = kv_layout(kv, head_dim=config.head_dim, dtype=bench.dtype)
    flags = tuple(head < retrieval for head in range(config.num_kv_heads))

    def cache(num_layers: int) -> DuoCache:
        return DuoCache(
            HeadPlan((flags,) * num_layers, sizes.sink_size, sizes.recent_size, "benchmark"),
            layout,
            num_heads=config.num_heads,
            context=context + room,
            device=bench.device,
            dtype=bench.dtype,
            kernels=TritonKernels(bench.dtype),
        )

    per_layer = max(1, retrieval * layout.record_bytes * (context // layout.block_size))
    made = cache(bench.copies(per_layer) if room == 1 else 1)
    fill_with_random_tokens(made, context, seed=bench.seed)
    return made


def layers_of(cache: DuoCache) -> list[LayerCache]:
    """Return what the kernels see of each layer."""
    assert isinstance(cache.backend, GpuBackend)
    return cache.backend.layers


def read_bytes(cache: DuoCache, seen: int) -> int:
    """Return the bytes of one layer that a decode step must read when a token sees `seen` tokens."""
    plan, layout = cache.plan, cache.layout
    retrieval = sum(plan.retrieval[0])
    return attention_read_bytes(
        seen,
        num_retrieval=retrieval,
        num_streaming=plan.num_kv_heads - retrieval,
        head_dim=layout.head_dim,
        itemsize=cache.dtype.itemsize,
        record_bytes=layout.record_bytes,
        block_size=layout.block_size,
        sink_size=plan.sink_size,
        recent_size=plan.recent_size,
        exact_recent=cache.exact_recent,
    )


@contextlib.contextmanager
def appending(cache: DuoCache, q_len: int) -> Iterator[None]:
    """Open a transaction of `q_len` tokens, a decode step for one, and forget it."""
    cache.begin(q_len, decode=q_len == 1)
    try:
        yield
    finally:
        cache.rollback()


def new_tokens(bench: Bench, q_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [q_len, num_heads, head_dim], k and v [q_len, num_kv_heads, head_dim]."""
    config = bench.sizes.config
    q = bench.randn(q_len, config.num_heads, config.head_dim)
    k, v = (bench.randn(q_len, config.num_kv_heads, config.head_dim) for _ in range(2))
    return q, k, v


def angles(bench: Bench, position: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin [1, head_dim / 2] of RoPE at a position, float32."""
    config = bench.sizes.config
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=bench.device)
    turned = position * config.rope_theta ** -(pairs / config.head_dim)
    return turned.cos().float()[None], turned.sin().float()[None]
