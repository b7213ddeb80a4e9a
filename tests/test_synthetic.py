"""The synthetic fill: a cache that decodes as if those tokens had been prefilled, and gives all its memory back."""

import pytest
import torch

from duolocal.cache import DuoCache
from duolocal.heads import HeadPlan
from duolocal.kernels.blocks import decode_blocks, hadamard
from duolocal.models.synthetic import fill_with_random_tokens
from duolocal.quant.kv import KV_FORMATS, kv_layout
from tests.oracle import oracle_attention
from tests.pool_checks import poisoned_cache

SINK, RECENT, BLOCK, DIM = 6, 40, 16, 32
RETRIEVAL = ((True, False), (False, False), (True, True))
CONTEXT = 600


def cache_of(kv: str, retrieval: tuple[tuple[bool, bool], ...] = RETRIEVAL) -> DuoCache:
    layout = kv_layout(kv, head_dim=DIM, dtype=torch.float32, block_size=BLOCK)
    plan = HeadPlan(retrieval, SINK, RECENT, "test")
    return poisoned_cache(plan, layout, group=2, context=CONTEXT)


def dense(cache: DuoCache, layer: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a decode step at `num_tokens` may see of each position: [num_tokens, num_kv_heads, head_dim]."""
    row = sum(sum(flags) for flags in cache.plan.retrieval[:layer])
    planes = torch.full((2, num_tokens, 2, DIM), float("nan"), dtype=torch.float64)
    for head, retrieval in enumerate(cache.plan.retrieval[layer]):
        if retrieval:
            closed = num_tokens // BLOCK
            records = cache.pool.records[cache.pool.table[row, :closed]]
            row += 1
            for plane, which, layout in zip(
                planes, ("key", "value"), (cache.layout.key, cache.layout.value), strict=True
            ):
                x = decode_blocks(records, cache.layout, which, dtype=torch.float64)  # type: ignore[arg-type]
                plane[: closed * BLOCK, head] = (hadamard(x) if layout.rotate else x).reshape(-1, DIM)
        held = torch.arange(num_tokens)
        width = cache.exact_recent if retrieval else RECENT
        # The new token sees itself as the first of its recent ones.
        held = held[(held < SINK) | (num_tokens - held < width)]
        for plane, ring in zip(planes, cache.ring.read(layer, held), strict=True):
            plane[held, head] = ring[head].double()
        assert not retrieval or planes[:, :, head].isfinite().all()  # every position is in a block or in the ring
    return planes[0], planes[1]


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("num_tokens", [0, 5, 47, 400, 527])
def test_a_decode_step_sees_what_was_filled_in(kv: str, num_tokens: int) -> None:
    cache = cache_of(kv)
    fill_with_random_tokens(cache, num_tokens, seed=3, distinct_blocks=7)
    assert cache.num_tokens == num_tokens
    generator = torch.Generator().manual_seed(1)
    seen = [dense(cache, layer, num_tokens) for layer in range(3)]
    positions = torch.tensor([num_tokens])
    cache.begin(1)
    for layer in range(3):
        k, v = torch.randn(2, 1, 2, DIM, generator=generator)
        q = torch.randn(1, 4, DIM, generator=generator)
        cache.append(layer, k, v)
        out = cache.attend(layer, q, positions)
        # Where a head may not look, the planes hold NaN: the oracle gives it weight 0.
        keys, values = (
            torch.cat((plane.nan_to_num(), new.double())) for plane, new in zip(seen[layer], (k, v), strict=True)
        )
        wanted = oracle_attention(
            q, keys, values, positions, retrieval=RETRIEVAL[layer], sink_size=SINK, recent_size=RECENT
        )
        # float32 sums over some hundred tokens whose outliers are 8 times larger.
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
    cache.commit()


@pytest.mark.parametrize("kv", ["int4", "16"])
def test_all_records_are_taken_written_and_given_back(kv: str) -> None:
    cache = cache_of(kv)
    pool = cache.pool
    fill_with_random_tokens(cache, 500, seed=1)
    used = pool.table[:, : pool.num_blocks].reshape(-1)
    assert pool.num_blocks == 500 // BLOCK
    assert used.unique().shape == used.shape  # no record twice
    for which in ("key", "value"):
        values = decode_blocks(pool.records[used], cache.layout, which, dtype=torch.float32)
        assert values.isfinite().all() and (values.std(dim=(1, 2)) > 0.1).all()
    scales = values.abs().amax(dim=(1, 2))
    assert scales.unique().shape[0] > 20  # blocks differ
    cache.reset()
    assert pool.num_blocks == 0
    fill_with_random_tokens(cache, 600, seed=2)  # and the whole context fits again
    assert pool.num_blocks == 600 // BLOCK


def test_the_same_seed_gives_the_same_cache() -> None:
    first, second, other = cache_of("int4"), cache_of("int4"), cache_of("int4")
    for cache, seed in ((first, 1), (second, 1), (other, 2)):
        fill_with_random_tokens(cache, 300, seed=seed)
    torch.testing.assert_close(first.pool.table, second.pool.table)
    used = first.pool.table[:, : first.pool.num_blocks].reshape(-1)
    assert torch.equal(first.pool.records[used], second.pool.records[used])
    assert torch.equal(first.ring.data, second.ring.data)
    assert not torch.equal(first.ring.data, other.ring.data)


def test_a_plan_without_retrieval_heads_has_a_ring_only() -> None:
    cache = cache_of("int4", ((False, False),))
    fill_with_random_tokens(cache, CONTEXT, seed=0)
    assert cache.num_tokens == CONTEXT and cache.ring.data.isfinite().all()


def test_only_an_empty_cache_is_filled_and_only_to_its_context() -> None:
    cache = cache_of("int4")
    with pytest.raises(AssertionError):
        fill_with_random_tokens(cache, CONTEXT + 1, seed=0)
    fill_with_random_tokens(cache, 1, seed=0)
    with pytest.raises(AssertionError, match="reset it first"):
        fill_with_random_tokens(cache, 1, seed=0)
