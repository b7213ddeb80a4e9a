"""Attention of one token against a dense float64 oracle with an explicit mask.

Blocks are written by `encode_blocks` and the oracle is given what `decode_blocks` makes of them. Everything that must
not be read is poison: slots of the ring that hold nothing are NaN, records of no visible block 0xFF (NaN in every
float format and in every scale), partial results and outputs NaN.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from duolocal.kernels.blocks import decode_blocks, encode_blocks, hadamard
from duolocal.kernels.gpu import decode
from duolocal.kernels.gpu.decode import block_dot_dtype, block_split_count, decode_attention, partial_shape
from duolocal.kernels.gpu.layer_cache import LayerCache
from duolocal.kernels.gpu.planes import plane_constants
from duolocal.quant.kv import KV_FORMATS, kv_layout
from tests.test_triton_append import make_cache, normal, slot
from tests.triton_device import COMPUTE_DTYPES, DEVICE, INTERPRETED

LENGTHS = 1 if INTERPRETED else 40  # a device also takes contexts this many times longer


def make_state(
    kv: str,
    *,
    head_dim: int,
    start: int,
    dtype: torch.dtype,
    group: int = 2,
    sink_size: int = 5,
    recent_size: int = 128,
    streaming_recent: int = 40,
    retrieval: tuple[bool, ...] = (True, False, True),
    block_size: int = 64,
    key_scale: float = 1.0,
) -> tuple[LayerCache, Tensor, Tensor]:
    """Return a cache of positions 0..start, poison elsewhere, and their k and v [start + 1, num_kv_heads, head_dim]."""
    layout = kv_layout(kv, head_dim=head_dim, dtype=dtype, block_size=block_size)
    cache = make_cache(
        layout,
        dtype=dtype,
        retrieval=retrieval,
        group=group,
        sink_size=sink_size,
        recent_size=recent_size,
        streaming_recent=streaming_recent,
        context=max(block_size, start + 1),
        start=start,
    )
    k, v = (normal(start + 1, len(retrieval), head_dim, dtype=torch.float32, seed=seed) for seed in (1, 2))
    k *= key_scale
    k[:, :, 1] += 4.0  # an outlier channel
    v[:, :, 2] -= 3.0
    store(cache, k.to(dtype), v.to(dtype))
    return cache, k.to(dtype), v.to(dtype)


def store(cache: LayerCache, k: Tensor, v: Tensor) -> None:
    """Put positions 0..n-1 into the ring, and into records the blocks that the next token may see, no others."""
    n, layout = k.shape[0], cache.layout
    kept = [p for p in range(n) if p < cache.sink_size or n - p <= cache.recent_size]
    slots = torch.tensor([slot(cache, p) for p in kept], device=DEVICE)
    cache.ring_k[:, slots] = k[kept].transpose(0, 1)
    cache.ring_v[:, slots] = v[kept].transpose(0, 1)
    seen_end = n - cache.recent_size
    if seen_end <= cache.sink_size:
        return
    size = layout.block_size
    blocks = slice(cache.sink_size // size, -(-seen_end // size))
    span = slice(blocks.start * size, blocks.stop * size)
    for row, head in enumerate(cache.retrieval_heads.tolist()):
        tokens_k, tokens_v = (x[span, head].cpu().float().view(-1, size, cache.head_dim) for x in (k, v))
        cache.records[cache.table[row, blocks]] = encode_blocks(tokens_k, tokens_v, layout).to(DEVICE)


def make_queries(cache: LayerCache, *, scale: float = 2.0, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Return q_rotated and q_blocks as `append_token` makes them, NaN for streaming heads."""
    dtype, group = cache.ring_k.dtype, cache.query_group
    q = (normal(1, cache.num_heads, cache.head_dim, dtype=torch.float32, seed=seed) * scale).to(dtype)
    blocks = q[0].float().cpu().clone()
    if cache.layout.key.rotate:
        blocks = hadamard(blocks)
    for head in range(cache.num_kv_heads):
        if head not in cache.retrieval_heads.tolist():
            blocks[head * group : (head + 1) * group] = float("nan")
    key = plane_constants(cache.layout, "key")
    return q, blocks.to(block_dot_dtype(key, interpreted=INTERPRETED)).to(DEVICE)


