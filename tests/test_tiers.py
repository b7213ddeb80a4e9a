"""Blocks beyond the device: the same bytes, the same results to the last bit, whatever lies where.

On a machine without a GPU the device is host memory, and beyond it lies a file, or more host memory as beside a GPU.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duolocal.cache import ON_DEVICE, DuoCache, Placement
from duolocal.cache import home as home_module
from duolocal.cache.pool import BlockPool, slots_per_row
from duolocal.errors import MemoryLimitError
from duolocal.heads import HeadPlan
from duolocal.kernels.cpu.operations import CpuKernels
from duolocal.kernels.interface import Kernels
from duolocal.quant.kv import kv_layout
from tests.pool_checks import poisoned_cache

CPU = torch.device("cpu")
PLAN = HeadPlan(((True, False, True), (False, True, False)), 4, 20, "test")
HEAD_DIM, GROUP, CONTEXT = 16, 2, 1024
KERNELS: dict[str, Kernels | None] = {"torch": None, "compiled": CpuKernels(2)}
LAYOUT = kv_layout("int4", head_dim=HEAD_DIM, dtype=torch.float32)
BLOCKS = CONTEXT // LAYOUT.block_size


def placement(slots: int, outer: str, folder: Path | None = None) -> Placement:
    """Room for `slots` records per row, and not quite for one more."""
    rows = PLAN.num_retrieval
    return Placement(rows * (BLOCKS * 8 + slots * (LAYOUT.record_bytes + 8)) + 7, outer, folder)  # type: ignore[arg-type]


def make_cache(where: Placement = ON_DEVICE, kernels: str = "torch") -> DuoCache:
    return poisoned_cache(PLAN, LAYOUT, group=GROUP, context=CONTEXT, kernels=KERNELS[kernels], placement=where)


def feed(cache: DuoCache, seed: int, cuts: list[int]) -> Tensor:
    """Append random tokens, each made from its position; return what each saw: [tokens, layers, heads, head_dim]."""
    seen = []
    for count in cuts:
        start = cache.num_tokens
        generator = [torch.Generator().manual_seed(1_000_003 * seed + start + i) for i in range(count)]
        x = torch.stack([torch.randn(2, 3 * GROUP + 6, HEAD_DIM, generator=g) for g in generator])
        cache.begin(count, decode=count == 1)
        layers = []
        for layer in range(2):
            q, k, v = (part.contiguous() for part in x[:, layer].split((3 * GROUP, 3, 3), dim=1))
            cache.append(layer, k, v)
            layers.append(cache.attend(layer, q, torch.arange(start, start + count)))
        cache.commit()
        seen.append(torch.stack(layers, dim=1))
    return torch.cat(seen)


@pytest.mark.cover(2)
@pytest.mark.parametrize("outer", ["memory", "disk"])
@pytest.mark.parametrize("slots", [0, 1, 5, BLOCKS - 1])
@pytest.mark.parametrize("kernels", KERNELS)
def test_offloaded_equals_in_memory_bit_for_bit(kernels: str, slots: int, outer: str, tmp_path: Path) -> None:
    cuts = [300, 1, 1, 150, 64, 7, *[1] * 130, 100]
    whole, parts = make_cache(kernels=kernels), make_cache(placement(slots, outer, tmp_path), kernels)
    assert parts.pool.tiered and parts.pool.num_slots == slots and not whole.pool.tiered
    wanted, got = feed(whole, 1, cuts), feed(parts, 1, cuts)
    assert wanted.isfinite().all()
    assert torch.equal(got, wanted)
    blocks = whole.pool.num_blocks
    assert torch.equal(parts.pool.read(0, blocks), whole.pool.read(0, blocks))
    assert ((parts.pool.tags >= 0).sum(1) == min(slots, blocks)).all()  # the device is used


moves = st.one_of(
    st.tuples(st.just("feed"), st.integers(1, 200)),
    st.tuples(st.just("undo"), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(1, 200)),
    st.tuples(st.just("reload"), st.integers(0, 200)),
)


@given(moves=st.lists(moves, min_size=1, max_size=12), slots=st.integers(0, 6), kernels=st.sampled_from(list(KERNELS)))
@settings(max_examples=60, deadline=None)
def test_whatever_happens_the_table_leads_to_the_bytes(moves: list[tuple[str, int]], slots: int, kernels: str) -> None:
    """Appended, undone, cancelled, saved and reloaded in any order: as a cache that has all of it in memory."""
    caches = [make_cache(kernels=kernels), make_cache(placement(slots, "memory"), kernels)]
    snapshots = [[cache.snapshot()] for cache in caches]
    for number, (move, count) in enumerate(moves):
        results = []
        for cache, taken in zip(caches, snapshots, strict=True):
            if move == "feed" and cache.num_tokens + count <= CONTEXT:
                taken.append(cache.snapshot())
                results.append(feed(cache, number, [count]))
            elif move == "undo":
                cache.restore(taken.pop() if len(taken) > 1 else taken[0])
            elif move == "cancel" and cache.num_tokens + count <= CONTEXT:
                cache.begin(count)
                cache.rollback()
            elif move == "reload":
                tokens, ring = cache.num_tokens, cache.read_ring()
                columns = cache.pool.read(0, tokens // LAYOUT.block_size)
                kept = min(count, tokens) // LAYOUT.block_size
                cache.pool.poison(0xFF)
                cache.resume(ring, num_tokens=tokens, first_block=kept, columns=[columns[kept:]])
                taken[:] = [cache.snapshot()]
            cache.pool.poison(0xFF)
            check(cache.pool)
        assert len(results) < 2 or torch.equal(*results)
    blocks = caches[0].pool.num_blocks
    assert torch.equal(caches[0].pool.read(0, blocks), caches[1].pool.read(0, blocks))


def check(pool: BlockPool) -> None:
    """Each entry leads to its home, or to the slot whose tag it is; what it leads to is what the home holds."""
    homes = pool.first_home + torch.arange(pool.num_rows * pool.max_blocks).view(pool.num_rows, pool.max_blocks)
    expected = homes.clone()
    for row, slot in (pool.tags >= 0).nonzero().tolist():
        block = int(pool.tags[row, slot])
        assert slot == block % pool.num_slots and block < pool.num_blocks
        expected[row, block] = row * pool.num_slots + slot
    assert torch.equal(pool.table, expected)
    for block in range(pool.num_blocks):
        assert torch.equal(pool.take(pool.table[:, block]), pool.read(block, block + 1)[0])


def test_the_device_holds_no_more_than_it_was_given(tmp_path: Path) -> None:
    for allowed in (0, 100, 5_000, 20_000, 10**9):
        where = Placement(allowed, "disk", tmp_path)
        pool = make_cache(where).pool
        least = pool.table.nbytes + LAYOUT.record_bytes  # the table is always there, and one record to count from
        assert pool.nbytes <= max(allowed, least)
        assert pool.tiered == (allowed < 10**9)
        assert slots_per_row(LAYOUT, num_rows=3, max_blocks=BLOCKS, placement=where) == pool.num_slots


def test_the_file_is_gone_with_the_cache_and_its_room_is_reserved(tmp_path: Path) -> None:
    cache = make_cache(placement(1, "disk", tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []  # it has no name
    assert cache.pool.mapping is not None and cache.pool.outer_bytes == len(cache.pool.mapping)
    assert cache.memory().outer_blocks == (PLAN.num_retrieval * BLOCKS + 1) * LAYOUT.record_bytes


def test_a_full_disk_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = home_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(home_module.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(MemoryLimitError, match=r"needs a file of 0\.0 GiB in .*: 0\.0 GiB are free; make room there"):
        make_cache(placement(0, "disk", tmp_path))
