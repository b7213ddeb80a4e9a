"""Attention of prefill chunks on the GPU against the dense float64 oracle.

The oracle is told what each position's block decodes to; that the records have the bytes of `encode_blocks` is
`test_triton_store.py`. Slots of the ring that hold nothing are NaN, free records 0xFF, results NaN.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from duolocal.kernels.blocks import BlockLayout, Plane, decode_blocks, encode_blocks, hadamard
from duolocal.kernels.gpu import fused_attention
from duolocal.kernels.gpu.layer_cache import LayerCache
from duolocal.kernels.gpu.library_attention import decode_span, fold_queries, library_blocks_attention, unpadded
from duolocal.kernels.gpu.prefill import band_attention, blocks_attention, prefill_attention
from duolocal.kernels.gpu.store import close_blocks, write_ring
from duolocal.quant.kv import KV_FORMATS, kv_layout
from tests.triton_device import COMPUTE_DTYPES, DEVICE, INTERPRETED

HALF = COMPUTE_DTYPES[0]  # the 16-bit type that most cases run in
ROUTES = ("fused", "library")
SINKS = (0, 1, 64, 70)
RECENTS = (1, 16, 128, 256)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every float tensor that an operation allocates is NaN until it is written."""
    real = torch.empty

    def empty(*args: object, **kwargs: object) -> Tensor:
        x = real(*args, **kwargs)  # type: ignore[call-overload]
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", empty)


@dataclass
class Context:
    """A layer and all the tokens it will ever see."""

    retrieval: tuple[bool, ...]
    sink_size: int
    recent_size: int  # of streaming heads
    layout: BlockLayout
    q: Tensor  # [count, num_heads, head_dim]
    k: Tensor  # [count, num_kv_heads, head_dim]
    v: Tensor
    cache: LayerCache

    @property
    def exact_recent(self) -> int:
        return self.cache.recent_size


def make(
    count: int,
    *,
    retrieval: tuple[bool, ...] = (True, False),
    sink_size: int = 4,
    recent_size: int = 16,
    kv: str | BlockLayout = "int8",
    head_dim: int = 64,
    group: int = 2,
    dtype: torch.dtype = HALF,
    seed: int = 0,
) -> Context:
    """Return a poisoned, empty layer and `count` tokens."""
    generator = torch.Generator().manual_seed(seed)
    num_kv_heads = len(retrieval)

    def normal(heads: int, scale: float) -> Tensor:
        x = torch.randn(count, heads, head_dim, generator=generator) * scale
        return x.to(DEVICE, dtype)

    q, k, v = normal(num_kv_heads * group, 2.0), normal(num_kv_heads, 1.0), normal(num_kv_heads, 1.0)
    layout = kv_layout(kv, head_dim=head_dim, dtype=dtype) if isinstance(kv, str) else kv
    exact_recent = max(recent_size, 128)
    heads = [head for head, flag in enumerate(retrieval) if flag]
    blocks = count // layout.block_size
    num_records = len(heads) * blocks + 3
    table = torch.randperm(num_records, generator=generator)[: len(heads) * blocks].view(len(heads), blocks)
    rows = torch.full((num_kv_heads,), -1, dtype=torch.int32)
    rows[heads] = torch.arange(len(heads), dtype=torch.int32)
    ring = torch.full((2, num_kv_heads, sink_size + exact_recent, head_dim), float("nan"), dtype=dtype, device=DEVICE)
    cache = LayerCache(
        ring_k=ring[0],
        ring_v=ring[1],
        records=torch.full((num_records, layout.record_bytes), 0xFF, dtype=torch.uint8, device=DEVICE),
        table=table.to(DEVICE),
        retrieval_heads=torch.tensor(heads, dtype=torch.int32, device=DEVICE),
        rows=rows.to(DEVICE),
        widths=torch.tensor(
            [exact_recent if flag else recent_size for flag in retrieval], dtype=torch.int32, device=DEVICE
        ),
        start=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        layout=layout,
        query_group=group,
        sink_size=sink_size,
        recent_size=exact_recent,
    )
    return Context(retrieval, sink_size, recent_size, layout, q, k, v, cache)


