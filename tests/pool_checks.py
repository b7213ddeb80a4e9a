"""Caches of nothing but poison, and what must hold of a block pool whenever nobody writes to it."""

from typing import Any

import torch

from duolocal.cache import DuoCache
from duolocal.cache.pool import BlockPool
from duolocal.heads import HeadPlan
from duolocal.kernels.blocks import BlockLayout


def poisoned_cache(
    plan: HeadPlan,
    layout: BlockLayout,
    *,
    group: int,
    context: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    **options: Any,
) -> DuoCache:
    """Return a cache in which all that nothing was written to is NaN, or no list; group: query heads per KV head."""
    cache = DuoCache(
        plan,
        layout,
        num_heads=plan.num_kv_heads * group,
        context=context,
        device=torch.device("cpu") if device is None else device,
        dtype=dtype,
        **options,
    )
    cache.pool.poison(0xFF)  # NaN in every float format
    cache.ring.data.fill_(float("nan"))
    if cache.selection is not None:
        cache.selection.digests.fill_(0xFF)
        cache.selection.lists.fill_(2**31 - 1)
    return cache


def check_table(pool: BlockPool) -> None:
    """The table leads to a slot exactly where its tag is the block, else to the home; a copy has the home's bytes."""
    for row in range(pool.num_rows):
        tags = pool.tags[row].tolist()
        for block in range(pool.num_blocks):
            slot = block % pool.num_slots
            home = pool.first_home + row * pool.max_blocks + block
            there = row * pool.num_slots + slot if tags[slot] == block else home
            assert int(pool.table[row, block]) == there, (row, block)
            assert torch.equal(pool.take(pool.table[row, block, None]), pool.take(pool.table.new_tensor([home])))
