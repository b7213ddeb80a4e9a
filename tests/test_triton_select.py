"""Selected decode on the GPU: digests, scores, lists, copies and attention, each against what defines it.

Digests are judged by `make_digests` and by the keys themselves, candidates by sorting float64 scores, lists by float64
softmaxes over the candidates' keys, copies by the records in their homes, attention by the dense float64 oracle of
test_triton_decode.py over the listed blocks only.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from duolocal.cache import Placement
from duolocal.cache.pool import BlockPool
from duolocal.cache.selection import occasion
from duolocal.kernels.blocks import decode_blocks, encode_blocks, hadamard
from duolocal.kernels.digest import (
    CANDIDATES,
    RUN,
    digest_bytes,
    digest_channels,
    make_digests,
    num_runs,
    score_digests,
    weigh_blocks,
)
from duolocal.kernels.gpu import select
from duolocal.kernels.gpu.decode import decode_attention, partial_shape
from duolocal.kernels.gpu.digest import digest_blocks
from duolocal.kernels.gpu.layer_cache import LayerCache, LayerSelection
from duolocal.kernels.gpu.select import select_blocks
from duolocal.quant.kv import KV_FORMATS, kv_layout
from tests.pool_checks import check_table
from tests.test_triton_decode import make_queries, make_state, oracle, store
from tests.triton_device import COMPUTE_DTYPES, DEVICE, INTERPRETED

# The newest complete block is poison in these tests, and so is its digest.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")


def selecting(cache: LayerCache, *, budget: int, reuse: int = 4, seed: int = 7) -> LayerCache:
    """Return the cache with a selection whose memory is poison, and whose lists are still to be made."""
    rows, dim, blocks = cache.num_retrieval, cache.head_dim, cache.max_blocks
    count = digest_channels(dim)
    generator = torch.Generator().manual_seed(seed)
    channels = torch.stack([torch.randperm(dim, generator=generator)[:count] for _ in range(rows)])
    size, group = digest_bytes(cache.layout.block_size, count), cache.query_group
    selection = LayerSelection(
        digests=torch.full((rows, blocks, size), 0xFF, dtype=torch.uint8, device=DEVICE),
        lists=torch.full((rows, budget + 1), -(10**6), dtype=torch.int32, device=DEVICE),
        made_at=torch.full((rows,), -1, dtype=torch.int64, device=DEVICE),
        channels=channels.int().to(DEVICE),
        centre=torch.randn(rows, count, generator=generator).to(DEVICE),
        scores=torch.full((rows + 1, blocks), float("nan"), device=DEVICE),
        candidates=torch.full((rows + 1, CANDIDATES * budget), -(10**6), dtype=torch.int32, device=DEVICE),
        weights=torch.full((rows + 1, group, CANDIDATES * budget), float("nan"), device=DEVICE),
        reuse=reuse,
    )
    return dataclasses.replace(cache, selection=selection)


def digested(cache: LayerCache, **more: int) -> LayerCache:
    """Return the cache with a selection that knows every block which a token at `start` sees, but for the newest."""
    cache = selecting(cache, **more)
    first, newest = seen_blocks(cache)
    digest_blocks(cache, first, newest)
    return cache


def seen_blocks(cache: LayerCache) -> tuple[int, int]:
    """Return the first and the newest block that the token at `start` sees; -1 for the newest where there is none."""
    size, end = cache.layout.block_size, int(cache.start) - cache.recent_size + 1
    return (cache.sink_size // size, (end - 1) // size) if end > cache.sink_size else (0, -1)


def selection_of(cache: LayerCache) -> LayerSelection:
    assert cache.selection is not None
    return cache.selection


# --- digests ----------------------------------------------------------------------------------------------------------


@pytest.mark.cover(1)
@pytest.mark.parametrize(
    ("kv", "head_dim", "block_size"),
    [(kv, 64, 64) for kv in KV_FORMATS]
    + [("int4", 16, 64), ("int4", 80, 16), ("int4", 96, 32), ("int4", 128, 128), ("int4", 256, 64), ("int8", 16, 16)],
)
def test_digests_are_those_of_the_definition(kv: str, head_dim: int, block_size: int) -> None:
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    cache, _, _ = make_state(kv, head_dim=head_dim, start=300, dtype=dtype, block_size=block_size, sink_size=0)
    cache = selecting(cache, budget=1)
    selection, last = selection_of(cache), 128 // block_size
    digest_blocks(cache, 0, last)
    assert bool((selection.digests[:, last:] == 0xFF).all())
    for row in range(cache.num_retrieval):
        records = cache.records[cache.table[row, :last]].cpu()
        wanted = make_digests(records, cache.layout, selection.channels[row].cpu(), selection.centre[row].cpu())
        same_digests(selection.digests[row, :last].cpu(), wanted, selection.num_channels)


def same_digests(got: Tensor, wanted: Tensor, num_channels: int) -> None:
    """Say that digests differ at most by how float32 sums come: a code by one, a scale or minimum by its last bit."""
    got, wanted = (x.unflatten(-1, (-1, num_channels // 2 + 4)) for x in (got, wanted))
    codes = num_channels // 2
    ends = [x[..., codes:].contiguous().view(torch.int16).int() for x in (got, wanted)]
    assert int((ends[0] - ends[1]).abs().max()) <= 1, (ends[0] - ends[1]).abs().max()
    nibbles = [torch.cat((x[..., :codes] & 15, x[..., :codes] >> 4), -1).int() for x in (got, wanted)]
    difference = (nibbles[0] - nibbles[1]).abs()
    assert int(difference.max()) <= 1 and float((difference != 0).double().mean()) < 0.01


def test_a_digest_encloses_its_keys() -> None:
    """Middle and half width, decoded, hold every key of the run up to a step of their codes."""
    cache, k, _ = make_state("32", head_dim=64, start=300, dtype=torch.float32, retrieval=(True,), sink_size=0)
    cache = selecting(cache, budget=1)
    selection = selection_of(cache)
    digest_blocks(cache, 0, 2)
    keys = k[:128, 0].cpu()[:, selection.channels[0].cpu().long()].view(2, 8, RUN, -1)
    vectors = selection.digests[0, :2].cpu().view(2, 8, 2, -1)
    codes = torch.cat((vectors[..., :16] & 15, vectors[..., :16] >> 4), -1).float()
    scale, low = (vectors[..., at : at + 2].contiguous().view(torch.float16).float() for at in (16, 18))
    middle, width = (codes * scale + low).unbind(2)
    slack = (scale.sum(2) * 0.51 + 0.01)[:, :, None]
    away = (keys - (middle + selection.centre[0].cpu())[:, :, None]).abs()
    assert bool((away <= width[:, :, None] + slack).all())
    assert bool((away.amax(2) >= width - slack[:, :, 0]).all())


# --- lists ------------------------------------------------------------------------------------------------------------


def scores_of(cache: LayerCache, q: Tensor, row: int) -> Tensor:
    """Return the float64 scores of the visible blocks but the newest, from the digests as they are."""
    selection, layout, group = selection_of(cache), cache.layout, cache.query_group
    first, newest = seen_blocks(cache)
    vectors = selection.digests[row, first:newest].cpu().view(newest - first, num_runs(layout.block_size), 2, -1)
    half = selection.num_channels // 2
    codes = torch.cat((vectors[..., :half] & 15, vectors[..., :half] >> 4), -1).double()
    scale, low = (vectors[..., at : at + 2].contiguous().view(torch.float16).double() for at in (half, half + 2))
    middle, width = (codes * scale + low).unbind(2)
    head = int(cache.retrieval_heads[row])
    picked = q[0, head * group : (head + 1) * group, selection.channels[row].long()].cpu().double()
    return (middle @ picked.mT + width @ picked.abs().mT).amax((1, 2))


def keys_of(cache: LayerCache, row: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float64 keys [blocks, block_size, head_dim] of a row, as its records have them, and which are seen."""
    size = cache.layout.block_size
    keys = decode_blocks(cache.records[cache.table[row, blocks]].cpu(), cache.layout, "key", dtype=torch.float64)
    return keys, blocks.cpu()[:, None] * size + torch.arange(size) >= cache.sink_size


