"""Sparse prefill in compiled kernels: against dense float64 and a mask, against the torch path, and in a cache."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from duolocal.cache import DuoCache
from duolocal.heads import HeadPlan
from duolocal.kernels.blocks import BlockLayout, decode_blocks, hadamard
from duolocal.kernels.sparse import Chosen, SparsePrefill, block_lse, blocks_seen
from duolocal.quant.kv import KV_FORMATS, kv_layout
from tests.compiled import THREADS, compiled, compiled_kernels, normal, poisoned
from tests.oracle import visibility_mask
from tests.pool_checks import poisoned_cache

pytestmark = compiled_kernels

PLAN = HeadPlan(((False, False), (True, False), (True, True)), sink_size=16, recent_size=40, source="test")
POLICY = SparsePrefill(mass=0.9, tile=64, stride=8, least_blocks=2)


def make_cache(
    layout: BlockLayout,
    policy: SparsePrefill | None,
    *,
    plan: HeadPlan = PLAN,
    group: int = 3,
    context: int = 1100,
    num_threads: int | None = 2,
) -> DuoCache:
    """Return a poisoned cache; num_threads: None for the torch path."""
    kernels = None if num_threads is None else compiled(num_threads)
    return poisoned_cache(plan, layout, group=group, context=context, kernels=kernels, prefill=policy)


def tokens(count: int, *, head_dim: int = 64, group: int = 3, plan: HeadPlan = PLAN) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v [num_layers, count, heads, head_dim] whose queries look at a few places."""
    shape = plan.num_layers, count, plan.num_kv_heads
    q = normal(*shape[:2], plan.num_kv_heads * group, head_dim, seed=0, scale=0.7)
    k, v = normal(*shape, head_dim, seed=1), normal(*shape, head_dim, seed=2)
    direction = normal(head_dim, seed=3, scale=1.2)
    q += direction  # drawn to the keys near it
    k[:, 130:150] += direction / 2
    k[:, 500:505] += direction
    return q, k, v


