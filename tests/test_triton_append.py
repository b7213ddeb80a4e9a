"""One new token into ring and blocks, judged byte by byte: by the ring's own rule and by `encode_blocks`.

Everything that the launch must not touch is compared with what it was before; memory that holds nothing is NaN.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from duolocal.kernels.blocks import BlockLayout, Plane, encode_blocks, hadamard
from duolocal.kernels.gpu.append import append_token
from duolocal.kernels.gpu.layer_cache import LayerCache
from duolocal.kernels.gpu.planes import unsupported
from duolocal.quant.kv import KV_FORMATS, kv_layout
from tests.triton_device import COMPUTE_DTYPES, DEVICE, INTERPRETED

RETRIEVAL = (True, False, True)


def make_cache(
    layout: BlockLayout,
    *,
    dtype: torch.dtype,
    retrieval: tuple[bool, ...] = RETRIEVAL,
    group: int = 2,
    sink_size: int = 0,
    recent_size: int = 128,
    streaming_recent: int | None = None,
    context: int = 512,
    start: int = 0,
) -> LayerCache:
    """Return a layer's cache of nothing but poison: slots NaN, records 0xFF, blocks in no order in a wider table."""
    heads = [head for head, flag in enumerate(retrieval) if flag]
    blocks = -(-context // layout.block_size)
    generator = torch.Generator().manual_seed(5)
    table = torch.randperm(len(heads) * blocks, generator=generator).view(len(heads), blocks) + 1
    wider = torch.full((len(heads) + 2, blocks + 3), -1)
    wider[1:-1, :blocks] = table
    slots = sink_size + recent_size
    ring = torch.full((2, len(retrieval), slots, layout.head_dim), float("nan"), dtype=dtype, device=DEVICE)
    rows = [heads.index(head) if flag else -1 for head, flag in enumerate(retrieval)]
    widths = [recent_size if flag else streaming_recent or recent_size for flag in retrieval]
    return LayerCache(
        ring_k=ring[0],
        ring_v=ring[1],
        records=torch.full((len(heads) * blocks + 2, layout.record_bytes), 0xFF, dtype=torch.uint8, device=DEVICE),
        table=wider.to(DEVICE)[1:-1, :blocks],
        retrieval_heads=torch.tensor(heads, dtype=torch.int32, device=DEVICE),
        rows=torch.tensor(rows, dtype=torch.int32, device=DEVICE),
        widths=torch.tensor(widths, dtype=torch.int32, device=DEVICE),
        start=torch.tensor([start], device=DEVICE),
        layout=layout,
        query_group=group,
        sink_size=sink_size,
        recent_size=recent_size,
    )


def at(cache: LayerCache, start: int) -> LayerCache:
    return dataclasses.replace(cache, start=torch.tensor([start], device=cache.start.device))


def slot(cache: LayerCache, position: int) -> int:
    if position < cache.sink_size:
        return position
    return cache.sink_size + (position - cache.sink_size) % cache.recent_size


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def fill(cache: LayerCache, k: Tensor, v: Tensor) -> None:
    """Put k and v [count, num_kv_heads, head_dim] of positions 0, 1, ... into the ring; the last of each slot stays."""
    for position in range(k.shape[0]):
        cache.ring_k[:, slot(cache, position)] = k[position]
        cache.ring_v[:, slot(cache, position)] = v[position]


def angles(position: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angle = position * 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))[None]
    return angle.cos().to(DEVICE), angle.sin().to(DEVICE)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [1, heads, head_dim] after RoPE, float64, not rounded."""
    low, high = x.double().cpu().chunk(2, dim=-1)
    cos, sin = cos.double().cpu()[:, None], sin.double().cpu()[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def assert_rounded_once(got: Tensor, wanted: Tensor) -> None:
    """Say that float32 arithmetic and one rounding to got's dtype explain its distance from wanted."""
    step = torch.finfo(got.dtype).eps
    limit = wanted.abs() * (step / 2 + 2**-22) + 4 * 2**-22  # products of size 4, which may cancel
    assert bool(((got.double().cpu() - wanted).abs() <= limit).all())