def queries_of(cache: LayerCache, q: Tensor, row: int) -> Tensor:
    """Return the queries [group, head_dim] of a row."""
    head, group = int(cache.retrieval_heads[row]), cache.query_group
    return q.view(cache.num_heads, -1)[head * group : (head + 1) * group].cpu()


def check_lists(cache: LayerCache, q: Tensor, q_blocks: Tensor) -> None:
    """Judge candidates and lists by float64 numbers; where two are nearly equal, either block may be taken."""
    selection = selection_of(cache)
    first, newest = seen_blocks(cache)
    count = newest - first
    kept = min(count, selection.budget)
    for row in range(cache.num_retrieval):
        found = selection.candidates[row, :count].long()
        assert rising(found, first, newest)
        if count > selection.num_candidates:
            check_candidates(cache, q, row, found.cpu() - first)
        listed = selection.lists[row, : kept + 1].long()
        assert rising(listed, first, newest + 1) and int(listed[-1]) == newest
        assert bool(torch.isin(listed[:-1], found).all())
        if count > kept:
            taken = torch.isin(found, listed[:-1]).cpu()
            weights = check_weights(cache, q, q_blocks, row, found)
            assert bool((weights[taken] >= weights.sort(descending=True).values[kept - 1] * (1 - 1e-4)).all())


