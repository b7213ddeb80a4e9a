"""Attention of one new token: the ring for every head, the blocks for retrieval heads, joined by log-sum-exp.

Flash-decoding (arXiv 2311.01282) in two launches. The split kernel has programs for pieces of the ring of each KV head
and for equal ranges of the blocks of each retrieval head; all query heads of a KV head share one program, so a block is
read once. The merge kernel joins them. Nothing here depends on the length of the context but the ranges, which the
device computes from `start`: a captured CUDA graph stays valid while the context grows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from duolocal.kernels.gpu.decode_blocks import LOWEST, attend_block_range
from duolocal.kernels.gpu.decode_merge import merge_splits_kernel
from duolocal.kernels.gpu.layer_cache import LayerCache
from duolocal.kernels.gpu.planes import PlaneConstants, hadamard_factor, plane_constants, unsupported

# To be swept on a GPU.
TILE_TOKENS = 64  # of one block, 16 for each warp; a shorter block makes shorter tiles
TILES = 2  # per iteration: 1 or 2
STEP_BYTES = 32 * 1024  # of codes per iteration at most: wide planes take fewer and shorter tiles
STAGES = 3  # iterations in flight: STAGES - 1 in shared memory
PROGRAMS_PER_SM = 3
HOST_SPLITS = 4  # of each retrieval head's blocks, without a GPU
WINDOW_BYTES = 8 * 1024  # of keys per program over the ring
MERGE_TILE = 16  # partial results joined at a time
MERGE_WARPS = 4

LOG2_E = 1.4426950408889634


@triton.jit
def split_attention_kernel(
    q_rotated,  # [num_heads, DIM] compute dtype
    q_blocks,  # [num_heads, DIM] Q_TYPE
    ring_k,  # [num_kv_heads, num_slots, DIM] compute dtype
    ring_v,
    records,  # uint8 [num_records, RECORD_BYTES]
    table,  # int64 [num_retrieval, max_blocks]
    retrieval_heads,  # int32 [num_retrieval]
    widths,  # int32 [num_kv_heads]
    start,  # int64 [1]
    lists,  # int32 [num_retrieval, BUDGET + 1]; with BUDGET 0 nothing
    partial_out,  # float32 [num_kv_heads, WINDOW_SPLITS + block_splits, GROUP, DIM]
    partial_lse,  # float32 [num_kv_heads, WINDOW_SPLITS + block_splits, GROUP], base 2
    table_stride,
    block_programs,  # num_retrieval * block_splits
    block_splits,
    scale,  # of the scores, log2(e) included
    BUDGET: tl.constexpr,  # blocks beside the newest; 0: all are read
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    WINDOW_SPLITS: tl.constexpr,
    WINDOW_TILE: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,  # GROUP, padded to what a tensor core takes
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RECORD_BYTES: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_DOT: tl.constexpr,  # dtype of the product with the keys, and of the values
    VALUE_DOT: tl.constexpr,
    STREAMS: tl.constexpr,
    TILES: tl.constexpr,  # per iteration: 1 or 2
    TILE_STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    position = tl.load(start).to(tl.int32)  # of the new token
    if program < block_programs:
        row = program // block_splits
        split = program % block_splits
        head = tl.load(retrieval_heads + row)
        step_tokens: tl.constexpr = STREAMS * 16 * TILES
        seen_end = position - RECENT + 1
        first_step: tl.constexpr = 0 if BUDGET > 0 else SINK // step_tokens
        if BUDGET > 0:
            # Iterations count through the list.
            length = tl.minimum((seen_end - 1) // BLOCK_SIZE - SINK // BLOCK_SIZE, BUDGET) + 1
            count = tl.cdiv(length * BLOCK_SIZE, step_tokens)
            listed = lists + row * (BUDGET + 1)
        else:
            length = 0
            count = tl.maximum(tl.cdiv(seen_end, step_tokens) - first_step, 0)
            listed = lists
        if seen_end <= SINK:
            count = 0
        per_split = tl.cdiv(count, block_splits)
        begin = first_step + split * per_split
        end = tl.minimum(begin + per_split, first_step + count)
        partial = head.to(tl.int64) * (WINDOW_SPLITS + block_splits) + WINDOW_SPLITS + split
        lse_at = partial_lse + partial * GROUP + columns
        if begin >= end:
            tl.store(lse_at, tl.full([COLUMNS], float("-inf"), tl.float32), mask=columns < GROUP)
        else:
            attend_block_range(
                q_blocks + head * (GROUP * DIM),
                records,
                table + row.to(tl.int64) * table_stride,
                listed,
                length,
                partial_out + partial * (GROUP * DIM),
                lse_at,
                begin,
                end,
                seen_end,
                scale,
                SINK,
                GROUP,
                COLUMNS,
                DIM,
                DIM_PAD,
                BLOCK_SIZE,
                RECORD_BYTES,
                KEY,
                VALUE,
                KEY_DOT,
                VALUE_DOT,
                STREAMS,
                TILES,
                TILE_STAGES,
                BUDGET > 0,
                INTERPRETED,
            )
    else:
        window = program - block_programs
        head = window // WINDOW_SPLITS
        split = window % WINDOW_SPLITS
        partial = head.to(tl.int64) * (WINDOW_SPLITS + block_splits) + split
        dims = tl.arange(0, DIM_PAD)
        slots = split * WINDOW_TILE + tl.arange(0, WINDOW_TILE)
        # The position that each slot holds, as in duolocal/cache/ring.py; C's remainder has the dividend's sign.
        age = ((position - slots) % RECENT + RECENT) % RECENT
        held = tl.where(slots < SINK, slots, position - age)
        width = tl.load(widths + head)
        visible = (slots < SINK + RECENT) & (held <= position) & ((slots < SINK) | (held >= SINK))
        visible = visible & ((held < SINK) | (position - held < width))
        within = visible[:, None] & (dims[None, :] < DIM)
        at = (head.to(tl.int64) * (SINK + RECENT) + slots[:, None]) * DIM + dims[None, :]
        # What is not stored may hold anything, and 0 · NaN is NaN: it is not read.
        k = tl.load(ring_k + at, mask=within, other=0.0)
        v = tl.load(ring_v + at, mask=within, other=0.0)
        q_mask = (columns[None, :] < GROUP) & (dims[:, None] < DIM)
        q = tl.load(q_rotated + (head * GROUP + columns[None, :]) * DIM + dims[:, None], mask=q_mask, other=0.0)
        scores = tl.dot(k, q, input_precision="ieee") * scale  # [WINDOW_TILE, COLUMNS]
        scores = tl.where(visible[:, None], scores, float("-inf"))
        top = tl.maximum(tl.max(scores, 0), LOWEST)
        weights = tl.exp2(scores - top[None, :])
        total = tl.sum(weights, 0)
        out = tl.dot(tl.trans(v), weights.to(v.dtype), input_precision="ieee")  # [DIM_PAD, COLUMNS]
        seen = total > 0.0
        out = out / tl.where(seen, total, 1.0)[None, :]
        tl.store(partial_out + (partial * GROUP + columns[None, :]) * DIM + dims[:, None], out, mask=q_mask)
        lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        tl.store(partial_lse + partial * GROUP + columns, lse, mask=columns < GROUP)


def block_split_count(cache: LayerCache) -> int:
    """Return how many programs share the blocks of one retrieval head; it does not depend on the context."""
    if not cache.num_retrieval:
        return 0
    if cache.records.device.type != "cuda":
        return HOST_SPLITS
    processors = torch.cuda.get_device_properties(cache.records.device).multi_processor_count
    splits = max(1, processors * PROGRAMS_PER_SM // cache.num_retrieval)
    # A list is short: an iteration for each program, or for some.
    return splits if cache.selection is None else min(splits, cache.selection.budget + 1)


def window_tile(cache: LayerCache) -> int:
    """Return the slots of one program over the ring: WINDOW_BYTES of keys, 16 to 64."""
    token_bytes = triton.next_power_of_2(cache.head_dim) * cache.ring_k.element_size()
    return min(64, max(16, WINDOW_BYTES // token_bytes))


def partial_shape(cache: LayerCache, *, block_splits: int | None = None) -> tuple[int, int, int, int]:
    """Return the shape of `partial_out`, float32: [num_kv_heads, splits, query_group, head_dim]."""
    blocks = block_split_count(cache) if block_splits is None else block_splits
    return cache.num_kv_heads, -(-cache.num_slots // window_tile(cache)) + blocks, cache.query_group, cache.head_dim


def decode_attention(
    cache: LayerCache,
    q_rotated: Tensor,
    q_blocks: Tensor,
    *,
    block_splits: int | None = None,
    partial_out: Tensor | None = None,
    partial_lse: Tensor | None = None,
) -> Tensor:
    """Attend from the token at position `cache.start`, which `append_token` has stored, to all that it may see.

    Of the blocks only those that `select_blocks` has listed, where the cache has a selection.

    q_rotated: [1, num_heads, head_dim] compute dtype; q_blocks: [num_heads, head_dim], both from `append_token`.
    block_splits: programs per retrieval head, None for the device's. partial_out: float32 of at least
    `partial_shape` in numbers, partial_lse without head_dim: memory to work in, None for fresh. Returns
    [1, num_heads, head_dim] compute dtype.
    """
    layout, head_dim, group = cache.layout, cache.head_dim, cache.query_group
    assert unsupported(layout) is None, unsupported(layout)
    assert q_rotated.shape == (1, cache.num_heads, head_dim) and q_rotated.is_contiguous(), q_rotated.shape
    assert q_blocks.shape == (cache.num_heads, head_dim) and q_blocks.is_contiguous(), q_blocks.shape
    assert q_rotated.dtype == cache.ring_k.dtype == cache.ring_v.dtype
    assert cache.ring_k.is_contiguous() and cache.ring_v.is_contiguous() and cache.records.is_contiguous()
    assert cache.table.stride(1) == 1 and cache.recent_size >= layout.block_size and group <= 16
    interpreted = not q_rotated.is_cuda
    blocks = block_split_count(cache) if block_splits is None else block_splits
    blocks = blocks if cache.num_retrieval else 0
    shape = partial_shape(cache, block_splits=blocks)
    window_splits = shape[1] - blocks
    device = q_rotated.device
    out = torch.empty_like(q_rotated)
    if partial_out is None:
        partial_out = torch.empty(shape, dtype=torch.float32, device=device)
    if partial_lse is None:
        partial_lse = torch.empty(shape[:3], dtype=torch.float32, device=device)
    assert partial_out.is_contiguous() and partial_out.numel() >= shape[0] * shape[1] * shape[2] * shape[3]
    assert partial_lse.is_contiguous() and partial_lse.numel() >= shape[0] * shape[1] * shape[2]
    block_programs = cache.num_retrieval * blocks
    constants, options = split_constants(cache, interpreted=interpreted)
    split_attention_kernel[(block_programs + cache.num_kv_heads * window_splits,)](
        q_rotated,
        q_blocks,
        cache.ring_k,
        cache.ring_v,
        cache.records,
        cache.table,
        cache.retrieval_heads,
        cache.widths,
        cache.start,
        None if cache.selection is None else cache.selection.lists,
        partial_out,
        partial_lse,
        cache.table.stride(0),
        block_programs,
        blocks,
        head_dim**-0.5 * LOG2_E,
        **constants,
        **options,
    )
    merge_splits_kernel[(cache.num_heads,)](
        partial_out,
        partial_lse,
        cache.rows,
        out,
        shape[1],
        WINDOW_SPLITS=window_splits,
        GROUP=group,
        DIM=head_dim,
        DIM_PAD=triton.next_power_of_2(head_dim),
        TILE=MERGE_TILE,
        ROTATED=layout.value.rotate,
        FACTOR=hadamard_factor(head_dim),
        num_warps=MERGE_WARPS,
    )
    return out


def block_dot_dtype(plane: PlaneConstants, *, interpreted: bool) -> torch.dtype:
    """Return the type of the products with a plane's numbers; `q_blocks` has that of the key plane."""
    if plane.kind == 0 or (plane.kind == 2 and interpreted):  # the interpreter has no bfloat16 product
        return torch.float32
    return torch.bfloat16 if plane.kind == 2 else torch.float16


