"""On the compiled path, too, nothing but the tokens decides what is computed: not cuts, blocks, threads or undo.

The cache is given the same keys and values whatever the cut, so every block gets the same codes and all formats are
held to float32 rounding. Through a whole model the keys themselves differ by a rounding, which may flip a code.
"""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from duolocal.cache import DuoCache
from duolocal.cache.compiled_backend import CompiledBackend
from duolocal.engine.engine import Engine
from duolocal.heads import HeadPlan
from duolocal.kernels.cpu.operations import Recording
from duolocal.kernels.interface import Kernels
from duolocal.models.config import ModelConfig
from duolocal.models.transformer import Transformer
from duolocal.models.weights import ModelWeights
from duolocal.quant.kv import KV_FORMATS
from duolocal.settings import Sampling
from tests.compiled import THREADS, compiled, compiled_kernels, poisoned
from tests.test_cpu_attention import MIXED, feed, layout_of, make_cache, tokens
from tests.test_transformer import widened
from tests.tiny import Architecture, random_model, save_checkpoint, tiny_config

pytestmark = compiled_kernels

HEAD_DIM = 16
PLAN = HeadPlan(MIXED, sink_size=3, recent_size=40, source="test")
formats = st.sampled_from(KV_FORMATS)
threads = st.sampled_from(THREADS)


def cache_of(kv: str = "int4", *, context: int, block_size: int = 64, num_threads: int = 1) -> DuoCache:
    layout = layout_of(kv, head_dim=HEAD_DIM, block_size=block_size)
    return make_cache(PLAN, layout, context=context, num_threads=num_threads)


def close(got: Tensor, wanted: Tensor) -> None:
    # Two float32 results, values of size 1 to 4: each is good to about 1e-6 of that (tests/test_cpu_attention.py).
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@given(
    cuts=st.lists(st.one_of(st.integers(1, 200), st.just(1)), min_size=1, max_size=12),
    kv=formats,
    block_size=st.sampled_from([16, 32, 64, 128]),
    num_threads=threads,
)
def test_neither_cut_nor_block_size_nor_threads_matter(
    cuts: list[int], kv: str, block_size: int, num_threads: int
) -> None:
    total = sum(cuts)
    context = total + 64
    q, k, v = tokens(PLAN, total, head_dim=HEAD_DIM)
    with poisoned():
        whole = cache_of(kv, context=context)
        expected = feed(whole, q, k, v, [total])
        cache = cache_of(kv, context=context, block_size=block_size, num_threads=num_threads)
        close(feed(cache, q, k, v, cuts), expected)
    if block_size == whole.layout.block_size:
        for which in ("key", "value"):
            for span in whole.layout.spans(which):
                mine, theirs = (c.pool.records[c.pool.table[:, : c.pool.num_blocks], span] for c in (cache, whole))
                assert torch.equal(mine, theirs)


def chunks(most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.one_of(st.integers(1, most), st.just(1)), min_size=1, max_size=4)


@given(before=st.integers(0, 250), lost=chunks(160), again=chunks(160), kv=formats, num_threads=threads)
def test_undo_leaves_no_trace(before: int, lost: list[int], again: list[int], kv: str, num_threads: int) -> None:
    """Snapshot, go on with other tokens, restore: what follows equals a context that never took the detour; and the
    detour, taken again from another snapshot, equals itself."""
    q, k, v = tokens(PLAN, before + sum(again), head_dim=HEAD_DIM, seed=10)
    detour = tokens(PLAN, before + sum(lost), head_dim=HEAD_DIM, seed=20)
    for mine, theirs in zip((q, k, v), detour, strict=True):
        theirs[:, :before] = mine[:, :before]
    context = before + max(sum(lost), sum(again))
    start = [before] if before else []
    with poisoned():
        cache = cache_of(kv, context=context, num_threads=num_threads)
        feed(cache, q, k, v, start) if before else None
        snapshot = cache.snapshot()
        first = feed(cache, *detour, lost)
        cache.restore(snapshot)
        cache.pool.poison(0xFF)
        expected = feed(cache_of(kv, context=context), q, k, v, [*start, *again])[:, before:]
        close(feed(cache, q, k, v, again), expected)
        cache.restore(snapshot)
        assert torch.equal(feed(cache, *detour, lost), first)


