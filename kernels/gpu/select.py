"""Which blocks a decode step reads: the best of all digests, of them the best by their keys, and copies of those.

Five launches after the one that makes the newest digest (`digest.py`), all of static shape and without a look at the
host, so that a CUDA graph can hold them: scores of digests, candidates, their weights (`weigh.py`), lists, and, where
blocks have their homes in pinned host memory, what copies them into the device's slots. What candidates, weights and
lists are says `kernels/digest.py`: rising, of equal ones the older block; a list ends with the newest block. Every
launch decides by itself, by the position and by `made_at`, whether a list is due, and by the number of blocks, whether
there is anything for it to choose: no score is needed where all are candidates, no weight where all are read.

The best are found by their threshold: the bits of the largest number that as many scores reach as are wanted, from the
highest bit down, scores as unsigned integers of the same order. One program per row keeps up to CHUNK scores in
registers, or all weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from duolocal.kernels.digest import CANDIDATES, RUN, digest_bytes, largest_gpu_budget, num_runs
from duolocal.kernels.gpu.digest import digest_newest, now_and_blocks
from duolocal.kernels.gpu.layer_cache import LayerCache
from duolocal.kernels.gpu.weigh import weigh_candidates

# To be swept on a GPU.
SCORED_BLOCKS = 64  # by one program
CHUNK = 16384  # scores looked at together
PLACED = 2048  # of them placed together
FETCH_WORDS = 1024  # of 8 bytes, copied together
SCORE_WARPS = 8
FETCH_WARPS = 4


@triton.jit(do_not_specialize=["reuse"])
def score_blocks_kernel(
    q,  # [num_heads, DIM], after RoPE
    digests,  # uint8 [num_retrieval, max_blocks, DIGEST_BYTES]
    channels,  # int32 [num_retrieval, CHANNELS]
    retrieval_heads,  # int32 [num_retrieval]
    made_at,  # int64 [num_retrieval]
    start,  # int64 [1]
    scores,  # float32 [num_retrieval, max_blocks], from the first visible block on
    max_blocks,
    reuse,
    NUM_CANDIDATES: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    HALF_PAD: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,  # blocks
):
    row = tl.program_id(1)
    at = tl.program_id(0) * TILE
    now, first, newest = now_and_blocks(tl.load(start), reuse, SINK, RECENT, BLOCK_SIZE)
    count = newest - first  # the newest is read in any case
    if (count > NUM_CANDIDATES) & (at < count) & (tl.load(made_at + row) != now):
        # A vector is CHANNELS / 2 bytes of codes (byte c: channel c, and above it channel c + CHANNELS / 2), then scale
        # and minimum in a word; a run is two vectors.
        half: tl.constexpr = CHANNELS // 2
        runs = tl.arange(0, TILE * RUNS)
        inside = at + runs // RUNS < count
        middles = (
            digests + (row.to(tl.int64) * max_blocks + first + at) * (RUNS * (CHANNELS + 8)) + runs * (CHANNELS + 8)
        )
        members = tl.arange(0, GROUP_PAD)
        query = q + (tl.load(retrieval_heads + row) * GROUP + members) * DIM
        low, high = _picked(query, channels + row * CHANNELS, members < GROUP, half, HALF_PAD)
        bound = _products(middles, low, high, inside, half, HALF_PAD)
        low, high = _size(low), _size(high)
        bound += _products(middles + half + 4, low, high, inside, half, HALF_PAD)
        score = tl.max(tl.where((members < GROUP)[None, :], bound, float("-inf")), 1)
        best = tl.max(tl.reshape(score, (TILE, RUNS)), 1)
        block = at + tl.arange(0, TILE)
        tl.store(scores + row.to(tl.int64) * max_blocks + block, best, mask=block < count)


@triton.jit
def _picked(query, channels, members, HALF: tl.constexpr, PAD: tl.constexpr):
    """Load the two halves of the picked channels of queries: [PAD, members] each, 0 beyond."""
    column = tl.arange(0, PAD)
    inside = column < HALF
    mask = inside[:, None] & members[None, :]
    low = tl.load(query[None, :] + tl.load(channels + column, mask=inside, other=0)[:, None], mask=mask, other=0.0)
    high = tl.load(
        query[None, :] + tl.load(channels + HALF + column, mask=inside, other=0)[:, None], mask=mask, other=0.0
    )
    return low, high


@triton.jit
def _size(q):
    return tl.abs(q.to(tl.float32)).to(q.dtype)


@triton.jit
def _products(vectors, low, high, inside, HALF: tl.constexpr, PAD: tl.constexpr):
    """Multiply stored vectors with queries, given as two halves of channels: float32 [vectors, members].

    Codes are exact in every dtype of q.
    """
    column = tl.arange(0, PAD)
    codes = tl.load(vectors[:, None] + column[None, :], mask=inside[:, None] & (column < HALF)[None, :], other=0)
    sums = tl.dot((codes & 15).to(low.dtype), low, input_precision="ieee")
    sums = tl.dot((codes >> 4).to(low.dtype), high, sums, input_precision="ieee")
    ends = tl.load((vectors + HALF).to(tl.pointer_type(tl.uint32)), mask=inside, other=0)
    scale = (ends & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    minimum = (ends >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    whole = tl.sum(low.to(tl.float32) + high.to(tl.float32), 0)
    return sums * scale[:, None] + minimum[:, None] * whole[None, :]


@triton.jit
def _order(x):
    """Return float32 as integers above 0 of the same order."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, ~bits, bits | 0x80000000)


