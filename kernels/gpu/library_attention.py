"""Blocks by the library's flash attention: decode a span of blocks once for the whole chunk, then attend to it.

A long chunk reads every key many times, so decoding is worth a pass of its own, and what is left is ordinary 16-bit
attention, which the library does best. Spans bound the scratch memory; their results are joined by log-sum-exp.

Query t of a chunk (position start + t) sees positions sink_size..start + t - recent_size. Let `skipped` be the number
of queries that see nothing and `base` = start + skipped - recent_size. Then all others see [sink_size, base), without
a mask, and of base + u those with u <= t - skipped: a causal square. (With queries skipped, base is sink_size.)
"""

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from duolocal.kernels.blocks import BlockLayout, Plane, hadamard
from duolocal.kernels.gpu.layer_cache import LayerCache
from duolocal.kernels.gpu.planes import load_codes, load_scales, numbers, plane_constants

Backend = Literal["flash", "cudnn"]

SPAN = 32768  # tokens decoded at a time
DECODE_TOKENS = 32  # decoded by one program
CUDNN_LEAST = 64  # rows and keys; cuDNN refuses some shorter lengths
CUDNN_DIM = 128  # the largest head_dim that every cuDNN supports
_HALF_MAX = tl.constexpr(65504.0)


@triton.jit
def load_plane(record, tokens, columns, mask, UPPER, PLANE, DIM, DOT):
    """Load one half of head_dim of tokens as numbers [tokens, HALF_PAD], before factor and addend; UPPER: 0 or 1."""
    if PLANE.kind == 5:
        codes = load_codes(record, tokens, columns, mask, PLANE, False)
        return numbers(codes, 4 * UPPER, PLANE.kind, DOT)
    codes = load_codes(record, tokens, columns + UPPER * (DIM // 2), mask, PLANE, False)
    return numbers(codes, 0, PLANE.kind, DOT)


@triton.jit
def dequantize(number, factor, addend, KIND, OUT):
    """Return factor · number + addend [tokens, dims] as OUT; what float16 cannot hold is saturated."""
    x = number.to(tl.float32)
    if KIND >= 3:
        x = x * factor[:, None]
    if KIND >= 4:
        x = x + addend[:, None]
    if OUT == tl.float16:  # noqa: SIM300
        x = tl.minimum(tl.maximum(x, -_HALF_MAX), _HALF_MAX)
    return x.to(OUT)


@triton.jit
def decode_plane(
    record,
    tokens,
    wanted,
    target,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    PLANE: tl.constexpr,
    NUMBER: tl.constexpr,
    OUT: tl.constexpr,
):
    """Store tokens [n] of a plane, where `wanted`, at the pointers target [n, 1]."""
    columns = tl.arange(0, HALF_PAD)[None, :]
    mask = wanted[:, None] & (columns < DIM // 2)
    factor, addend = load_scales(record, tokens, wanted, PLANE)
    for upper in tl.static_range(2):
        number = load_plane(record, tokens[:, None], columns, mask, upper, PLANE, DIM, NUMBER)
        tl.store(target + upper * (DIM // 2) + columns, dequantize(number, factor, addend, PLANE.kind, OUT), mask=mask)


@triton.jit(do_not_specialize=["begin", "end"])
def decode_span_kernel(
    records,  # uint8 [num_records, record_bytes]
    table,  # int64 [num_retrieval, max_blocks]
    out_k,  # [num_retrieval, end - begin, DIM]
    out_v,
    begin,
    end,
    table_stride,
    record_stride,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    OUT: tl.constexpr,
    KEY: tl.constexpr,
    K_NUMBER: tl.constexpr,
    VALUE: tl.constexpr,
    V_NUMBER: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    first = (begin // TOKENS + tl.program_id(0)) * TOKENS
    record = records + tl.load(table + row * table_stride + first // BLOCK_SIZE) * record_stride
    tokens = first % BLOCK_SIZE + tl.arange(0, TOKENS)
    positions = first + tl.arange(0, TOKENS)
    wanted = (positions >= begin) & (positions < end)
    target = ((row * (end - begin) + (positions - begin)) * DIM)[:, None]
    decode_plane(record, tokens, wanted, out_k + target, DIM, HALF_PAD, KEY, K_NUMBER, OUT)
    decode_plane(record, tokens, wanted, out_v + target, DIM, HALF_PAD, VALUE, V_NUMBER, OUT)


def decode_span(
    cache: LayerCache, begin: int, end: int, dtype: torch.dtype, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Decode positions begin..end-1 of all retrieval heads; all their blocks are full.

    Returns k and v [num_retrieval, end - begin, head_dim] in `dtype`; a rotated plane stays rotated. out: memory for
    both, [2, n] of that dtype, n no less than one of them has.
    """
    layout, dim = cache.layout, cache.head_dim
    assert 0 <= begin < end <= cache.max_blocks * layout.block_size, (begin, end, cache.max_blocks)
    shape = cache.num_retrieval, end - begin, dim
    if out is None:
        out = torch.empty(2, prod(shape), dtype=dtype, device=cache.records.device)
    k, v = (plane[: prod(shape)].view(shape) for plane in out)
    tokens = min(layout.block_size, DECODE_TOKENS)
    grid = (triton.cdiv(end, tokens) - begin // tokens, cache.num_retrieval)
    decode_span_kernel[grid](
        cache.records,
        cache.table,
        k,
        v,
        begin,
        end,
        cache.table.stride(0),
        cache.records.stride(0),
        DIM=dim,
        HALF_PAD=triton.next_power_of_2(dim // 2),
        BLOCK_SIZE=layout.block_size,
        TOKENS=tokens,
        OUT=triton_dtype(dtype),
        KEY=plane_constants(layout, "key"),
        K_NUMBER=number_dtype(layout.key),
        VALUE=plane_constants(layout, "value"),
        V_NUMBER=number_dtype(layout.value),
        num_warps=4,
    )
    return k, v


def decoded_spans(
    cache: LayerCache, begin: int, end: int, dtype: torch.dtype, *, span: int = SPAN
) -> Iterator[tuple[Tensor, Tensor]]:
    """Decode positions begin..end-1 span by span, each as `decode_span` does; use it before the next is asked for.

    Where blocks lie in host memory, the next span comes over the bus, on a stream of its own, while this one is used.
    Spans are then half as long, so that two of them take the memory of one.
    """
    streams = two_streams(cache.records.device) if cache.beyond else None
    if streams is None:
        for at in range(begin, end, span):
            yield decode_span(cache, at, min(at + span, end), dtype)
        return
    here, aside = streams
    starts = range(begin, end, max(1, span // 2))
    most = cache.num_retrieval * min(starts.step, max(0, end - begin)) * cache.head_dim
    buffers = torch.empty(2, 2, most, dtype=dtype, device=cache.records.device)
    ready, used = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))

    def ask(number: int) -> tuple[Tensor, Tensor]:
        which, at = number % 2, starts[number]
        with torch.cuda.stream(aside):
            if number >= 2:
                aside.wait_event(used[which])
            decoded = decode_span(cache, at, min(at + starts.step, end), dtype, out=buffers[which])
            ready[which].record(aside)
        return decoded

    aside.wait_stream(here)  # for blocks that were written, and for whoever had the memory of the buffers before
    asked: list[tuple[Tensor, Tensor]] = []
    try:
        for number in range(len(starts)):
            asked += [ask(later) for later in range(len(asked), min(number + 2, len(starts)))]
            here.wait_event(ready[number % 2])
            yield asked[number]
            used[number % 2].record(here)
    finally:
        here.wait_stream(aside)  # before anybody else gets the memory of the buffers


def two_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | None:
    """Return the stream that is used now and the one on which blocks come over the bus; None without a GPU."""
    return (torch.cuda.current_stream(device), _second_stream(device)) if device.type == "cuda" else None


@lru_cache(maxsize=8)
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def library_blocks_attention(
    cache: LayerCache, q: Tensor, start: int, *, backend: Backend | None = None, span: int = SPAN
) -> tuple[Tensor, Tensor]:
    """Attend from a chunk's queries to the blocks of the retrieval heads.

    q: [q_len, num_heads, head_dim] at positions start.. . Returns out float32 [num_retrieval, q_len · group, head_dim],
    a token's query heads side by side, and lse float32 [num_retrieval, q_len · group]; 0 and -inf for a query that
    sees nothing. A rotated value plane leaves the output rotated. At least one query sees something.

    Memory beside the result, in bytes, with d = head_dim and 16-bit scratch: spans 4 · num_retrieval · span · d, or the
    square 4 · num_retrieval · q_len · (1 + 2 · group) · d, and 12 · num_retrieval · q_len · group · d for queries and
    the part that is joined. Nothing grows with the context.
    """
    group, dim, q_len = cache.query_group, cache.head_dim, q.shape[0]
    dtype = scratch_dtype(cache.layout, q.dtype)
    scale = dim**-0.5
    skipped = max(0, cache.sink_size + cache.recent_size - start)
    seeing = q_len - skipped
    assert seeing > 0, (start, q_len)
    base = start + skipped - cache.recent_size
    queries = fold_queries(cache, q[skipped:], dtype)  # [num_retrieval, seeing * group, head_dim]
    rows = cache.num_retrieval, q_len * group

    # The square: queries and keys of each query head as long as the chunk, the keys repeated.
    k, v = decode_span(cache, base, base + seeing, dtype)
    heads = cache.num_retrieval * group
    square = queries.view(-1, seeing, group, dim).transpose(1, 2).reshape(heads, seeing, dim)
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    part, part_lse = flash_with_lse(square, k, v, causal=True, scale=scale, backend=backend)
    del square, k, v
    out = torch.zeros(*rows, dim, dtype=torch.float32, device=q.device)
    lse = torch.full(rows, float("-inf"), dtype=torch.float32, device=q.device)
    folded = cache.num_retrieval, group, seeing
    first = skipped * group
    out[:, first:].view(-1, seeing, group, dim).copy_(part.reshape(*folded, dim).transpose(1, 2))
    lse[:, first:].view(-1, seeing, group).copy_(part_lse.reshape(folded).transpose(1, 2))

    for k, v in decoded_spans(cache, cache.sink_size, base, dtype, span=span):
        part, part_lse = flash_with_lse(queries, k, v, causal=False, scale=scale, backend=backend)
        del k, v
        joined = torch.logaddexp(lse, part_lse)
        out.mul_((lse - joined).exp_()[..., None]).add_(part * (part_lse - joined).exp_()[..., None])
        lse = joined
    return out, lse


def flash_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Attend with the library's kernel.

    q: [heads, rows, head_dim]; k, v: [heads, keys, head_dim], all contiguous and of one 16-bit dtype (on a CPU also
    float32). causal: row t sees keys up to t; rows and keys are then equally many. Returns out like q and the natural
    log-sum-exp, float32 [heads, rows]. backend: None for cuDNN where it is the faster one (sm_90 and newer).

    The schemas (torch 2.13; _scaled_dot_product_* of aten): flash(q, k, v, dropout_p, is_causal, return_debug_mask,
    scale=) and cudnn(q, k, v, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, scale=) return
    output, logsumexp and more. cuDNN's log-sum-exp is [1, heads, rows] before torch 2.9 and [1, heads, rows, 1] since;
    that of flash was once padded to a multiple of rows.
    """
    rows, keys, dim = q.shape[1], k.shape[1], q.shape[2]
    assert k.shape == v.shape == (q.shape[0], keys, dim) and q.dtype == k.dtype == v.dtype, (q.shape, k.shape, v.shape)
    assert not causal or rows == keys, (rows, keys)
    q, k, v = q[None], k[None], v[None]
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    elif _backend(q, keys, backend) == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out[0], unpadded(lse, rows)


def unpadded(lse: Tensor, rows: int) -> Tensor:
    """Return [heads, rows] of a log-sum-exp [1, heads, rows or more] or [1, heads, rows or more, 1]."""
    return lse.reshape(*lse.shape[1:3])[:, :rows]


def _backend(q: Tensor, keys: int, backend: Backend | None) -> Backend:
    if q.shape[-1] > CUDNN_DIM or min(q.shape[2], keys) < CUDNN_LEAST:
        return "flash"
    return backend or ("cudnn" if torch.cuda.get_device_capability(q.device) >= (9, 0) else "flash")


def fold_queries(cache: LayerCache, q: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the retrieval heads' queries, rotated where the keys are, the query heads of a token side by side.

    q: [q_len, num_heads, head_dim]. Returns [num_retrieval, q_len · group, head_dim] in `dtype`, contiguous.
    """
    q_len, _, dim = q.shape
    grouped = q.unflatten(1, (cache.num_kv_heads, cache.query_group))
    if cache.num_retrieval < cache.num_kv_heads:
        grouped = grouped.index_select(1, cache.retrieval_heads)
    x = grouped.transpose(0, 1).reshape(cache.num_retrieval, q_len * cache.query_group, dim)
    if cache.layout.key.rotate:
        x = x.float() @ hadamard_matrix(dim, q.device)
    if dtype == torch.float16 and x.dtype != torch.float16:
        x = x.clamp(-65504.0, 65504.0)  # an infinite query would have NaN scores
    return x.to(dtype).contiguous()  # with one query head per KV head, all this may have been a view


@lru_cache(maxsize=8)
def hadamard_matrix(dim: int, device: torch.device) -> Tensor:
    """Return the transform of `blocks.hadamard` as a float32 matrix [dim, dim]: symmetric, its own inverse."""
    return hadamard(torch.eye(dim, device=device))


def scratch_dtype(layout: BlockLayout, compute: torch.dtype) -> torch.dtype:
    """Return the dtype that decoded keys and values have: float16 holds integer and FP8 planes best.

    A 32-bit plane holds what was computed, so the compute dtype holds it exactly, unless it was rotated.
    """
    dtypes = {plane.dtype for plane in (layout.key, layout.value) if plane.kind == "float"} or {torch.float16}
    assert len(dtypes) == 1, f"planes of {dtypes}: the library takes one dtype"
    dtype = dtypes.pop()
    assert dtype is not None
    return compute if dtype == torch.float32 else dtype


def number_dtype(plane: Plane) -> tl.dtype:
    """Return the dtype that holds a plane's codes exactly."""
    return tl.float16 if plane.dtype is None else triton_dtype(plane.dtype)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name of a dtype."""
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