def rising(numbers: Tensor, low: int, high: int) -> bool:
    """Whether numbers rise within low..high-1."""
    edges = torch.tensor([low - 1, *numbers.tolist(), high])
    return bool((edges.diff() > 0).all())


def check_candidates(cache: LayerCache, q: Tensor, row: int, found: Tensor) -> None:
    """Judge scores, and the candidates, which are counted from the first visible block."""
    selection = selection_of(cache)
    first, newest = seen_blocks(cache)
    scores = scores_of(cache, q, row)
    near = 1e-5 * scores.abs().max()
    assert bool((scores[found] >= scores.sort(descending=True).values[len(found) - 1] - near).all())
    ours = selection.scores[row, : newest - first].cpu()
    reference = score_digests(
        queries_of(cache, q, row),
        selection.digests[row, first:newest].cpu(),
        selection.channels[row].cpu(),
        block_size=cache.layout.block_size,
    )
    assert bool(((ours - scores).abs() <= near).all()) and bool(((ours - reference).abs() <= near).all())


def check_weights(cache: LayerCache, q: Tensor, q_blocks: Tensor, row: int, found: Tensor) -> Tensor:
    """Judge the weights of candidates by query head; return their shares of attention, added up, float64."""
    keys, seen = keys_of(cache, row, found)
    logits = torch.einsum("gd,ntd->gnt", queries_of(cache, q_blocks, row).double(), keys) / cache.head_dim**0.5
    wanted = logits.masked_fill(~seen, float("-inf")).exp().sum(-1).log()
    ours = selection_of(cache).weights[row, :, : len(found)].cpu() * math.log(2)
    assert bool(((ours - wanted).abs() <= 1e-5 * (1 + logits.abs().max())).all()), (ours - wanted).abs().max()
    weights = torch.stack([torch.exp(x) / torch.exp(x).sum() for x in wanted]).sum(0)
    records = cache.records[cache.table[row, found]].cpu()
    hidden = int((~seen[0]).sum())
    reference = weigh_blocks(queries_of(cache, q, row), records, cache.layout, hidden=hidden)
    assert bool(((weights - reference).abs() <= 2e-2 * weights).all())  # q_blocks is rounded once more
    return weights


