"""The bytes that a KV cache really takes."""

import gc
import platform

import psutil
import torch

import duolocal
from duolocal.engine.engine import Engine
from duolocal.settings import LoadSettings


def memory_report(settings: LoadSettings) -> dict[str, object]:
    """Allocate a model's whole cache and count the bytes, by head class, next to a dense 16-bit cache.

    Bytes are those of the tensors' storages. On a CPU every byte is also written, and what the process grew by is
    reported as `resident_growth_bytes`, so that the figures cannot be promises; not where blocks lie in a file or have
    digests.
    """
    engine = Engine.load(settings.model, settings)
    memory, plan, layout = engine.memory(), engine.plan, engine.cache.layout
    cache = memory.cache
    return {
        "benchmark": "memory",
        "model": settings.model,
        "context": engine.context,
        "device": str(engine.transformer.device),
        "kv": engine.kv,
        **plan.report(),
        "bytes_per_token_and_retrieval_head": layout.bytes_per_token,
        "retrieval_blocks_bytes": cache.retrieval_blocks,
        "retrieval_windows_bytes": cache.retrieval_windows,
        "streaming_windows_bytes": cache.streaming_windows,
        "digests_bytes": cache.digests,
        "kv_bytes": cache.total,
        "kv_beyond_device_bytes": cache.outer_blocks,
        "resident_growth_bytes": _resident_growth(engine),
        "dense_16bit_bytes": memory.dense_16bit,
        "kv_share_of_dense": cache.total / memory.dense_16bit,
        "weights_bytes": memory.weights,
        "versions": {
            "duolocal": duolocal.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _resident_growth(engine: Engine) -> int | None:
    """Return by how much this process grows when a cache like the engine's is made and filled; None for other kinds."""
    old = engine.cache
    if old.device.type != "cpu" or old.pool.tiered or old.selection is not None:
        return None
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    cache = Engine.build(engine.transformer, old.plan, kv=engine.kv, chunk_size=engine.chunk_size).cache
    cache.pool.records.fill_(1)
    cache.ring.data.fill_(1)
    return process.memory_info().rss - before
