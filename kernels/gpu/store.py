"""New keys and values of a prefill chunk into their places: full blocks into records, what stays recent into the ring.

The order within a chunk is: close the blocks (their older tokens are still in the ring), attend, write the ring.
"""

import triton
import triton.language as tl
from torch import Tensor

from duolocal.kernels.gpu.layer_cache import LayerCache
from duolocal.kernels.gpu.library_attention import triton_dtype
from duolocal.kernels.gpu.planes import hadamard_factor, plane_constants, rotate_halves, store_plane

CLOSE_TOKENS = 32  # of a block, encoded by one program; half of them beyond head_dim 128
RING_TOKENS = 32  # copied by one program


@triton.jit
def load_half(
    ring,
    chunk,
    slots,
    rows,
    old,
    offset,
    slot_at,
    row_at,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """Load dimensions offset..offset+DIM/2-1 of tokens: from the ring where `old`, else from the chunk.

    slots, rows: int64 [tokens], element offsets; slot_at, row_at: where the head begins. Returns [tokens, HALF_PAD].
    """
    columns = tl.arange(0, HALF_PAD)[None, :]
    inside = columns < DIM // 2
    older = tl.load(ring + slot_at + slots[:, None] + offset + columns, mask=old[:, None] & inside, other=0.0)
    newer = tl.load(chunk + row_at + rows[:, None] + offset + columns, mask=(~old)[:, None] & inside, other=0.0)
    return tl.where(old[:, None], older, newer)


@triton.jit(do_not_specialize=["start", "sink_size", "first_block"])
def close_blocks_kernel(
    k,  # [q_len, num_kv_heads, DIM]
    v,
    ring_k,  # [num_kv_heads, num_slots, DIM]
    ring_v,
    records,  # uint8 [num_records, record_bytes]
    table,  # int64 [num_retrieval, max_blocks]
    retrieval_heads,  # int32 [num_retrieval]
    start,
    first_block,
    sink_size,
    recent_size,
    k_stride,
    v_stride,
    table_stride,
    record_stride,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    DOT: tl.constexpr,
    FACTOR: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
):
    row = tl.program_id(1)
    part = tl.program_id(0)
    block = first_block + part // (BLOCK_SIZE // TOKENS)
    tokens = (part % (BLOCK_SIZE // TOKENS)) * TOKENS + tl.arange(0, TOKENS)
    head = tl.load(retrieval_heads + row)
    record = records + tl.load(table + row.to(tl.int64) * table_stride + block) * record_stride
    positions = block * BLOCK_SIZE + tokens
    old = positions < start
    slot = tl.where(positions < sink_size, positions, sink_size + (positions - sink_size) % recent_size)
    slots = slot.to(tl.int64) * DIM
    slot_at = head.to(tl.int64) * (sink_size + recent_size) * DIM
    source = (positions - start).to(tl.int64)
    every = tokens >= 0

    low = load_half(ring_k, k, slots, source * k_stride, old, 0, slot_at, head * DIM, DIM, HALF_PAD)
    high = load_half(ring_k, k, slots, source * k_stride, old, DIM // 2, slot_at, head * DIM, DIM, HALF_PAD)
    if KEY.rotate:
        low, high = rotate_halves(low, high, DIM, HALF_PAD, FACTOR, DOT)
    low, high = low.to(tl.float32), high.to(tl.float32)
    store_plane(record, tokens, low, high, every, KEY, DIM, HALF_PAD)

    low = load_half(ring_v, v, slots, source * v_stride, old, 0, slot_at, head * DIM, DIM, HALF_PAD)
    high = load_half(ring_v, v, slots, source * v_stride, old, DIM // 2, slot_at, head * DIM, DIM, HALF_PAD)
    if VALUE.rotate:
        low, high = rotate_halves(low, high, DIM, HALF_PAD, FACTOR, DOT)
    low, high = low.to(tl.float32), high.to(tl.float32)
    store_plane(record, tokens, low, high, every, VALUE, DIM, HALF_PAD)


def close_blocks(cache: LayerCache, k: Tensor, v: Tensor, start: int) -> None:
    """Encode every block of every retrieval head whose last token is in the chunk.

    k, v: [q_len, num_kv_heads, head_dim], positions start.., not yet in the ring. Tokens of a block that came before
    the chunk are read from the ring, so a block is at most as long as the ring. Launches nothing when no block closes.
    """
    check_chunk(cache, k, v, start)
    layout, dim = cache.layout, cache.head_dim
    size = layout.block_size
    first, last = start // size, (start + k.shape[0]) // size
    if first == last or cache.num_retrieval == 0:
        return
    assert last <= cache.max_blocks, (last, cache.max_blocks)
    assert size <= cache.recent_size, (size, cache.recent_size)
    tokens = min(size, CLOSE_TOKENS if dim <= 128 else CLOSE_TOKENS // 2)
    grid = ((last - first) * (size // tokens), cache.num_retrieval)
    close_blocks_kernel[grid](
        k,
        v,
        cache.ring_k,
        cache.ring_v,
        cache.records,
        cache.table,
        cache.retrieval_heads,
        start,
        first,
        cache.sink_size,
        cache.recent_size,
        k.stride(0),
        v.stride(0),
        cache.table.stride(0),
        cache.records.stride(0),
        DIM=dim,
        HALF_PAD=max(16, triton.next_power_of_2(dim // 2)),
        BLOCK_SIZE=size,
        TOKENS=tokens,
        DOT=triton_dtype(k.dtype),
        FACTOR=hadamard_factor(dim),
        KEY=plane_constants(layout, "key"),
        VALUE=plane_constants(layout, "value"),
        num_warps=4 if dim <= 128 else 8,
    )


@triton.jit(do_not_specialize=["start", "sinks", "recent_start", "count", "sink_size"])
def write_ring_kernel(
    k,
    v,
    ring_k,
    ring_v,
    start,
    sinks,  # how many tokens of the chunk are sinks: its first ones
    recent_start,  # the first position of the recent tokens that stay
    count,  # sinks and recent tokens
    sink_size,
    recent_size,
    k_stride,
    v_stride,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(1)
    index = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    position = tl.where(index < sinks, start + index, recent_start + index - sinks)
    slot = tl.where(position < sink_size, position, sink_size + (position - sink_size) % recent_size)
    dims = tl.arange(0, DIM_PAD)[None, :]
    mask = (index < count)[:, None] & (dims < DIM)
    source = (position - start).to(tl.int64)[:, None]
    target = (head.to(tl.int64) * (sink_size + recent_size) + slot)[:, None] * DIM + dims
    column = head * DIM + dims
    tl.store(ring_k + target, tl.load(k + source * k_stride + column, mask=mask, other=0.0), mask=mask)
    tl.store(ring_v + target, tl.load(v + source * v_stride + column, mask=mask, other=0.0), mask=mask)


def write_ring(cache: LayerCache, k: Tensor, v: Tensor, start: int) -> None:
    """Store the positions of a chunk that stay: the sinks, and the last recent_size of the context.

    k, v: [q_len, num_kv_heads, head_dim], positions start.. . Nothing else of the ring is touched.
    """
    check_chunk(cache, k, v, start)
    dim, end = cache.head_dim, start + k.shape[0]
    sinks = max(0, min(end, cache.sink_size) - start)
    recent_start = max(start, end - cache.recent_size, cache.sink_size)
    count = sinks + max(0, end - recent_start)
    grid = (triton.cdiv(count, RING_TOKENS), cache.num_kv_heads)
    write_ring_kernel[grid](
        k,
        v,
        cache.ring_k,
        cache.ring_v,
        start,
        sinks,
        recent_start,
        count,
        cache.sink_size,
        cache.recent_size,
        k.stride(0),
        v.stride(0),
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        TOKENS=RING_TOKENS,
        num_warps=4,
    )


def check_chunk(cache: LayerCache, k: Tensor, v: Tensor, start: int) -> None:
    """Assert that k and v are a chunk of this layer, the heads of a token side by side."""
    wanted = (k.shape[0], cache.num_kv_heads, cache.head_dim)
    assert k.shape == v.shape == wanted, (k.shape, v.shape, wanted)
    assert k.dtype == v.dtype == cache.ring_k.dtype == cache.ring_v.dtype, (k.dtype, v.dtype, cache.ring_k.dtype)
    assert cache.ring_k.is_contiguous() and cache.ring_v.is_contiguous()
    assert all(x.stride(2) == 1 and x.stride(1) == cache.head_dim for x in (k, v)), (k.stride(), v.stride())
    assert k.shape[0] > 0 and start >= 0, (k.shape, start)