@given(
    before=st.integers(0, 300),
    lost=st.one_of(st.just(1), st.integers(1, 400)),
    layers_done=st.integers(0, 2),
    attended=st.booleans(),
    after=st.one_of(st.just(1), st.integers(1, 200)),
    kv=formats,
    num_threads=threads,
)
def test_a_cancelled_chunk_leaves_no_trace(
    before: int, lost: int, layers_done: int, attended: bool, after: int, kv: str, num_threads: int
) -> None:
    q, k, v = tokens(PLAN, before + after, head_dim=HEAD_DIM, seed=3)
    other = tokens(PLAN, lost, head_dim=HEAD_DIM, seed=4)
    context = before + max(lost, after)
    start = [before] if before else []
    with poisoned():
        cache = cache_of(kv, context=context, num_threads=num_threads)
        feed(cache, q, k, v, start) if before else None
        ring, blocks = cache.ring.data.clone(), cache.pool.num_blocks
        cache.begin(lost)
        for layer in range(layers_done):
            cache.append(layer, other[1][layer], other[2][layer])
            if attended or layer < layers_done - 1:  # else cancelled between append and attend
                cache.attend(layer, other[0][layer], torch.arange(before, before + lost))
        cache.rollback()
        assert (cache.num_tokens, cache.pool.num_blocks) == (before, blocks)
        assert torch.equal(cache.ring.data.view(torch.int32), ring.view(torch.int32))  # NaN included
        cache.pool.poison(0xFF)
        expected = feed(cache_of(kv, context=context), q, k, v, [*start, after])
        close(feed(cache, q, k, v, [after]), expected[:, before:])


# ---- whole models ----

CONTEXT = 400
MODEL_PLAN = HeadPlan(((True, False), (False, True)), sink_size=4, recent_size=24, source="test")


def model_of(
    config: ModelConfig, weights: ModelWeights, *, kernels: Kernels | None, dtype: torch.dtype = torch.float32
) -> Transformer:
    return Transformer(config, weights, context=CONTEXT, device=torch.device("cpu"), dtype=dtype, kernels=kernels)


def cache_for(model: Transformer, kv: str) -> DuoCache:
    return Engine.build(model, MODEL_PLAN, kv=kv, chunk_size=64).cache


def recording(cache: DuoCache) -> Recording | None:
    """Return the decode step as it was recorded; None before the first."""
    assert isinstance(cache.backend, CompiledBackend)
    return cache.backend.recorder.recordings.get(1)


def token_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(seed))


def run(
    model: Transformer,
    cache: DuoCache,
    ids: Tensor,
    *,
    keep: bool = True,
    before_layer: Callable[[int], None] | None = None,
) -> Tensor:
    """Append ids as one chunk, or take them back at the end; return hidden states [n, hidden_size]."""
    positions = torch.arange(cache.num_tokens, cache.num_tokens + ids.shape[0])
    cache.begin(ids.shape[0])
    try:
        hidden = model.hidden(ids, positions, cache, before_layer=before_layer)
    except BaseException:
        cache.rollback()
        raise
    cache.commit() if keep else cache.rollback()
    return hidden


def one_by_one(model: Transformer, cache: DuoCache, ids: Tensor) -> Tensor:
    return torch.cat([run(model, cache, ids[i : i + 1]) for i in range(ids.shape[0])])


def near(got: Tensor, wanted: Tensor) -> None:
    # Two layers in float32, hidden states of size 1 to 5; measured 3e-6.
    torch.testing.assert_close(got.double(), wanted.double(), rtol=0, atol=2e-5)


