"""What must hold of a block pool whenever nobody writes to it."""

import torch

from duolocal.cache.pool import BlockPool


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