@triton.jit
def _load_ordered(scores, at, count):
    """Load scores as `_order` gives them; 0 beyond `count`."""
    inside = at < count
    return tl.where(inside, _order(tl.load(scores + at, mask=inside, other=0.0)), 0)


@triton.jit
def _threshold(keys, scores, count, WANTED: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """Return the largest key that WANTED of `count` reach, and how many are beyond it.

    keys: uint32 [CHUNK], all of them where WHOLE; else they come of `scores`, again and again.
    """
    threshold = tl.full([], 0, tl.uint32)
    above = tl.full([], 0, tl.int32)
    for bit in range(32):
        wanted = threshold | (tl.full([], 0x80000000, tl.uint32) >> bit)
        if WHOLE:
            reached = tl.sum((keys >= wanted).to(tl.int32), 0)
        else:
            reached = tl.full([], 0, tl.int32)
            for at in range(0, count, CHUNK):
                loaded = _load_ordered(scores, at + tl.arange(0, CHUNK), count)
                reached += tl.sum((loaded >= wanted).to(tl.int32), 0)
        threshold = tl.where(reached >= WANTED, wanted, threshold)
        above = tl.where(reached >= WANTED, above, reached)
    return threshold, above


@triton.jit
def _places(keys, inside, threshold, room):
    """Return which keys are taken, their places, and how many are beyond the threshold and how many equal it.

    Of those that equal the threshold the first are taken, as many as there is room for.
    """
    larger = (keys > threshold).to(tl.int32)
    equal = ((keys == threshold) & inside).to(tl.int32)
    # Both are counted in one scan: larger ones in the upper half of a word.
    found = tl.cumsum((larger << 16) | equal, 0)
    equals = found & 0xFFFF
    taken = (larger == 1) | ((equal == 1) & (equals <= room))
    place = (found >> 16) + tl.minimum(equals, room) - 1
    return taken, place, tl.sum(larger, 0), tl.minimum(tl.sum(equal, 0), room)


@triton.jit(do_not_specialize=["reuse"])
def choose_blocks_kernel(
    scores,  # float32 [num_retrieval, max_blocks]
    candidates,  # int32 [num_retrieval, NUM_CANDIDATES]
    made_at,  # int64 [num_retrieval]
    start,  # int64 [1]
    max_blocks,
    reuse,
    NUM_CANDIDATES: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,  # max_blocks <= CHUNK
    TILE: tl.constexpr,  # scores placed together
):
    row = tl.program_id(0)
    now, first, newest = now_and_blocks(tl.load(start), reuse, SINK, RECENT, BLOCK_SIZE)
    if (newest >= first) & (tl.load(made_at + row) != now):
        count = (newest - first).to(tl.int32)
        first = first.to(tl.int32)
        out = candidates + row * NUM_CANDIDATES
        offsets = tl.arange(0, CHUNK)
        if count <= NUM_CANDIDATES:
            for at in range(0, count, CHUNK):
                tl.store(out + at + offsets, first + at + offsets, mask=at + offsets < count)
        else:
            scores += row.to(tl.int64) * max_blocks
            keys = _load_ordered(scores, offsets, count)
            threshold, above = _threshold(keys, scores, count, NUM_CANDIDATES, CHUNK, WHOLE)
            room = NUM_CANDIDATES - above
            written = tl.full([], 0, tl.int32)
            places = tl.arange(0, TILE)
            for at in range(0, count, TILE):
                placed = _load_ordered(scores, at + places, count)
                taken, place, larger, equal = _places(placed, at + places < count, threshold, room)
                tl.store(out + written + place, first + at + places, mask=taken)
                written += larger + equal
                room -= equal


@triton.jit(do_not_specialize=["reuse"])
def rank_blocks_kernel(
    candidates,  # int32 [num_retrieval, NUM_CANDIDATES]
    weights,  # float32 [num_retrieval, GROUP, NUM_CANDIDATES], log-sum-exp of base 2
    lists,  # int32 [num_retrieval, BUDGET + 1]
    made_at,  # int64 [num_retrieval]
    start,  # int64 [1]
    reuse,
    BUDGET: tl.constexpr,
    NUM_CANDIDATES: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    WIDTH: tl.constexpr,  # NUM_CANDIDATES, padded
):
    row = tl.program_id(0)
    now, first, newest = now_and_blocks(tl.load(start), reuse, SINK, RECENT, BLOCK_SIZE)
    if (newest >= first) & (tl.load(made_at + row) != now):
        count = tl.minimum(newest - first, NUM_CANDIDATES).to(tl.int32)
        entries = tl.arange(0, WIDTH)
        inside = entries < count
        block = tl.load(candidates + row * NUM_CANDIDATES + entries, mask=inside, other=0)
        out = lists + row * (BUDGET + 1)
        if count <= BUDGET:
            tl.store(out + entries, block, mask=inside)
            tl.store(out + count, newest.to(tl.int32))
        else:
            # Each query head's shares of attention among the candidates, added up.
            members = tl.arange(0, GROUP_PAD)
            mask = (members < GROUP)[:, None] & inside[None, :]
            at = (row * GROUP + members)[:, None] * NUM_CANDIDATES + entries[None, :]
            size = tl.load(weights + at, mask=mask, other=float("-inf"))
            top = tl.where(members < GROUP, tl.max(size, 1), 0.0)
            share = tl.exp2(size - top[:, None])
            share = share / tl.where(members < GROUP, tl.sum(share, 1), 1.0)[:, None]
            keys = tl.where(inside, _order(tl.sum(share, 0)), 0)
            threshold, above = _threshold(keys, weights, count, BUDGET, WIDTH, True)
            taken, place, _, _ = _places(keys, inside, threshold, BUDGET - above)
            tl.store(out + place, block, mask=taken)
            tl.store(out + BUDGET, newest.to(tl.int32))
        tl.debug_barrier()  # a warp that comes late must not find that the list is made
        tl.store(made_at + row, now)


@triton.jit(do_not_specialize=["first_slot", "first_home"])
def fetch_blocks_kernel(
    records,  # int64 [num_records, WORDS]
    table,  # int64 [num_retrieval, max_blocks]
    tags,  # int64 [num_retrieval, num_slots]
    lists,  # int32 [num_retrieval, BUDGET + 1]
    start,  # int64 [1]
    first_slot,
    first_home,
    table_stride,
    num_slots,
    BUDGET: tl.constexpr,
    LIST_PAD: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0)
    _, first, newest = now_and_blocks(tl.load(start), 1, SINK, RECENT, BLOCK_SIZE)
    length = tl.minimum(newest - first, BUDGET) + 1
    if (newest >= first) & (entry < length):
        # All programs of a slot come to the same answer whatever the others have already done: the slot goes to the
        # first listed block that wants it, unless it holds a listed one.
        numbers = tl.arange(0, LIST_PAD)
        listed = tl.load(lists + row * (BUDGET + 1) + numbers, mask=numbers < length, other=-1).to(tl.int64)
        block = tl.load(lists + row * (BUDGET + 1) + entry).to(tl.int64)
        slot = block % num_slots
        held = tl.load(tags + row * num_slots + slot)
        rivals = (listed >= 0) & (listed % num_slots == slot)
        kept = tl.sum((rivals & (listed == held)).to(tl.int32), 0) > 0
        foremost = tl.min(tl.where(rivals, listed, 1 << 62), 0)
        if (foremost == block) & ~kept:
            if held >= 0:
                tl.store(table + row * table_stride + held, first_home + row * table_stride + held)
            source = records + (first_home + row * table_stride + block) * WORDS
            number = first_slot + row * num_slots + slot
            words = tl.arange(0, TILE)
            for at in range(0, WORDS, TILE):
                inside = at + words < WORDS
                tl.store(records + number * WORDS + at + words, tl.load(source + at + words, mask=inside), mask=inside)
            tl.store(tags + row * num_slots + slot, block)
            tl.store(table + row * table_stride + block, number)


def select_blocks(cache: LayerCache, q_rotated: Tensor, q_blocks: Tensor) -> None:
    """Make the lists of every retrieval head, where they are due, for the token at `cache.start`.

    q_rotated: [1, num_heads, head_dim], which meets digests, and q_blocks: [num_heads, head_dim], which meets the keys
    of blocks, both from `append_token`, which has stored the token. Also makes the digest of the newest complete block,
    and copies listed blocks into slots on the device where they have their homes elsewhere.
    """
    selection, layout, rows = cache.selection, cache.layout, cache.num_retrieval
    assert selection is not None
    if not rows:
        return
    budget, num_candidates, num_channels = selection.budget, selection.num_candidates, selection.num_channels
    assert q_rotated.shape == (1, cache.num_heads, cache.head_dim) and q_rotated.is_contiguous(), q_rotated.shape
    assert selection.lists.is_contiguous() and selection.lists.dtype == torch.int32
    assert 0 < budget <= largest_gpu_budget(cache.query_group), (budget, cache.query_group)
    assert selection.scores.is_contiguous() and selection.scores.shape[0] >= rows
    assert selection.scores.shape[1] == cache.max_blocks and cache.query_group <= 16
    assert selection.candidates.is_contiguous() and selection.candidates.dtype == torch.int32
    assert selection.candidates.shape[0] >= rows and num_candidates == CANDIDATES * budget
    assert selection.weights.is_contiguous() and selection.weights.dtype == torch.float32
    assert selection.weights.shape[0] >= rows and selection.weights.shape[1:] == (cache.query_group, num_candidates)
    # At most one block may be completed between two choices, or one would have no digest.
    assert 0 < selection.reuse <= layout.block_size <= cache.recent_size, (selection.reuse, layout.block_size)
    digest_newest(cache)
    sizes = {
        "SINK": cache.sink_size,
        "RECENT": cache.recent_size,
        "BLOCK_SIZE": layout.block_size,
    }
    runs = num_runs(layout.block_size)
    assert digest_bytes(layout.block_size, num_channels) == runs * (num_channels + 8) and layout.block_size % RUN == 0
    tile = SCORED_BLOCKS
    score_blocks_kernel[(triton.cdiv(cache.max_blocks, tile), rows)](
        q_rotated,
        selection.digests,
        selection.channels,
        cache.retrieval_heads,
        selection.made_at,
        cache.start,
        selection.scores,
        cache.max_blocks,
        selection.reuse,
        **sizes,
        NUM_CANDIDATES=num_candidates,
        GROUP=cache.query_group,
        GROUP_PAD=16,  # the least that tensor cores take
        DIM=cache.head_dim,
        CHANNELS=num_channels,
        HALF_PAD=max(16, num_channels // 2),
        RUNS=runs,
        TILE=tile,
        num_warps=SCORE_WARPS,
    )
    chunk = min(CHUNK, triton.next_power_of_2(cache.max_blocks))
    choose_blocks_kernel[(rows,)](
        selection.scores,
        selection.candidates,
        selection.made_at,
        cache.start,
        cache.max_blocks,
        selection.reuse,
        **sizes,
        NUM_CANDIDATES=num_candidates,
        CHUNK=chunk,
        WHOLE=cache.max_blocks <= chunk,
        TILE=min(PLACED, chunk),
        num_warps=max(4, min(32, chunk // 256)),
    )
    weigh_candidates(cache, q_blocks)
    width, members = triton.next_power_of_2(num_candidates), triton.next_power_of_2(cache.query_group)
    rank_blocks_kernel[(rows,)](
        selection.candidates,
        selection.weights,
        selection.lists,
        selection.made_at,
        cache.start,
        selection.reuse,
        **sizes,
        BUDGET=budget,
        NUM_CANDIDATES=num_candidates,
        GROUP=cache.query_group,
        GROUP_PAD=members,
        WIDTH=width,
        num_warps=max(1, min(32, width * members // 512)),
    )
    if selection.tags is None or selection.tags.shape[1] == 0:
        return
    assert selection.tags.is_contiguous() and cache.table.stride(1) == 1
    words = layout.record_bytes // 8
    fetch_blocks_kernel[(budget + 1, rows)](
        cache.records.view(torch.int64),
        cache.table,
        selection.tags,
        selection.lists,
        cache.start,
        selection.first_slot,
        selection.first_home,
        cache.table.stride(0),
        selection.tags.shape[1],
        **sizes,
        BUDGET=budget,
        LIST_PAD=triton.next_power_of_2(budget + 1),
        WORDS=words,
        TILE=min(FETCH_WORDS, triton.next_power_of_2(words)),
        num_warps=FETCH_WARPS,
    )