def assert_plane(got: Tensor, wanted: Tensor, layout: BlockLayout, which: str, *, exact: bool) -> None:
    """Compare one plane of records [num, record_bytes] on the CPU.

    A rotation's float32 sums come in another order than in `hadamard`: where one lies within 2^-21 of a boundary
    between two codes, the code may be the neighbour; where it decides the rounding of a scale, so may it.
    """
    plane: Plane = getattr(layout, which)
    codes, scales = layout.spans(which)  # type: ignore[arg-type]
    if exact:
        assert torch.equal(got[:, codes], wanted[:, codes]), which
        dtype = torch.bfloat16 if plane.kind == "fp8" else torch.float16
        assert torch.equal(*(x[:, scales].contiguous().view(dtype) for x in (got, wanted))), which
        return
    mine, theirs = (x[:, scales].contiguous().view(torch.int16).int() for x in (got, wanted))
    assert int((mine - theirs).abs().max()) <= 1 and (mine != theirs).double().mean() < 0.01
    split = [(x[:, codes] & 15, x[:, codes] >> 4) for x in (got, wanted)]
    difference = torch.stack([(a.int() - b.int()).abs() for a, b in zip(*split, strict=True)])
    assert int(difference.max()) <= 1 and (difference != 0).double().mean() < 0.001, difference.double().mean()