@pytest.mark.cover(1)
@pytest.mark.parametrize(
    ("kv", "head_dim", "block_size", "group", "sink_size", "start", "budget"),
    [
        ("int4", 64, 16, 2, 5, 400, 3),
        ("int4", 128, 64, 8, 70, 511, 2),
        ("16", 80, 16, 3, 0, 330, 7),
        ("int8", 16, 16, 1, 33, 500, 1),
        ("fp8", 64, 32, 16, 64, 480, 40),
        ("fp8", 64, 32, 3, 40, 400, 3),
        ("k8v4", 16, 128, 4, 70, 700, 1),  # the first tile of tokens is all sinks
    ],
)
def test_lists_hold_the_best(
    kv: str, head_dim: int, block_size: int, group: int, sink_size: int, start: int, budget: int
) -> None:
    cache, _, _ = make_state(
        kv,
        head_dim=head_dim,
        start=start,
        dtype=COMPUTE_DTYPES[0],
        group=group,
        sink_size=sink_size,
        block_size=block_size,
    )
    cache = digested(cache, budget=budget)
    q, q_blocks = make_queries(cache)
    select_blocks(cache, q, q_blocks)
    check_lists(cache, q, q_blocks)
    selection, rows = selection_of(cache), cache.num_retrieval
    first, newest = seen_blocks(cache)
    count = newest - first
    assert bool((selection.lists[:, min(count, budget) + 1 :] == -(10**6)).all())
    assert bool((selection.candidates[:, count:] == -(10**6)).all())
    assert selection.made_at.tolist() == [occasion(start, newest, reuse=4)] * rows
    # What is not needed is not worked out.
    assert bool(selection.scores[:rows, :count].isnan().all()) == (count <= selection.num_candidates)
    assert bool(selection.weights[:rows, :, :count].isnan().all()) == (count <= budget)
    assert bool(selection.weights[:rows, :, count:].isnan().all())


def test_only_candidates_are_looked_at() -> None:
    """The records of all others are poison, and the list stays."""
    cache, _, _ = make_state(
        "int4", head_dim=16, start=400, dtype=COMPUTE_DTYPES[0], group=1, block_size=16, retrieval=(False, True)
    )
    cache = digested(cache, budget=2)
    q, q_blocks = make_queries(cache)
    select_blocks(cache, q, q_blocks)
    selection = selection_of(cache)
    first, newest = seen_blocks(cache)
    lists, found = selection.lists.clone(), selection.candidates[0].tolist()
    others = [block for block in range(first, newest + 1) if block not in found]
    assert len(found) == CANDIDATES * 2 and len(others) == newest + 1 - first - len(found) > 0
    cache.records[cache.table[0, others]] = 0xFF
    selection.made_at.fill_(-1)
    selection.lists.fill_(-1)
    select_blocks(cache, q, q_blocks)
    assert torch.equal(lists, selection.lists)


@pytest.mark.parametrize("hidden", [True, False])
def test_sinks_in_the_first_block_do_not_weigh(hidden: bool) -> None:
    """What the query is after lies in the first block: before the last sink, where the ring has it, or behind."""
    cache, k, v = make_state("int8", head_dim=16, start=330, dtype=COMPUTE_DTYPES[0], group=1, sink_size=50)
    q, q_blocks = make_queries(cache)
    for head in cache.retrieval_heads.tolist():
        k[50:, head] *= 0.1
        k[49 if hidden else 50, head] = (q[0, head].float() * 3).to(k.dtype)
    store(cache, k, v)
    cache = digested(cache, budget=1)
    select_blocks(cache, q, q_blocks)
    check_lists(cache, q, q_blocks)
    assert bool((selection_of(cache).lists[:, 0] == 0).all()) != hidden