def oracle(cache: LayerCache, q: Tensor, q_blocks: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the token at the last position sees, float64 [num_heads, head_dim], and how large its values are."""
    n, layout, group = k.shape[0], cache.layout, cache.query_group
    i, j = n - 1, torch.arange(n)
    rows = cache.rows.tolist()
    out, size = (
        torch.empty(cache.num_heads, cache.head_dim, dtype=torch.float64),
        torch.empty(cache.num_heads, 1).double(),
    )
    for head in range(cache.num_kv_heads):
        exact = (j < cache.sink_size) | (i - j < int(cache.widths[head]))
        keys, values = k[:, head].double().cpu(), v[:, head].double().cpu()
        block_keys, block_values = torch.zeros_like(keys), torch.zeros_like(values)
        behind = torch.zeros_like(exact)
        if rows[head] >= 0:
            behind = (j >= cache.sink_size) & (i - j >= cache.recent_size)
            for block in sorted({int(p) // layout.block_size for p in j[behind]}):
                record = cache.records[cache.table[rows[head], block]][None].cpu()
                span = slice(block * layout.block_size, (block + 1) * layout.block_size)
                block_keys[span] = decode_blocks(record, layout, "key", dtype=torch.float64)[0]
                decoded = decode_blocks(record, layout, "value", dtype=torch.float64)[0]
                block_values[span] = hadamard(decoded) if layout.value.rotate else decoded
        for query in range(head * group, (head + 1) * group):
            scores = torch.where(behind, block_keys @ q_blocks[query].double().cpu(), keys @ q[0, query].double().cpu())
            weights = (scores / cache.head_dim**0.5).masked_fill(~(exact | behind), float("-inf")).softmax(-1)
            out[query] = (weights * exact) @ values + (weights * behind) @ block_values
            largest = torch.where(behind, block_values.abs().amax(-1), values.abs().amax(-1))
            size[query] = (weights * largest).sum()
    return out, size


def check(cache: LayerCache, k: Tensor, v: Tensor, *, splits: int, q_scale: float = 2.0, loose: float = 1.0) -> Tensor:
    q, q_blocks = make_queries(cache, scale=q_scale)
    shape = partial_shape(cache, block_splits=splits if cache.num_retrieval else 0)
    nan = torch.full(shape, float("nan"), device=DEVICE)
    before = [x.cpu().clone() for x in (cache.ring_k, cache.ring_v, cache.records, q, q_blocks)]
    out = decode_attention(
        cache,
        q,
        q_blocks,
        block_splits=splits,
        partial_out=nan,
        partial_lse=torch.full(shape[:3], float("nan")).to(DEVICE),
    )
    assert out.shape == q.shape and out.dtype == q.dtype
    for x, old in zip((cache.ring_k, cache.ring_v, cache.records, q, q_blocks), before, strict=True):
        assert torch.equal(x.cpu().contiguous().view(torch.uint8), old.contiguous().view(torch.uint8))
    wanted, size = oracle(cache, q, q_blocks, k, v)
    # Weights are rounded to the compute dtype (window) or to 16 bits (blocks) before they meet the values, each by
    # eps/2 of itself, the sum of them likewise at worst; the result is rounded once more. float32 alone: 3e-6.
    planes = (cache.layout.key, cache.layout.value)
    coarse = torch.float16 if any(plane.bits < 32 for plane in planes) else q.dtype
    eps = max(torch.finfo(q.dtype).eps, torch.finfo(coarse).eps if cache.num_retrieval else 0.0)
    limit = (eps + 5e-6) * loose * size
    error = (out[0].double().cpu() - wanted).abs()
    assert bool((error <= limit).all()), f"{(error / limit).nan_to_num(torch.inf).max():.3} times too far"
    return out


# Pairwise over kv, head_dim, group, sink, recent, start, splits; starts at the edges of blocks, sinks and the ring.
CASES = [
    # kv, head_dim, group, sink_size, recent_size, streaming_recent, start, splits
    ("32", 64, 1, 0, 128, 1, 0, 1),
    ("32", 96, 3, 64, 128, 16, 300, 3),
    ("32", 256, 4, 70, 128, 128, 198, 2),
    ("16", 64, 8, 1, 128, 16, 128, 4),
    ("16", 128, 4, 70, 256, 256, 400, 2),
    ("16", 256, 1, 64, 128, 1, 320, 1),
    ("int8", 64, 3, 70, 128, 128, 1, 2),
    ("int8", 96, 4, 0, 128, 1, 129, 8),
    ("int8", 128, 8, 1, 128, 16, 383, 5),
    ("int8", 256, 3, 64, 256, 128, 447, 3),
    ("fp8", 64, 4, 64, 128, 16, 63, 1),
    ("fp8", 96, 8, 70, 128, 128, 330, 2),
    ("fp8", 128, 1, 0, 128, 1, 255, 3),
    ("fp8", 256, 4, 1, 128, 16, 257, 1),
    ("k8v4", 64, 1, 64, 128, 1, 193, 7),
    ("k8v4", 96, 3, 1, 256, 256, 384, 2),
    ("k8v4", 128, 4, 70, 128, 16, 64, 1),
    ("k8v4", 128, 3, 0, 128, 128, 319, 4),
    ("k8v4", 256, 8, 70, 128, 1, 300, 6),
    ("int4", 64, 8, 0, 128, 16, 320, 2),
    ("int4", 80, 2, 1, 128, 16, 385, 3),
    ("int4", 96, 1, 70, 128, 128, 256, 5),
    ("int4", 128, 4, 64, 128, 1, 191, 8),
    ("int4", 128, 8, 70, 128, 16, 197, 1),
    ("int4", 128, 4, 70, 128, 16, 198, 4),
    ("int4", 128, 3, 0, 256, 128, 511, 3),
    ("int4", 256, 4, 64, 128, 1, 448, 1),
    ("int4", 128, 16, 1, 128, 1, 300, 2),
]


@pytest.mark.parametrize(
    ("kv", "head_dim", "group", "sink_size", "recent_size", "streaming_recent", "start", "splits"), CASES
)
def test_decode_equals_the_oracle(
    kv: str, head_dim: int, group: int, sink_size: int, recent_size: int, streaming_recent: int, start: int, splits: int
) -> None:
    # The interpreter takes its time: one dtype per case there.
    for dtype in COMPUTE_DTYPES[start % 2 :][:1] if INTERPRETED else COMPUTE_DTYPES:
        cache, k, v = make_state(
            kv,
            head_dim=head_dim,
            start=start * LENGTHS,
            dtype=dtype,
            group=group,
            sink_size=sink_size,
            recent_size=recent_size,
            streaming_recent=streaming_recent,
        )
        check(cache, k, v, splits=splits)


@pytest.mark.cover(1)
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("start", [128, 255, 256, 257, 400])
def test_block_sizes(block_size: int, start: int) -> None:
    dtype = COMPUTE_DTYPES[0]
    for kv, splits in (("int4", 2), ("16", 1)):
        cache, k, v = make_state(
            kv, head_dim=64, start=start, dtype=dtype, block_size=block_size, sink_size=start % 50, retrieval=(True,)
        )
        check(cache, k, v, splits=splits)


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, 63, 64, 127, 128, 132, 133, 134, 191, 192, 193, 260, 261, 262])
def test_positions_around_every_edge(start: int) -> None:
    """5 sinks and 128 recent tokens: the first block is seen from position 133 on, for one token of it."""
    dtype = torch.float32 if INTERPRETED else COMPUTE_DTYPES[0]
    cache, k, v = make_state("32", head_dim=64, start=start, dtype=dtype, retrieval=(True, False), group=1)
    check(cache, k, v, splits=2)


@pytest.mark.parametrize("retrieval", [True, False])
def test_one_class_of_heads_only(retrieval: bool) -> None:
    cache, k, v = make_state("int4", head_dim=64, start=300, dtype=COMPUTE_DTYPES[0], retrieval=(retrieval,) * 2)
    check(cache, k, v, splits=3)


def test_a_head_without_visible_blocks_is_exact_and_splits_do_not_matter() -> None:
    dtype = COMPUTE_DTYPES[0]
    cache, k, v = make_state("int4", head_dim=64, start=131, dtype=dtype, sink_size=4, streaming_recent=128)
    alone = check(cache, k, v, splits=1)
    assert torch.equal(alone, check(cache, k, v, splits=5))
    streaming = dataclasses.replace(
        cache,
        rows=torch.full_like(cache.rows, -1),
        table=cache.table[:0],
        retrieval_heads=cache.retrieval_heads[:0],
    )
    assert torch.equal(alone, check(streaming, k, v, splits=1))


@pytest.mark.cover(1)
@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("magnitude", [1e-7, 1e-4, 1e4])
def test_values_of_any_magnitude_keep_their_precision(kv: str, magnitude: float) -> None:
    """Scales near the ends of float16, where weight · scale as a float16 would vanish or overflow."""
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    cache, k, v = make_state(kv, head_dim=64, start=330, dtype=dtype, retrieval=(True,), group=4)
    v = v * magnitude
    v[200:210] = 0.0  # tokens of zeros, and one of a constant
    v[100] = magnitude
    v[50] *= 2.0 if magnitude > 1 else 100.0
    store(cache, k, v)
    check(cache, k, v, splits=2)


SCORES = {
    "equal": torch.zeros(401),
    "all-high": torch.full((401,), 200.0),
    "all-low": torch.full((401,), -200.0),
    "rising": torch.linspace(-200, 200, 401),
    "falling": torch.linspace(200, -200, 401),
    "jumping": torch.tensor([200.0, -200.0]).repeat(201)[:401],
    "sink": torch.zeros(401).index_fill(0, torch.tensor([2]), 200.0),
    "block": torch.zeros(401).index_fill(0, torch.tensor([100]), 200.0),
    "window": torch.zeros(401).index_fill(0, torch.tensor([390]), 200.0),
}


@pytest.mark.cover(1)
@pytest.mark.parametrize("kv", ["32", "int8", "int4"])
@pytest.mark.parametrize("name", SCORES)
def test_softmax_extremes(name: str, kv: str) -> None:
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    cache, k, v = make_state(kv, head_dim=64, start=400, dtype=dtype, retrieval=(True,), group=1)
    q, _ = make_queries(cache)
    direction = q[0, 0].double().cpu()
    direction = direction / (direction @ direction) * 8  # q · direction / sqrt(64) is 1
    k = (SCORES[name].double()[:, None, None] * direction).to(dtype).to(DEVICE)
    store(cache, k, v)
    # Scores of size 200 · log2(e) are good to some roundings of 2^-24 of their terms, which are several times larger.
    check(cache, k, v, splits=2, loose=1.0 if kv != "32" else 20.0)


def test_offsets_beyond_two_to_the_31() -> None:
    dtype = COMPUTE_DTYPES[0]
    cache, k, v = make_state("int8", head_dim=64, start=300, dtype=dtype, retrieval=(True,))
    num_records = 2**31 // cache.layout.record_bytes + 100
    records = torch.empty(num_records, cache.layout.record_bytes, dtype=torch.uint8, device=DEVICE)
    records[-20:] = (
        cache.records[:20]
        if cache.records.shape[0] >= 20
        else torch.cat(
            (cache.records, cache.records.new_full((20 - cache.records.shape[0], cache.layout.record_bytes), 0xFF))
        )
    )
    table = (cache.table + num_records - 20).contiguous()
    far = dataclasses.replace(cache, records=records[-20:], table=cache.table)
    q, q_blocks = make_queries(cache)
    wanted, size = oracle(far, q, q_blocks, k, v)
    cache = dataclasses.replace(cache, records=records, table=table)
    out = decode_attention(cache, q, q_blocks, block_splits=2)
    assert bool(((out[0].double().cpu() - wanted).abs() <= 1e-3 * size + 0.01 * (dtype == torch.bfloat16)).all())


def test_tiles_of_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sweep may choose gives the same attention."""
    cache, k, v = make_state("int4", head_dim=64, start=420, dtype=COMPUTE_DTYPES[0], retrieval=(True,), sink_size=70)
    for tile, tiles in ((16, 1), (32, 2), (64, 1), (64, 2)):
        monkeypatch.setattr(decode, "TILE_TOKENS", tile)
        monkeypatch.setattr(decode, "TILES", tiles)
        check(cache, k, v, splits=2)


def test_the_number_of_splits_does_not_depend_on_the_context() -> None:
    counts = set()
    for start in (0, 100, 400):
        cache, _, _ = make_state("int8", head_dim=64, start=start, dtype=COMPUTE_DTYPES[0])
        counts.add((block_split_count(cache), partial_shape(cache)))
    assert len(counts) == 1
    streaming, _, _ = make_state("int8", head_dim=64, start=0, dtype=COMPUTE_DTYPES[0], retrieval=(False,))
    assert block_split_count(streaming) == 0
