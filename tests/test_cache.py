"""The cache against a dense float64 oracle with an explicit mask, and its invariances.

Everything runs in float64, where a difference of rounding between two cuts of the same tokens cannot flip a
quantization code (the chance is about 1e-12 per number), so the tolerance can be tight for every format.
"""

from weakref import WeakSet

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duolocal.cache import DuoCache
from duolocal.cache.cache import MIN_EXACT_RECENT
from duolocal.heads import HeadPlan
from duolocal.kernels.blocks import decode_blocks, encode_blocks, hadamard
from duolocal.quant.kv import KV_FORMATS, kv_layout
from tests.oracle import naive_visibility
from tests.pool_checks import poisoned_cache

CPU = torch.device("cpu")
TOLERANCE = 1e-9  # float64, a few hundred terms; scores reach about 10
NUM_KV_HEADS, GROUP, HEAD_DIM = 3, 2, 16
NUM_HEADS = NUM_KV_HEADS * GROUP
PLANS = {
    "mixed": ((True, False, True), (False, False, False), (True, True, True)),
    "all": ((True,) * 3,) * 3,
    "none": ((False,) * 3,) * 3,
}


def make_plan(name: str = "mixed", *, sink_size: int = 4, recent_size: int = 20) -> HeadPlan:
    return HeadPlan(PLANS[name], sink_size, recent_size, name)


