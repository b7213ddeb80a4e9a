"""Where blocks live: records on the device, records beyond it, and the table that finds them.

Owns placement only; what the bytes mean is the business of `kernels.blocks`. Every block of every row has one home.
Where all homes are on the device that is all there is. Otherwise they are in host memory or in a file, and the device
has `num_slots` records per row for copies: block b may have its copy in slot b % num_slots of its row, and while it
has, the table leads there. A block never changes once it is written, so a copy is dropped by forgetting it.
"""

import mmap

import torch
from torch import Tensor

from duolocal.cache.home import ON_DEVICE, Home, Placement, open_home
from duolocal.kernels.blocks import BlockLayout

TABLE_BYTES = 8  # of an entry of the table, and of a slot's tag


class BlockPool:
    """Records for `num_rows` retrieval heads, growing together block by block.

    `table` int64 [num_rows, max_blocks] has the record of each block, counted from the first of `records`; those beyond
    the device have numbers outside of that tensor. `tags` int64 [num_rows, num_slots] has the block whose copy is in
    each slot, -1 for none; empty where all blocks are on the device.

    Invariant: the table leads to a slot exactly where that slot's tag is the block, and to the home otherwise; blocks
    0..num_blocks-1 are written. All memory is reserved here, once, so that a context that was accepted never runs out
    half-way. `stamps` has one number per column, given once: where it is still there, the bytes of the column are what
    they were.
    """

    def __init__(
        self,
        layout: BlockLayout,
        *,
        num_rows: int,
        max_blocks: int,
        device: torch.device,
        placement: Placement = ON_DEVICE,
    ) -> None:
        self.layout = layout
        self.num_rows = num_rows
        self.max_blocks = max_blocks
        self.num_blocks = 0  # of each row
        self.stamps: list[int] = []
        self._next_stamp = 0
        self.num_slots = slots_per_row(layout, num_rows=num_rows, max_blocks=max_blocks, placement=placement)
        self.tiered = self.num_slots < max_blocks and num_rows > 0
        size = num_rows * self.num_slots
        # Numbers are counted from here, so there is a record here even where no copy has room.
        count = max(size, 1) if self.tiered else size
        self.records = torch.empty(count, layout.record_bytes, dtype=torch.uint8, device=device)
        self._home: Home | None = None
        homes = torch.arange(num_rows * max_blocks, dtype=torch.int64, device=device)
        self._first_home = 0
        if self.tiered:
            self._home = open_home(num_rows * max_blocks, layout.record_bytes, placement=placement, beside=self.records)
            apart = self._home.records.data_ptr() - self.records.data_ptr()
            assert apart % layout.record_bytes == 0
            self._first_home = apart // layout.record_bytes
        self.table = homes.add_(self._first_home).view(num_rows, max_blocks)
        self.tags = torch.full((num_rows, self.num_slots if self.tiered else 0), -1, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated on the device, tables included."""
        return self.records.nbytes + self.table.nbytes + self.tags.nbytes

    @property
    def outer_bytes(self) -> int:
        """Bytes reserved beyond the device."""
        return 0 if self._home is None else self._home.records.untyped_storage().nbytes()

    @property
    def mapping(self) -> mmap.mmap | None:
        """The file that blocks beyond the device lie in, None where there is none."""
        return None if self._home is None else self._home.mapping

    def drop_from_memory(self) -> bool:
        """Let the next read of blocks in a file come from the disk, for a measurement; False where none can."""
        return self._home is not None and self._home.drop_from_memory()

    @property
    def first_home(self) -> int:
        """The number of the first home: that of block b of row r is first_home + r * max_blocks + b."""
        return self._first_home

    def grow(self, num_blocks: int) -> None:
        """Bring every row to `num_blocks` blocks; the caller has checked that they fit, and writes them."""
        assert self.num_blocks <= num_blocks <= self.max_blocks, (self.num_blocks, num_blocks, self.max_blocks)
        self.stamps += range(self._next_stamp, self._next_stamp + num_blocks - self.num_blocks)
        self._next_stamp += num_blocks - self.num_blocks
        self.num_blocks = num_blocks

    def shrink(self, num_blocks: int) -> None:
        """Forget all blocks of every row from `num_blocks` on."""
        assert 0 <= num_blocks <= self.num_blocks, (num_blocks, self.num_blocks)
        if self.tiered and num_blocks < self.num_blocks:
            self.table[:, num_blocks : self.num_blocks] = self._homes(num_blocks, self.num_blocks)
            self.tags[self.tags >= num_blocks] = -1
        del self.stamps[num_blocks:]
        self.num_blocks = num_blocks

    def settle(self, first: int) -> None:
        """Copy the blocks from `first` on, which have just been written, into slots that are still empty."""
        last = min(self.num_blocks, self.num_slots)
        if not self.tiered or first >= last:
            return
        rows, columns = (self.tags[:, first:last] < 0).nonzero(as_tuple=True)
        columns += first
        self._synchronize()
        homes = (rows * self.max_blocks + columns).cpu()
        assert self._home is not None
        slots = rows * self.num_slots + columns
        self.records[slots] = self._home.records[homes].to(self.records.device)
        self.table[rows, columns] = slots
        self.tags[rows, columns] = columns

    def take(self, entries: Tensor) -> Tensor:
        """Return the records [n, record_bytes] of table entries [n], on the device."""
        if self._home is None:
            return self.records[entries]
        self._synchronize()
        outer = (entries < 0) | (entries >= self.records.shape[0])
        homes = (entries[outer] - self._first_home).cpu()
        taken = torch.empty(entries.shape[0], self.layout.record_bytes, dtype=torch.uint8, device=self.records.device)
        taken[~outer] = self.records[entries[~outer]]
        taken[outer] = self._home.records[homes].to(taken.device)
        return taken

    def put(self, entries: Tensor, records: Tensor) -> None:
        """Write the records [n, record_bytes] of table entries [n], which are homes."""
        words = records.view(torch.int64)  # faster than bytes
        if self._home is None:
            self.records.view(torch.int64).index_copy_(0, entries, words)
        else:
            self._home.records.view(torch.int64).index_copy_(0, (entries - self._first_home).cpu(), words.cpu())

    def read(self, first: int, last: int) -> Tensor:
        """Copy columns first..last-1 to host memory: uint8 [last - first, num_rows, record_bytes]."""
        assert 0 <= first <= last <= self.num_blocks, (first, last, self.num_blocks)
        self._synchronize()
        words = self._columns()[:, first:last].transpose(0, 1)  # of 8 bytes: faster than bytes
        copy = torch.empty(words.shape, dtype=words.dtype)
        return copy.copy_(words).view(torch.uint8)

    def write(self, first: int, columns: Tensor) -> None:
        """Fill columns from `first` on, which `grow` has just given, with what `read` returned."""
        last = first + columns.shape[0]
        assert 0 <= first <= last <= self.num_blocks, (first, last, self.num_blocks)
        assert columns.shape[1:] == (self.num_rows, self.layout.record_bytes), columns.shape
        if columns.numel():
            self._synchronize()
            self._columns()[:, first:last] = columns.contiguous().view(torch.int64).transpose(0, 1)

    def poison(self, value: int) -> None:
        """Fill all that holds no block with bytes of `value`: for tests, which see then whether it is read."""
        self._columns()[:, self.num_blocks :].view(torch.uint8).fill_(value)
        if self.tiered:
            self.records[: self.tags.numel()][self.tags.view(-1) < 0] = value

    def _columns(self) -> Tensor:
        """Return the homes as int64 [num_rows, max_blocks, record_bytes / 8]."""
        records = self.records if self._home is None else self._home.records
        return records.view(torch.int64).view(self.num_rows, self.max_blocks, self.layout.record_bytes // 8)

    def _homes(self, first: int, last: int) -> Tensor:
        rows = torch.arange(self.num_rows, device=self.table.device)[:, None] * self.max_blocks
        return self._first_home + rows + torch.arange(first, last, device=self.table.device)

    def _synchronize(self) -> None:
        """Wait until the device has written what it was told to write into host memory."""
        if self._home is not None and self.records.device.type == "cuda":
            torch.cuda.synchronize(self.records.device)


def slots_per_row(layout: BlockLayout, *, num_rows: int, max_blocks: int, placement: Placement) -> int:
    """Return how many records each row has on the device: all of its blocks, or as many as the placement allows."""
    if placement.device_bytes is None or num_rows == 0:
        return max_blocks
    if num_rows * max_blocks * (layout.record_bytes + TABLE_BYTES) <= placement.device_bytes:
        return max_blocks
    left = placement.device_bytes - num_rows * max_blocks * TABLE_BYTES
    return max(0, left // (num_rows * (layout.record_bytes + TABLE_BYTES)))