@pytest.mark.parametrize("chunk", [select.CHUNK, 8])
@settings(max_examples=12 if INTERPRETED else 100, deadline=None)
@given(data=st.data())
def test_of_equal_scores_the_older_and_rising(chunk: int, data: st.DataObject) -> None:
    """Candidates alone, of scores given, with many ties, signs and zeros; also where a row takes several chunks."""
    count = data.draw(st.integers(1, 30), label="blocks")
    budget = data.draw(st.integers(1, 6), label="budget")
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, -3e38, 3e38, 2.5])
    scores = torch.tensor(data.draw(st.lists(values, min_size=count, max_size=count), label="scores"))
    cache = one_row(count, budget=budget)
    selection = selection_of(cache)
    selection.scores[0, :count] = scores.to(DEVICE)
    chunk = min(chunk, 64)
    select.choose_blocks_kernel[(1,)](
        selection.scores,
        selection.candidates,
        selection.made_at,
        cache.start,
        33,
        4,
        **SIZES,
        NUM_CANDIDATES=selection.num_candidates,
        CHUNK=chunk,
        WHOLE=chunk >= 33,
        TILE=8,
    )
    # -0.0 and 0.0 are told apart by their bits, and the order of both is one that sorting may have.
    key = torch.where(scores == 0, torch.where(torch.signbit(scores), -1e-45, 0.0), scores.double())
    order = sorted(range(count), key=lambda block: (-float(key[block]), block))[: CANDIDATES * budget]
    assert selection.candidates[0, : len(order)].tolist() == sorted(order)
    assert bool((selection.candidates[0, len(order) :] == -(10**6)).all()) and int(selection.made_at) == -1


SIZES = {"SINK": 0, "RECENT": 128, "BLOCK_SIZE": 16}


def one_row(count: int, *, budget: int) -> LayerCache:
    """Return a cache of one row and two query heads that sees `count` blocks and the newest; nothing is in it."""
    cache, _, _ = make_state("int4", head_dim=16, start=0, dtype=COMPUTE_DTYPES[0], block_size=16, sink_size=0)
    start, table = torch.tensor([128 + 16 * count]), torch.zeros(1, 33, dtype=torch.int64)
    return selecting(dataclasses.replace(cache, start=start.to(DEVICE), table=table.to(DEVICE)), budget=budget)


@settings(max_examples=8 if INTERPRETED else 100, deadline=None)
@given(data=st.data())
def test_of_equal_weights_the_older_and_rising(data: st.DataObject) -> None:
    """The list alone, of weights given, with many ties; the second query head attends to all alike."""
    count = data.draw(st.integers(1, 14), label="candidates")
    budget = data.draw(st.integers(-(-count // CANDIDATES), 9), label="budget")
    weights = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 2.0, 5.0]), min_size=count, max_size=count))
    cache = one_row(count, budget=budget)
    selection = selection_of(cache)
    numbers = torch.arange(count)
    selection.candidates[0, :count] = numbers.to(DEVICE)
    selection.weights[0, :, :count] = torch.stack((torch.tensor(weights) - 300, torch.full((count,), 1e4))).to(DEVICE)
    select.rank_blocks_kernel[(1,)](
        selection.candidates,
        selection.weights,
        selection.lists,
        selection.made_at,
        cache.start,
        4,
        **SIZES,
        BUDGET=budget,
        NUM_CANDIDATES=selection.num_candidates,
        GROUP=2,
        GROUP_PAD=2,
        WIDTH=32,
    )
    order = sorted(range(count), key=lambda block: (-weights[block], block))[:budget]
    assert selection.lists[0, : len(order) + 1].tolist() == [*sorted(order), count]
    assert int(selection.made_at) == occasion(int(cache.start), count, reuse=4)


