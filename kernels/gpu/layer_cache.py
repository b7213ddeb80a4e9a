"""One layer's share of a cache, as GPU kernels see it."""

from dataclasses import dataclass

from torch import Tensor

from duolocal.kernels.blocks import BlockLayout


@dataclass(frozen=True)
class LayerSelection:
    """What a layer needs to choose the blocks that a decode step reads; rows are those of its `table`.

    digests: uint8 [num_retrieval, max_blocks, digest_bytes]; lists: int32 [num_retrieval, budget + 1], the blocks to
    read, rising; made_at: int64 [num_retrieval], the occasion of each list, -1 for none; channels: int32 and centre:
    float32 [num_retrieval, num_channels], of the digests; scores: float32 [num_retrieval, max_blocks], candidates:
    int32 [num_retrieval, CANDIDATES · budget] and weights: float32 [num_retrieval, query_group, CANDIDATES · budget],
    memory to work in, of as many rows or more. reuse: steps that share a list. tags: int64 [num_retrieval, num_slots],
    the block whose copy each slot on the device holds, None where all blocks are there; first_slot, first_home: numbers
    of the first slot and of the first home of the first row. All tensors are contiguous.
    """

    digests: Tensor
    lists: Tensor
    made_at: Tensor
    channels: Tensor
    centre: Tensor
    scores: Tensor
    candidates: Tensor
    weights: Tensor
    reuse: int
    tags: Tensor | None = None
    first_slot: int = 0
    first_home: int = 0

    @property
    def budget(self) -> int:
        """Blocks that a row reads beside the newest."""
        return self.lists.shape[1] - 1

    @property
    def num_candidates(self) -> int:
        """Blocks of which the budget is chosen."""
        return self.candidates.shape[1]

    @property
    def num_channels(self) -> int:
        return self.channels.shape[1]


@dataclass(frozen=True)
class LayerCache:
    """The memory of one layer; all tensors are on one device and stay where they are.

    ring_k, ring_v: [num_kv_heads, sink_size + recent_size, head_dim], contiguous, compute dtype; position p lies in
    slot p (p < sink_size) or sink_size + (p - sink_size) % recent_size. records: uint8 [num_records, record_bytes].
    table: int64 [num_retrieval, max_blocks], the record of each block of the retrieval heads of THIS layer, in order of
    head (a view of the cache's table), counted from the first of `records`; numbers outside of that tensor are records
    in pinned host memory. retrieval_heads: int32 [num_retrieval], their numbers, rising. rows: int32 [num_kv_heads],
    the row of `table` of each KV head, -1 for a streaming head.
    widths: int32 [num_kv_heads], how many recent tokens each head reads from the ring: recent_size for a retrieval
    head, at most that for a streaming head. start: int64 [1], tokens in the cache before the new ones. selection: how
    decode steps choose their blocks, None where they read all. beyond: whether some of the records are in host memory.
    """

    ring_k: Tensor
    ring_v: Tensor
    records: Tensor
    table: Tensor
    retrieval_heads: Tensor
    rows: Tensor
    widths: Tensor
    start: Tensor
    layout: BlockLayout
    query_group: int
    sink_size: int
    recent_size: int
    selection: LayerSelection | None = None
    beyond: bool = False

    @property
    def num_kv_heads(self) -> int:
        return self.ring_k.shape[0]

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.query_group

    @property
    def num_retrieval(self) -> int:
        return self.table.shape[0]

    @property
    def head_dim(self) -> int:
        return self.ring_k.shape[2]

    @property
    def num_slots(self) -> int:
        return self.ring_k.shape[1]

    @property
    def max_blocks(self) -> int:
        return self.table.shape[1]
