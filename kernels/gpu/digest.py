"""Digests of blocks from their records, as `kernels/digest.py` defines them: one program per block and retrieval head.

A decode step makes the digest of the newest complete block when it makes its lists, and not when the block is
completed: it is not scored before, and at most one block is completed between two choices.
"""

import torch
import triton
import triton.language as tl

from duolocal.kernels.digest import RUN, digest_bytes
from duolocal.kernels.gpu.layer_cache import LayerCache
from duolocal.kernels.gpu.planes import (
    hadamard_factor,
    hadamard_tile,
    integer_codes,
    load_codes,
    load_raw_scales,
    numbers,
    plane_constants,
    scale_factors,
)

WARPS = 4
_HALF_MAX = tl.constexpr(65504.0)


@triton.jit
def now_and_blocks(position, reuse, SINK: tl.constexpr, RECENT: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Return the occasion, and the first and the newest block that a query at `position` sees (0 and -1 for none)."""
    seen = position - RECENT + 1 > SINK
    first: tl.constexpr = SINK // BLOCK_SIZE
    newest = tl.where(seen, (position - RECENT) // BLOCK_SIZE, -1)
    return ((position // reuse) << 32) + newest, tl.where(seen, first, 0), newest


@triton.jit(do_not_specialize=["first", "reuse"])
def digest_blocks_kernel(
    records,  # uint8 [num_records, RECORD_BYTES]
    table,  # int64 [num_retrieval, max_blocks]
    channels,  # int32 [num_retrieval, CHANNELS]
    centre,  # float32 [num_retrieval, CHANNELS]
    digests,  # uint8 [num_retrieval, max_blocks, DIGEST_BYTES]
    start,  # int64 [1]
    made_at,  # int64 [num_retrieval]
    first,
    reuse,
    table_stride,
    max_blocks,
    NEWEST: tl.constexpr,  # the newest complete block after this decode step, where it makes a list; else `first` ...
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    CHANNELS: tl.constexpr,
    RUN: tl.constexpr,
    DIGEST_BYTES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    FACTOR: tl.constexpr,  # of the Hadamard transform
    KEY: tl.constexpr,
):
    row = tl.program_id(1)
    block = first + tl.program_id(0)
    wanted = block >= 0
    if NEWEST:
        position = tl.load(start)
        now, _, _ = now_and_blocks(position, reuse, SINK, RECENT, BLOCK_SIZE)
        block = ((position + 1) // BLOCK_SIZE - 1).to(tl.int32)
        wanted = (block >= 0) & (tl.load(made_at + row) != now)
    if wanted:
        half: tl.constexpr = CHANNELS // 2
        record = records + tl.load(table + row.to(tl.int64) * table_stride + block) * RECORD_BYTES
        columns = tl.arange(0, half)
        at = row * CHANNELS + columns
        low_channels = tl.load(channels + at)
        high_channels = tl.load(channels + at + half)
        low = _keys(record, low_channels, BLOCK_SIZE, DIM, HALF_PAD, FACTOR, KEY)
        high = _keys(record, high_channels, BLOCK_SIZE, DIM, HALF_PAD, FACTOR, KEY)
        runs: tl.constexpr = BLOCK_SIZE // RUN
        low = tl.reshape(low, (runs, RUN, half))
        high = tl.reshape(high, (runs, RUN, half))
        low_least, low_most = tl.min(low, 1), tl.max(low, 1)
        high_least, high_most = tl.min(high, 1), tl.max(high, 1)
        out = digests + (row.to(tl.int64) * max_blocks + block) * DIGEST_BYTES
        low_centre = tl.load(centre + at)[None, :]
        high_centre = tl.load(centre + at + half)[None, :]
        middles_low = (low_least + low_most) * 0.5 - low_centre
        middles_high = (high_least + high_most) * 0.5 - high_centre
        _store_vectors(out, middles_low, middles_high, runs, half)
        widths_low = (low_most - low_least) * 0.5
        widths_high = (high_most - high_least) * 0.5
        _store_vectors(out + half + 4, widths_low, widths_high, runs, half)


@triton.jit
def _keys(
    record,
    channels,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    FACTOR: tl.constexpr,
    KEY: tl.constexpr,
):
    """Return some channels of a block's keys, turned back: float32 [BLOCK_SIZE, channels]."""
    tokens = tl.arange(0, BLOCK_SIZE)
    raw_scales, raw_minima = load_raw_scales(record, tokens, None, KEY)
    half: tl.constexpr = DIM // 2
    if KEY.rotate:
        # Of integer planes, all of it exact but the last line: products of codes with ±1, and their sums.
        scale, minimum = raw_scales.to(tl.float32)[:, None], raw_minima.to(tl.float32)[:, None]
        units = tl.arange(0, HALF_PAD)
        inside = units < half
        size: tl.constexpr = DIM & -DIM
        signs_low = tl.where(inside[:, None], hadamard_tile(units[:, None], channels[None, :], size), 0.0)
        signs_high = tl.where(inside[:, None], hadamard_tile(units[:, None] + half, channels[None, :], size), 0.0)
        shared = load_codes(record, tokens[:, None], units[None, :], inside[None, :], KEY, False)
        if KEY.kind == 5:
            low = (shared & 15).to(tl.float16)
            high = (shared >> 4).to(tl.float16)
        else:
            low = shared.to(tl.float16)
            high = load_codes(record, tokens[:, None], units[None, :] + half, inside[None, :], KEY, False).to(
                tl.float16
            )
        x = tl.dot(low, signs_low.to(tl.float16))
        x = tl.dot(high, signs_high.to(tl.float16), x)
        signs = (tl.sum(signs_low, 0) + tl.sum(signs_high, 0))[None, :]
        x = (x * scale + signs * minimum) * FACTOR
    elif KEY.kind == 5:
        units = (channels % half)[None, :]
        shared = load_codes(record, tokens[:, None], units, None, KEY, False)
        codes = tl.where((channels >= half)[None, :], shared >> 4, shared & 15).to(tl.float32)
        x = codes * raw_scales.to(tl.float32)[:, None] + raw_minima.to(tl.float32)[:, None]
    else:
        codes = load_codes(record, tokens[:, None], channels[None, :], None, KEY, False)
        factor, addend = scale_factors(raw_scales, raw_minima, KEY.kind)
        x = numbers(codes, 0, KEY.kind, tl.float32) * factor[:, None] + addend[:, None]
    return x


@triton.jit
def _store_vectors(out, low, high, RUNS: tl.constexpr, HALF: tl.constexpr):
    """Store vectors given as two halves [RUNS, HALF]: codes, scale, minimum, one vector in two of a run."""
    at = out + tl.arange(0, RUNS) * (2 * (HALF + 4))
    least = tl.minimum(tl.min(low, 1), tl.min(high, 1))
    most = tl.maximum(tl.max(low, 1), tl.max(high, 1))
    minimum = tl.minimum(tl.maximum(least, -_HALF_MAX), _HALF_MAX).to(tl.float16)
    step = tl.math.div_rn(most - minimum.to(tl.float32), tl.full(most.shape, 15.0, tl.float32))
    scale = tl.minimum(tl.maximum(step, 0.0), _HALF_MAX).to(tl.float16)
    tl.store((at + HALF).to(tl.pointer_type(tl.float16)), scale)
    tl.store((at + HALF + 2).to(tl.pointer_type(tl.float16)), minimum)
    divisor = scale.to(tl.float32)
    divisor = tl.where(divisor == 0.0, 1.0, divisor)[:, None] + tl.zeros_like(low)
    floor = minimum.to(tl.float32)[:, None]
    codes = integer_codes(low, floor, divisor, 15.0) | (integer_codes(high, floor, divisor, 15.0) << 4)
    tl.store(at[:, None] + tl.arange(0, HALF)[None, :], codes.to(tl.uint8))


def digest_blocks(cache: LayerCache, first: int, last: int) -> None:
    """Make the digests of blocks first..last-1 of every retrieval head from their records."""
    if first < last and cache.num_retrieval:
        assert first >= 0 and last <= cache.max_blocks, (first, last, cache.max_blocks)
        _launch(cache, (last - first, cache.num_retrieval), first=first, newest=False)


def digest_newest(cache: LayerCache) -> None:
    """Make the digests of the newest complete block, where the decode step that has appended its token makes lists."""
    _launch(cache, (1, cache.num_retrieval), first=0, newest=True)


def _launch(cache: LayerCache, grid: tuple[int, int], *, first: int, newest: bool) -> None:
    selection, layout = cache.selection, cache.layout
    assert selection is not None
    key = plane_constants(layout, "key")
    assert not key.rotate or layout.key.kind == "int", layout.key
    size = digest_bytes(layout.block_size, selection.num_channels)
    assert selection.digests.shape == (cache.num_retrieval, cache.max_blocks, size), selection.digests.shape
    assert selection.digests.is_contiguous() and selection.digests.dtype == torch.uint8
    assert selection.num_channels in (16, 32) and selection.channels.is_contiguous()
    assert selection.centre.is_contiguous() and cache.table.stride(1) == 1
    digest_blocks_kernel[grid](
        cache.records,
        cache.table,
        selection.channels,
        selection.centre,
        selection.digests,
        cache.start,
        selection.made_at,
        first,
        selection.reuse,
        cache.table.stride(0),
        cache.max_blocks,
        NEWEST=newest,
        SINK=cache.sink_size,
        RECENT=cache.recent_size,
        CHANNELS=selection.num_channels,
        RUN=RUN,
        DIGEST_BYTES=size,
        BLOCK_SIZE=layout.block_size,
        RECORD_BYTES=layout.record_bytes,
        DIM=cache.head_dim,
        HALF_PAD=max(16, triton.next_power_of_2(cache.head_dim // 2)),
        FACTOR=hadamard_factor(cache.head_dim),
        KEY=key,
        num_warps=WARPS,
    )
