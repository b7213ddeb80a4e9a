"""Closing blocks and writing the ring on the GPU: the bytes of `encode_blocks`, the slots of `Ring.write`."""

from functools import partial

import pytest
import torch
from torch import Tensor

from duolocal.cache.ring import Ring
from duolocal.kernels.blocks import BlockLayout, Plane, decode_blocks, encode_blocks
from duolocal.kernels.gpu.layer_cache import LayerCache
from duolocal.kernels.gpu.store import close_blocks, write_ring
from duolocal.quant.kv import KV_FORMATS, kv_layout
from tests.triton_device import COMPUTE_DTYPES, DEVICE

HALF = COMPUTE_DTYPES[0]
CUTS = (2, 1, 60, 1, 130, 1, 63, 128, 14)  # before, at and over the edges of blocks; longer than a block; single tokens


def layer(
    layout: BlockLayout,
    *,
    count: int,
    heads: tuple[int, ...] = (0, 2),
    num_kv_heads: int = 3,
    sink_size: int = 5,
    recent_size: int = 128,
    dtype: torch.dtype = HALF,
) -> LayerCache:
    """Return a poisoned, empty layer with room for `count` tokens."""
    blocks = count // layout.block_size
    num_records = len(heads) * blocks + 2
    order = torch.randperm(num_records, generator=torch.Generator().manual_seed(3))[: len(heads) * blocks]
    ring = torch.full(
        (2, num_kv_heads, sink_size + recent_size, layout.head_dim), float("nan"), dtype=dtype, device=DEVICE
    )
    return LayerCache(
        ring_k=ring[0],
        ring_v=ring[1],
        records=torch.full((num_records, layout.record_bytes), 0xFF, dtype=torch.uint8, device=DEVICE),
        table=order.view(len(heads), blocks).to(DEVICE),
        retrieval_heads=torch.tensor(heads, dtype=torch.int32, device=DEVICE),
        rows=torch.tensor([heads.index(h) if h in heads else -1 for h in range(num_kv_heads)], dtype=torch.int32),
        widths=torch.full((num_kv_heads,), recent_size, dtype=torch.int32, device=DEVICE),
        start=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        layout=layout,
        query_group=1,
        sink_size=sink_size,
        recent_size=recent_size,
    )


def tokens(cache: LayerCache, count: int, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    shape = count, cache.num_kv_heads, cache.head_dim
    k, v = ((torch.randn(shape, generator=generator) * scale).to(DEVICE, cache.ring_k.dtype) for _ in range(2))
    k[:, :, 1] *= 20
    if count > 25:
        k[20], v[21] = 0.0, 0.75  # constant rows
        v[22, :, 0] = -100.0
    return k, v


def feed(cache: LayerCache, k: Tensor, v: Tensor, cuts: tuple[int, ...]) -> None:
    start = 0
    for length in cuts:
        span = slice(start, start + length)
        close_blocks(cache, k[span], v[span], start)
        write_ring(cache, k[span], v[span], start)
        start += length


def assert_records(cache: LayerCache, k: Tensor, v: Tensor) -> None:
    """Byte for byte, but for rotated planes, whose sums may differ in the last place: there one code at most."""
    layout = cache.layout
    size = layout.block_size
    blocks = k.shape[0] // size
    for row, head in enumerate(cache.retrieval_heads.tolist()):
        got = cache.records[cache.table[row, :blocks]]
        keys, values = (x[: blocks * size, head].float().view(blocks, size, -1) for x in (k, v))
        wanted = encode_blocks(keys, values, layout)
        for which, plane in (("key", layout.key), ("value", layout.value)):
            mine, theirs = (
                decode_blocks(r, layout, which, dtype=torch.float64)  # type: ignore[arg-type]
                for r in (got, wanted)
            )
            if plane.rotate:
                step = (theirs.amax(-1, keepdim=True) - theirs.amin(-1, keepdim=True)) / (2**plane.bits - 1)
                error = (mine - theirs).abs()
                assert bool((error <= 1.01 * step + 1e-3 * theirs.abs().amax(-1, keepdim=True)).all())
                assert float((error > 0.5 * step).double().mean()) < 1e-2  # few codes differ at all
            else:
                codes, _ = layout.spans(which)  # type: ignore[arg-type]
                assert torch.equal(got[:, codes], wanted[:, codes])
                assert torch.equal(mine, theirs)  # the scales as numbers: a minimum of 0 may have either sign
    used = cache.table.reshape(-1)
    free = torch.ones(cache.records.shape[0], dtype=torch.bool, device=DEVICE).index_fill(0, used, False)
    assert bool((cache.records[free] == 0xFF).all()), "a free record was written"


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", COMPUTE_DTYPES)
@pytest.mark.parametrize(("kv", "head_dim"), [(kv, 64) for kv in KV_FORMATS] + [(kv, 96) for kv in ("int8", "int4")])
def test_records_are_those_of_encode_blocks(kv: str, head_dim: int, dtype: torch.dtype) -> None:
    cache = layer(kv_layout(kv, head_dim=head_dim, dtype=dtype), count=sum(CUTS), dtype=dtype)
    k, v = tokens(cache, sum(CUTS))
    feed(cache, k, v, CUTS)
    assert_records(cache, k, v)


@pytest.mark.cover(1)
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 128), (32, 80), (64, 256), (128, 128)])
@pytest.mark.parametrize("kv", ["k8v4", "fp8"])
def test_sizes_of_blocks_and_heads(kv: str, block_size: int, head_dim: int) -> None:
    layout = kv_layout(kv, head_dim=head_dim, dtype=HALF, block_size=block_size)
    cache = layer(layout, count=300, sink_size=70, heads=(1,), num_kv_heads=2)
    k, v = tokens(cache, 300)
    feed(cache, k, v, (100, 29, 1, 126, 44))
    assert_records(cache, k, v)