# Plain, with biases, with q_norm and k_norm. More threads than cores wait for each other: fewer tokens.
@pytest.mark.parametrize(
    ("architecture", "num_threads", "count"),
    [("llama", 1, 300), ("llama", 2, 300), ("llama", 3, 140), ("qwen2", 2, 300), ("qwen3", 2, 300)],
)
def test_token_by_token_is_one_chunk_is_float64(architecture: Architecture, num_threads: int, count: int) -> None:
    config, weights = random_model(tiny_config(architecture, max_positions=4096))
    ids = token_ids(count)
    judge = model_of(config, widened(weights), kernels=None, dtype=torch.float64)
    wanted = run(judge, cache_for(judge, "32"), ids)
    with poisoned():
        model = model_of(config, weights, kernels=compiled(num_threads))
        near(run(model, cache_for(model, "32"), ids), wanted)
        cache = cache_for(model, "32")
        near(run(model, cache, ids[:1]), wanted[:1])
        recorded = recording(cache)
        assert recorded is not None
        near(one_by_one(model, cache, ids[1:]), wanted[1:])
        assert recording(cache) is recorded  # and run again for every token
        near(model.logits(wanted.float()), judge.logits(wanted))


# A code that flips moves one number of one key or value by a step: int8 about 4 / 255, int4 about 4 / 15. A layer's
# output moves by that times an attention weight (behind the window rarely above 0.1) and an output weight (0.125), and
# the next layer may double it. Rounding flips about one in 10,000 codes of int8, so most hidden states do not move.
FLIP = {"int8": 5e-4, "int4": 1e-2}


@pytest.mark.parametrize("kv", FLIP)
def test_quantized_blocks_token_by_token_and_in_chunks(kv: str) -> None:
    config, weights = random_model(tiny_config(max_positions=4096))
    ids = token_ids(300)
    model, plain = model_of(config, weights, kernels=compiled(2)), model_of(config, weights, kernels=None)
    wanted = run(plain, cache_for(plain, kv), ids)
    whole = run(model, cache_for(model, kv), ids)
    cache = cache_for(model, kv)
    mixed = torch.cat(
        [run(model, cache, ids[:130]), one_by_one(model, cache, ids[130:230]), run(model, cache, ids[230:])]
    )
    for got in (whole, mixed, one_by_one(model, cache_for(model, kv), ids)):
        error = (got - wanted).abs().amax(-1)  # [300]
        assert error.max() < FLIP[kv]
        assert error.median() < 2e-5
    exact = run(plain, cache_for(plain, "32"), ids)
    assert (wanted - exact).abs().amax(-1).max() > 4 * FLIP[kv]  # reading other values than these would show


@pytest.mark.parametrize("turn", [1, 3])
def test_two_caches_take_turns(turn: int) -> None:
    """The decode step belongs to one cache; another one's is recorded anew."""
    config, weights = random_model(tiny_config("qwen2", max_positions=4096))
    model = model_of(config, weights, kernels=compiled(2))
    texts = [token_ids(160, seed=1), token_ids(160, seed=2)]
    wanted = [run(model, cache_for(model, "32"), ids) for ids in texts]
    caches = [cache_for(model, "32") for _ in texts]
    for cache, ids in zip(caches, texts, strict=True):
        run(model, cache, ids[:130])
    for start in range(130, 160, turn):
        for cache, ids, expected in zip(caches, texts, wanted, strict=True):
            near(one_by_one(model, cache, ids[start : start + turn]), expected[start : start + turn])


@pytest.mark.parametrize("kernels", [None, compiled(1)], ids=["torch", "compiled"])
def test_a_dropped_engine_gives_its_cache_back(kernels: Kernels | None) -> None:
    """At once, and although what it computed with stays: no collector runs, and nothing recorded keeps the cache."""
    config, weights = random_model()
    model = model_of(config, weights, kernels=kernels)
    engine = Engine.build(model, MODEL_PLAN, kv="32", chunk_size=64)
    list(engine.generate(token_ids(5).tolist(), Sampling(temperature=0, max_tokens=4), eos_ids=frozenset()))
    cache, ring = weakref.ref(engine.cache), weakref.ref(engine.cache.ring.data)
    gc.disable()
    try:
        del engine
        assert cache() is None and ring() is None
    finally:
        gc.enable()


def test_results_are_the_callers_own() -> None:
    """A step that is run again writes to the same memory: what was returned before must not change."""
    config, weights = random_model()
    model = model_of(config, weights, kernels=compiled(1))
    cache = cache_for(model, "32")
    ids = token_ids(6)
    kept = [run(model, cache, ids[i : i + 1]) for i in range(6)]
    copies = [hidden.clone() for hidden in kept]
    run(model, cache, token_ids(1, seed=9))
    assert all(map(torch.equal, kept, copies))
    assert not torch.equal(kept[3], kept[4])


