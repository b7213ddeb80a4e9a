"""A cache that holds many tokens without a prefill, for decode benchmarks only.

What is filled in is random numbers, not a text: nothing that is generated from such a cache means anything. No command
that answers a user imports this.
"""

import torch
from torch import Tensor

from duolocal.cache import DuoCache
from duolocal.kernels.blocks import BlockLayout, encode_blocks

DISTINCT_BLOCKS = 1024  # encoded once each; every record of the pool is a copy of one of them
_ENCODED_AT_ONCE = 256  # blocks
_COPIED_BYTES = 1 << 28  # at a time
_OUTLIERS = 16  # one channel in so many is 8 times larger, as keys of real models have them


def fill_with_random_tokens(
    cache: DuoCache, num_tokens: int, *, seed: int, distinct_blocks: int = DISTINCT_BLOCKS
) -> None:
    """Bring an empty cache to `num_tokens` tokens of random keys and values, for a decode benchmark.

    Takes records from the pool as a prefill does and writes all of them, so that memory is really held and a reader
    meets as many different addresses; their contents are copies, in random order, of `distinct_blocks` encoded
    blocks whose scales differ. Every slot of the ring is random. Seconds for many gigabytes. `num_tokens` must fit
    the cache's context.
    """
    assert cache.num_tokens == 0, f"the cache holds {cache.num_tokens} tokens: reset it first"
    assert 0 <= num_tokens <= cache.context, (num_tokens, cache.context)
    generator = torch.Generator(device=cache.device).manual_seed(seed)
    layout, pool = cache.layout, cache.pool
    num_blocks = num_tokens // layout.block_size
    pool.grow(num_blocks)
    targets = pool.table[:, :num_blocks].reshape(-1)
    if targets.shape[0]:
        blocks = _random_blocks(layout, min(distinct_blocks, targets.shape[0]), generator)
        step = max(1, _COPIED_BYTES // layout.record_bytes)
        for part in targets.split(step):
            chosen = torch.randint(blocks.shape[0], part.shape, generator=generator, device=cache.device)
            pool.put(part, blocks[chosen])
        pool.settle(0)
        cache.make_digests(0)
    ring = cache.ring.data
    for half in ring:  # keys, then values
        shape = (*half.shape[:2], 1, half.shape[3])
        half.copy_(_scaled(torch.randn(half.shape, generator=generator, device=cache.device), shape, generator))
    cache.num_tokens = num_tokens


def _random_blocks(layout: BlockLayout, count: int, generator: torch.Generator) -> Tensor:
    """Return uint8 [count, record_bytes]: random keys and values, encoded."""
    parts = []
    for start in range(0, count, _ENCODED_AT_ONCE):
        shape = (min(_ENCODED_AT_ONCE, count - start), layout.block_size, layout.head_dim)
        keys, values = (
            _scaled(
                torch.randn(shape, generator=generator, device=generator.device),
                (shape[0], 1, shape[2]),
                generator,
            )
            for _ in range(2)
        )
        parts.append(encode_blocks(keys, values, layout))
    return torch.cat(parts)


def _scaled(x: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Multiply x with a random size per channel (`shape` broadcasts to x), a few of them outliers."""
    sizes = torch.randn(shape, generator=generator, device=x.device).mul_(0.5).exp_()
    outlier = torch.randint(_OUTLIERS, shape, generator=generator, device=x.device) == 0
    return x * torch.where(outlier, 8 * sizes, sizes)
