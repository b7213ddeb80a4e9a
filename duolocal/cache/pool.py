"""Where blocks live: a pool of equal records and the table that finds them.

Owns allocation only; what the bytes mean is the business of `kernels.blocks`.
"""

import torch
from torch import Tensor

from duolocal.kernels.blocks import BlockLayout


class BlockPool:
    """Records for `num_rows` retrieval heads, growing together block by block.

    Invariant: a record is either on the free list or in exactly one place of the table, and the first `num_blocks`
    columns of the table are in use. All memory is reserved here, once, so that a context that was accepted never
    runs out half-way. `stamps` has one number per column, given once: where it is still there, the bytes of the column
    are what they were.
    """

    def __init__(self, layout: BlockLayout, *, num_rows: int, max_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.num_rows = num_rows
        self.max_blocks = max_blocks
        self.num_blocks = 0  # of each row
        self.stamps: list[int] = []
        self._next_stamp = 0
        num_records = num_rows * max_blocks
        self.records = torch.empty(num_records, layout.record_bytes, dtype=torch.uint8, device=device)
        self.table = torch.full((num_rows, max_blocks), -1, dtype=torch.int64, device=device)
        self._free = torch.arange(num_records, dtype=torch.int64, device=device)
        self._num_free = num_records

    @property
    def nbytes(self) -> int:
        """Bytes allocated, tables included."""
        return self.records.nbytes + self.table.nbytes + self._free.nbytes

    @property
    def num_free(self) -> int:
        return self._num_free

    def grow(self, num_blocks: int) -> None:
        """Bring every row to `num_blocks` blocks; the caller has checked that they fit."""
        assert self.num_blocks <= num_blocks <= self.max_blocks, (self.num_blocks, num_blocks, self.max_blocks)
        if num_blocks == self.num_blocks:  # most decode steps: nothing is launched
            return
        wanted = (num_blocks - self.num_blocks) * self.num_rows
        taken = self._free[self._num_free - wanted : self._num_free].flip(0)
        # A row's new blocks are neighbours, so that a span of one head is read in sequence.
        self.table[:, self.num_blocks : num_blocks] = taken.view(self.num_rows, num_blocks - self.num_blocks)
        self._num_free -= wanted
        self.stamps += range(self._next_stamp, self._next_stamp + num_blocks - self.num_blocks)
        self._next_stamp += num_blocks - self.num_blocks
        self.num_blocks = num_blocks

    def shrink(self, num_blocks: int) -> None:
        """Free all blocks of every row from `num_blocks` on."""
        assert 0 <= num_blocks <= self.num_blocks, (num_blocks, self.num_blocks)
        freed = self.table[:, num_blocks : self.num_blocks].reshape(-1).flip(0)
        self._free[self._num_free : self._num_free + freed.shape[0]] = freed
        self._num_free += freed.shape[0]
        self.table[:, num_blocks : self.num_blocks] = -1
        del self.stamps[num_blocks:]
        self.num_blocks = num_blocks

    def read(self, first: int, last: int) -> Tensor:
        """Copy columns first..last-1 to host memory: uint8 [last - first, num_rows, record_bytes]."""
        assert 0 <= first <= last <= self.num_blocks, (first, last, self.num_blocks)
        shape = (last - first, self.num_rows, self.layout.record_bytes)
        words = self.records.view(torch.int64)[self._column_records(first, last)]  # faster than bytes
        return words.cpu().view(torch.uint8).view(shape)

    def write(self, first: int, columns: Tensor) -> None:
        """Fill columns from `first` on, which `grow` has just given, with what `read` returned."""
        last = first + columns.shape[0]
        assert 0 <= first <= last <= self.num_blocks, (first, last, self.num_blocks)
        assert columns.shape[1:] == (self.num_rows, self.layout.record_bytes), columns.shape
        if columns.numel():
            flat = columns.reshape(-1, self.layout.record_bytes).view(torch.int64).to(self.records.device)
            self.records.view(torch.int64).index_copy_(0, self._column_records(first, last), flat)

    def _column_records(self, first: int, last: int) -> Tensor:
        return self.table[:, first:last].t().reshape(-1)

    def free_records(self) -> Tensor:
        """Return the indices of the records that are free (tests poison them)."""
        return self._free[: self._num_free]
