"""Selected decode: digests, scores and lists against independent facts; the compiled path against the torch path."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duolocal.cache import ON_DEVICE, DuoCache, Placement
from duolocal.cache.selection import SelectionPolicy
from duolocal.heads import HeadPlan
from duolocal.kernels.blocks import BlockLayout, decode_blocks, encode_blocks, hadamard
from duolocal.kernels.cpu.operations import CpuKernels
from duolocal.kernels.digest import CANDIDATES, DigestChannels, digest_bytes, make_digests, num_runs, score_digests
from duolocal.kernels.interface import Kernels
from duolocal.quant.kv import kv_layout
from tests.pool_checks import poisoned_cache

CPU = torch.device("cpu")
PLAN = HeadPlan(((True, False, True), (False, True, False)), 4, 20, "test")
HEAD_DIM, GROUP, CONTEXT, CHANNELS = 32, 2, 2048, 8
KERNELS: dict[str, Kernels | None] = {"torch": None, "compiled": CpuKernels(2)}


def channels(seed: int = 0) -> DigestChannels:
    generator = torch.Generator().manual_seed(seed)
    picked = torch.stack([torch.randperm(HEAD_DIM, generator=generator)[:CHANNELS] for _ in range(PLAN.num_retrieval)])
    return DigestChannels(picked.int(), torch.randn(picked.shape, generator=generator))


def make_cache(
    budget: int | None, kernels: str = "compiled", *, kv: str = "int4", reuse: int = 1, where: Placement = ON_DEVICE
) -> DuoCache:
    return poisoned_cache(
        PLAN,
        kv_layout(kv, head_dim=HEAD_DIM, dtype=torch.float32),
        group=GROUP,
        context=CONTEXT,
        kernels=KERNELS[kernels],
        placement=where,
        select=None if budget is None else SelectionPolicy(budget, channels(), reuse),
    )


def inputs(start: int, count: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [count, layers, heads, head_dim] of positions start..; each is made from its position alone."""
    generators = [torch.Generator().manual_seed(1_000_003 * seed + start + i) for i in range(count)]
    x = torch.stack([torch.randn(2, 3 * GROUP + 6, HEAD_DIM, generator=g) for g in generators])
    q, k, v = x.split((3 * GROUP, 3, 3), dim=2)
    return q * 3, k, v


def feed(cache: DuoCache, cuts: list[int], seed: int = 1, *, prompt: bool = False) -> Tensor:
    """Append tokens, single ones as decode steps unless of a prompt; return [tokens, layers, heads, head_dim]."""
    seen = []
    for count in cuts:
        start = cache.num_tokens
        q, k, v = inputs(start, count, seed)
        cache.begin(count, decode=count == 1 and not prompt)
        layers = []
        for layer in range(2):
            cache.append(layer, k[:, layer].contiguous(), v[:, layer].contiguous())
            layers.append(cache.attend(layer, q[:, layer].contiguous(), torch.arange(start, start + count)))
        cache.commit()
        seen.append(torch.stack(layers, dim=1))
    return torch.cat(seen)