def at(context: Context, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the layer where a chunk start..end-1 finds it, with plain torch; return the chunk's q, k, v.

    The ring holds what it holds after `start` tokens, the records all blocks that are full after `end`.
    """
    cache = context.cache
    for ring, x in ((cache.ring_k, context.k), (cache.ring_v, context.v)):
        ring.fill_(float("nan"))
        held = [p for p in range(start) if p < cache.sink_size or p >= start - cache.recent_size]
        for p in held:
            slot = p if p < cache.sink_size else cache.sink_size + (p - cache.sink_size) % cache.recent_size
            ring[:, slot] = x[p]
    cache.records.fill_(0xFF)
    size = context.layout.block_size
    closed = end // size
    for row, head in enumerate(cache.retrieval_heads.tolist()):
        if closed:
            k, v = (x[: closed * size, head].float().reshape(closed, size, -1) for x in (context.k, context.v))
            cache.records[cache.table[row, :closed]] = encode_blocks(k, v, context.layout)
    return context.q[start:end], context.k[start:end], context.v[start:end]


def stored(context: Context, which: str, x: Tensor) -> Tensor:
    """Return x [count, num_kv_heads, head_dim] float64 as read from blocks; NaN where none is full."""
    x = x.double().cpu()
    cache = context.cache
    plane = context.layout.key if which == "key" else context.layout.value
    for row, head in enumerate(cache.retrieval_heads.tolist()):
        records = cache.records.cpu()[cache.table[row].cpu()]
        decoded = decode_blocks(records, context.layout, which, dtype=torch.float64)  # type: ignore[arg-type]
        decoded = (hadamard(decoded) if plane.rotate else decoded).flatten(0, 1)
        x[: decoded.shape[0], head] = decoded
    return x


def oracle(context: Context, start: int, end: int, part: str = "all") -> tuple[Tensor, Tensor, Tensor]:
    """Return out [n, num_heads, head_dim] and lse [n, num_heads] of queries start..end-1, float64, and their sizes.

    part: "band" (what is read as computed), "blocks" or "all". size [n, num_heads, 1] is the weighted mean of the
    largest number of each value: a rotated value, or one of scale and minimum, has the rounding of its largest number.
    """
    cache = context.cache
    q, k, v = (x.double().cpu() for x in (context.q[start:end], context.k[:end], context.v[:end]))
    blocks_k, blocks_v = stored(context, "key", context.k)[:end], stored(context, "value", context.v)[:end]
    i, j = torch.arange(start, end)[:, None], torch.arange(end)[None]
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float64)
    size = torch.empty(*q.shape[:2], 1, dtype=torch.float64)
    for head, retrieval in enumerate(context.retrieval):
        width = context.exact_recent if retrieval else context.recent_size
        exact = (j <= i) & ((j < context.sink_size) | (i - j < width))
        old = (j >= context.sink_size) & (i - j >= context.exact_recent) & retrieval
        assert not bool((exact & old).any())
        mask = {"band": exact, "blocks": old, "all": exact | old}[part]
        keys_b, values_b = blocks_k[:, head].nan_to_num(), blocks_v[:, head].nan_to_num()
        for query_head in range(head * cache.query_group, (head + 1) * cache.query_group):
            query = q[:, query_head] / q.shape[-1] ** 0.5
            scores = torch.where(exact, query @ k[:, head].T, query @ keys_b.T).masked_fill(~mask, float("-inf"))
            weights = scores.softmax(-1).nan_to_num()  # a row that sees nothing
            out[:, query_head] = (weights * exact) @ v[:, head] + (weights * old) @ values_b
            lse[:, query_head] = scores.logsumexp(-1)
            largest = torch.where(exact, v[:, head].abs().amax(-1), values_b.abs().amax(-1))
            size[:, query_head] = (weights * largest).sum(-1, keepdim=True)
    return out, lse, size


# Weights are rounded to the 16-bit type (half a unit is 2^-12 of a float16, 2^-9 of a bfloat16), and so are rotated or
# converted queries, whose scores of 10 to 20 have many such errors, decoded values, and the output. Measured in
# float16: 9e-4 at worst, 3e-4 without blocks.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2, torch.float32: 1e-5}


def assert_near(got: Tensor, wanted: Tensor, size: Tensor, *, tolerance: float) -> None:
    assert got.shape == wanted.shape
    limit = tolerance * size + 1e-30
    error = (got.double().cpu() - wanted).abs()
    assert bool((error <= limit).all()), f"{(error / limit).nan_to_num(torch.inf).max()} times too far"


def assert_lse(got: Tensor, wanted: Tensor, *, tolerance: float) -> None:
    """Scores have sizes of 10 to 20; where nothing is visible both are -inf."""
    got = got.double().cpu()
    assert got.shape == wanted.shape and not bool(got.isnan().any())
    assert torch.equal(got == float("-inf"), wanted == float("-inf"))
    error = (got - wanted).masked_fill(wanted == float("-inf"), 0.0).abs().max()
    assert error <= 4 * tolerance, error


def check_band(context: Context, start: int, end: int) -> None:
    q, k, v = at(context, start, end)
    out, lse = band_attention(context.cache, q, k, v, start)
    wanted, wanted_lse, size = oracle(context, start, end, "band")
    tolerance = TOLERANCE[q.dtype]
    assert out.dtype == lse.dtype == torch.float32
    assert_near(out, wanted, size, tolerance=tolerance)
    assert_lse(lse, wanted_lse, tolerance=5e-5)  # products of the inputs are exact


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", COMPUTE_DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "group"), [(64, 1), (64, 3), (80, 4), (96, 3), (96, 8), (128, 1), (128, 4), (256, 2)]
)
def test_band_equals_the_oracle(head_dim: int, group: int, dtype: torch.dtype) -> None:
    context = make(230, head_dim=head_dim, group=group, dtype=dtype, sink_size=5, recent_size=40)
    check_band(context, 0, 37)
    check_band(context, 180, 217)


@pytest.mark.cover(1)
@pytest.mark.parametrize("recent_size", RECENTS)
@pytest.mark.parametrize("sink_size", SINKS)
def test_band_at_the_edges_of_sinks_and_windows(sink_size: int, recent_size: int) -> None:
    """Chunks before, in and after the sinks, chunks longer than the window, single tokens, full and part-full rings."""
    context = make(400, sink_size=sink_size, recent_size=recent_size, group=1)
    for start, end in ((0, 1), (0, 150), (1, 3), (63, 66), (69, 72), (130, 260), (380, 400)):
        check_band(context, start, end)


def check(context: Context, start: int, end: int, *, route: str, tolerance: float | None = None) -> None:
    """Judge the blocks alone and the whole."""
    cache = context.cache
    q, k, v = at(context, start, end)
    tolerance = tolerance or TOLERANCE[q.dtype]
    wanted, wanted_lse, size = oracle(context, start, end, "blocks")
    seen = blocks_attention(cache, q, start, route=route)  # type: ignore[arg-type]
    if seen is None:
        assert bool((wanted_lse == float("-inf")).all())
    else:
        out, lse = seen
        assert out.dtype == lse.dtype == torch.float32
        out = hadamard(out) if context.layout.value.rotate else out
        heads = [head for head, flag in enumerate(context.retrieval) if flag]

        def folded(x: Tensor) -> Tensor:  # [n, num_heads, ...] as [num_retrieval, n * group, ...]
            return x.unflatten(1, (-1, cache.query_group))[:, heads].transpose(0, 1).flatten(1, 2)

        assert_near(out, folded(wanted), folded(size), tolerance=tolerance)
        assert_lse(lse, folded(wanted_lse), tolerance=tolerance)
    wanted, _, size = oracle(context, start, end)
    out = prefill_attention(cache, q, k, v, start, route=route)  # type: ignore[arg-type]
    assert out.dtype == q.dtype
    assert_near(out, wanted, size, tolerance=tolerance)


@pytest.mark.cover(1)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", COMPUTE_DTYPES)
@pytest.mark.parametrize("kv", KV_FORMATS)
def test_every_format_equals_the_oracle(kv: str, dtype: torch.dtype, route: str) -> None:
    context = make(420, kv=kv, group=3, dtype=dtype, sink_size=5)
    # float16 is what integer and FP8 planes are computed in, whatever the compute dtype.
    exact = dtype == torch.float32 and kv == "32"
    tolerance = TOLERANCE[dtype] if exact else max(TOLERANCE[dtype], TOLERANCE[torch.float16])
    check(context, 300, 341, route=route, tolerance=tolerance)


SHAPES = [  # head_dim, group, format, retrieval heads
    (64, 1, "int8", (True, True)),
    (64, 8, "int4", (True,)),
    (80, 3, "int8", (False, True)),
    (96, 1, "int4", (True, False, True)),
    (96, 4, "fp8", (True, True)),
    (128, 3, "k8v4", (False, False, True)),
    (128, 8, "16", (True, False)),
    (256, 1, "int4", (True, True)),
    (256, 4, "int8", (False, True)),
]


@pytest.mark.cover(1)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("head_dim", "group", "kv", "retrieval"), SHAPES)
def test_shapes_of_heads(head_dim: int, group: int, kv: str, retrieval: tuple[bool, ...], route: str) -> None:
    context = make(310, kv=kv, head_dim=head_dim, group=group, retrieval=retrieval, sink_size=3, recent_size=20)
    check(context, 277, 304, route=route)
    check(context, 304, 305, route=route)


def test_layers_of_one_class_of_heads() -> None:
    for retrieval in ((False, False), (True, True)):
        check(make(300, retrieval=retrieval), 250, 290, route="fused")
    assert blocks_attention(make(300, retrieval=(False,)).cache, make(300, retrieval=(False,)).q[:9], 280) is None


@pytest.mark.cover(1)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("sink_size", "recent_size"), [(0, 1), (1, 128), (64, 16), (70, 256), (70, 130)])
def test_blocks_at_the_edges_of_sinks_and_windows(sink_size: int, recent_size: int, route: str) -> None:
    """Chunks whose first, some or last queries see a block for the first time; single tokens; edges of blocks."""
    context = make(460, sink_size=sink_size, recent_size=recent_size, group=1)
    edge = sink_size + context.exact_recent  # the first query that sees a block's token
    assert blocks_attention(context.cache, context.q[:edge], 0, route=route) is None  # type: ignore[arg-type]
    for start, end in (
        (edge - 70, edge + 1),
        (edge - 3, edge + 2),
        (edge, edge + 1),
        (edge + 1, edge + 66),
        (383, 385),
    ):
        check(context, start, end, route=route)


@pytest.mark.cover(1)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_block_sizes(block_size: int, route: str) -> None:
    context = make(400, kv=kv_layout("k8v4", head_dim=64, dtype=HALF, block_size=block_size), sink_size=block_size + 3)
    check(context, 330, 390, route=route)


@pytest.mark.parametrize("route", ROUTES)
def test_planes_of_bfloat16_and_unlike_planes(route: str) -> None:
    half = Plane("float", 16, torch.bfloat16)
    check(make(300, kv=BlockLayout(half, half, 32, 64)), 250, 290, route=route, tolerance=TOLERANCE[torch.bfloat16])
    check(make(300, kv=BlockLayout(Plane("int", 4, rotate=True), Plane("fp8", 8), 64, 64)), 250, 290, route=route)
    check(make(300, kv=BlockLayout(Plane("fp8", 8), Plane("int", 4), 64, 64)), 250, 290, route=route)


@pytest.mark.parametrize("beyond", [False, True] if not INTERPRETED else [False])
@pytest.mark.parametrize("span", [1, 50, 64, 1000])
def test_spans_of_the_library_route(span: int, beyond: bool) -> None:
    """Spans that end in the middle of blocks and at their edges, and one that holds everything; on a second stream."""
    context = make(330, kv="int8", sink_size=5, retrieval=(True,), group=3)
    context.cache = replace(context.cache, beyond=beyond)
    start, end = (150, 171) if span == 1 else (290, 325)
    q, _, _ = at(context, start, end)
    out, lse = library_blocks_attention(context.cache, q, start, span=span)
    wanted, wanted_lse, size = (x.flatten(0, 1)[None] for x in oracle(context, start, end, "blocks"))
    assert_near(out, wanted, size, tolerance=TOLERANCE[HALF])
    assert_lse(lse, wanted_lse, tolerance=TOLERANCE[HALF])


@pytest.mark.parametrize(("start", "end"), [(125, 200), (280, 281), (370, 375)])
def test_splits_of_the_fused_route(start: int, end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of one tile each: some of them hold nothing that any, or some, of the queries see."""
    monkeypatch.setattr(fused_attention, "SPLIT_KEYS", 1)
    check(make(380, kv="int4", sink_size=5, retrieval=(True, True)), start, end, route="fused")


@pytest.mark.parametrize("route", ROUTES)
def test_scores_of_any_size(route: str) -> None:
    """Scores of +-200, the highest among sinks, old blocks or recent tokens, or nowhere."""
    for best in (2, 100, 290, None):
        context = make(320, retrieval=(True, False), kv="int8")
        direction = torch.ones(64, device=DEVICE) / 8
        context.q[:] = direction * 40
        context.k[:] = -direction * 40
        if best is not None:
            context.k[best] = direction * 40
        check(context, 280, 315, route=route)


@pytest.mark.parametrize("route", ROUTES)
def test_cuts_do_not_change_results(route: str) -> None:
    """A text in one chunk, in long and in short ones, through closing blocks and writing the ring as a model does."""
    count = 260
    outputs, records = [], []
    for cuts in ((260,), (100, 1, 1, 26, 64, 68), (190, 3, 67)):
        context = make(count, kv="int4", sink_size=5, recent_size=40, group=1)
        cache, start, parts = context.cache, 0, []
        for length in cuts:
            q, k, v = (x[start : start + length] for x in (context.q, context.k, context.v))
            close_blocks(cache, k, v, start)
            parts.append(prefill_attention(cache, q, k, v, start, route=route))  # type: ignore[arg-type]
            write_ring(cache, k, v, start)
            start += length
        outputs.append(torch.cat(parts))
        records.append(cache.records[cache.table])
        wanted, _, size = oracle(context, 0, count)
        assert_near(outputs[-1], wanted, size, tolerance=TOLERANCE[HALF])
    for other, other_records in zip(outputs[1:], records[1:], strict=True):
        assert torch.equal(other_records, records[0])
        assert_near(other, outputs[0].double().cpu(), size, tolerance=TOLERANCE[HALF])


def test_a_span_is_what_decode_blocks_gives() -> None:
    for kv in ("int4", "fp8", "16"):
        context = make(300, kv=kv, retrieval=(True, False, True), head_dim=80)
        at(context, 0, 300)
        cache = context.cache
        got = decode_span(cache, 37, 230, torch.float16)
        for which, x in zip(("key", "value"), got, strict=True):
            decoded = decode_blocks(cache.records[cache.table.flatten()], context.layout, which, dtype=torch.float32)  # type: ignore[arg-type]
            wanted = decoded.view(2, -1, 80)[:, 37:230]
            torch.testing.assert_close(x.float(), wanted, rtol=2**-10, atol=1e-6)


def test_queries_beyond_float16_are_saturated() -> None:
    cache = make(1, kv="int8", dtype=COMPUTE_DTYPES[-1]).cache
    q = torch.full((3, 4, 64), 1e30, device=DEVICE).to(torch.float32)
    assert bool((fold_queries(cache, q, torch.float16) == 65504.0).all())


def test_log_sum_exps_of_every_shape() -> None:
    lse = torch.arange(2 * 5.0).view(1, 2, 5)
    padded = torch.nn.functional.pad(lse, (0, 3), value=float("nan"))
    for shape in (lse, lse[..., None], padded, padded[..., None]):
        assert torch.equal(unpadded(shape, 5), lse[0])


@pytest.mark.cover(1)
@pytest.mark.skipif(INTERPRETED, reason="hours in the interpreter")
@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_long_contexts(head_dim: int, kv: str) -> None:
    context = make(6100, kv=kv, head_dim=head_dim, group=4, sink_size=64, recent_size=256)
    for start, end in ((4000, 6100), (6000, 6070), (6099, 6100)):
        for route in ROUTES:
            check(context, start, end, route=route)
        q, _, _ = at(context, start, end)
        wanted, wanted_lse, size = (x[:, :4].transpose(0, 1) for x in oracle(context, start, end, "blocks"))
        for backend in ("flash", "cudnn"):
            out, lse = library_blocks_attention(context.cache, q, start, backend=backend, span=1000)
            out = hadamard(out) if context.layout.value.rotate else out
            out, lse = (x[0].unflatten(0, (-1, 4)).transpose(0, 1) for x in (out, lse))
            assert_near(out, wanted, size, tolerance=TOLERANCE[HALF])
            assert_lse(lse, wanted_lse, tolerance=TOLERANCE[HALF])


def far(x: Tensor, stride: int) -> Tensor:
    """Return x [tokens, heads, dims] with `stride` elements from token to token; only touched pages cost memory."""
    size = (x.shape[0] - 1) * stride + x[0].numel()
    return x.new_empty(size).as_strided(x.shape, (stride, x.stride(1), 1)).copy_(x)


def test_offsets_beyond_two_to_the_31() -> None:
    """Tokens, table rows and records further apart than 32 bits reach, in elements or bytes."""
    context = make(170, retrieval=(True, True), kv="int8", group=1, sink_size=3)
    q, k, v = at(context, 140, 170)
    cache = context.cache
    wanted = prefill_attention(cache, q, k, v, 140)
    stride = 2**31 // 29 + 16
    many = torch.empty(2**31 // cache.records.shape[1] + 8, cache.records.shape[1], dtype=torch.uint8, device=DEVICE)
    table = cache.table + many.shape[0] - cache.records.shape[0]
    many[table] = cache.records[cache.table]
    moved = LayerCache(**{**vars(cache), "records": many, "table": table})
    for route in ROUTES:
        got = prefill_attention(moved, far(q, stride), far(k, stride), far(v, stride), 140, route=route)  # type: ignore[arg-type]
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-3)
