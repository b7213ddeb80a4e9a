"""The compiled share of the KV cache: storing new keys and values, and attention over ring, chunk and blocks.

Owns the description of one layer's cache for the C side (`LayerCache`) and the working memory of attention. What
the bytes mean is `kernels/blocks.py`, which of them a query sees `kernels/attention.py`; both hold here too.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.kernels.blocks import BlockLayout, Plane
from duolocal.kernels.cpu.operations import CpuKernels
from duolocal.kernels.cpu.structs import (
    KEY_TILE,
    MAX_CHANNELS,
    MAX_DIM,
    MAX_GROUP,
    MOST_AHEAD,
    PLANE_KINDS,
    AcceptArgs,
    DecodeArgs,
    DigestArgs,
    EstimateArgs,
    LayerCache,
    PlaneArgs,
    PrefillArgs,
    SelectArgs,
    SelectionArgs,
    StoreArgs,
)
from duolocal.kernels.digest import CANDIDATES
from duolocal.kernels.sparse import Chosen

TILE_ROWS = 192  # (query, query head) pairs that an item of prefill works on
_SPANS_PER_THREAD = 8  # of a head's blocks, at most


def unsupported(layout: BlockLayout, query_group: int) -> str | None:
    """Return why the compiled attention cannot be used for these shapes, or None where it can."""
    if layout.head_dim > MAX_DIM or layout.head_dim % 2:
        return f"they take an even head_dim up to {MAX_DIM}, this model has {layout.head_dim}"
    if query_group > MAX_GROUP:
        return f"they take up to {MAX_GROUP} query heads per KV head, this model has {query_group}"
    return None


@dataclass(frozen=True)
class Tiers:
    """Blocks beyond the first records: the number of the first home, and whose copies the records hold.

    tags: int64 [rows, copies per row]; advise: the address of the C library's madvise where homes lie in a mapped file,
    None where they do not.
    """

    first_home: int
    tags: Tensor
    advise: int | None


@dataclass(frozen=True)
class SelectedBlocks:
    """What selected decode keeps, as `duolocal.cache.selection` describes it; reuse: steps that share a list."""

    digests: Tensor
    lists: Tensor
    made_at: Tensor
    channels: Tensor
    centre: Tensor
    reuse: int


class CpuAttention:
    """Attention of every layer over one cache's memory; the tensors given must stay where they are.

    ring: float32 [2, num_layers, num_kv_heads, sink_size + recent_size, head_dim]; records: uint8 [num_records,
    record_bytes]; table: int64 [rows, max_blocks]; start: int64 [1], the tokens before the new ones, read at every
    call; retrieval: per layer and KV head; streaming_size: recent tokens that streaming heads see; tiers: where blocks
    lie beyond `records`, None where all are in it; selected: None where a decode step reads all blocks.
    """

    def __init__(
        self,
        kernels: CpuKernels,
        layout: BlockLayout,
        *,
        ring: Tensor,
        records: Tensor,
        table: Tensor,
        start: Tensor,
        retrieval: Sequence[Sequence[bool]],
        query_group: int,
        sink_size: int,
        recent_size: int,
        streaming_size: int,
        tiers: Tiers | None = None,
        selected: SelectedBlocks | None = None,
    ) -> None:
        assert unsupported(layout, query_group) is None
        num_layers, num_kv_heads = len(retrieval), len(retrieval[0])
        assert ring.shape == (2, num_layers, num_kv_heads, sink_size + recent_size, layout.head_dim), ring.shape
        assert (
            ring.dtype == torch.float32 and ring.is_contiguous() and records.is_contiguous() and table.is_contiguous()
        )
        assert start.dtype == table.dtype == torch.int64 and records.dtype == torch.uint8
        self._kernels = kernels
        self._group = query_group
        self._heads, self._dim = num_kv_heads, layout.head_dim
        self._kept = (ring, records, table, start, tiers, selected)
        self._selection = None if selected is None else self._selection_of(selected, table.shape[1])
        flags = torch.tensor(retrieval)
        rows = torch.where(flags, flags.flatten().cumsum(0).view(flags.shape) - 1, -1).contiguous()
        widths = torch.where(flags, recent_size, streaming_size).contiguous()
        self._rows, self._widths = rows, widths  # int64 [num_layers, num_kv_heads]
        counts = flags.sum(1).tolist()
        first_rows = [sum(counts[:layer]) for layer in range(num_layers)]
        self._layers = [
            LayerCache(
                ring[0, layer].data_ptr(),
                ring[1, layer].data_ptr(),
                records.data_ptr(),
                table.data_ptr(),
                rows[layer].data_ptr(),
                widths[layer].data_ptr(),
                start.data_ptr(),
                table.shape[1],
                layout.record_bytes,
                layout.block_size,
                num_kv_heads,
                query_group,
                layout.head_dim,
                sink_size,
                recent_size,
                _plane(layout, "key"),
                _plane(layout, "value"),
                None if tiers is None else tiers.advise,
                0 if tiers is None else tiers.first_home,
                0 if tiers is None else tiers.tags.shape[1],
                first_rows[(layer + 1) % num_layers],
                counts[(layer + 1) % num_layers],
                None if tiers is None else tiers.tags.data_ptr(),
                kernels.activations != "float32",
                None if self._selection is None else ctypes.addressof(self._selection),
            )
            for layer in range(num_layers)
        ]
        self._max_spans = _SPANS_PER_THREAD * kernels.num_threads
        sums = num_kv_heads * (self._max_spans + 1) * query_group * (layout.head_dim + 2)
        self._partial = torch.empty(MOST_AHEAD * sums)
        self._scratch = torch.empty(0)

    def close_blocks(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Encode every block that k and v [q_len, num_kv_heads, head_dim] complete; runs before `write_ring`."""
        self._store("close_blocks", layer, k, v)

    def write_ring(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep in the ring what stays of the new tokens."""
        self._store("write_ring", layer, k, v)

    def digest(self, layer: int, count: int = 0, *, first: int = 0, last: int = 0) -> None:
        """Make the digests of the blocks that `count` new tokens complete, or, for none, of blocks first..last-1."""
        self._kernels.run("digest_blocks", DigestArgs(self._address(layer), count, first, last), self)

    def decode(self, layer: int, q: Tensor, new: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend from one new token, whose key is in the ring; q [1, num_heads, head_dim] -> the same.

        new: keys and values [q_len, num_kv_heads, head_dim] of a few tokens that are not in the ring; q is theirs then,
        and the result, bit by bit, what they give when they come one by one.
        """
        count = 1 if new is None else q.shape[0]
        self._check(q, count, self._heads * self._group)
        assert count <= MOST_AHEAD and (new is None or self._selection is None)
        out = torch.empty_like(q)
        if self._selection is not None:
            select = SelectArgs(self._address(layer), q.data_ptr())
            for operation in ("score_blocks", "choose_candidates", "weigh_blocks", "choose_blocks"):
                self._kernels.run(operation, select, q, self)
        args = DecodeArgs(
            self._address(layer),
            q.data_ptr(),
            None if new is None else new[0].data_ptr(),
            None if new is None else new[1].data_ptr(),
            out.data_ptr(),
            self._partial.data_ptr(),
            count,
            self._max_spans,
        )
        self._kernels.run("decode_attention", args, q, new, out, self)
        self._kernels.run("merge", args, q, out, self)
        return out

    def prefill(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        chosen: Chosen | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Attend from a chunk of new tokens that are not in the ring yet.

        q [q_len, num_heads, head_dim]; k, v [q_len, num_kv_heads, head_dim] -> like q. chosen: the blocks that the
        layer's retrieval heads read, None for all. weights: float32 [q_len, num_heads, 2], gets each query's largest
        score and the sum of e^(score - largest).
        """
        count = q.shape[0]
        self._check(q, count, self._heads * self._group)
        self._check(k, count, self._heads)
        self._check(v, count, self._heads)
        tile = min(max(1, TILE_ROWS // self._group), count)
        blocks, choice = None, (0, 0, 0, 0)
        if chosen is not None and chosen.blocks is not None:
            num_tiles, num_blocks = chosen.blocks.shape[1:]
            blocks = torch.zeros(self._heads, num_tiles, num_blocks, dtype=torch.uint8)
            blocks[self._rows[layer] >= 0] = chosen.blocks.to(torch.uint8)
            tile = math.gcd(chosen.tile, 1 << (max(1, TILE_ROWS // self._group).bit_length() - 1))
            choice = (chosen.tile, chosen.tiles.start, num_tiles, num_blocks)
        stride = self._scratch_floats(tile)
        wanted = stride * self._kernels.num_threads
        if self._scratch.numel() < wanted:
            self._scratch = torch.empty(wanted)
        out = torch.empty_like(q)
        args = PrefillArgs(
            self._address(layer),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            self._scratch.data_ptr(),
            stride,
            count,
            tile,
            None if blocks is None else blocks.data_ptr(),
            *choice,
            None if weights is None else weights.data_ptr(),
        )
        self._kernels.run("prefill_attention", args, q, k, v, out, blocks, weights, self, self._scratch)
        return out

    def block_weights(
        self, layer: int, q: Tensor, k: Tensor, *, first: int, step: int, queries: int, blocks: int
    ) -> tuple[Tensor, Tensor]:
        """Return how much some queries of a chunk look at each block and at their window, as log-sum-exps.

        q [q_len, num_heads, head_dim]; k [q_len, num_kv_heads, head_dim], not in the ring yet; the queries are those at
        positions first, first + step, ... Returns float32 [heads, group, queries, blocks] and [heads, group, queries]
        of the layer's retrieval heads; -inf where a query sees nothing.
        """
        self._check(q, q.shape[0], self._heads * self._group)
        self._check(k, q.shape[0], self._heads)
        out = torch.empty(self._heads, queries, self._group, blocks + 1, 2)
        rows = queries * self._group
        stride = rows * (2 * self._dim + KEY_TILE + 2) + 2 * self._dim * KEY_TILE
        scratch = torch.empty(stride * self._kernels.num_threads)
        args = EstimateArgs(
            self._address(layer),
            q.data_ptr(),
            k.data_ptr(),
            out.data_ptr(),
            scratch.data_ptr(),
            stride,
            q.shape[0],
            first,
            step,
            queries,
            blocks,
        )
        self._kernels.run("estimate_blocks", args, q, k, out, scratch, self)
        found = out[self._rows[layer] >= 0].transpose(1, 2)  # [heads, group, queries, blocks + 1, 2]
        lse = found[..., 1].log_().add_(found[..., 0])
        return lse[..., :-1], lse[..., -1]

    def accept(self, new: Sequence[tuple[Tensor, Tensor]], row: int) -> None:
        """Store token number `row` of `new`, keys and values [q_len, num_kv_heads, head_dim] of every layer."""
        layers = (StoreArgs * len(new))(
            *(StoreArgs(self._address(layer), k.data_ptr(), v.data_ptr(), 1) for layer, (k, v) in enumerate(new))
        )
        self._kernels.run("accept", AcceptArgs(ctypes.addressof(layers), len(new), row), new, layers)

    def _store(self, name: str, layer: int, k: Tensor, v: Tensor) -> None:
        self._check(k, k.shape[0], self._heads)
        self._check(v, k.shape[0], self._heads)
        args = StoreArgs(self._address(layer), k.data_ptr(), v.data_ptr(), k.shape[0])
        self._kernels.run(name, args, k, v, self)

    def _selection_of(self, selected: SelectedBlocks, max_blocks: int) -> SelectionArgs:
        assert selected.channels.shape[1] <= MAX_CHANNELS, selected.channels.shape
        budget = selected.lists.shape[1] - 1
        # One layer after the other works in this.
        self._scores = torch.empty(self._heads, max_blocks)
        self._candidates = torch.empty(self._heads, CANDIDATES * budget, dtype=torch.int32)
        self._weights = torch.empty(self._heads, self._group, 2, CANDIDATES * budget)
        return SelectionArgs(
            budget,
            selected.reuse,
            selected.channels.data_ptr(),
            selected.centre.data_ptr(),
            selected.channels.shape[1],
            selected.digests.data_ptr(),
            selected.digests.shape[2],
            selected.lists.data_ptr(),
            selected.made_at.data_ptr(),
            self._scores.data_ptr(),
            self._candidates.shape[1],
            self._candidates.data_ptr(),
            self._weights.data_ptr(),
        )

    def _address(self, layer: int) -> int:
        return ctypes.addressof(self._layers[layer])

    def _check(self, x: Tensor, count: int, heads: int) -> None:
        assert x.shape == (count, heads, self._dim) and x.dtype == torch.float32 and x.is_contiguous(), (
            x.shape,
            x.dtype,
            (count, heads, self._dim),
        )

    def _scratch_floats(self, tile: int) -> int:
        rows = tile * self._group
        codes = rows * (self._dim + KEY_TILE) // 2  # two bytes each, of queries and of weights
        return rows * (3 * self._dim + KEY_TILE + 6) + 3 * self._dim * KEY_TILE + codes


def _plane(layout: BlockLayout, which: str) -> PlaneArgs:
    plane: Plane = getattr(layout, which)
    codes, scales = layout.spans(which)  # type: ignore[arg-type]
    half = (scales.stop - scales.start) // 2  # scales first, then as many minima
    return PlaneArgs(
        PLANE_KINDS.index(_kind(plane)),
        plane.groups,
        plane.rotate,
        codes.start,
        scales.start,
        scales.start + half,
    )


def _kind(plane: Plane) -> str:
    if plane.kind == "float":
        kinds = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
        assert plane.dtype in kinds, plane
        return kinds[plane.dtype]
    return "fp8" if plane.kind == "fp8" else f"int{plane.bits}"