def check(cache: LayerCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, LayerCache]:
    """Append a token after k, v [start, num_kv_heads, head_dim], judge all memory; return the queries and the cache."""
    position, head_dim, layout = k.shape[0], cache.head_dim, cache.layout
    cache = at(cache, position)
    fill(cache, k, v)
    dtype = k.dtype
    # As a model makes them: views of one product.
    heads = cache.num_heads + 2 * cache.num_kv_heads
    fused = normal(1, heads * head_dim + 6, dtype=dtype, seed=99)[:, 3:-3].view(1, heads, head_dim)
    q, new_k, new_v = fused.split((cache.num_heads, cache.num_kv_heads, cache.num_kv_heads), dim=1)
    cos, sin = angles(position, head_dim)
    before = {name: getattr(cache, name).cpu().clone() for name in ("ring_k", "ring_v", "records", "table")}
    q_rotated, q_blocks = append_token(cache, q, new_k, new_v, cos, sin)

    assert q_rotated.shape == q.shape and q_rotated.dtype == dtype
    assert_rounded_once(q_rotated, rotated(q, cos, sin))
    place = slot(cache, position)
    stored_k, stored_v = cache.ring_k[:, place].cpu(), cache.ring_v[:, place].cpu()
    assert_rounded_once(stored_k, rotated(new_k, cos, sin)[0])
    assert torch.equal(stored_v, new_v[0].cpu())
    before["ring_k"][:, place], before["ring_v"][:, place] = stored_k, stored_v

    size = layout.block_size
    exact = {which: not getattr(layout, which).rotate for which in ("key", "value")}
    if (position + 1) % size == 0:
        first = position + 1 - size
        for row, head in enumerate(cache.retrieval_heads.tolist()):
            record = int(cache.table[row, first // size])
            tokens_k, tokens_v = (
                torch.cat((x[first:, head].cpu().float(), new[None, head].float()))
                for x, new in ((k, stored_k), (v, stored_v))
            )
            wanted = encode_blocks(tokens_k[None], tokens_v[None], layout)
            got = cache.records[record].cpu()[None]
            for which in ("key", "value"):
                assert_plane(got, wanted, layout, which, exact=exact[which])
            before["records"][record] = got
    for name, wanted in before.items():
        got = getattr(cache, name).cpu().contiguous().view(torch.uint8)
        assert torch.equal(got, wanted.contiguous().view(torch.uint8)), name
    return q_rotated, q_blocks, cache


CASES = [
    # kv, head_dim, block_size, sink_size, recent_size, start, group
    ("32", 64, 64, 0, 128, 0, 1),
    ("32", 80, 64, 64, 128, 127, 3),
    ("16", 64, 64, 70, 128, 63, 2),
    ("16", 256, 128, 1, 128, 127, 8),
    ("int8", 96, 64, 70, 128, 127, 3),
    ("int8", 128, 32, 0, 256, 511, 4),
    ("fp8", 128, 64, 1, 128, 191, 1),
    ("fp8", 80, 16, 64, 129, 79, 3),
    ("k8v4", 64, 64, 0, 128, 62, 4),
    ("k8v4", 96, 64, 64, 128, 255, 3),
    ("int4", 128, 64, 70, 131, 319, 4),
    ("int4", 256, 64, 1, 128, 127, 2),
    ("int4", 80, 128, 0, 128, 383, 1),
    ("int4", 64, 16, 64, 128, 64, 16),
]


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", COMPUTE_DTYPES)
@pytest.mark.parametrize(("kv", "head_dim", "block_size", "sink_size", "recent_size", "start", "group"), CASES)
def test_ring_and_block_and_queries(
    kv: str,
    head_dim: int,
    block_size: int,
    sink_size: int,
    recent_size: int,
    start: int,
    group: int,
    dtype: torch.dtype,
) -> None:
    layout = kv_layout(kv, head_dim=head_dim, dtype=dtype, block_size=block_size)
    cache = make_cache(layout, dtype=dtype, group=group, sink_size=sink_size, recent_size=recent_size)
    k, v = (normal(start, len(RETRIEVAL), head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    k[:, :, 1] += 15.0  # an outlier channel
    q_rotated, q_blocks, cache = check(cache, k, v)

    assert q_blocks.shape == (cache.num_heads, head_dim)
    wanted = q_rotated[0].cpu().double()
    wanted = hadamard(wanted) if layout.key.rotate else wanted
    kind = layout.key
    kind_dtype = kind.dtype if kind.kind == "float" else torch.float16
    assert q_blocks.dtype == (torch.float32 if INTERPRETED and kind_dtype == torch.bfloat16 else kind_dtype)
    for head in cache.retrieval_heads.tolist():
        heads = slice(head * group, (head + 1) * group)
        limit = wanted[heads].abs() * torch.finfo(q_blocks.dtype).eps / 2 + 1e-6
        assert bool(((q_blocks[heads].cpu().double() - wanted[heads]).abs() <= limit).all())


PLANES = {
    "int8": Plane("int", 8),
    "int4": Plane("int", 4),
    "fp8": Plane("fp8", 8),
    "float16": Plane("float", 16, torch.float16),
    "bfloat16": Plane("float", 16, torch.bfloat16),
    "float32": Plane("float", 32, torch.float32),
}


@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-8, 1e-3, 1.0, 1e3, 1e6, 1e30])
@pytest.mark.parametrize("name", PLANES)
def test_codes_are_those_of_encode_blocks_byte_for_byte(name: str, magnitude: float) -> None:
    """From numbers below float16's range (scale 0) to far beyond it (saturated)."""
    dtype = torch.float32 if INTERPRETED else COMPUTE_DTYPES[0]
    layout = BlockLayout(PLANES[name], PLANES[name], 16, 64)
    cache = make_cache(layout, dtype=dtype, retrieval=(True,), group=1)
    k, v = ((normal(15, 1, 64, dtype=torch.float32, seed=seed) * magnitude).to(dtype) for seed in (1, 2))
    k[3], v[4] = magnitude, -magnitude
    k[:, :, 1] *= 40
    check(cache, k, v)


def test_numbers_between_two_codes_go_to_the_even_one() -> None:
    if not INTERPRETED:
        pytest.skip("bfloat16 and float16 have no such numbers for all codes")
    halves = torch.arange(0, 256) + 0.5
    halves[0], halves[-1] = 0.0, 255.0
    every = torch.arange(256, dtype=torch.uint8)
    fp8 = every[(every & 127) != 127].view(torch.float8_e4m3fn).float().sort().values  # all but the two NaN
    between = torch.cat(((fp8[1:] + fp8[:-1]) / 2, torch.tensor([448.0, -0.0])))
    between = torch.nn.functional.pad(between, (0, 256 - between.shape[0]))
    for plane, x in ((Plane("int", 8), halves), (Plane("int", 4), halves / 17), (Plane("fp8", 8), between)):
        layout = BlockLayout(plane, plane, 16, 256)
        k = x.expand(15, 1, 256).contiguous()
        cache = make_cache(layout, dtype=torch.float32, retrieval=(True,), group=1)
        check(cache, k, -k)


def test_rotations_that_are_exact_give_the_same_bytes() -> None:
    """Small integers add up without rounding, so here the order of a rotation's sums cannot matter."""
    dtype = COMPUTE_DTYPES[0]
    for head_dim in (64, 96, 128):
        layout = kv_layout("int4", head_dim=head_dim, dtype=dtype)
        cache = make_cache(layout, dtype=dtype, sink_size=3)
        k, v = (normal(63, 3, head_dim, dtype=torch.float32, seed=seed).mul(8).round().to(dtype) for seed in (1, 2))
        cache = at(cache, 63)
        fill(cache, k, v)
        new_k, new_v = (
            normal(1, 3, head_dim, dtype=torch.float32, seed=seed).mul(8).round().to(dtype) for seed in (3, 4)
        )
        one, zero = torch.ones(1, head_dim // 2, device=DEVICE), torch.zeros(1, head_dim // 2, device=DEVICE)
        append_token(cache, torch.zeros(1, 6, head_dim, dtype=dtype, device=DEVICE), new_k, new_v, one, zero)
        for row, head in enumerate((0, 2)):
            tokens_k, tokens_v = (
                torch.cat((x[:, head], new[:, head])).float().cpu()[None] for x, new in ((k, new_k), (v, new_v))
            )
            got = cache.records[int(cache.table[row, 0])].cpu()[None]
            wanted = encode_blocks(tokens_k, tokens_v, layout)
            # Where 1/sqrt(32) is rounded, the product with it and the division by sqrt(32) may differ.
            for which in ("key", "value"):
                assert_plane(got, wanted, layout, which, exact=head_dim == 64)


def test_queries_beyond_float16_saturate() -> None:
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    layout = kv_layout("int8", head_dim=64, dtype=dtype)
    cache = make_cache(layout, dtype=dtype, retrieval=(True,), group=1)
    q = torch.full((1, 1, 64), 1e6, dtype=dtype, device=DEVICE)
    q[..., 32:] = -1e6
    one, zero = torch.ones(1, 32, device=DEVICE), torch.zeros(1, 32, device=DEVICE)
    _, q_blocks = append_token(cache, q, q, q, one, zero)
    assert q_blocks.dtype == torch.float16
    assert torch.equal(q_blocks[0].cpu(), q[0, 0].cpu().sign().half() * 65504)


def test_offsets_beyond_two_to_the_31() -> None:
    """The block's record, and the strides of the table, in a mapping of which hardly a page is touched."""
    dtype = COMPUTE_DTYPES[0]
    layout = kv_layout("int8", head_dim=64, dtype=dtype)
    num_records = 2**31 // layout.record_bytes + 10
    cache = make_cache(layout, dtype=dtype, retrieval=(False, True), group=1)
    records = torch.empty(num_records, layout.record_bytes, dtype=torch.uint8, device=DEVICE)
    records[-8:] = 0xFF
    table = torch.full((1, 8), num_records - 3, device=DEVICE)
    cache = dataclasses.replace(cache, records=records, table=table)
    cache = at(cache, 63)
    k, v = (normal(63, 2, 64, dtype=dtype, seed=seed) for seed in (1, 2))
    fill(cache, k, v)
    new = normal(1, 2, 64, dtype=dtype, seed=3)
    one, zero = torch.ones(1, 32, device=DEVICE), torch.zeros(1, 32, device=DEVICE)
    append_token(cache, new, new, new, one, zero)
    tokens_k, tokens_v = (torch.cat((x[:, 1], new[:, 1])).float().cpu()[None] for x in (k, v))
    assert torch.equal(records[-3].cpu(), encode_blocks(tokens_k, tokens_v, layout)[0])
    assert bool((records[-2:] == 0xFF).all()) and bool((records[-8:-3] == 0xFF).all())


def test_layouts_that_the_kernels_do_not_read_are_named() -> None:
    assert all(unsupported(kv_layout(kv, head_dim=128, dtype=torch.bfloat16)) is None for kv in KV_FORMATS)
    grouped = BlockLayout(Plane("int", 4, groups=4), Plane("int", 4), 64, 128)
    assert "4 scales" in (unsupported(grouped) or "")
    assert "blocks of 48" in (unsupported(BlockLayout(Plane("int", 8), Plane("int", 8), 48, 64)) or "")
    assert "head_dim 24" in (unsupported(BlockLayout(Plane("int", 8), Plane("int", 8), 64, 24)) or "")