@pytest.mark.cover(1)
@pytest.mark.parametrize("sink_size", [0, 1, 64, 70, 400])
@pytest.mark.parametrize("recent_size", [128, 200])
def test_the_ring_holds_what_the_reference_writes(sink_size: int, recent_size: int) -> None:
    """Bit by bit, and untouched (NaN) where it holds nothing: sinks that come late, chunks longer than the ring."""
    cache = layer(
        kv_layout("int8", head_dim=80, dtype=HALF), count=500, sink_size=sink_size, recent_size=recent_size, heads=()
    )
    ring = Ring(
        num_layers=1,
        num_kv_heads=3,
        head_dim=80,
        sink_size=sink_size,
        recent_size=recent_size,
        device=DEVICE,
        dtype=HALF,
    )
    ring.data.fill_(float("nan"))
    k, v = tokens(cache, 500)
    start = 0
    for length in (2, 1, 60, 5, 1, 300, 1, 128, 2):
        span = slice(start, start + length)
        write_ring(cache, k[span], v[span], start)
        ring.write(0, k[span].transpose(0, 1), v[span].transpose(0, 1), start=start)
        start += length
        for mine, theirs in ((cache.ring_k, ring.data[0, 0]), (cache.ring_v, ring.data[1, 0])):
            assert torch.equal(mine.view(torch.int16), theirs.view(torch.int16)), start


def test_nothing_is_launched_when_no_block_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = layer(kv_layout("int8", head_dim=64, dtype=HALF), count=128)
    k, v = tokens(cache, 63)
    monkeypatch.setattr("duolocal.kernels.gpu.store.close_blocks_kernel", None)
    close_blocks(cache, k, v, 0)
    none = layer(kv_layout("int8", head_dim=64, dtype=HALF), count=128, heads=())
    close_blocks(none, *tokens(none, 128), 0)
    assert bool((cache.records == 0xFF).all())


def test_chunks_and_records_beyond_two_to_the_31() -> None:
    """Token strides and the record's number that put elements beyond 2^31 of the first; only touched pages cost."""
    layout = BlockLayout(Plane("int", 8), Plane("int", 4, rotate=True), 16, 64)
    empty = partial(torch.empty, device=DEVICE)
    cache = layer(layout, count=16, heads=(0,), num_kv_heads=1)
    stride = 2**31 // 24
    far_k, far_v = (empty(31 * stride + 64, dtype=HALF).as_strided((32, 1, 64), (stride, 64, 1)) for _ in range(2))
    k, v = tokens(cache, 32)
    far_k.copy_(k)
    far_v.copy_(v)
    num_records = 2**31 // layout.record_bytes + 2
    records = empty(num_records, layout.record_bytes, dtype=torch.uint8)
    table = torch.tensor([[num_records - 1, 0]], device=DEVICE)
    far = LayerCache(**{**vars(cache), "records": records, "table": table})
    close_blocks(far, far_k, far_v, 0)
    write_ring(far, far_k, far_v, 0)
    assert torch.equal(far.ring_k[0, 5:32], k[5:, 0]) and torch.equal(far.ring_v[0, :5], v[:5, 0])
    near = layer(layout, count=32, heads=(0,), num_kv_heads=1)
    close_blocks(near, k, v, 0)
    assert torch.equal(records[table[0]], near.records[near.table[0]])
