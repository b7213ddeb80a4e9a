"""Which blocks a decode step reads: by digests of all of them, then by the keys of the best.

A digest stands for the keys of one block, a few channels of them: per 8 tokens the middle of the range of each channel
and half its width, each such vector in 4 bits with a scale and a minimum in float16. A query's score of a run of 8 is
q · middle + |q| · half width, the bound that no key of it exceeds in those channels (Quest, arXiv 2406.10774). A
block's is the highest over its runs and over the query heads of its KV head. Which channels, and why these numbers:
docs/selection.md.

The blocks with the highest scores, CANDIDATES times as many as will be read, are candidates. Their keys are looked at:
those are read that have the most attention among the candidates, by the sum over the query heads.

A digest depends on the record alone, so it is the same for a context that was computed and for one that was read back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.kernels.blocks import BlockLayout, decode_blocks, hadamard

RUN = 8  # tokens
CANDIDATES = 3  # times the blocks that are read
MAX_CHANNELS = 32
RANKED_ON_GPU = 1 << 14  # candidates times query heads: what a program ranks in its registers, 16 for each thread


@dataclass(frozen=True)
class DigestChannels:
    """The channels of each row of the block table that digests hold, and what is subtracted from the middles.

    channels: int32 [num_rows, num_channels], an even number; centre: float32 [num_rows, num_channels], about the mean
    key: a score says how far above an ordinary key's a block is, so that query heads can be compared.
    """

    channels: Tensor
    centre: Tensor

    def __post_init__(self) -> None:
        assert self.channels.shape == self.centre.shape and self.channels.dtype == torch.int32
        assert self.channels.shape[1] % 2 == 0, self.channels.shape

    @property
    def num_channels(self) -> int:
        return self.channels.shape[1]


def num_runs(block_size: int) -> int:
    """Return how many runs of tokens a block is cut into."""
    return max(1, block_size // RUN)


def digest_bytes(block_size: int, num_channels: int) -> int:
    """Return the bytes of one block's digest: per run codes, scale and minimum of the middles, then of the widths."""
    return num_runs(block_size) * 2 * (num_channels // 2 + 4)


def digest_channels(head_dim: int) -> int:
    """Return how many channels of a head digests hold."""
    return min(MAX_CHANNELS, head_dim)


def largest_gpu_budget(query_group: int) -> int:
    """Return the most blocks that the GPU kernels choose for a KV head with so many query heads."""
    return RANKED_ON_GPU // (1 << (query_group - 1).bit_length()) // CANDIDATES


def make_digests(records: Tensor, layout: BlockLayout, channels: Tensor, centre: Tensor) -> Tensor:
    """Return the digests uint8 [n, digest_bytes] of records [n, record_bytes] of one row.

    channels int64 and centre float32 [num_channels] of that row.
    """
    keys = decode_blocks(records, layout, "key", dtype=torch.float32)  # [n, block_size, head_dim]
    keys = (hadamard(keys) if layout.key.rotate else keys)[..., channels.long()]
    runs = keys.unflatten(1, (num_runs(layout.block_size), -1))  # [n, runs, tokens, channels]
    low, high = runs.amin(2), runs.amax(2)
    parts = (_encode((low + high) / 2 - centre), _encode((high - low) / 2))
    return torch.cat(parts, dim=-1).flatten(1)


def score_digests(q: Tensor, digests: Tensor, channels: Tensor, *, block_size: int) -> Tensor:
    """Return the scores [n] of blocks for the queries q [group, head_dim] of one KV head.

    digests: uint8 [n, digest_bytes]; channels: int64 [num_channels] of that head's row.
    """
    picked = q[:, channels.long()].float()
    runs = digests.unflatten(1, (num_runs(block_size), 2, -1))  # [n, runs, middle or width, bytes]
    middle, width = (_decode(runs[:, :, part]) for part in (0, 1))
    return (middle @ picked.mT + width @ picked.abs().mT).amax((1, 2))


def weigh_blocks(q: Tensor, records: Tensor, layout: BlockLayout, *, hidden: int = 0) -> Tensor:
    """Return the weights [n] of candidates: their shares of each query head's attention among them, added up.

    q: [group, head_dim], RoPE applied; records: [n, record_bytes]; hidden: leading tokens of the first block that are
    not read from it (sinks).
    """
    keys = decode_blocks(records, layout, "key", dtype=torch.float32)
    if layout.key.rotate:
        keys = hadamard(keys)
    logits = torch.einsum("gd,ntd->gnt", q.float(), keys) * q.shape[1] ** -0.5
    logits[:, 0, :hidden] = -torch.inf
    return logits.logsumexp(-1).softmax(-1).sum(0)


def choose_blocks(
    q: Tensor,
    digests: Tensor,
    records: Callable[[Tensor], Tensor],
    layout: BlockLayout,
    channels: Tensor,
    *,
    budget: int,
    hidden: int = 0,
) -> Tensor:
    """Return which of n blocks are read for the queries q [group, head_dim] of a KV head: int64 [budget], rising.

    digests: uint8 [n, digest_bytes]; records: from numbers of blocks to their records; channels: of the head's row;
    hidden: leading tokens of block 0 that are not read from it. Of equal ones the older. All of them where they are no
    more than `budget`.
    """
    numbers = torch.arange(len(digests), device=digests.device)
    if len(numbers) > CANDIDATES * budget:
        scores = score_digests(q, digests, channels, block_size=layout.block_size)
        numbers = _largest(scores, CANDIDATES * budget)
    if len(numbers) > budget:
        weights = weigh_blocks(q, records(numbers), layout, hidden=0 if int(numbers[0]) else hidden)
        numbers = numbers[_largest(weights, budget)]
    return numbers


def _largest(x: Tensor, count: int) -> Tensor:
    return x.argsort(descending=True, stable=True)[:count].sort().values


def _encode(x: Tensor) -> Tensor:
    """Return x [..., num_channels] as codes (two per byte, the low one first half), scale and minimum."""
    limit = torch.finfo(torch.float16).max
    low = x.amin(-1, keepdim=True).clamp(-limit, limit).half()
    scale = ((x.amax(-1, keepdim=True) - low.float()) / 15).clamp(0, limit).half()
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    codes = ((x - low.float()) / divisor).round().clamp(0, 15).to(torch.uint8)
    half = x.shape[-1] // 2
    packed = codes[..., :half] | (codes[..., half:] << 4)
    return torch.cat((packed, scale.view(torch.uint8), low.view(torch.uint8)), dim=-1)


def _decode(stored: Tensor) -> Tensor:
    codes, scale, low = stored.split((stored.shape[-1] - 4, 2, 2), dim=-1)
    scale, low = (x.contiguous().view(torch.float16).float() for x in (scale, low))
    return torch.cat((codes & 15, codes >> 4), dim=-1).float() * scale + low
