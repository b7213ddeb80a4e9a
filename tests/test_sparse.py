"""Sparse prefill in plain torch: what is chosen, and attention over the choice, against dense float64 and a mask."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from duolocal.kernels.attention import block_attention
from duolocal.kernels.blocks import BlockLayout, decode_blocks, encode_blocks, hadamard
from duolocal.kernels.sparse import (
    SparsePrefill,
    block_lse,
    blocks_seen,
    choose_blocks,
    chosen_block_attention,
    sparse_block_attention,
    tiles_at_once,
)
from duolocal.quant.kv import KV_FORMATS, kv_layout

DIM, HEADS, GROUP = 32, 2, 3
SCALE = DIM**-0.5


class Keys:
    """Blocks of random keys and values, and what they decode to: float64 [heads, kv_len, DIM]."""

    def __init__(self, layout: BlockLayout, num_blocks: int, *, seed: int = 0, k: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (HEADS, num_blocks, layout.block_size, DIM)
        k = torch.randn(shape, generator=generator) if k is None else k.view(shape)
        v = torch.randn(shape, generator=generator)
        spare = 3  # records that belong to nobody, of NaN
        order = torch.randperm(HEADS * num_blocks + spare, generator=generator)
        self.table = order[: HEADS * num_blocks].view(HEADS, num_blocks)
        self.records = torch.full((order.shape[0], layout.record_bytes), 0xFF, dtype=torch.uint8)
        self.records[self.table.flatten()] = encode_blocks(k.flatten(0, 1), v.flatten(0, 1), layout)
        self.layout = layout
        self.k, self.v = (self._decoded(which) for which in ("key", "value"))

    def take(self, entries: Tensor) -> Tensor:
        return self.records[entries]

    def _decoded(self, which: str) -> Tensor:
        records = self.records[self.table.flatten()]
        decoded = decode_blocks(records, self.layout, which, dtype=torch.float64)  # type: ignore[arg-type]
        rotated = getattr(self.layout, which).rotate
        return (hadamard(decoded) if rotated else decoded).view(HEADS, -1, DIM)


def queries(count: int, *, seed: int = 1, size: float = 2.0) -> Tensor:
    return torch.randn(HEADS, GROUP, count, DIM, generator=torch.Generator().manual_seed(seed)) * size


def behind(positions: Tensor, kv_len: int, *, sink_size: int, recent_size: int) -> Tensor:
    """Which keys each query sees in blocks: bool [n, kv_len], the rule of `kernels/attention.py` word for word."""
    i, j = positions[:, None], torch.arange(kv_len)[None]
    return (j >= sink_size) & (i - j >= recent_size)


def dense(q: Tensor, keys: Keys, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attend in float64 under a mask [heads, n, kv_len]; 0 and -inf for a query that sees nothing."""
    scores = (q.double() @ keys.k[:, None].transpose(2, 3) * SCALE).masked_fill(~mask[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return weights @ keys.v[:, None], lse


@given(
    start=st.integers(0, 3000),
    length=st.integers(1, 2000),
    tile=st.sampled_from((16, 64, 128)),
    sink_size=st.sampled_from((0, 16, 64)),
    cut=st.integers(1, 30),
)
def test_tiles_are_whole_see_enough_and_do_not_depend_on_chunks(
    start: int, length: int, tile: int, sink_size: int, cut: int
) -> None:
    policy = SparsePrefill(tile=tile, stride=8, least_blocks=4)
    sizes = {"sink_size": sink_size, "recent_size": 128, "block_size": 64}
    tiles = policy.tiles(start, start + length, **sizes)
    wanted = [
        number
        for number in range((start + length) // tile + 2)
        if number * tile >= start
        and (number + 1) * tile <= start + length
        and (number * tile - 128 + 1) // 64 - sink_size // 64 >= 4  # whole blocks of its first query
    ]
    assert list(tiles) == wanted
    chunk = cut * tile  # cuts at multiples of the tile, after a first piece up to one
    cuts = sorted({start, *range(-(-start // tile) * tile, start + length, chunk), start + length})
    assert [number for a, b in pairwise(cuts) for number in policy.tiles(a, b, **sizes)] == wanted
    asked = policy.asked(tiles)
    assert torch.equal(asked // tile, torch.tensor(wanted, dtype=torch.int64).repeat_interleave(tile // 8))


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize(("sink_size", "block_size"), [(0, 64), (16, 64), (70, 32)])
def test_log_sum_exp_of_each_block_against_dense(kv: str, sink_size: int, block_size: int) -> None:
    keys = Keys(kv_layout(kv, head_dim=DIM, dtype=torch.float32, block_size=block_size), 640 // block_size)
    positions = torch.tensor([130, 300, 301, 500, 767])
    q = queries(5)
    num_blocks = blocks_seen(767, recent_size=128, block_size=block_size)
    lse = block_lse(
        q,
        keys.take,
        keys.table,
        keys.layout,
        q_positions=positions,
        num_blocks=num_blocks,
        sink_size=sink_size,
        recent_size=128,
        scale=SCALE,
    )
    assert lse.shape == (HEADS, GROUP, 5, num_blocks) and num_blocks * block_size == 640
    mask = behind(positions, 640, sink_size=sink_size, recent_size=128)
    for block in range(num_blocks):
        inside = torch.zeros(640, dtype=torch.bool)
        inside[block * block_size : (block + 1) * block_size] = True
        _, wanted = dense(q, keys, (mask & inside).expand(HEADS, -1, -1))
        torch.testing.assert_close(lse[..., block].double(), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("sink_size", [0, 16, 64])
def test_attention_over_any_blocks_against_dense(kv: str, sink_size: int) -> None:
    keys = Keys(kv_layout(kv, head_dim=DIM, dtype=torch.float32), 12)
    generator = torch.Generator().manual_seed(5)
    first, tile, tiles = 512, 64, 4
    q = queries(tile * tiles)
    chosen = torch.rand(HEADS, tiles, 12, generator=generator) < 0.4
    chosen[0, 1] = False  # a tile that reads nothing
    out, lse = chosen_block_attention(
        q,
        keys.take,
        keys.table,
        keys.layout,
        chosen,
        first=first,
        tile=tile,
        sink_size=sink_size,
        recent_size=128,
        scale=SCALE,
    )
    mask = behind(torch.arange(first, first + tile * tiles), 768, sink_size=sink_size, recent_size=128)
    listed = chosen.repeat_interleave(tile, 1).repeat_interleave(64, 2)
    wanted, wanted_lse = dense(q, keys, mask & listed)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=2e-5)
    assert bool((lse[0, :, tile : 2 * tile] == float("-inf")).all())


def choose(
    policy: SparsePrefill, keys: Keys, q: Tensor, start: int, *, sink_size: int = 16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the choice for all of `q` at positions start.., the queries' window, and dense out and lse behind it."""
    end = start + q.shape[2]
    positions = torch.arange(start, end)
    window_lse = torch.randn(HEADS, GROUP, q.shape[2], generator=torch.Generator().manual_seed(9)) + 2
    _, _, choice = sparse_block_attention(
        q,
        window_lse,
        keys.take,
        keys.table,
        keys.layout,
        policy,
        q_positions=positions,
        sink_size=sink_size,
        recent_size=128,
        scale=SCALE,
    )
    assert choice.blocks is not None
    mask = behind(positions, keys.k.shape[1], sink_size=sink_size, recent_size=128)
    return choice.blocks, window_lse, *dense(q, keys, mask.expand(HEADS, -1, -1))


@pytest.mark.parametrize("mass", [0.5, 0.7, 0.8])
def test_the_choice_reaches_its_mass_with_as_few_blocks_as_possible(mass: float) -> None:
    keys = Keys(kv_layout("int4", head_dim=DIM, dtype=torch.float32), 24, seed=3)
    policy = SparsePrefill(mass=mass, tile=64, stride=1, least_blocks=4)  # every query is asked
    start, count = 1536, 128
    q = queries(count, seed=4)
    chosen, window_lse, _, lse = choose(policy, keys, q, start)
    total = torch.logaddexp(lse, window_lse.double())
    window = (window_lse - total).exp()
    size = keys.layout.block_size
    mask = behind(torch.arange(start, start + count), keys.k.shape[1], sink_size=16, recent_size=128)
    for head in range(HEADS):
        for tile in range(2):
            rows = slice(tile * 64, tile * 64 + 64)
            shares = []
            for block in range(24):
                inside = torch.zeros(keys.k.shape[1], dtype=torch.bool)
                inside[block * size : (block + 1) * size] = True
                _, block_part = dense(q[:, :, rows], keys, (mask[rows] & inside).expand(HEADS, -1, -1))
                shares.append((block_part[head] - total[head, :, rows]).exp().mean())
            share = torch.stack(shares)
            whole = mask[rows].all(0).view(24, size)[:, :].all(-1)
            whole[0] = True  # of its tokens 16 are sinks, which belong to the window
            read = chosen[head, tile]
            base = window[head, :, rows].mean() + share[~whole].sum()
            kept = base + share[read & whole].sum()
            assert kept >= policy.target - 1e-5
            assert bool(read[~whole & (share > 0)].all())  # what is seen in part is always read
            taken = share[read & whole]
            assert taken.numel() and kept - taken.min() < policy.target + 1e-5
            assert taken.min() >= share[whole & ~read].max() - 1e-6
            assert 0 < read.sum() < 22


def test_few_queries_find_what_all_of_them_look_at() -> None:
    layout = kv_layout("k8v4", head_dim=DIM, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(HEADS, 32 * 64, DIM, generator=generator) * 0.3
    direction = torch.randn(DIM, generator=generator)
    direction *= 6 / direction.norm()
    k[0, 13 * 64 + 5] = direction  # a needle for head 0 only
    keys = Keys(layout, 32, k=k)
    policy = SparsePrefill(least_blocks=4)
    q = queries(128, size=0.2) + direction * 3
    chosen, *_ = choose(policy, keys, q, 2048, sink_size=0)
    assert bool(chosen[0, 0, 13]) and int(chosen[0, 0].sum()) <= 4
    assert int(chosen[1, 0].sum()) > 16  # nothing stands out there


@pytest.mark.parametrize("kv", ["32", "k8v4", "int4"])
def test_a_mass_of_one_is_exact(kv: str) -> None:
    keys = Keys(kv_layout(kv, head_dim=DIM, dtype=torch.float32), 23)
    start, count = 1300, 300
    q, positions = queries(count), torch.arange(start, start + count)
    sizes = {"sink_size": 16, "recent_size": 128, "scale": SCALE}
    wanted, wanted_lse = block_attention(q, keys.take, keys.table, keys.layout, q_positions=positions, **sizes)
    policy = SparsePrefill(mass=1.0, tile=64, least_blocks=4)
    out, lse, choice = sparse_block_attention(
        q, torch.zeros(HEADS, GROUP, count), keys.take, keys.table, keys.layout, policy, q_positions=positions, **sizes
    )
    assert choice.blocks is not None and choice.tiles == range(21, 25)
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=2e-5)
    seen = behind(positions[1344 - start : 1600 - start], 1472, sink_size=16, recent_size=128).view(4, 64, 23, 64)
    assert torch.equal(choice.blocks, seen.any(3).any(1).expand(HEADS, -1, -1))


def test_chunks_cut_between_tiles_choose_the_same_blocks() -> None:
    keys = Keys(kv_layout("k8v4", head_dim=DIM, dtype=torch.float32), 30, seed=8)
    policy = SparsePrefill(mass=0.9, tile=64, stride=8, least_blocks=4)
    start, count = 1000, 900
    q = queries(count, seed=12)
    window_lse = torch.randn(HEADS, GROUP, count, generator=torch.Generator().manual_seed(2))

    def run(cuts: list[int]) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        outs, lses, chosen = [], [], {}
        for first, last in pairwise(cuts):
            rows = slice(first - start, last - start)
            out, lse, choice = sparse_block_attention(
                q[:, :, rows],
                window_lse[:, :, rows],
                keys.take,
                keys.table[:, : last // 64],  # what is there after this chunk
                keys.layout,
                policy,
                q_positions=torch.arange(first, last),
                sink_size=16,
                recent_size=128,
                scale=SCALE,
            )
            outs.append(out)
            lses.append(lse)
            for at, tile in enumerate(choice.tiles):
                assert choice.blocks is not None
                chosen[tile] = choice.blocks[:, at]
        return torch.cat(outs, 2), torch.cat(lses, 2), chosen

    out, lse, chosen = run([1000, 1900])
    assert list(chosen) == list(range(16, 29))
    for cuts in ([1000, 1024, 1088, 1472, 1900], [1000, 1152, 1664, 1900]):
        other, other_lse, others = run(cuts)
        assert list(others) == list(chosen)
        for tile, blocks in others.items():
            width = blocks.shape[1]
            assert torch.equal(blocks, chosen[tile][:, :width]) and not chosen[tile][:, width:].any()
        torch.testing.assert_close(other, out, rtol=0, atol=1e-5)
        torch.testing.assert_close(other_lse, lse, rtol=0, atol=1e-5)
    _, _, cut_through = run([1000, 1500, 1900])
    assert 23 not in cut_through and set(chosen) - set(cut_through) == {23}


def test_what_is_chosen_is_what_attention_reads() -> None:
    keys = Keys(kv_layout("int4", head_dim=DIM, dtype=torch.float32), 30, seed=8)
    policy = SparsePrefill(mass=0.8, tile=64, stride=8, least_blocks=4)
    start, count = 1536, 128
    q, positions = queries(count, seed=12), torch.arange(start, start + count)
    window_lse = torch.zeros(HEADS, GROUP, count)
    out, lse, choice = sparse_block_attention(
        q,
        window_lse,
        keys.take,
        keys.table,
        keys.layout,
        policy,
        q_positions=positions,
        sink_size=0,
        recent_size=128,
        scale=SCALE,
    )
    assert choice.blocks is not None
    listed = torch.zeros(HEADS, count, keys.k.shape[1], dtype=torch.bool)
    blocks = choice.blocks.repeat_interleave(64, 1).repeat_interleave(64, 2)
    listed[:, :, : blocks.shape[2]] = blocks
    mask = behind(positions, keys.k.shape[1], sink_size=0, recent_size=128)
    wanted, wanted_lse = dense(q, keys, mask & listed)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("num_blocks", "tiles"), [(1, 4), (2048, 4), (16384, 1), (1 << 20, 1)])
def test_what_is_asked_together_is_bounded(num_blocks: int, tiles: int) -> None:
    policy = SparsePrefill()
    assert tiles_at_once(policy, num_heads=16, num_blocks=num_blocks) == tiles
    assert tiles == 1 or tiles * 16 * policy.asked_per_tile * num_blocks <= 1 << 22


def test_choose_blocks_keeps_ties_by_position() -> None:
    policy = SparsePrefill(mass=0.6, tile=16, stride=16, least_blocks=1)
    lse = torch.zeros(1, 1, 1, 8)
    lse[..., 6:] = float("-inf")
    chosen = choose_blocks(
        lse, torch.full((1, 1, 1), -30.0), policy, range(40, 41), sink_size=0, recent_size=64, size=64
    )
    # Six equal blocks; 0.7 of the mass takes five, the earliest; block 8 and later are the window's.
    assert policy.target == pytest.approx(0.7)
    assert chosen.tolist() == [[[True, True, True, True, True, False, False, False]]]
