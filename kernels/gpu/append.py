"""One new token in one launch: rotary embedding, its place in the ring, and the block that it finishes.

One program per KV head, with the query heads that share it. A block is encoded by the program that has its last token:
the older ones come from the ring (which keeps at least a block as computed), the last one from registers, since what
this program has just stored need not be visible to its other threads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from duolocal.kernels.gpu.decode import block_dot_dtype
from duolocal.kernels.gpu.layer_cache import LayerCache
from duolocal.kernels.gpu.planes import hadamard_factor, plane_constants, rotate_halves, store_plane, unsupported

# To be swept on a GPU.
TOKEN_TILE = 16  # tokens of a finished block encoded at a time
WARPS = 8


@triton.jit
def append_token_kernel(
    q,  # [num_heads, DIM] compute dtype
    k,  # [num_kv_heads, DIM]
    v,
    cos,  # float32 [DIM / 2]
    sin,
    q_rotated,  # [num_heads, DIM] compute dtype
    q_blocks,  # [num_heads, DIM]
    ring_k,  # [num_kv_heads, SINK + RECENT, DIM] compute dtype
    ring_v,
    records,  # uint8 [num_records, RECORD_BYTES]
    table,  # int64 [num_retrieval, max_blocks]
    rows,  # int32 [num_kv_heads]
    start,  # int64 [1]
    q_stride,  # between heads
    k_stride,
    v_stride,
    table_stride,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    FACTOR: tl.constexpr,  # of the Hadamard transform
    LIMIT: tl.constexpr,  # largest finite number of q_blocks
    TILE: tl.constexpr,
):
    head = tl.program_id(0)
    half: tl.constexpr = DIM // 2
    compute: tl.constexpr = ring_k.dtype.element_ty
    dims = tl.arange(0, HALF_PAD)
    inside = dims < half
    position = tl.load(start)
    row = tl.load(rows + head)
    cosine = tl.load(cos + dims, mask=inside, other=0.0)
    sine = tl.load(sin + dims, mask=inside, other=0.0)

    # The queries of this KV head.
    members = tl.arange(0, GROUP_PAD)
    q_mask = (members < GROUP)[:, None] & inside[None, :]
    heads = head * GROUP + members
    q_at = q + heads[:, None].to(tl.int64) * q_stride + dims[None, :]
    q_low = tl.load(q_at, mask=q_mask, other=0.0).to(tl.float32)
    q_high = tl.load(q_at + half, mask=q_mask, other=0.0).to(tl.float32)
    new_low = (q_low * cosine[None, :] - q_high * sine[None, :]).to(compute)
    new_high = (q_high * cosine[None, :] + q_low * sine[None, :]).to(compute)
    out_at = heads[:, None] * DIM + dims[None, :]
    tl.store(q_rotated + out_at, new_low, mask=q_mask)
    tl.store(q_rotated + out_at + half, new_high, mask=q_mask)
    if row >= 0:
        if KEY.rotate:
            low, high = rotate_halves(new_low, new_high, DIM, HALF_PAD, FACTOR, compute)
        else:
            low = new_low.to(tl.float32)
            high = new_high.to(tl.float32)
        blocks_type: tl.constexpr = q_blocks.dtype.element_ty
        low = tl.minimum(tl.maximum(low, -LIMIT), LIMIT).to(blocks_type)
        high = tl.minimum(tl.maximum(high, -LIMIT), LIMIT).to(blocks_type)
        tl.store(q_blocks + out_at, low, mask=q_mask)
        tl.store(q_blocks + out_at + half, high, mask=q_mask)

    # The key and the value into their slot.
    k_at = k + head.to(tl.int64) * k_stride + dims
    k_low = tl.load(k_at, mask=inside, other=0.0).to(tl.float32)
    k_high = tl.load(k_at + half, mask=inside, other=0.0).to(tl.float32)
    key_low = (k_low * cosine - k_high * sine).to(compute)
    key_high = (k_high * cosine + k_low * sine).to(compute)
    v_at = v + head.to(tl.int64) * v_stride + dims
    value_low = tl.load(v_at, mask=inside, other=0.0)
    value_high = tl.load(v_at + half, mask=inside, other=0.0)
    first_slot = head.to(tl.int64) * (SINK + RECENT)
    slot = tl.where(position < SINK, position, SINK + (position - SINK) % RECENT)
    ring_at = (first_slot + slot) * DIM + dims
    tl.store(ring_k + ring_at, key_low, mask=inside)
    tl.store(ring_k + ring_at + half, key_high, mask=inside)
    tl.store(ring_v + ring_at, value_low, mask=inside)
    tl.store(ring_v + ring_at + half, value_high, mask=inside)

    if (row >= 0) & ((position + 1) % BLOCK_SIZE == 0):
        block = position // BLOCK_SIZE
        record = records + tl.load(table + row.to(tl.int64) * table_stride + block) * RECORD_BYTES
        for first in range(0, BLOCK_SIZE, TILE):
            tokens = first + tl.arange(0, TILE)
            older = block * BLOCK_SIZE + tokens
            slots = tl.where(older < SINK, older, SINK + (older - SINK) % RECENT)
            stored = (tokens < BLOCK_SIZE - 1)[:, None]
            mask = stored & inside[None, :]
            at = (first_slot + slots)[:, None] * DIM + dims[None, :]
            low = tl.load(ring_k + at, mask=mask, other=0.0)
            high = tl.load(ring_k + at + half, mask=mask, other=0.0)
            low = tl.where(stored, low, key_low[None, :])
            high = tl.where(stored, high, key_high[None, :])
            _encode(record, tokens, low, high, KEY, DIM, HALF_PAD, FACTOR)
            low = tl.load(ring_v + at, mask=mask, other=0.0)
            high = tl.load(ring_v + at + half, mask=mask, other=0.0)
            low = tl.where(stored, low, value_low[None, :])
            high = tl.where(stored, high, value_high[None, :])
            _encode(record, tokens, low, high, VALUE, DIM, HALF_PAD, FACTOR)


@triton.jit
def _encode(
    record,
    tokens,
    low,
    high,
    PLANE: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Encode rows in the compute dtype, all of them inside the block."""
    if PLANE.rotate:
        x, y = rotate_halves(low, high, DIM, HALF_PAD, FACTOR, low.dtype)
    else:
        x = low.to(tl.float32)
        y = high.to(tl.float32)
    store_plane(record, tokens, x, y, tokens >= 0, PLANE, DIM, HALF_PAD)