def split_constants(cache: LayerCache, *, interpreted: bool) -> tuple[dict[str, object], dict[str, int]]:
    """Return the split kernel's compile-time arguments and launch options."""
    layout, head_dim = cache.layout, cache.head_dim
    key, value = plane_constants(layout, "key"), plane_constants(layout, "value")
    token_bytes = (key.token_bytes + value.token_bytes) * triton.next_power_of_2(head_dim) // head_dim
    tile, tiles = min(TILE_TOKENS, layout.block_size), TILES
    if cache.selection is not None:
        tiles = 1  # the more programs share a list, the sooner they are done
    while tiles > 1 and tile * tiles * token_bytes > STEP_BYTES:
        tiles //= 2
    while tile > 16 and tile * token_bytes > STEP_BYTES:
        tile //= 2
    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    window = window_tile(cache)
    constants: dict[str, object] = {
        "KEY": key,
        "VALUE": value,
        "BUDGET": 0 if cache.selection is None else cache.selection.budget,
        "SINK": cache.sink_size,
        "RECENT": cache.recent_size,
        "WINDOW_SPLITS": -(-cache.num_slots // window),
        "WINDOW_TILE": window,
        "GROUP": cache.query_group,
        "COLUMNS": 8 if cache.query_group <= 8 else 16,
        "DIM": head_dim,
        "DIM_PAD": triton.next_power_of_2(head_dim),
        "BLOCK_SIZE": layout.block_size,
        "RECORD_BYTES": layout.record_bytes,
        "KEY_DOT": types[block_dot_dtype(key, interpreted=interpreted)],
        "VALUE_DOT": types[block_dot_dtype(value, interpreted=interpreted)],
        "STREAMS": tile // 16,
        "TILES": tiles,
        "TILE_STAGES": STAGES,
        "INTERPRETED": interpreted,
    }
    # Products in float32 have no tensor core: the more warps share one, the fewer registers each needs.
    return constants, {"num_warps": max(4, tile // 16) if 0 in (key.kind, value.kind) else tile // 16}
