"""Compiled attention and block encoding against the dense float64 oracle, and against the torch path.

Blocks in "32" hold what was computed, so the oracle knows no blocks at all. For the other formats it is given what
the cache's own records decode to; that these are the bytes of `encode_blocks` is a test of its own. Everything that
must not be read is NaN: free records, slots of the ring that hold nothing, scratch memory, results.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from duolocal.cache import DuoCache
from duolocal.heads import HeadPlan
from duolocal.kernels.blocks import BlockLayout, Plane, decode_blocks, encode_blocks, hadamard
from duolocal.quant.kv import KV_FORMATS, kv_layout
from tests.compiled import THREADS, compiled, compiled_kernels, normal, poisoned, surrounded
from tests.oracle import oracle_attention, visibility_mask
from tests.pool_checks import poisoned_cache

pytestmark = compiled_kernels

# Relative to the weighted mean of the largest number of each value. A score of size 10 to 20 from some hundred products
# of either sign is good to about 2e-6, e^x to 3e-7 of itself, and so is the result; measured 1.8e-6 (head_dim 256).
TOLERANCE = 5e-6
MIXED = (True, False, True), (False, False, True)  # two layers, three KV heads
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
GROUPS = (1, 3, 4, 8)
SINKS = (0, 1, 64, 70)
RECENTS = (1, 16, 128, 256)


def make_cache(
    plan: HeadPlan,
    layout: BlockLayout,
    *,
    group: int = 2,
    context: int = 512,
    num_threads: int | None = 2,
    activations: str = "float32",
) -> DuoCache:
    """Return a poisoned cache; num_threads: None for the torch path."""
    kernels = None if num_threads is None else compiled(num_threads, activations)
    return poisoned_cache(plan, layout, group=group, context=context, kernels=kernels)


def tokens(
    plan: HeadPlan, count: int, *, head_dim: int, group: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q [num_layers, count, num_heads, head_dim], k and v [num_layers, count, num_kv_heads, head_dim]."""
    shape = plan.num_layers, count, plan.num_kv_heads
    q = normal(*shape[:2], plan.num_kv_heads * group, head_dim, seed=seed, scale=2.0)
    return q, normal(*shape, head_dim, seed=seed + 1), normal(*shape, head_dim, seed=seed + 2)


def alone(x: Tensor) -> Tensor:
    return surrounded(x, offset=4)


def feed(
    cache: DuoCache, q: Tensor, k: Tensor, v: Tensor, cuts: list[int], *, place: Callable[[Tensor], Tensor] = alone
) -> Tensor:
    """Feed all tokens from the cache's position on, cut into chunks; return [num_layers, count, num_heads, head_dim].

    Every chunk is placed alone in memory: what stands before and after it are not its neighbours.
    """
    outputs = []
    for length in cuts:
        span = slice(cache.num_tokens, cache.num_tokens + length)
        positions = torch.arange(span.start, span.stop)
        cache.begin(length)
        layers = []
        for layer in range(q.shape[0]):
            cache.append(layer, place(k[layer, span]), place(v[layer, span]))
            layers.append(cache.attend(layer, place(q[layer, span]), positions))
        cache.commit()
        outputs.append(torch.stack(layers))
    return torch.cat(outputs, dim=1)


def stored(cache: DuoCache, layer: int, which: str, x: Tensor) -> Tensor:
    """Return x [count, num_kv_heads, head_dim] float64 as retrieval heads see it from blocks."""
    x = x.double()
    rows = sum(map(sum, cache.plan.retrieval[:layer]))
    plane = getattr(cache.layout, which)
    for head, retrieval in enumerate(cache.plan.retrieval[layer]):
        if not retrieval:
            continue
        records = cache.pool.records[cache.pool.table[rows, : cache.pool.num_blocks]]
        decoded = decode_blocks(records, cache.layout, which, dtype=torch.float64)  # type: ignore[arg-type]
        decoded = (hadamard(decoded) if plane.rotate else decoded).flatten(0, 1)
        x[: decoded.shape[0], head] = decoded
        rows += 1
    return x