def make_cache(plan: HeadPlan, *, kv: str = "int4", block_size: int = 64, context: int = 1024) -> DuoCache:
    layout = kv_layout(kv, head_dim=HEAD_DIM, dtype=torch.float64, block_size=block_size)
    return poisoned_cache(plan, layout, group=NUM_HEADS // NUM_KV_HEADS, context=context, dtype=torch.float64)


def tokens(count: int, *, seed: int = 0, num_layers: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """q [num_layers, count, num_heads, head_dim], k and v [num_layers, count, num_kv_heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_layers, count, NUM_HEADS, HEAD_DIM, dtype=torch.float64, generator=generator) * 2
    k, v = torch.randn(2, num_layers, count, NUM_KV_HEADS, HEAD_DIM, dtype=torch.float64, generator=generator)
    return q, k, v


def feed(cache: DuoCache, q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> Tensor:
    """Feed all tokens from the cache's position on, cut into chunks; return [num_layers, count, heads, dim]."""
    outputs = []
    for length in cuts:
        start = cache.num_tokens
        span = slice(start, start + length)
        positions = torch.arange(start, start + length)
        cache.begin(length)
        layers = []
        for layer in range(q.shape[0]):
            cache.append(layer, k[layer, span], v[layer, span])
            layers.append(cache.attend(layer, q[layer, span], positions))
        cache.commit()
        outputs.append(torch.stack(layers))
    return torch.cat(outputs, dim=1)


def oracle(plan: HeadPlan, cache: DuoCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query, every key, one at a time: the visibility rule, and the precision rule of the cache."""
    count = q.shape[1]
    size = cache.layout.block_size
    exact_recent = max(plan.recent_size, MIN_EXACT_RECENT)
    whole = count // size * size
    out = torch.empty_like(q)
    i, j = torch.arange(count)[:, None], torch.arange(count)[None]
    for layer, flags in enumerate(plan.retrieval):
        for head, retrieval in enumerate(flags):
            keys, values = k[layer, :, head], v[layer, :, head]
            stored_k, stored_v = keys.clone(), values.clone()
            records = encode_blocks(
                keys[:whole].view(-1, size, HEAD_DIM), values[:whole].view(-1, size, HEAD_DIM), cache.layout
            )
            for which, plane, stored in (("key", cache.layout.key, stored_k), ("value", cache.layout.value, stored_v)):
                decoded = decode_blocks(records, cache.layout, which, dtype=torch.float64)  # type: ignore[arg-type]
                stored[:whole] = (hadamard(decoded) if plane.rotate else decoded).view(-1, HEAD_DIM)
            visible = torch.tensor(
                [
                    [
                        naive_visibility(
                            a, b, retrieval=retrieval, sink_size=plan.sink_size, recent_size=plan.recent_size
                        )
                        for b in range(count)
                    ]
                    for a in range(count)
                ]
            )
            exact = (j < plan.sink_size) | (i - j < exact_recent)
            for query_head in range(head * GROUP, (head + 1) * GROUP):
                queries = q[layer, :, query_head]
                scores = torch.where(exact, queries @ keys.T, queries @ stored_k.T) / HEAD_DIM**0.5
                weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
                out[layer, :, query_head] = (weights * exact) @ values + (weights * ~exact) @ stored_v
    return out


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("plan_name", PLANS)
def test_cache_equals_the_oracle(plan_name: str, kv: str) -> None:
    plan = make_plan(plan_name)
    cache = make_cache(plan, kv=kv)
    q, k, v = tokens(330)
    out = feed(cache, q, k, v, [100, 1, 150, 1, 1, 64, 13])
    close(out, oracle(plan, cache, q, k, v))


@pytest.mark.parametrize(("sink_size", "recent_size"), [(0, 1), (0, 300), (1, 64), (64, 256), (70, 130), (400, 7)])
def test_sink_and_window_edges(sink_size: int, recent_size: int) -> None:
    plan = make_plan(sink_size=sink_size, recent_size=recent_size)
    cache = make_cache(plan)
    q, k, v = tokens(420)
    out = feed(cache, q, k, v, [129, 1, 270, *[1] * 20])
    close(out, oracle(plan, cache, q, k, v))


cut_lists = st.lists(st.integers(1, 200), min_size=1, max_size=12)


@given(cuts=cut_lists, kv=st.sampled_from(KV_FORMATS), block_size=st.sampled_from([16, 32, 64, 128]))
@settings(max_examples=40, deadline=None)
def test_neither_cut_nor_block_size_matters(cuts: list[int], kv: str, block_size: int) -> None:
    plan = make_plan(sink_size=3, recent_size=40)
    total = sum(cuts)
    q, k, v = tokens(total)
    context = total + 64
    whole = make_cache(plan, kv=kv, context=context)
    expected = feed(whole, q, k, v, [total])
    cache = make_cache(plan, kv=kv, block_size=block_size, context=context)
    close(feed(cache, q, k, v, cuts), expected)
    if block_size == whole.layout.block_size:
        mine, theirs = (c.pool.records[c.pool.table[:, : c.pool.num_blocks]] for c in (cache, whole))
        assert torch.equal(mine, theirs)


@given(
    before=st.integers(0, 300),
    lost=st.lists(st.integers(1, 250), min_size=1, max_size=4),
    again=st.lists(st.integers(1, 250), min_size=1, max_size=4),
)
@settings(max_examples=30, deadline=None)
def test_undo_leaves_no_trace(before: int, lost: list[int], again: list[int]) -> None:
    """Snapshot, go on with other tokens, restore: what follows equals a context that never took the detour."""
    plan = make_plan()
    q, k, v = tokens(before + sum(again), seed=1)
    detour = tokens(before + sum(lost), seed=2)
    context = before + max(sum(lost), sum(again))
    cache = make_cache(plan, context=context)
    if before:
        feed(cache, q, k, v, [before])
    snapshot = cache.snapshot()
    feed(cache, *detour, lost)
    cache.restore(snapshot)
    assert cache.num_tokens == before
    cache.pool.poison(0xFF)
    expected = feed(make_cache(plan, context=context), q, k, v, [*([before] if before else []), *again])
    close(feed(cache, q, k, v, again), expected[:, before:])


@given(before=st.integers(0, 300), lost=st.integers(1, 600), layers_done=st.integers(0, 3), after=st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_a_cancelled_chunk_leaves_no_trace(before: int, lost: int, layers_done: int, after: int) -> None:
    plan = make_plan()
    q, k, v = tokens(before + after, seed=3)
    other = tokens(before + lost, seed=4)
    context = before + max(lost, after)
    cache = make_cache(plan, context=context)
    cuts = [before] if before else []
    feed(cache, q[:, :before], k[:, :before], v[:, :before], cuts) if before else None
    blocks = cache.pool.num_blocks
    cache.begin(lost)
    for layer in range(layers_done):
        span = slice(before, before + lost)
        cache.append(layer, other[1][layer, span], other[2][layer, span])
        if layer != layers_done - 1:  # the last one is cancelled between append and attend
            cache.attend(layer, other[0][layer, span], torch.arange(before, before + lost))
    cache.rollback()
    assert (cache.num_tokens, cache.pool.num_blocks) == (before, blocks)
    expected = feed(make_cache(plan, context=context), q, k, v, [*cuts, after])
    close(feed(cache, q, k, v, [after]), expected[:, before:])


def test_going_back_leaves_nothing_behind() -> None:
    """A chat goes back after every turn: what the cache remembers of it must not grow."""
    cache = make_cache(make_plan())

    def held() -> int:
        return sum(len(value) for value in vars(cache).values() if isinstance(value, (list, set, dict, WeakSet)))

    feed(cache, *tokens(100), [100])
    snapshot, before = cache.snapshot(), held()
    for _ in range(50):
        cache.restore(snapshot)
        cache.snapshot()  # and dropped
        cache.resume(cache.read_ring(), num_tokens=100, first_block=cache.pool.num_blocks)
        snapshot = cache.snapshot()
    assert held() == before


def test_a_snapshot_of_an_abandoned_context_is_refused() -> None:
    cache = make_cache(make_plan())
    q, k, v = tokens(200)
    early = cache.snapshot()
    feed(cache, q, k, v, [200])
    late = cache.snapshot()
    cache.restore(early)
    feed(cache, q, k, v, [200])
    with pytest.raises(AssertionError, match="abandoned"):
        cache.restore(late)


def test_memory_is_what_is_allocated_and_streaming_heads_do_not_grow() -> None:
    plan = make_plan()
    small, large = (make_cache(plan, kv="int8", context=context) for context in (1024, 64 * 1024))
    for cache in (small, large):
        tensors = [cache.pool.records, cache.pool.table, cache.ring.data]
        assert cache.memory().total == sum(t.untyped_storage().nbytes() for t in tensors)
    assert small.memory().streaming_windows == large.memory().streaming_windows
    per_token = large.memory().retrieval_blocks / large.context
    assert per_token == plan.num_retrieval * (small.layout.bytes_per_token + 8 / 64)  # the table: 8 bytes
    none = make_cache(make_plan("none"), context=64 * 1024)
    assert none.memory().retrieval_blocks == 0