def feed_these(cache: DuoCache, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Append tokens given as `inputs` gives them, the last one as a decode step."""
    count = len(q)
    for start, end in ((0, count - 1), (count - 1, count)):
        cache.begin(end - start, decode=end == count)
        for layer in range(2):
            span = slice(start, end)
            cache.append(layer, k[span, layer].contiguous(), v[span, layer].contiguous())
            cache.attend(layer, q[span, layer].contiguous(), torch.arange(start, end))
        cache.commit()


def keys_of(cache: DuoCache, row: int, block: int) -> Tensor:
    record = cache.pool.take(cache.pool.table[row, block : block + 1])
    keys = decode_blocks(record, cache.layout, "key", dtype=torch.float32)[0]
    return hadamard(keys) if cache.layout.key.rotate else keys


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kv", ["int4", "k8v4", "16"])
def test_a_budget_for_all_is_dense(kernels: str, kv: str) -> None:
    """Where every block is listed, the result is that of reading all, whatever the digests say."""
    dense, selected = make_cache(None, kernels, kv=kv), make_cache(CONTEXT, kernels, kv=kv)
    cuts = [700, *[1] * 130]
    torch.testing.assert_close(feed(selected, cuts), feed(dense, cuts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.one_of(st.just(1), st.integers(1, 90)), min_size=1, max_size=30), reuse=st.sampled_from([1, 4]))
def test_a_prompt_reads_everything_however_it_is_cut(kernels: str, cuts: list[int], reuse: int) -> None:
    """Single tokens of a prompt see what they see in a whole one, and the answer after them reads what it would."""
    total = 500 + sum(cuts)
    whole, pieces = (make_cache(64, kernels, reuse=reuse) for _ in range(2))
    wanted = feed(make_cache(None, kernels), [total])
    torch.testing.assert_close(feed(whole, [total]), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(feed(pieces, [500, *cuts], prompt=True), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(feed(pieces, [1] * 4), feed(whole, [1] * 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("reuse", [1, 4])
def test_the_step_reads_sinks_recent_tokens_and_listed_blocks_and_nothing_else(kernels: str, reuse: int) -> None:
    """Against softmax over exactly those keys, in float64; the lists come from the cache and are checked elsewhere."""
    cache = make_cache(256, kernels, reuse=reuse)
    feed(cache, [1100])
    assert cache.selection is not None
    size, exact = cache.layout.block_size, cache.exact_recent
    for _ in range(70):
        position = cache.num_tokens
        out = feed(cache, [1])[0]
        q, k, v = inputs(0, position + 1)
        row = 0
        for layer in range(2):
            for head, retrieval in enumerate(PLAN.retrieval[layer]):
                if not retrieval:
                    continue
                listed = cache.selection.lists[row].tolist()
                assert listed == sorted(set(listed)) and listed[-1] == (position - exact) // size
                keys, values = k[:, layer, head].double(), v[:, layer, head].double()
                visible = torch.zeros(position + 1, dtype=torch.bool)
                visible[: PLAN.sink_size] = True
                visible[position - exact + 1 :] = True
                for block in listed:
                    span = torch.arange(block * size, (block + 1) * size)
                    inside = (span >= PLAN.sink_size) & (position - span >= exact)
                    record = cache.pool.take(cache.pool.table[row, block : block + 1])
                    for which, stored in (("key", keys), ("value", values)):
                        x = decode_blocks(record, cache.layout, which, dtype=torch.float64)[0]  # type: ignore[arg-type]
                        stored[span[inside]] = hadamard(x)[inside]
                    visible[span[inside]] = True
                for g in range(GROUP):
                    scores = keys @ q[position, layer, head * GROUP + g].double() / HEAD_DIM**0.5
                    weights = scores.masked_fill(~visible, float("-inf")).softmax(0)
                    wanted = weights @ values
                    torch.testing.assert_close(out[layer, head * GROUP + g].double(), wanted, rtol=1e-4, atol=1e-4)
                row += 1


@given(
    before=st.integers(300, 900),
    steps=st.integers(1, 90),
    budget=st.sampled_from([64, 192, 320]),
    reuse=st.sampled_from([1, 3, 4]),
    kv=st.sampled_from(["int4", "int8", "fp8", "16"]),
)
@settings(max_examples=25, deadline=None)
def test_both_paths_choose_and_compute_alike(before: int, steps: int, budget: int, reuse: int, kv: str) -> None:
    caches = [make_cache(budget, kernels, kv=kv, reuse=reuse) for kernels in KERNELS]
    outs = [feed(cache, [before, *[1] * steps]) for cache in caches]
    one, other = (cache.selection for cache in caches)
    assert one is not None and other is not None
    blocks = caches[0].pool.num_blocks
    # A rounding may fall the other way in one digest of a thousand; a list then differs only between near equals.
    same = (one.digests[:, :blocks] == other.digests[:, :blocks]).float().mean()
    assert same > 0.99
    assert torch.equal(one.made_at, other.made_at)
    if torch.equal(one.lists, other.lists):
        torch.testing.assert_close(outs[0][-1], outs[1][-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kv", ["int4", "k8v4", "16"])
@pytest.mark.parametrize("tokens", [600, 900, 1600])  # as many blocks as are read or fewer, as candidates, and more
def test_lists_hold_what_is_seen_most_among_the_best_scores(kernels: str, kv: str, tokens: int) -> None:
    cache = make_cache(256, kernels, kv=kv)
    feed(cache, [tokens, 1])
    assert cache.selection is not None
    q, _, _ = inputs(tokens, 1)
    newest = (tokens - cache.exact_recent) // 64
    for row, (layer, head) in enumerate(((0, 0), (0, 2), (1, 1))):
        group = q[0, layer, head * GROUP : (head + 1) * GROUP]
        picked = cache.selection.channels[row]
        scores = score_digests(group, cache.selection.digests[row, :newest], picked, block_size=64)
        candidates = scores.topk(min(newest, CANDIDATES * 4)).indices.sort().values
        keys = torch.stack([keys_of(cache, row, block) for block in candidates.tolist()]).double()
        logits = torch.einsum("gd,ntd->gnt", group.double(), keys) / HEAD_DIM**0.5
        if int(candidates[0]) == 0:
            logits[:, 0, : PLAN.sink_size] = -torch.inf
        attention = logits.flatten(1).softmax(1).view(GROUP, len(candidates), 64).sum((0, 2))
        best = candidates[attention.topk(min(newest, 4)).indices]
        assert cache.selection.lists[row, : min(newest, 4) + 1].tolist() == [*sorted(best.tolist()), newest]


def test_sinks_do_not_speak_for_the_first_block() -> None:
    """Sinks that a head looks at most are read from the ring: their block is not chosen for them."""
    cache = make_cache(64)
    q, k, v = inputs(0, 1600)
    k[: PLAN.sink_size, 0, 0] = q[1599, 0, :GROUP].sum(0) * 3
    k[517, 0, 0] = q[1599, 0, :GROUP].sum(0)
    feed_these(cache, q, k, v)
    assert cache.selection is not None
    digests = cache.selection.digests[0, :22]
    scores = score_digests(q[1599, 0, :GROUP], digests, cache.selection.channels[0], block_size=64)
    assert int(scores.argmax()) == 0 and int(cache.selection.lists[0, 0]) == 517 // 64


def test_a_needle_is_found_among_many_blocks() -> None:
    """A key along the query, in a block far away: its head's list has that block, the others' need not."""
    cache = make_cache(64)
    q, k, v = inputs(0, 1600)
    needle = 517
    for row_layer, head in ((0, 0), (0, 2), (1, 1)):
        query = q[1599, row_layer, head * GROUP + 1]  # one of the query heads is enough
        k[needle, row_layer, head] = query / query.norm() * 24
    feed_these(cache, q, k, v)
    assert cache.selection is not None
    assert cache.selection.lists[:, 0].tolist() == [needle // 64] * 3


@pytest.mark.parametrize("kernels", KERNELS)
def test_lists_are_made_anew_when_they_must(kernels: str) -> None:
    cache = make_cache(64, kernels, reuse=4)
    feed(cache, [1000])
    selection = cache.selection
    assert selection is not None and (selection.made_at == -1).all()
    made = []
    for _ in range(30):
        before = selection.made_at.clone()
        feed(cache, [1])
        if not torch.equal(before, selection.made_at):
            made.append(cache.num_tokens - 1)
    # At the first, at multiples of 4, and where position - 128 enters another block: 1024 + ... is a multiple of 4 too.
    assert made == [1000, *range(1004, 1030, 4)]
    snapshot = cache.snapshot()
    cache.restore(snapshot)
    assert (selection.made_at == -1).all()
    feed(cache, [1])
    cache.begin(1, decode=True)
    cache.rollback()
    assert (selection.made_at == -1).all()


@pytest.mark.cover(2)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("outer", ["memory", "disk"])
@pytest.mark.parametrize("slots", [0, 3, 7])
def test_offloaded_equals_in_memory_bit_for_bit(kernels: str, slots: int, outer: str, tmp_path: Path) -> None:
    whole = make_cache(256, kernels, reuse=4)
    room = PLAN.num_retrieval * (CONTEXT // 64 * 8 + slots * (whole.layout.record_bytes + 8))
    parts = make_cache(256, kernels, reuse=4, where=Placement(room, outer, tmp_path))  # type: ignore[arg-type]
    assert parts.pool.num_slots == slots and parts.pool.tiered
    cuts = [1500, *[1] * 100, 64, *[1] * 9]
    assert torch.equal(feed(parts, cuts), feed(whole, cuts))
    blocks = parts.pool.num_blocks
    for row, slot in (parts.pool.tags >= 0).nonzero().tolist():
        block = int(parts.pool.tags[row, slot])
        assert int(parts.pool.table[row, block]) == row * slots + slot and slot == block % slots
        assert torch.equal(parts.pool.records[row * slots + slot], parts.pool.read(block, block + 1)[0, row])
    assert torch.equal(parts.pool.read(0, blocks), whole.pool.read(0, blocks))
    if kernels == "compiled" and slots == 7:  # what was listed last was fetched, unless two wanted one slot
        assert parts.selection is not None
        for row in range(PLAN.num_retrieval):
            listed = parts.selection.lists[row].tolist()
            held = set(parts.pool.tags[row].tolist())
            alone = [b for b in listed if sum(b % slots == other % slots for other in listed) == 1]
            assert set(alone) <= held


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_context_read_back_selects_as_before(kernels: str) -> None:
    cache, other = make_cache(256, kernels), make_cache(256, kernels)
    feed(cache, [1300])
    blocks = cache.pool.num_blocks
    other.resume(cache.read_ring(), num_tokens=1300, first_block=0, columns=[cache.pool.read(0, blocks)])
    assert cache.selection is not None and other.selection is not None
    assert torch.equal(cache.selection.digests[:, :blocks], other.selection.digests[:, :blocks])
    assert torch.equal(feed(cache, [1] * 5), feed(other, [1] * 5))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_digests_say_what_they_say(block_size: int) -> None:
    """Middle and half width of each run, within the rounding of 4 bits: the score is the bound that no key exceeds."""
    layout = BlockLayout(*(kv_layout("int8", head_dim=32, dtype=torch.float32).key,) * 2, block_size, 32)
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(5, block_size, 32, generator=generator) * torch.rand(32, generator=generator).mul(4)
    records = encode_blocks(keys, keys, layout)
    picked = torch.tensor([3, 9, 1, 30, 8, 17], dtype=torch.int32)
    centre = torch.randn(6, generator=generator)
    digests = make_digests(records, layout, picked, centre)
    assert digests.shape == (5, digest_bytes(block_size, 6))
    q = torch.randn(3, 32, generator=generator)
    stored = decode_blocks(records, layout, "key", dtype=torch.float64)[..., picked.long()]
    low, high = (getattr(stored.view(5, num_runs(block_size), -1, 6), name)(2).values for name in ("min", "max"))
    chosen = q[:, picked.long()].double()
    middle, width = (low + high) / 2 - centre, (high - low) / 2
    bounds = torch.maximum((low - centre)[:, :, None] * chosen, (high - centre)[:, :, None] * chosen).sum(-1)
    wanted = bounds.amax((1, 2))
    # A vector of range r is rounded by at most r / 30 per channel, and by float16.
    step = sum((x.amax(-1) - x.amin(-1)).max() / 30 + 0.01 for x in (middle, width))
    bound = float(step * chosen.abs().sum(1).max())
    got = score_digests(q, digests, picked, block_size=block_size)
    assert (got.double() - wanted).abs().max() < bound
    assert got.argmax() == wanted.argmax() or float(wanted.max() - wanted[got.argmax()]) < 2 * bound