def oracle(cache: DuoCache, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return what q [n, num_heads, head_dim] at `positions` sees, float64, and how large its values are.

    That is the weighted mean of the largest number of each: a rotated value, or one made of scale and minimum, has
    the rounding of its largest number in all of them.
    """
    plan, group = cache.plan, cache.query_group
    blocks_k, blocks_v = stored(cache, layer, "key", k), stored(cache, layer, "value", v)
    k, v = k.double(), v.double()
    i, j = positions[:, None], torch.arange(k.shape[0])[None]
    exact = (j < plan.sink_size) | (i - j < cache.exact_recent)  # read as computed
    out, size = torch.empty(q.shape, dtype=torch.float64), torch.empty(*q.shape[:2], 1, dtype=torch.float64)
    for head, retrieval in enumerate(plan.retrieval[layer]):
        mask = visibility_mask(
            positions, k.shape[0], retrieval=retrieval, sink_size=plan.sink_size, recent_size=plan.recent_size
        )
        for query_head in range(head * group, (head + 1) * group):
            query = q[:, query_head].double() / q.shape[-1] ** 0.5
            scores = torch.where(exact, query @ k[:, head].T, query @ blocks_k[:, head].T)
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            out[:, query_head] = (weights * exact) @ v[:, head] + (weights * ~exact) @ blocks_v[:, head]
            largest = torch.where(exact, v[:, head].abs().amax(-1), blocks_v[:, head].abs().amax(-1))
            size[:, query_head] = (weights * largest).sum(-1, keepdim=True)
    return out, size


def assert_near(got: Tensor, wanted: Tensor, size: Tensor, *, tolerance: float = TOLERANCE) -> None:
    assert got.dtype == torch.float32 and got.shape == wanted.shape
    limit = tolerance * size + 1e-30
    error = (got.double() - wanted).abs()
    assert bool((error <= limit).all()), f"{(error / limit).nan_to_num(torch.inf).max()} times too far"


def check(
    cache: DuoCache, q: Tensor, k: Tensor, v: Tensor, cuts: list[int], *, tolerance: float = TOLERANCE
) -> tuple[Tensor, Tensor]:
    """Feed all tokens and judge every output; return [num_layers, count, num_heads, head_dim] and its sizes."""
    got = feed(cache, q, k, v, cuts)
    positions = torch.arange(q.shape[1])
    sizes = []
    for layer in range(q.shape[0]):
        wanted, size = oracle(cache, layer, q[layer], k[layer], v[layer], positions)
        sizes.append(size)
        if cache.layout.key.bits == 32:
            plan = cache.plan
            plain = oracle_attention(
                q[layer],
                k[layer],
                v[layer],
                positions,
                retrieval=plan.retrieval[layer],
                sink_size=plan.sink_size,
                recent_size=plan.recent_size,
            )
            torch.testing.assert_close(wanted, plain, rtol=1e-12, atol=1e-12)  # this file's oracle, by the other one
        assert_near(got[layer], wanted, size, tolerance=tolerance)
    return got, torch.stack(sizes)


layout_of = partial(kv_layout, dtype=torch.float32)


@pytest.mark.parametrize(
    ("head_dim", "group"), [*product(HEAD_DIMS, GROUPS), (6, 2), (12, 5), (24, 6), (40, 7), (64, 32), (256, 32)]
)
def test_attention_equals_the_oracle(head_dim: int, group: int) -> None:
    plan = HeadPlan(MIXED if group < 32 else ((True, False),), sink_size=5, recent_size=40, source="test")
    q, k, v = tokens(plan, 300, head_dim=head_dim, group=group)
    with poisoned():
        cache = make_cache(plan, layout_of("32", head_dim=head_dim), group=group)
        check(cache, q, k, v, [100, 1, 1, 63, 64, 1, 2, 68])


@pytest.mark.cover(2)
@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("recent_size", RECENTS)
@pytest.mark.parametrize("sink_size", SINKS)
def test_sinks_and_windows(sink_size: int, recent_size: int, num_threads: int) -> None:
    """Cuts before, at and after the edges of blocks, sinks and windows, and steps of one token over a block's edge."""
    plan = HeadPlan(((True, False),), sink_size, recent_size, "test")
    cuts = [1, 62, 1, 1, 63, *[1] * 3, 125, 64, 65, *[1] * 70]
    q, k, v = tokens(plan, sum(cuts), head_dim=32)
    with poisoned():
        check(make_cache(plan, layout_of("32", head_dim=32), num_threads=num_threads), q, k, v, cuts)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("count", [15, 16, 17, 127, 128, 129, 191, 192, 193, 321])
def test_lengths_around_block_edges(count: int, block_size: int) -> None:
    plan = HeadPlan(MIXED, sink_size=3, recent_size=20, source="test")
    q, k, v = tokens(plan, count, head_dim=16)
    with poisoned():
        for cuts in ([count], [count - 1, 1], [1, count - 1]):
            layout = layout_of("32", head_dim=16, block_size=block_size)
            check(make_cache(plan, layout, context=count), q, k, v, cuts)


@pytest.mark.parametrize("retrieval", [True, False])
def test_one_class_of_heads_only(retrieval: bool) -> None:
    plan = HeadPlan(((retrieval,),) * 2, sink_size=4, recent_size=30, source="test")
    q, k, v = tokens(plan, 300, head_dim=64)
    with poisoned():
        check(make_cache(plan, layout_of("int4", head_dim=64)), q, k, v, [200, *[1] * 10, 90])


@pytest.mark.parametrize(("sink_size", "recent_size"), [(0, 1), (3, 40), (70, 130), (400, 7)])
def test_the_ring_holds_what_the_torch_path_keeps(sink_size: int, recent_size: int) -> None:
    """Bit by bit, and untouched (NaN) where it holds nothing: sinks that come late, chunks longer than the ring."""
    plan = HeadPlan(MIXED, sink_size, recent_size, "test")
    cuts = [2, 1, 1, 60, 1, 5, 300, 1, 1, 128, 129]
    q, k, v = tokens(plan, sum(cuts), head_dim=16)
    layout = layout_of("int8", head_dim=16)
    caches = [make_cache(plan, layout, context=640, num_threads=num_threads) for num_threads in (2, None)]
    for length in cuts:
        for cache in caches:
            feed(cache, q, k, v, [length])
        mine, theirs = (cache.ring.data.view(torch.int32) for cache in caches)
        assert torch.equal(mine, theirs), cache.num_tokens


def with_special_values(k: Tensor, v: Tensor) -> None:
    """Outlier channels in keys; tokens of zeros, of one constant; values that float16 cannot hold."""
    k[..., 1] += 15.0
    for x in (k, v):
        x[:, 20] = 0.0
        x[:, 21] = 0.75
        x[:, 22, :, 0] = -100.0
        x[:, 23] *= 1e-7
    v[:, 24, :, 1] = 1e5
    v[:, 25] *= 1e6


@pytest.mark.cover(1)
@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize(("head_dim", "num_threads"), [(16, 1), (64, 2), (80, 3), (128, 2)])
def test_every_format_equals_the_oracle_and_the_torch_path(head_dim: int, kv: str, num_threads: int) -> None:
    plan = HeadPlan(MIXED, sink_size=5, recent_size=40, source="test")
    q, k, v = tokens(plan, 330, head_dim=head_dim, group=3)
    with_special_values(k, v)
    layout = layout_of(kv, head_dim=head_dim)
    tolerance = (
        4 * TOLERANCE
    )  # |q| |k| / sqrt(head_dim), what a score's rounding goes by, is 4 times that of other tests
    with poisoned():
        cache = make_cache(plan, layout, group=3, num_threads=num_threads)
        got, size = check(cache, q, k, v, [150, 1, 1, 100, *[1] * 8, 70], tolerance=tolerance)
    theirs = feed(make_cache(plan, layout, group=3, num_threads=None), q, k, v, [330])
    assert_near(got, theirs.double(), size, tolerance=2 * tolerance)  # each may be that far from the exact value


# A weight loses up to 2^-16 of the largest of up to 64 in its tile, times its scale; a query's feature 2^-16 of the
# largest of its row, before it meets keys with outliers. Measured 3.4e-3 at worst, 2e-5 on average.
CODES_TOLERANCE, CODES_AVERAGE = 8e-3, 6e-5


@pytest.mark.cover(1)
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("kv", ["int8", "k8v4", "int4"])
@pytest.mark.parametrize(("head_dim", "group"), [(32, 1), (64, 3), (96, 5), (128, 8), (160, 2), (256, 6)])
def test_codes_meet_codes(head_dim: int, group: int, kv: str, block_size: int) -> None:
    """One token after another, from blocks of integer codes: by integers, near the oracle, and no less than it is."""
    plan = HeadPlan(MIXED, sink_size=5, recent_size=40, source="test")
    q, k, v = tokens(plan, 362, head_dim=head_dim, group=group)
    with_special_values(k, v)
    layout, cuts = layout_of(kv, head_dim=head_dim, block_size=block_size), [200, 150, *[1] * 12]
    with poisoned():
        cache = make_cache(plan, layout, group=group, activations="int8")
        got, size = check(cache, q, k, v, cuts, tolerance=CODES_TOLERANCE)
        exact = feed(make_cache(plan, layout, group=group), q, k, v, cuts)
    assert float(((got - exact).abs() / size.clamp_min(1e-30)).mean()) < CODES_AVERAGE
    retrieval = [(layer, head) for layer, heads in enumerate(MIXED) for head, kept in enumerate(heads) if kept]
    layers, heads = map(list, zip(*retrieval, strict=True))
    by_head = [x.unflatten(2, (3, group))[layers, :, heads] for x in (got, exact)]  # [rows, count, group, head_dim]
    assert torch.equal(by_head[0][:, :133], by_head[1][:, :133])  # nothing is beyond the window
    assert not torch.equal(by_head[0][:, 200:350], by_head[1][:, 200:350])
    assert not torch.equal(by_head[0][:, 350:], by_head[1][:, 350:])
    streaming = [(layer, head) for layer, heads in enumerate(MIXED) for head, kept in enumerate(heads) if not kept]
    layers, heads = map(list, zip(*streaming, strict=True))
    assert torch.equal(*(x.unflatten(2, (3, group))[layers, :, heads] for x in (got, exact)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["query", "value"])
def test_what_is_not_finite_is_not_hidden_by_codes(where: str, bad: float) -> None:
    plan = HeadPlan(((True,),), sink_size=5, recent_size=40, source="test")
    q, k, v = tokens(plan, 300, head_dim=64)
    {"query": q, "value": v}[where][0, 299 if where == "query" else 20, 0, 3] = bad
    outs = [
        feed(make_cache(plan, layout_of("k8v4", head_dim=64), activations=activations), q, k, v, [250, *[1] * 50])
        for activations in ("float32", "int8")
    ]
    seen = [out[0, -1, 0].isfinite() for out in outs]
    assert torch.equal(*seen), where
    assert where == "value" or not seen[0].all()


LAYOUTS = {
    **{kv: layout_of(kv, head_dim=64) for kv in KV_FORMATS},
    "bfloat16": BlockLayout(Plane("float", 16, torch.bfloat16), Plane("float", 16, torch.bfloat16), 32, 64),
    "groups": BlockLayout(Plane("int", 8, groups=4), Plane("int", 4, groups=2, rotate=True), 32, 64),
    "plain-int4": BlockLayout(Plane("int", 4, groups=4), Plane("int", 4), 32, 64),
    "narrow": BlockLayout(Plane("int", 8), Plane("int", 4), 16, 6),
    "odd-vectors": BlockLayout(Plane("fp8", 8), Plane("int", 4, rotate=True), 16, 12),
    "wide": BlockLayout(Plane("int", 4, rotate=True), Plane("fp8", 8), 128, 256),
}


def encoded(layout: BlockLayout, k: Tensor, v: Tensor, *, cuts: list[int], num_threads: int = 1) -> Tensor:
    """Return the records that the compiled path makes of k and v [count, head_dim]: uint8 [blocks, record_bytes]."""
    plan = HeadPlan(((True,),), sink_size=3, recent_size=1, source="test")
    cache = make_cache(plan, layout, group=1, context=k.shape[0], num_threads=num_threads)
    feed(cache, torch.zeros(1, k.shape[0], 1, layout.head_dim), k[None, :, None], v[None, :, None], cuts)
    return cache.pool.records[cache.pool.table[0]]


def assert_same_bytes(records: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> None:
    shape = -1, layout.block_size, layout.head_dim
    wanted = encode_blocks(k.view(shape), v.view(shape), layout)
    for which in ("key", "value"):
        codes, scales = layout.spans(which)
        assert torch.equal(records[:, codes], wanted[:, codes]), f"{which}: {(records != wanted)[:, codes].sum()} bytes"
        dtype = torch.bfloat16 if getattr(layout, which).kind == "fp8" else torch.float16
        mine, theirs = (r[:, scales].contiguous().view(dtype) for r in (records, wanted))
        assert torch.equal(mine, theirs), which  # as numbers: a minimum of 0 may have either sign


@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-8, 1e-3, 1.0, 1e3, 1e6, 1e30])
@pytest.mark.parametrize("name", LAYOUTS)
def test_records_are_those_of_encode_blocks_byte_for_byte(name: str, magnitude: float) -> None:
    """Both do the same float32 operations in the same order, so not one code may differ: from numbers below float16's
    range (scale 0) to far beyond it (saturated)."""
    layout = LAYOUTS[name]
    k, v = (normal(256, layout.head_dim, seed=seed) * magnitude for seed in (1, 2))
    k[3], v[4] = magnitude, -magnitude
    k[:, 1] *= 40
    with poisoned():
        for num_threads, cuts in ((1, [256]), (2, [125, 1, 1, 1, 128])):
            records = encoded(layout, k, v, cuts=cuts, num_threads=num_threads)
            assert_same_bytes(records, k, v, layout)


def test_numbers_between_two_codes_go_to_the_even_one() -> None:
    halves = torch.arange(0, 256) + 0.5
    halves[0], halves[-1] = 0.0, 255.0
    every = torch.arange(256, dtype=torch.uint8)
    fp8 = every[(every & 127) != 127].view(torch.float8_e4m3fn).float().sort().values  # all but the two NaN
    between = torch.cat(((fp8[1:] + fp8[:-1]) / 2, torch.tensor([448.0, -0.0])))
    between = torch.nn.functional.pad(between, (0, 256 - between.shape[0]))
    for plane, x in ((Plane("int", 8), halves), (Plane("int", 4), halves / 17), (Plane("fp8", 8), between)):
        layout = BlockLayout(plane, plane, 16, 256)
        k = x.expand(16, 256).contiguous()
        assert_same_bytes(encoded(layout, k, -k, cuts=[16]), k, -k, layout)


@pytest.mark.parametrize("kv", ["32", "int8", "int4"])
@pytest.mark.parametrize("num_threads", THREADS)
def test_long_contexts_are_read_in_spans(num_threads: int, kv: str) -> None:
    """Decode cuts the blocks of a head into spans of 512 tokens or more, at most 8 per thread: here 12, and 8."""
    plan = HeadPlan(((True, False),), sink_size=4, recent_size=40, source="test")
    count = 6200
    q, k, v = tokens(plan, count, head_dim=32)
    cuts = [4000, 2192, *[1] * 8]
    with poisoned():
        cache = make_cache(plan, layout_of(kv, head_dim=32), context=6400, num_threads=num_threads)
        got = feed(cache, q, k, v, cuts)
    rows = torch.cat((torch.arange(0, count - 8, 137), torch.arange(count - 8, count)))
    wanted, size = oracle(cache, 0, q[0, rows], k[0], v[0], rows)
    assert_near(got[0, rows], wanted, size)


def scored(plan: HeadPlan, scores: Tensor, *, head_dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v whose scores are scores [count], whoever asks."""
    count = scores.shape[0]
    q, k, v = tokens(plan, count, head_dim=head_dim)
    direction = torch.ones(head_dim) / head_dim**0.5
    q[:] = direction * head_dim**0.25
    k[:] = scores[None, :, None, None] * direction * head_dim**0.25
    return q, k, v


SCORES = {
    "equal": torch.zeros(400),
    "all-high": torch.full((400,), 200.0),
    "all-low": torch.full((400,), -200.0),
    "rising": torch.linspace(-200, 200, 400),
    "falling": torch.linspace(200, -200, 400),
    "jumping": torch.tensor([200.0, -200.0]).repeat(200),
    "sink": torch.zeros(400).index_fill(0, torch.tensor([2]), 200.0),
    "block": torch.zeros(400).index_fill(0, torch.tensor([100]), 200.0),
    "window": torch.zeros(400).index_fill(0, torch.tensor([290]), 200.0),
}


@pytest.mark.cover(1)
@pytest.mark.parametrize("kv", ["32", "int8", "int4"])
@pytest.mark.parametrize("name", SCORES)
def test_softmax_extremes(name: str, kv: str) -> None:
    plan = HeadPlan(((True, False),), sink_size=4, recent_size=40, source="test")
    q, k, v = scored(plan, SCORES[name])
    cuts = [150, *[1] * 5, 145, *[1] * 100]
    with poisoned():
        # Scores of size 200 are good to 200 roundings of 2^-24 times a few.
        check(make_cache(plan, layout_of(kv, head_dim=64)), q, k, v, cuts, tolerance=2e-4)