class Stopped(Exception):
    pass


def stop_at(layer: int) -> Callable[[int], None]:
    def before_layer(number: int) -> None:
        if number == layer:
            raise Stopped

    return before_layer


@pytest.mark.parametrize("filled", [0, 2, 131, 191])  # 191: the next token closes a block
@pytest.mark.parametrize("layer", [0, 1])
def test_a_cancelled_token_leaves_no_trace(layer: int, filled: int) -> None:
    """Cancelled while it is recorded, when it is run again, and in a chunk in between."""
    config, weights = random_model(tiny_config("qwen3", max_positions=4096))
    model = model_of(config, weights, kernels=compiled(2))
    ids, other = token_ids(filled + 40), token_ids(8, seed=5)
    wanted = run(model, cache_for(model, "32"), ids)
    model = model_of(config, weights, kernels=compiled(2))
    cache = cache_for(model, "32")
    if filled:
        run(model, cache, ids[:filled])
    with pytest.raises(Stopped):
        run(model, cache, other[:1], before_layer=stop_at(layer))  # while it is recorded
    assert recording(cache) is None
    near(run(model, cache, ids[filled : filled + 1]), wanted[filled : filled + 1])
    assert recording(cache) is not None
    for i in range(filled + 1, filled + 20):
        with pytest.raises(Stopped):
            run(model, cache, other[:1], before_layer=stop_at(0))  # a step that is run again stops before it begins
        with pytest.raises(Stopped):
            run(model, cache, other, before_layer=stop_at(layer))
        near(run(model, cache, ids[i : i + 1]), wanted[i : i + 1])
    near(run(model, cache, ids[filled + 20 :]), wanted[filled + 20 :])


def test_a_token_after_a_rollback_and_after_undo() -> None:
    config, weights = random_model(tiny_config(max_positions=4096))
    model = model_of(config, weights, kernels=compiled(2))
    ids, other = token_ids(330), token_ids(70, seed=5)
    wanted = run(model, cache_for(model, "32"), ids)
    cache = cache_for(model, "32")
    run(model, cache, ids[:150])
    for i in range(150, 330, 3):
        run(model, cache, other[:1], keep=False)
        near(run(model, cache, ids[i : i + 1]), wanted[i : i + 1])
        run(model, cache, other, keep=False)
        near(run(model, cache, ids[i + 1 : i + 2]), wanted[i + 1 : i + 2])
        snapshot = cache.snapshot()
        one_by_one(model, cache, other[: 330 - i - 2])
        cache.restore(snapshot)
        near(run(model, cache, ids[i + 2 : i + 3]), wanted[i + 2 : i + 3])


def test_inference_mode_may_end_between_tokens() -> None:
    config, weights = random_model()
    model = model_of(config, weights, kernels=compiled(1))
    ids = token_ids(2)
    wanted = run(model, cache_for(model, "32"), ids)
    cache = cache_for(model, "32")
    for i in range(2):
        with torch.inference_mode(i == 0):
            near(run(model, cache, ids[i : i + 1]), wanted[i : i + 1])


def test_generation_is_that_of_the_torch_kernels(tmp_path: Path) -> None:
    """Greedy, through the engine as a user loads it, with logits that are no near ties."""
    save_checkpoint(tmp_path, seed=1, max_position_embeddings=1024)
    greedy = Sampling(temperature=0, max_tokens=40)
    prompt = token_ids(200, seed=7).tolist()
    answers = {}
    for kernels in ("torch", "compiled"):
        engine = Engine.load(
            str(tmp_path), context=512, kv="int8", heads="all", chunk_size=64, threads=2, kernels=kernels, device="cpu"
        )
        assert engine.transformer.kernels.name == kernels
        answers[kernels] = list(engine.generate(prompt, greedy, eos_ids=frozenset()))
    engine.reset()
    logits = engine.logits([*prompt, *answers["torch"][:-1]])[-40:]
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-2, "a near tie: take another seed"
    assert len(answers["torch"]) == 40
    assert answers["compiled"] == answers["torch"]
