"""Sparse prefill: of the quantized blocks behind the window, only those that carry the attention.

Queries are taken in tiles of `SparsePrefill.tile`, at absolute multiples of it. Of every tile one query in `stride` is
asked: its scores against all keys behind the window, as quantized, and against its window, give the share of attention
that each block has. The mean over the queries asked, and over the query heads of a KV head, is the block's mass; blocks
are taken by falling mass until window and blocks together reach the target. The window (sinks, the tile's own diagonal,
recent tokens) is always read, and so is every block that some query of the tile sees in part.

What is chosen depends on the tile's positions and on what its queries say, never on where a chunk begins; but only a
tile whose queries all come in one chunk is sparse. A tile that a chunk cuts through, and one that sees fewer than
`least_blocks`, is exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from duolocal.kernels.attention import KEY_SPAN, block_attention
from duolocal.kernels.blocks import BlockLayout, decode_blocks, hadamard

Take = Callable[[Tensor], Tensor]  # entries of the table [n] -> records uint8 [n, record_bytes]

# The blocks that few queries name hold less of what all of them look at: of what may be lost, the choice plans a part.
SPENT = 0.75
# What is kept of the scores of tiles that are asked together: at most so many tiles, and numbers, if one tile allows.
TILES_AT_ONCE = 4
NUMBERS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class SparsePrefill:
    """How prefill chooses blocks for retrieval heads.

    mass: the share of attention that a tile keeps, on average; 1 keeps every block. tile: queries that share a choice;
    stride: one query in so many is asked, which costs 1 / (2 · stride) of the attention. measure: also compute the
    exact attention, for the mass that is really kept (twice the work and more: for measurements, on a CPU).
    """

    mass: float = 0.98
    tile: int = 128
    stride: int = 8
    least_blocks: int = 16
    measure: bool = False

    def __post_init__(self) -> None:
        assert 0 < self.mass <= 1 and self.stride > 0 and self.tile > 1 and self.tile % self.stride == 0, self

    @property
    def target(self) -> float:
        """The share that the queries asked have to keep."""
        return 1 - SPENT * (1 - self.mass)

    @property
    def asked_per_tile(self) -> int:
        return self.tile // self.stride

    def whole(self, chunk_size: int) -> int:
        """Return the largest chunk size up to this one that cuts through no tile; as it is where none fits."""
        return max(chunk_size // self.tile, 1) * self.tile if chunk_size >= self.tile else chunk_size

    def tiles(self, start: int, end: int, *, sink_size: int, recent_size: int, block_size: int) -> range:
        """Return the numbers of the tiles among queries start..end-1 that are sparse; tile t begins at t · tile."""
        # The first query of a tile sees blocks up to its position - recent_size.
        least = (sink_size // block_size + self.least_blocks) * block_size + recent_size
        first = -(-max(start, least) // self.tile)
        return range(first, max(first, end // self.tile))

    def asked(self, tiles: range, *, device: torch.device | None = None) -> Tensor:
        """Return the positions of the queries asked: int64 [len(tiles) * asked_per_tile]."""
        positions = torch.arange(tiles.start * self.tile, tiles.stop * self.tile, self.stride, device=device)
        return positions + self.stride // 2


def blocks_seen(position: int, *, recent_size: int, block_size: int) -> int:
    """Return the number of the first block that a query at `position` and those before it see nothing of."""
    return max(0, -(-(position - recent_size + 1) // block_size))


def block_lse(
    q: Tensor,
    take: Take,
    table: Tensor,
    layout: BlockLayout,
    *,
    q_positions: Tensor,
    num_blocks: int,
    sink_size: int,
    recent_size: int,
    scale: float,
) -> Tensor:
    """Return the log-sum-exp of what each query sees of each block: [num_heads, group, n, num_blocks].

    q: [num_heads, group, n, head_dim] of retrieval KV heads at `q_positions` int64 [n], in any order; table, take: as
    in `block_attention`. -inf where a query sees nothing of a block.
    """
    num_heads, group, count, _ = q.shape
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = q.to(accumulate)
    q = (hadamard(q) if layout.key.rotate else q) * scale
    size = layout.block_size
    out = torch.full((num_heads, group, count, num_blocks), float("-inf"), dtype=accumulate, device=q.device)
    step = max(1, KEY_SPAN // size)
    for block in range(sink_size // size, num_blocks, step):
        end = min(block + step, num_blocks)
        records = take(table[:, block:end].reshape(-1))
        keys = decode_blocks(records, layout, "key", dtype=accumulate).view(num_heads, -1, layout.head_dim)
        scores = torch.einsum("hgqd,hkd->hgqk", q, keys)
        positions = torch.arange(block * size, end * size, device=q.device)
        hidden = (q_positions[:, None] - positions < recent_size) | (positions < sink_size)
        scores.masked_fill_(hidden, float("-inf"))
        out[..., block:end] = scores.unflatten(-1, (-1, size)).logsumexp(-1)
    return out


def choose_blocks(
    lse: Tensor, window_lse: Tensor, policy: SparsePrefill, tiles: range, *, sink_size: int, recent_size: int, size: int
) -> Tensor:
    """Return which blocks each tile reads: bool [num_heads, len(tiles), num_blocks].

    lse: [num_heads, group, n, num_blocks] of the queries asked, in order; window_lse: [num_heads, group, n] of their
    windows; size: tokens of a block.
    """
    blocks = torch.arange(lse.shape[-1], device=lse.device)
    first = torch.arange(tiles.start, tiles.stop, device=lse.device)[:, None] * policy.tile - recent_size
    last = first + policy.tile - 1  # the newest position behind the window of the tile's last query
    seen = (blocks >= sink_size // size) & (blocks * size <= last)  # [tiles, blocks]
    whole = seen & ((blocks + 1) * size - 1 <= first)
    partly = whole.logical_not()  # or not at all
    if policy.target >= 1:
        return seen.expand(lse.shape[0], -1, -1)
    per_tile = (len(tiles), policy.asked_per_tile)
    total = torch.logaddexp(lse.logsumexp(-1), window_lse)
    share = (lse - total[..., None]).exp_().unflatten(2, per_tile).mean((1, 3))  # [heads, tiles, blocks]
    window = (window_lse - total).exp().unflatten(2, per_tile).mean((1, 3))  # [heads, tiles]
    needed = policy.target - window - share.masked_fill(whole, 0.0).sum(-1)
    falling, order = share.masked_fill(partly, -1.0).sort(dim=-1, descending=True, stable=True)
    before = falling.clamp_min(0.0).cumsum(-1) - falling.clamp_min(0.0)
    wanted = (before < needed[..., None]) & (falling > 0)
    return torch.zeros_like(wanted).scatter_(-1, order, wanted) | (seen & partly)


def chosen_block_attention(
    q: Tensor,
    take: Take,
    table: Tensor,
    layout: BlockLayout,
    chosen: Tensor,
    *,
    first: int,
    tile: int,
    sink_size: int,
    recent_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to chosen blocks behind the window.

    q: [num_heads, group, len(tiles) * tile, head_dim] at positions first..; table, take: as in `block_attention`;
    chosen: bool [num_heads, len(tiles), num_blocks]. Returns out like q and lse [num_heads, group, q_len]; 0 and -inf
    where a query sees nothing.
    """
    num_heads, _, q_len, _ = q.shape
    assert q_len == chosen.shape[1] * tile, (q.shape, chosen.shape, tile)
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = q.to(accumulate)
    q = (hadamard(q) if layout.key.rotate else q) * scale
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=accumulate, device=q.device)
    within = torch.arange(layout.block_size, device=q.device)
    for head in range(num_heads):
        for number in range(chosen.shape[1]):
            rows = slice(number * tile, (number + 1) * tile)
            positions = torch.arange(first + rows.start, first + rows.stop, device=q.device)
            for blocks in chosen[head, number].nonzero()[:, 0].split(max(1, KEY_SPAN // layout.block_size)):
                records = take(table[head, blocks])
                k, v = (
                    decode_blocks(records, layout, which, dtype=accumulate).flatten(0, 1) for which in ("key", "value")
                )
                k_positions = (blocks[:, None] * layout.block_size + within).flatten()
                scores = q[head, :, rows] @ k.T  # [group, tile, keys]
                hidden = (positions[:, None] - k_positions < recent_size) | (k_positions < sink_size)
                scores.masked_fill_(hidden, float("-inf"))
                span_lse = scores.logsumexp(-1)
                joined = torch.logaddexp(lse[head, :, rows], span_lse)
                reference = joined.masked_fill(joined == float("-inf"), 0.0)
                weights = scores.sub_(reference[..., None]).exp_()
                kept = (lse[head, :, rows] - reference).exp()
                out[head, :, rows] = out[head, :, rows] * kept[..., None] + weights @ v
                lse[head, :, rows] = joined
    return (hadamard(out) if layout.value.rotate else out), lse


Estimate = Callable[[range, int], tuple[Tensor, Tensor]]  # tiles, number of blocks -> as `block_lse`, and the windows


def tiles_at_once(policy: SparsePrefill, *, num_heads: int, num_blocks: int) -> int:
    """Return how many tiles are asked together; each has num_heads · asked_per_tile · num_blocks float32 numbers."""
    return max(1, min(TILES_AT_ONCE, NUMBERS_AT_ONCE // max(1, num_heads * policy.asked_per_tile * num_blocks)))


def choose(
    policy: SparsePrefill,
    estimate: Estimate,
    *,
    num_heads: int,
    start: int,
    end: int,
    sink_size: int,
    recent_size: int,
    block_size: int,
) -> "Chosen":
    """Choose the blocks for a chunk's queries at positions start..end-1, a few tiles at a time.

    num_heads: the query heads of the retrieval heads. Memory: some NUMBERS_AT_ONCE float32 numbers, or one tile's.
    """
    tiles = policy.tiles(start, end, sink_size=sink_size, recent_size=recent_size, block_size=block_size)
    num_blocks = blocks_seen(tiles.stop * policy.tile - 1, recent_size=recent_size, block_size=block_size)
    found = []
    step = tiles_at_once(policy, num_heads=num_heads, num_blocks=num_blocks)
    for at in range(tiles.start, tiles.stop, step):
        some = range(at, min(at + step, tiles.stop))
        lse, window_lse = estimate(some, num_blocks)
        found.append(
            choose_blocks(lse, window_lse, policy, some, sink_size=sink_size, recent_size=recent_size, size=block_size)
        )
    return Chosen(tiles, policy.tile, torch.cat(found, dim=1) if found else None)


def sparse_block_attention(
    q: Tensor,
    window_lse: Tensor,
    take: Take,
    table: Tensor,
    layout: BlockLayout,
    policy: SparsePrefill,
    *,
    q_positions: Tensor,
    sink_size: int,
    recent_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, "Chosen"]:
    """Attend from a chunk to the blocks behind the window, as `block_attention` does, by the policy.

    window_lse: [num_heads, group, q_len] of the same queries' windows. Returns out, lse and what was chosen.
    """
    start, end = int(q_positions[0]), int(q_positions[-1]) + 1
    sizes = {"sink_size": sink_size, "recent_size": recent_size}

    def estimate(tiles: range, num_blocks: int) -> tuple[Tensor, Tensor]:
        asked = policy.asked(tiles, device=q.device)
        queries = q[:, :, asked - start]
        lse = block_lse(queries, take, table, layout, q_positions=asked, num_blocks=num_blocks, scale=scale, **sizes)
        return lse, window_lse[:, :, asked - start]

    num_heads = q.shape[0] * q.shape[1]
    choice = choose(policy, estimate, num_heads=num_heads, start=start, end=end, block_size=layout.block_size, **sizes)
    outs, lses = [], []
    for first, last in choice.pieces(start, end):
        part = q[:, :, first - start : last - start]
        if choice.blocks is not None and first == choice.first:
            out, lse = chosen_block_attention(
                part, take, table, layout, choice.blocks, first=first, tile=policy.tile, scale=scale, **sizes
            )
        else:
            positions = q_positions[first - start : last - start]
            out, lse = block_attention(part, take, table, layout, q_positions=positions, scale=scale, **sizes)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2), choice


@dataclass(frozen=True)
class Chosen:
    """Which blocks the sparse tiles of a chunk read: bool [num_heads, len(tiles), num_blocks]; None without such."""

    tiles: range
    tile: int
    blocks: Tensor | None

    @property
    def first(self) -> int:
        """The position of the first query that chooses."""
        return self.tiles.start * self.tile

    def pieces(self, start: int, end: int) -> list[tuple[int, int]]:
        """Cut queries start..end-1 into what comes before the sparse tiles, the tiles, and what comes after."""
        if self.blocks is None:
            return [(start, end)]
        cuts = [start, self.first, self.tiles.stop * self.tile, end]
        return [(first, last) for first, last in pairwise(cuts) if first < last]


class SparseCounts:
    """What sparse prefill has read so far, by row of the block table (retrieval heads, layer by layer)."""

    def __init__(self, num_rows: int, *, device: torch.device) -> None:
        # In queries times blocks; queries that are exact count as reading all that they see.
        self.read = torch.zeros(num_rows, dtype=torch.float64, device=device)
        self.seen = torch.zeros_like(self.read)
        # Of the queries that chose, where the policy measures: the share of their attention that was kept.
        self.mass = torch.zeros_like(self.read)
        self.lowest = torch.ones_like(self.read)
        self.measured = torch.zeros_like(self.read)

    def reset(self) -> None:
        """Begin anew."""
        for counts in (self.read, self.seen, self.mass, self.measured):
            counts.zero_()
        self.lowest.fill_(1.0)

    def add(
        self, rows: slice, chosen: Chosen, *, start: int, end: int, sink_size: int, recent_size: int, block_size: int
    ) -> None:
        """Count a chunk's queries at positions start..end-1 in one layer."""
        unseen = sink_size // block_size
        for first, last in chosen.pieces(start, end):
            if chosen.blocks is not None and first == chosen.first:
                tiles = torch.tensor([(tile + 1) * chosen.tile - 1 for tile in chosen.tiles])
                self.read[rows] += chosen.blocks.sum((1, 2)) * chosen.tile
            else:
                tiles = torch.arange(first, last)
            blocks = (-(-(tiles - recent_size + 1) // block_size) - unseen).clamp_min(0)
            seen = int(blocks.sum()) * (last - first) / len(tiles)
            self.seen[rows] += seen
            if chosen.blocks is None or first != chosen.first:
                self.read[rows] += seen

    def add_mass(self, rows: slice, chosen: Chosen, kept_lse: Tensor, exact_lse: Tensor, *, start: int) -> None:
        """Count what sparse queries kept: log-sum-exps [num_heads, group, q_len] of a chunk, windows included."""
        if chosen.blocks is None:
            return
        inside = slice(chosen.first - start, chosen.tiles.stop * chosen.tile - start)
        mass = (kept_lse - exact_lse)[:, :, inside].double().exp().clamp_max(1.0)
        self.mass[rows] += mass.sum((1, 2))
        self.lowest[rows] = torch.minimum(self.lowest[rows], mass.amin((1, 2)))
        self.measured[rows] += mass[0].numel()

    @property
    def density(self) -> float:
        """The share of the blocks behind the window that was read; 1 where there were none."""
        seen = float(self.seen.sum())
        return float(self.read.sum()) / seen if seen else 1.0