def test_lists_are_made_anew_when_due() -> None:
    """By position, by a new block in sight, and after `forget`: never otherwise."""
    reuse = 5
    cache, _, _ = make_state(
        "int4", head_dim=16, start=420, dtype=COMPUTE_DTYPES[0], block_size=16, sink_size=4, retrieval=(False, True)
    )
    cache = selecting(cache, budget=2, reuse=reuse)
    digest_blocks(cache, 0, 20)
    selection = selection_of(cache)
    made = None
    for start in (400, 401, 404, 405, 415, 416):
        cache.start.fill_(start)
        q, q_blocks = make_queries(cache, seed=start)
        worked = [selection.lists, selection.scores, selection.candidates, selection.weights]
        before = [x.clone() for x in worked]
        select_blocks(cache, q, q_blocks)
        now = occasion(start, (start - 128) // 16, reuse=reuse)
        if now != made:
            check_lists(cache, q, q_blocks)
        else:
            assert all(
                torch.equal(x.view(torch.int32), old.view(torch.int32)) for x, old in zip(worked, before, strict=True)
            )
        made = now
    selection.made_at.fill_(-1)
    selection.lists.fill_(-1)
    select_blocks(cache, q, q_blocks)
    check_lists(cache, q, q_blocks)


def test_nothing_is_listed_before_a_block_is_seen() -> None:
    """5 sinks, 128 recent tokens: from position 133 on."""
    cache, _, _ = make_state("int4", head_dim=16, start=140, dtype=COMPUTE_DTYPES[0], block_size=16, sink_size=5)
    cache = selecting(cache, budget=2)
    q, q_blocks = make_queries(cache)
    for start, listed in ((0, False), (127, False), (132, False), (133, True)):
        cache.start.fill_(start)
        select_blocks(cache, q, q_blocks)
        assert bool((selection_of(cache).made_at >= 0).all()) == listed
    assert selection_of(cache).lists[:, 0].tolist() == [0, 0]


def test_the_newest_block_gets_its_digest_when_lists_are_made() -> None:
    cache, _, _ = make_state(
        "int8", head_dim=16, start=420, dtype=COMPUTE_DTYPES[0], block_size=16, sink_size=0, retrieval=(True,)
    )
    records = encode_blocks(torch.randn(1, 16, 16), torch.randn(1, 16, 16), cache.layout).to(DEVICE)
    cache.records[cache.table[:, 14]] = records  # of positions 224 .. 239, completed by the step at 239
    cache = selecting(cache, budget=1)
    selection = selection_of(cache)
    q, q_blocks = make_queries(cache)
    for start, made in ((238, False), (239, True), (240, True), (254, True)):
        selection.digests[:, 14] = 0xFF
        selection.made_at.fill_(-1)
        cache.start.fill_(start)
        select_blocks(cache, q, q_blocks)
        assert bool((selection.digests[:, 14] != 0xFF).any()) == made
    wanted = selection.digests.clone()
    selection.digests[:, 14] = 0xFF
    select_blocks(cache, q, q_blocks)  # no list is due
    assert bool((selection.digests[:, 14] == 0xFF).all())
    digest_blocks(cache, 14, 15)
    assert torch.equal(wanted, selection.digests)


# --- copies -----------------------------------------------------------------------------------------------------------


def test_listed_blocks_come_to_slots() -> None:
    """Slots of a pool whose homes lie elsewhere: after every choice the table, the tags and the bytes agree."""
    layout = kv_layout("int4", head_dim=16, dtype=COMPUTE_DTYPES[0], block_size=16)
    rows, blocks, slots = 2, 20, 5
    row_bytes = blocks * 8 + slots * (layout.record_bytes + 8)
    pool = BlockPool(
        layout,
        num_rows=rows,
        max_blocks=blocks,
        device=DEVICE,
        placement=Placement(rows * row_bytes),
    )
    assert pool.tiered and pool.num_slots == slots
    pool.grow(blocks)
    generator = torch.Generator().manual_seed(1)
    records = torch.randint(0, 256, (rows * blocks, layout.record_bytes), dtype=torch.uint8, generator=generator)
    pool.put(pool.table.flatten(), records.to(DEVICE))
    pool.settle(0)
    base, _, _ = make_state("int4", head_dim=16, start=0, dtype=COMPUTE_DTYPES[0], block_size=16, sink_size=0)
    # The second row alone, as a layer that is not the first has it.
    for first in (0, 1):
        cache = dataclasses.replace(base, records=pool.records, table=pool.table[first:])
        cache = selecting(cache, budget=4)
        selection = dataclasses.replace(
            selection_of(cache),
            tags=pool.tags[first:],
            first_slot=first * slots,
            first_home=pool.first_home + first * blocks,
        )
        for listed in ([0, 1, 2, 3, 4], [1, 5, 6, 10, 19], [0, 5, 10, 15, 19], [5, 6, 7, 8, 9], [0, 5, 10, 15, 16]):
            before = pool.tags[first].tolist()
            selection.lists[:] = torch.tensor(listed, dtype=torch.int32, device=DEVICE)
            start = torch.tensor([128 + 16 * listed[-1]], device=DEVICE)
            fetch(dataclasses.replace(cache, start=start, selection=selection))
            check_places(pool, records.view(rows, blocks, -1))
            for slot, held in enumerate(pool.tags[first].tolist()):
                wanted = [block for block in listed if block % slots == slot]
                if not wanted or before[slot] in wanted:
                    assert held == before[slot]
                else:
                    assert held == wanted[0]


def fetch(cache: LayerCache) -> None:
    selection = selection_of(cache)
    assert selection.tags is not None
    words = cache.layout.record_bytes // 8
    select.fetch_blocks_kernel[(selection.budget + 1, cache.num_retrieval)](
        cache.records.view(torch.int64),
        cache.table,
        selection.tags,
        selection.lists,
        cache.start,
        selection.first_slot,
        selection.first_home,
        cache.table.stride(0),
        selection.tags.shape[1],
        BUDGET=selection.budget,
        LIST_PAD=8,
        SINK=0,
        RECENT=128,
        BLOCK_SIZE=16,
        WORDS=words,
        TILE=16,
    )


def check_places(pool: BlockPool, records: Tensor) -> None:
    """The pool's invariant, and that the table leads to the right bytes."""
    check_table(pool)
    for row in range(pool.num_rows):
        assert torch.equal(pool.take(pool.table[row]).cpu(), records[row])


# --- attention --------------------------------------------------------------------------------------------------------


def listed_oracle(cache: LayerCache, q: Tensor, q_blocks: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `oracle` does where blocks that are not listed are hidden, and the size of the values."""
    n, layout, group = k.shape[0], cache.layout, cache.query_group
    dense, size = oracle(cache, q, q_blocks, k, v)
    first, newest = seen_blocks(cache)
    lists, j = selection_of(cache).lists, torch.arange(n)
    for row, head in enumerate(cache.retrieval_heads.tolist()):
        exact = (j < cache.sink_size) | (n - 1 - j < cache.recent_size)
        listed = lists[row, : min(newest - first, selection_of(cache).budget) + 1].tolist()
        behind = ~exact & torch.isin(j // layout.block_size, torch.tensor(listed))
        keys, values = torch.zeros(2, n, cache.head_dim, dtype=torch.float64)
        for block in listed:
            record = cache.records[cache.table[row, block]][None].cpu()
            span = slice(block * layout.block_size, (block + 1) * layout.block_size)
            keys[span] = decode_blocks(record, layout, "key", dtype=torch.float64)[0][: n - span.start]
            decoded = decode_blocks(record, layout, "value", dtype=torch.float64)[0]
            values[span] = hadamard(decoded) if layout.value.rotate else decoded
        ring_keys, ring_values = k[:, head].double().cpu(), v[:, head].double().cpu()
        for query in range(head * group, (head + 1) * group):
            scores = torch.where(behind, keys @ q_blocks[query].double().cpu(), ring_keys @ q[0, query].double().cpu())
            weights = (scores / cache.head_dim**0.5).masked_fill(~(exact | behind), float("-inf")).softmax(-1)
            dense[query] = (weights * exact) @ ring_values + (weights * behind) @ values
            size[query] = (weights * torch.where(behind, values.abs().amax(-1), ring_values.abs().amax(-1))).sum()
    return dense, size


@pytest.mark.cover(1)
@pytest.mark.parametrize(
    ("kv", "head_dim", "block_size", "sink_size", "start", "budget", "splits"),
    [
        ("int4", 64, 64, 5, 511, 2, 2),
        ("int4", 64, 64, 5, 511, 100, 3),
        ("int4", 128, 64, 70, 500, 1, 1),
        ("16", 64, 16, 20, 300, 4, 3),
        ("int8", 96, 32, 0, 301, 2, 8),
        ("fp8", 64, 128, 1, 640, 2, 2),
        ("k8v4", 64, 64, 64, 400, 1, 4),
        ("32", 64, 64, 5, 133, 2, 2),
        ("32", 64, 64, 5, 132, 2, 2),
    ],
)
def test_attention_reads_what_is_listed(
    kv: str, head_dim: int, block_size: int, sink_size: int, start: int, budget: int, splits: int
) -> None:
    dtype = COMPUTE_DTYPES[start % 2]
    cache, k, v = make_state(
        kv, head_dim=head_dim, start=start, dtype=dtype, block_size=block_size, sink_size=sink_size, group=3
    )
    first, newest = seen_blocks(cache)
    cache = digested(cache, budget=budget) if newest >= first else selecting(cache, budget=budget)
    q, q_blocks = make_queries(cache)
    select_blocks(cache, q, q_blocks)
    if start > 400:  # what is not listed is not read
        lists = selection_of(cache).lists
        count = min(newest - first, budget) + 1
        for row in range(cache.num_retrieval):
            others = [block for block in range(first, newest + 1) if block not in lists[row, :count].tolist()]
            cache.records[cache.table[row, others]] = 0xFF
    shape = partial_shape(cache, block_splits=splits)
    nan = torch.full(shape, float("nan"), device=DEVICE)
    out = decode_attention(
        cache, q, q_blocks, block_splits=splits, partial_out=nan, partial_lse=nan[..., 0].contiguous()
    )
    shown = dataclasses.replace(cache, records=torch.where(cache.records == 0xFF, 0, cache.records))
    _, size = listed_oracle(shown, q, q_blocks, k, v)
    wanted, _ = listed_oracle(cache, q, q_blocks, k, v)
    planes = (cache.layout.key, cache.layout.value)
    coarse = torch.float16 if any(plane.bits < 32 for plane in planes) else dtype
    limit = (max(torch.finfo(dtype).eps, torch.finfo(coarse).eps) + 5e-6) * size
    error = (out[0].double().cpu() - wanted).abs()
    assert bool((error <= limit).all()), f"{(error / limit).nan_to_num(torch.inf).max():.3} times too far"


def test_a_budget_for_everything_is_dense_attention() -> None:
    cache, k, v = make_state("int4", head_dim=64, start=500, dtype=COMPUTE_DTYPES[0], sink_size=5)
    q, q_blocks = make_queries(cache)
    dense = decode_attention(cache, q, q_blocks, block_splits=2)
    chosen = digested(cache, budget=50)
    select_blocks(chosen, q, q_blocks)
    out = decode_attention(chosen, q, q_blocks, block_splits=2)
    _, size = oracle(cache, q, q_blocks, k, v)
    limit = (torch.finfo(q.dtype).eps + torch.finfo(torch.float16).eps + 5e-6) * size
    assert bool(((out - dense)[0].double().cpu().abs() <= limit).all())


def test_the_needle_is_found() -> None:
    """One block of eight holds a key that the query is after: with a budget of one block it is read."""
    cache, k, v = make_state("int4", head_dim=64, start=700, dtype=COMPUTE_DTYPES[0], group=1, sink_size=0)
    q, q_blocks = make_queries(cache)
    head = int(cache.retrieval_heads[0])
    k[200, head] = (q[0, head].float() * 3).to(k.dtype)
    store(cache, k, v)
    cache = digested(cache, budget=1)
    select_blocks(cache, q, q_blocks)
    assert selection_of(cache).lists[0].tolist() == [200 // 64, (700 - 128) // 64]


def test_more_rows_than_one_layer_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs of scores per row, and chunks of lists."""
    monkeypatch.setattr(select, "SCORED_BLOCKS", 4)
    monkeypatch.setattr(select, "CHUNK", 8)
    monkeypatch.setattr(select, "PLACED", 4)
    cache, _, _ = make_state("int4", head_dim=64, start=400, dtype=COMPUTE_DTYPES[0], block_size=16, sink_size=5)
    cache = digested(cache, budget=3)
    q, q_blocks = make_queries(cache, seed=11)
    select_blocks(cache, q, q_blocks)
    check_lists(cache, q, q_blocks)
