"""What sparse prefill costs and saves in the attention of one chunk, by context and by density.

    .venv/bin/python scripts/time_sparse_prefill.py [--contexts 8K,32K,128K] [--model smollm2-135m] [--repeats 5]

One layer of the model's shape, all of its KV heads retrieval heads, over blocks of random numbers: what would be
chosen there says nothing, so the lists are drawn at random with the densities given. Times, in turns: exact attention;
asking queries and choosing; attention over the lists. With the compiled CPU kernels; the last line is JSON.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("OMP_PROC_BIND", "true")  # two threads on one core would take forty times as long

import torch

from duolocal.bench.machine import machine_facts
from duolocal.cache import DuoCache
from duolocal.cache.compiled_backend import CompiledBackend
from duolocal.heads import uniform_plan
from duolocal.kernels.cpu.operations import CpuKernels
from duolocal.kernels.sparse import Chosen, SparsePrefill, blocks_seen
from duolocal.models.loader import open_model
from duolocal.models.registry import resolve
from duolocal.models.synthetic import fill_with_random_tokens
from duolocal.quant.kv import kv_layout
from duolocal.sizes import parse_tokens


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes."""
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--contexts", default="8K,32K,128K")
    parser.add_argument("--densities", default="0.5,0.25,0.1")
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--kv", default="k8v4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = open_model(resolve(options.model)).config
    kernels, policy, count = CpuKernels(options.threads), SparsePrefill(), options.chunk_size
    plan = uniform_plan(num_layers=1, num_kv_heads=config.num_kv_heads, retrieval=True, sink_size=64, recent_size=256)
    rows = []
    for context in map(parse_tokens, options.contexts.split(",")):
        cache = DuoCache(
            plan,
            kv_layout(options.kv, head_dim=config.head_dim, dtype=torch.float32),
            num_heads=config.num_heads,
            context=context,
            device=torch.device("cpu"),
            dtype=torch.float32,
            kernels=kernels,
            prefill=policy,
        )
        fill_with_random_tokens(cache, context - count, seed=0)
        generator = torch.Generator().manual_seed(1)
        q = torch.randn(count, config.num_heads, config.head_dim, generator=generator)
        k, v = torch.randn(2, count, config.num_kv_heads, config.head_dim, generator=generator)
        cache.begin(count)
        cache.append(0, k, v)
        backend = cache.backend
        assert isinstance(backend, CompiledBackend)
        start = context - count
        sizes = {"sink_size": plan.sink_size, "recent_size": cache.exact_recent, "block_size": cache.layout.block_size}
        tiles = policy.tiles(start, context, **sizes)
        num_blocks = blocks_seen(
            tiles.stop * policy.tile - 1, recent_size=cache.exact_recent, block_size=cache.layout.block_size
        )
        shape = (config.num_kv_heads, len(tiles), num_blocks)
        read = partial(backend.attention.prefill, 0, q, k, v)
        works: dict[str, Callable[[], object]] = {
            "exact": read,
            "choosing": partial(backend.choose, 0, q, k, start=start, end=context),
        }
        for density in map(float, options.densities.split(",")):
            blocks = torch.rand(shape, generator=generator) < density
            works[f"reading {density}"] = partial(read, chosen=Chosen(tiles, policy.tile, blocks))
        times: dict[str, list[float]] = {name: [] for name in works}
        for repeat in range(options.repeats + 1):
            for name, work in works.items():
                elapsed_s = timed(work)
                if repeat:
                    times[name].append(elapsed_s)
        cache.rollback()
        exact = statistics.median(times["exact"])
        for name, elapsed in times.items():
            median = statistics.median(elapsed)
            row = {"context": context, "what": name, "ms": round(1e3 * median, 2), "of_exact": round(median / exact, 4)}
            row |= {"min_ms": round(1e3 * min(elapsed), 2), "max_ms": round(1e3 * max(elapsed), 2)}
            rows.append(row)
            print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    facts = machine_facts(threads=options.threads, device="cpu")
    head = {"model": options.model, "kv": options.kv, "chunk_size": count, "tile": policy.tile, "stride": policy.stride}
    print(json.dumps(head | {"rows": rows, "machine": facts}))


if __name__ == "__main__":
    main()
