"""Selected decode: each retrieval head reads the blocks that matter to the present query, under a budget of tokens.

Owns the digests of all blocks and the lists of chosen ones; the arithmetic is `kernels/digest.py`. A list belongs to a
row of the block table. It is made anew where the position is a multiple of `reuse`, where a new block comes into
sight, and at the first decoded token after a prefill, an undo or a reload; in between the steps share it. The newest
block that is seen at all is always in the list, beside the budget, and sinks and recent tokens are read from the ring
as ever.
"""

from dataclasses import dataclass

import torch

from duolocal.kernels.blocks import BlockLayout
from duolocal.kernels.digest import DigestChannels, digest_bytes

REUSE = 2  # steps


@dataclass(frozen=True)
class SelectionPolicy:
    """budget: tokens that a retrieval head reads from blocks; reuse: steps that share a list; channels: of digests."""

    budget: int
    channels: DigestChannels
    reuse: int = REUSE

    def budget_blocks(self, block_size: int) -> int:
        """Return the budget in blocks."""
        return max(1, self.budget // block_size)


class Selection:
    """Digests and lists for one cache.

    digests: uint8 [num_rows, max_blocks, digest_bytes]; lists: int32 [num_rows, budget_blocks + 1], rising; made_at:
    int64 [num_rows], the occasion of each list (see `occasion`), -1 for none; channels, centre: of the policy, on the
    device.
    """

    def __init__(
        self, policy: SelectionPolicy, layout: BlockLayout, *, num_rows: int, max_blocks: int, device: torch.device
    ) -> None:
        assert policy.channels.channels.shape[0] == num_rows, (policy.channels.channels.shape, num_rows)
        self.policy = policy
        self.budget_blocks = policy.budget_blocks(layout.block_size)
        self.channels = policy.channels.channels.to(device).contiguous()
        self.centre = policy.channels.centre.to(device).contiguous()
        size = digest_bytes(layout.block_size, policy.channels.num_channels)
        self.digests = torch.empty(num_rows, max_blocks, size, dtype=torch.uint8, device=device)
        self.lists = torch.zeros(num_rows, self.budget_blocks + 1, dtype=torch.int32, device=device)
        self.made_at = torch.full((num_rows,), -1, dtype=torch.int64, device=device)
        self.forgotten = 0  # times that the lists were dropped

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        tensors = (self.digests, self.lists, self.made_at, self.channels, self.centre)
        return sum(tensor.nbytes for tensor in tensors)

    def forget(self) -> None:
        """Drop all lists: what comes is not the next token of what they were made for."""
        self.made_at.fill_(-1)
        self.forgotten += 1


def occasion(position: int, newest: int, *, reuse: int) -> int:
    """Return the number by which steps know that they may share a list; `newest`: the newest block seen at all."""
    return (position // reuse << 32) + newest