def append_token(cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Take the token at position `cache.start`: rotate it, store it, and encode the block that it finishes.

    q: [1, num_heads, head_dim], k, v: [1, num_kv_heads, head_dim] in the compute dtype, not rotated, of unit last
    stride; cos, sin: float32 [1, head_dim / 2], for the pairs (d, d + head_dim / 2). Returns q_rotated
    [1, num_heads, head_dim] in the compute dtype and q_blocks [num_heads, head_dim], what the keys of blocks are
    multiplied with, in the type of that product: also through the Hadamard transform where the key plane is, saturated;
    undefined for streaming heads.
    """
    layout, head_dim, group = cache.layout, cache.head_dim, cache.query_group
    assert unsupported(layout) is None, unsupported(layout)
    assert q.shape == (1, cache.num_heads, head_dim), q.shape
    assert k.shape == v.shape == (1, cache.num_kv_heads, head_dim), (k.shape, v.shape)
    assert q.dtype == k.dtype == v.dtype == cache.ring_k.dtype == cache.ring_v.dtype
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1
    assert cos.shape == sin.shape == (1, head_dim // 2) and cos.dtype == sin.dtype == torch.float32
    assert cos.stride(1) == sin.stride(1) == 1
    assert cache.ring_k.is_contiguous() and cache.ring_v.is_contiguous() and cache.records.is_contiguous()
    assert cache.table.stride(1) == 1 and cache.recent_size >= layout.block_size and group <= 16
    key = plane_constants(layout, "key")
    blocks_dtype = block_dot_dtype(key, interpreted=not q.is_cuda)
    q_rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q_blocks = torch.empty((cache.num_heads, head_dim), dtype=blocks_dtype, device=q.device)
    append_token_kernel[(cache.num_kv_heads,)](
        q,
        k,
        v,
        cos,
        sin,
        q_rotated,
        q_blocks,
        cache.ring_k,
        cache.ring_v,
        cache.records,
        cache.table,
        cache.rows,
        cache.start,
        q.stride(1),
        k.stride(1),
        v.stride(1),
        cache.table.stride(0),
        SINK=cache.sink_size,
        RECENT=cache.recent_size,
        GROUP=group,
        GROUP_PAD=16,
        DIM=head_dim,
        HALF_PAD=triton.next_power_of_2(head_dim // 2),
        BLOCK_SIZE=layout.block_size,
        RECORD_BYTES=layout.record_bytes,
        KEY=key,
        VALUE=plane_constants(layout, "value"),
        FACTOR=hadamard_factor(head_dim),
        LIMIT=torch.finfo(blocks_dtype).max,
        TILE=TOKEN_TILE,
        num_warps=WARPS,
    )
    return q_rotated, q_blocks