def feed(cache: DuoCache, q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> Tensor:
    """Feed tokens up to each cut; return [num_layers, count, num_heads, head_dim]."""
    outputs = []
    for first, last in pairwise([cache.num_tokens, *cuts]):
        cache.begin(last - first)
        layers = []
        for layer in range(q.shape[0]):
            cache.append(layer, k[layer, first:last].contiguous(), v[layer, first:last].contiguous())
            layers.append(cache.attend(layer, q[layer, first:last].contiguous(), torch.arange(first, last)))
        cache.commit()
        outputs.append(torch.stack(layers))
    return torch.cat(outputs, dim=1)


def rows_of(cache: DuoCache, layer: int) -> slice:
    first = sum(map(sum, cache.plan.retrieval[:layer]))
    return slice(first, first + sum(cache.plan.retrieval[layer]))


def stored(cache: DuoCache, layer: int, which: str) -> Tensor:
    """Return what the retrieval heads of a layer read from blocks: float64 [heads, kv_len, head_dim]."""
    table = cache.pool.table[rows_of(cache, layer), : cache.pool.num_blocks]
    records = cache.pool.records[table.flatten()]
    decoded = decode_blocks(records, cache.layout, which, dtype=torch.float64)  # type: ignore[arg-type]
    decoded = hadamard(decoded) if getattr(cache.layout, which).rotate else decoded
    return decoded.view(table.shape[0], -1, cache.layout.head_dim)


@pytest.mark.cover(2)
@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize(("head_dim", "group", "block_size"), [(64, 3, 64), (16, 1, 32), (128, 4, 128), (80, 2, 64)])
def test_block_weights_against_dense(kv: str, head_dim: int, group: int, block_size: int, num_threads: int) -> None:
    layout = kv_layout(kv, head_dim=head_dim, dtype=torch.float32, block_size=block_size)
    cache = make_cache(layout, None, group=group, num_threads=num_threads)
    q, k, v = tokens(1000, head_dim=head_dim, group=group)
    feed(cache, q, k, v, [640, 641])
    step, queries, first = 24, 13, 649
    positions = torch.arange(first, first + step * queries, step)
    blocks = blocks_seen(int(positions[-1]), recent_size=128, block_size=block_size)
    layer = 2
    cache.begin(1000 - 641)
    cache.append(layer, k[layer, 641:].contiguous(), v[layer, 641:].contiguous())
    with poisoned():
        lse, window = cache.backend.attention.block_weights(  # type: ignore[attr-defined]
            layer,
            q[layer, 641:].contiguous(),
            k[layer, 641:].contiguous(),
            first=first,
            step=step,
            queries=queries,
            blocks=blocks,
        )
    assert lse.shape == (2, group, queries, blocks) and window.shape == (2, group, queries)
    asked = q[layer, positions].unflatten(1, (2, group)).permute(1, 2, 0, 3).double() * head_dim**-0.5
    i, j = positions[:, None], torch.arange(1000)
    near = (i >= j) & ((j < 16) | (i - j < 128))
    scores = asked @ k[layer].permute(1, 2, 0).double()[:, None]
    torch.testing.assert_close(
        window.double(), scores.masked_fill(~near, float("-inf")).logsumexp(-1), rtol=0, atol=1e-4
    )
    keys = stored(cache, layer, "key")
    behind = (j[: keys.shape[1]] >= 16) & (i - j[: keys.shape[1]] >= 128)
    scores = (asked @ keys[:, None].transpose(2, 3)).masked_fill(~behind, float("-inf"))
    wanted = scores[..., : blocks * block_size].unflatten(-1, (-1, block_size)).logsumexp(-1)
    torch.testing.assert_close(lse.double(), wanted, rtol=0, atol=1e-4)
    assert bool((lse == float("-inf")).any())  # some blocks are seen by later queries only
    theirs = block_lse(
        q[layer, positions].unflatten(1, (2, group)).permute(1, 2, 0, 3),
        cache.pool.take,
        cache.pool.table[rows_of(cache, layer), : cache.pool.num_blocks],
        layout,
        q_positions=positions,
        num_blocks=blocks,
        sink_size=16,
        recent_size=128,
        scale=head_dim**-0.5,
    )
    torch.testing.assert_close(lse, theirs, rtol=0, atol=1e-4)


@pytest.mark.cover(2)
@pytest.mark.parametrize("kv", ["32", "k8v4", "int4"])
@pytest.mark.parametrize(("group", "tile", "start"), [(3, 64, 600), (1, 128, 577), (4, 32, 640), (5, 16, 601)])
@pytest.mark.parametrize("sink_size", [0, 16, 70])
def test_attention_over_any_blocks_against_dense(kv: str, group: int, tile: int, start: int, sink_size: int) -> None:
    plan = dataclasses.replace(PLAN, sink_size=sink_size)
    layout = kv_layout(kv, head_dim=32, dtype=torch.float32)
    cache = make_cache(layout, None, group=group, plan=plan)
    q, k, v = tokens(1000, head_dim=32, group=group)
    feed(cache, q, k, v, [start])
    layer, end = 2, 1000
    first, last = -(-start // tile), end // tile
    blocks = blocks_seen(last * tile - 1, recent_size=128, block_size=64)
    listed = torch.rand(2, last - first, blocks, generator=torch.Generator().manual_seed(4)) < 0.4
    listed[0, 1] = False
    cache.begin(end - start)
    cache.append(layer, k[layer, start:].contiguous(), v[layer, start:].contiguous())
    weights = torch.full((end - start, 2 * group, 2), float("nan"))
    with poisoned():
        got = cache.backend.attention.prefill(  # type: ignore[attr-defined]
            layer,
            *(x[layer, start:].contiguous() for x in (q, k, v)),
            chosen=Chosen(range(first, last), tile, listed),
            weights=weights,
        )
    positions = torch.arange(start, end)
    i, j = positions[:, None], torch.arange(end)
    near = (i >= j) & ((j < sink_size) | (i - j < 128))
    keys, values = stored(cache, layer, "key"), stored(cache, layer, "value")
    read = torch.ones(2, end - start, keys.shape[1], dtype=torch.bool)  # of queries in no tile: everything
    inside = slice(first * tile - start, last * tile - start)
    read[:, inside, blocks * 64 :] = False
    read[:, inside, : blocks * 64] = listed.repeat_interleave(tile, 1).repeat_interleave(64, 2)
    behind = (j[: keys.shape[1]] >= sink_size) & (i - j[: keys.shape[1]] >= 128)
    for head in range(2):
        for at in range(head * group, (head + 1) * group):
            query = q[layer, start:, at].double() * 32**-0.5
            scores = torch.cat(
                (
                    (query @ k[layer, :, head].double().T).masked_fill(~near, float("-inf")),
                    (query @ keys[head].T).masked_fill(~(behind & read[head]), float("-inf")),
                ),
                dim=1,
            )
            wanted = scores.softmax(-1) @ torch.cat((v[layer, :, head].double(), values[head]))
            torch.testing.assert_close(got[:, at].double(), wanted, rtol=0, atol=3e-5)
            lse = weights[:, at, 0] + weights[:, at, 1].log()
            torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-4)


def visible_everywhere(count: int) -> int:
    """Return the pairs of a query and a block behind its window that a retrieval head of PLAN sees."""
    mask = visibility_mask(torch.arange(count), count, retrieval=True, sink_size=16, recent_size=40)
    mask &= torch.arange(count)[:, None] - torch.arange(count) >= 128
    return int(torch.nn.functional.pad(mask, (0, -count % 64)).unflatten(1, (-1, 64)).any(2).sum())


@pytest.mark.parametrize("num_threads", [1, 2, None])
@pytest.mark.parametrize("kv", ["k8v4", "int4"])
def test_a_cache_with_a_mass_of_one_is_exact(kv: str, num_threads: int | None) -> None:
    layout = kv_layout(kv, head_dim=64, dtype=torch.float32)
    q, k, v = tokens(1000)
    cuts = [300, 301, 620, 1000]
    policy = dataclasses.replace(POLICY, mass=1.0, measure=True)
    sparse = make_cache(layout, policy, num_threads=num_threads)
    got = feed(sparse, q, k, v, cuts)
    wanted = feed(make_cache(layout, None, num_threads=num_threads), q, k, v, cuts)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    counts = sparse.sparse_counts
    assert counts is not None and counts.density == 1.0
    assert torch.allclose(counts.mass / counts.measured, torch.ones(3, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("kv", ["32", "k8v4", "int4"])
def test_a_sparse_cache_equals_the_torch_path(kv: str) -> None:
    layout = kv_layout(kv, head_dim=64, dtype=torch.float32)
    q, k, v = tokens(1000)
    cuts = [300, 301, 620, 1000]
    policy = dataclasses.replace(POLICY, measure=True)
    mine, theirs = (make_cache(layout, policy, num_threads=num_threads) for num_threads in (2, None))
    got, wanted = feed(mine, q, k, v, cuts), feed(theirs, q, k, v, cuts)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    a, b = mine.sparse_counts, theirs.sparse_counts
    assert a is not None and b is not None
    assert torch.equal(a.read, b.read) and torch.equal(a.seen, b.seen) and torch.equal(a.measured, b.measured)
    torch.testing.assert_close(a.mass, b.mass, rtol=1e-5, atol=0)
    assert 0.2 < a.density < 0.9
    # Tiles 5 to 8 and 10 to 14 lie within a chunk and see two whole blocks: 64 queries of 3 heads each.
    assert a.measured.tolist() == [9 * 64 * 3] * 3
    assert bool((a.mass / a.measured > 0.87).all()) and bool((a.mass / a.measured < 0.99).all())
    exact = feed(make_cache(layout, None), q, k, v, cuts)
    assert not torch.allclose(got[1:, 700:], exact[1:, 700:], rtol=0, atol=1e-3)
    assert torch.equal(got[0], exact[0])  # streaming heads have nothing to choose
    assert torch.allclose(got[1:, :320], exact[1:, :320], rtol=0, atol=2e-5)


@pytest.mark.parametrize("num_threads", [2, None])
def test_chunks_cut_between_tiles_give_the_same(num_threads: int | None) -> None:
    layout = kv_layout("k8v4", head_dim=64, dtype=torch.float32)
    q, k, v = tokens(1000)
    caches = []
    for cuts in ([1000], [64, 320, 384, 960, 1000], [512, 1000]):
        cache = make_cache(layout, POLICY, num_threads=num_threads)
        caches.append((feed(cache, q, k, v, cuts), cache.sparse_counts))
    out, counts = caches[0]
    assert counts is not None
    for other, others in caches[1:]:
        torch.testing.assert_close(other, out, rtol=0, atol=2e-5)
        assert others is not None and torch.equal(others.read, counts.read) and torch.equal(others.seen, counts.seen)
    assert counts.seen.tolist() == [visible_everywhere_by_tiles(1000)] * 3


def visible_everywhere_by_tiles(count: int) -> int:
    """Return the same where the queries of a sparse tile count as seeing what its last one sees."""
    exact, sparse = visible_everywhere(320), 0
    for tile in range(5, count // 64):
        sparse += 64 * blocks_seen(tile * 64 + 63, recent_size=128, block_size=64)
    return exact + sparse + visible_everywhere(count) - visible_everywhere(count // 64 * 64)


def test_one_token_at_a_time_is_exact() -> None:
    layout = kv_layout("k8v4", head_dim=64, dtype=torch.float32)
    q, k, v = tokens(700)
    sparse, exact = make_cache(layout, POLICY), make_cache(layout, None)
    for cache in (sparse, exact):
        feed(cache, q, k, v, [640])
    before = sparse.sparse_counts.read.clone()  # type: ignore[union-attr]
    sparse.ring.data.copy_(exact.ring.data)
    cuts = list(range(641, 701))
    torch.testing.assert_close(feed(sparse, q, k, v, cuts), feed(exact, q, k, v, cuts), rtol=0, atol=0)
    assert torch.equal(sparse.sparse_counts.read, before)  # type: ignore[union-attr]
