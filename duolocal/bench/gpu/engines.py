"""Engines for the sections that run the whole random model."""

import time
from collections.abc import Iterator, Sequence

import torch

from duolocal.bench.gpu.measure import Bench
from duolocal.cache import ON_DEVICE, Placement
from duolocal.cache.selection import SelectionPolicy
from duolocal.engine.engine import Engine
from duolocal.heads import HeadPlan
from duolocal.kernels.gpu.operations import TritonKernels
from duolocal.models.assemble import assemble
from duolocal.models.synthetic import DENSE, RandomTensors, fill_with_random_tokens
from duolocal.models.transformer import Transformer
from duolocal.models.weights import ModelWeights
from duolocal.quant.kv import DEFAULT_BLOCK_SIZE
from duolocal.settings import Sampling

WARM_TOKENS = 4  # the first token's step, the first of its kind, the capture, one replay


def engine_for(
    bench: Bench,
    weights: ModelWeights,
    *,
    heads: str,
    context: int,
    kv: str = "int4",
    chunk_size: int = 4096,
    placement: Placement = ON_DEVICE,
    select: SelectionPolicy | None = None,
) -> Engine:
    """Return an engine with room for `context` tokens; heads: as of `plan_of`."""
    transformer = Transformer(
        bench.sizes.config,
        weights,
        context=context,
        device=bench.device,
        dtype=bench.dtype,
        kernels=TritonKernels(bench.dtype),
    )
    plan = plan_of(bench, heads)
    return Engine.build(transformer, plan, kv=kv, chunk_size=chunk_size, placement=placement, select=select)


def plan_of(bench: Bench, heads: str) -> HeadPlan:
    """Return the plan in which every other KV head of every layer is a retrieval head ("50%"), or every one ("all")."""
    sizes, config = bench.sizes, bench.sizes.config
    flags = tuple(heads == "all" or head % 2 == 0 for head in range(config.num_kv_heads))
    source = "all heads retrieval" if heads == "all" else "every other head"
    return HeadPlan((flags,) * config.num_layers, sizes.sink_size, sizes.recent_size, source)


def bench_weights(bench: Bench) -> ModelWeights:
    """Return the suite's model: random 4-bit matrices; embedding, lm_head and norms in the compute dtype."""
    outer = next(name for name, dtype in DENSE.items() if dtype == bench.dtype)
    tensors = RandomTensors("INT4", outer, group_size=bench.sizes.group_size, device=bench.device, seed=bench.seed)
    weights = assemble(bench.sizes.config, tensors, device=bench.device, dtype=bench.dtype)
    bench.synchronize()
    return weights


def fill(engine: Engine, num_tokens: int, *, seed: int) -> None:
    """Replace what is in the engine's context by `num_tokens` tokens of random keys and values."""
    engine.reset()
    fill_with_random_tokens(engine.cache, num_tokens, seed=seed)
    engine.token_ids.extend([0] * num_tokens)


def warm_tokens(engine: Engine, num_tokens: int, *, warm: int | None = None) -> Iterator[int]:
    """Return an iterator over `num_tokens` greedy tokens of a decode loop that is warm: what follows is replayed.

    warm: the tokens before them, None for WARM_TOKENS.
    """
    warm = WARM_TOKENS if warm is None else warm
    sampling = Sampling(temperature=0, repetition_penalty=1.0, max_tokens=num_tokens + warm)
    tokens = engine.generate([1], sampling, eos_ids=frozenset())
    for _ in range(warm):
        next(tokens)
    return tokens


def tokens_s(engine: Engine, num_tokens: int) -> list[float]:
    """Return the seconds of each of `num_tokens` greedy tokens after those that warm up; the context grows.

    The clock is the host's and sees all that a user waits for: launching, sampling and reading the id.
    """
    tokens = warm_tokens(engine, num_tokens)
    times = []
    for _ in range(num_tokens):
        began = time.perf_counter()
        next(tokens)
        times.append(time.perf_counter() - began)
    return times


def room_to_decode(num_tokens: int) -> int:
    """Return how many tokens decoding `num_tokens` warm ones appends at most."""
    return num_tokens + WARM_TOKENS + 1


def reserved_for(context: int, num_tokens: int) -> int:
    """Return the tokens to reserve for `num_tokens` decoded ones after `context`, in whole blocks."""
    return -(-(context + room_to_decode(num_tokens)) // DEFAULT_BLOCK_SIZE) * DEFAULT_BLOCK_SIZE


def random_ids(bench: Bench, count: int) -> Sequence[int]:
    """Return random token ids."""
    generator = torch.Generator().manual_seed(bench.seed)
    ids: list[int] = torch.randint(bench.sizes.config.vocab_size, (count,), generator=generator).tolist()
    return ids
