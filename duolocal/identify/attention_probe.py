"""What the methods that look at attention weights share: all weights of a sequence, and a KV head's worth."""

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from duolocal.models.observe import ObservedCache, layer_by_layer, shown_attention
from duolocal.models.transformer import Transformer

CHUNK_SIZE = 1024  # tokens that go through a layer together


class Watcher(Protocol):
    """Is shown attention weights."""

    def __call__(self, layer: int, positions: Tensor, weights: Tensor) -> None:
        """Look at weights [num_heads, t, kv_len] of the queries at `positions` [t]; rows sum to 1, keys from 0."""
        ...


@torch.inference_mode()
def probe(
    transformer: Transformer,
    token_ids: list[int],
    watch: Watcher,
    *,
    tile: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Iterator[int]:
    """Run one sequence through the model, dense, showing `watch` all attention weights; yield layers done."""
    ids = torch.tensor(token_ids, dtype=torch.int64, device=transformer.device)

    def cache_of(layer: int) -> ObservedCache:
        return ObservedCache(shown_attention(partial(watch, layer), tile=tile))

    for done, _ in enumerate(layer_by_layer(transformer, ids, cache_of, chunk_size=chunk_size), 1):
        yield done


def over_group(per_head: Tensor, num_kv_heads: int) -> Tensor:
    """Return the largest of each KV head's query heads: [num_layers, num_heads] -> [num_layers, num_kv_heads].

    The largest and not the mean, as in RazorAttention (arXiv 2407.15891): a KV head whose window is cut is cut for
    all of its query heads, so it is worth what the neediest of them needs.
    """
    return per_head.unflatten(1, (num_kv_heads, -1)).amax(-1)
