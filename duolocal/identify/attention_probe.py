"""Watching attention: a cache that sees everything and shows the attention weights of every layer, tile by tile.

Owns dense attention in float32 (or wider) over tiles of queries; what is made of the weights is the watcher's. It
stands where the model's own cache stands (`duolocal.models.transformer.Cache`), so it works for every model that
runs, whatever bits its weights are in.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from duolocal.kernels.interface import Rotation
from duolocal.models.config import ModelConfig
from duolocal.models.transformer import Transformer

# Attention weights that exist at one time: 64 MB in float32.
TILE_ELEMENTS = 1 << 24
MAX_TILE = 128  # queries
CHUNK_SIZE = 1024  # tokens that go through the layers together


class Watcher(Protocol):
    """Is shown attention weights."""

    def __call__(self, layer: int, positions: Tensor, weights: Tensor) -> None:
        """Look at weights [num_heads, t, kv_len] of the queries at `positions` [t]; rows sum to 1, keys from 0."""
        ...


class ProbeCache:
    """A Cache in which every head sees everything and `watch` sees every weight.

    tile: queries at a time, None for as many as TILE_ELEMENTS weights allow.
    """

    recordable = rotates = False

    def __init__(self, config: ModelConfig, watch: Watcher, *, tile: int | None = None) -> None:
        self._config = config
        self._watch = watch
        self._tile = tile
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor, rotation: Rotation | None = None) -> None:
        assert rotation is None
        kept = self._kv.get(layer)
        # Copies in any case: compiled kernels may write their next result where k and v lie.
        self._kv[layer] = (k.clone(), v.clone()) if kept is None else (torch.cat((kept[0], k)), torch.cat((kept[1], v)))

    def attend(self, layer: int, q: Tensor, positions: Tensor, rotation: Rotation | None = None) -> Tensor:
        assert rotation is None
        k, v = self._kv[layer]
        num_kv_heads, kv_len = self._config.num_kv_heads, k.shape[0]
        wide = torch.promote_types(q.dtype, torch.float32)
        scale = self._config.head_dim**-0.5
        # [num_kv_heads, head_dim, kv_len] and [num_kv_heads, kv_len, head_dim]
        keys, values = k.to(wide).permute(1, 2, 0), v.to(wide).transpose(0, 1)
        grouped = (q.to(wide) * scale).unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)  # [kv_heads, group, q, d]
        out = torch.empty_like(q)
        for start, stop in self._tiles(q.shape[0], kv_len):
            seen = int(positions[stop - 1]) + 1  # later keys are nobody's in this tile
            rows = grouped[:, :, start:stop].flatten(1, 2)  # [num_kv_heads, group * t, head_dim]
            logits = (rows @ keys[:, :, :seen]).view(q.shape[1], stop - start, seen)
            future = torch.arange(seen, device=q.device) > positions[start:stop, None]
            weights = logits.masked_fill_(future, float("-inf")).softmax(-1)  # [num_heads, t, seen]
            self._watch(layer, positions[start:stop], weights)
            attended = weights.view(num_kv_heads, -1, seen) @ values[:, :seen]  # [num_kv_heads, group * t, head_dim]
            out[start:stop] = attended.view(q.shape[1], stop - start, -1).transpose(0, 1).to(q.dtype)
        return out

    def _tiles(self, q_len: int, kv_len: int) -> Iterator[tuple[int, int]]:
        tile = self._tile or max(1, min(MAX_TILE, TILE_ELEMENTS // (self._config.num_heads * kv_len)))
        for start in range(0, q_len, tile):
            yield start, min(start + tile, q_len)


@torch.inference_mode()
def probe(
    transformer: Transformer,
    token_ids: list[int],
    watch: Watcher,
    *,
    tile: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Iterator[int]:
    """Run one sequence through the model, dense, showing `watch` all attention weights; yield layers done.

    Memory is bounded: the whole sequence goes through a layer in chunks before the next layer begins, so there are
    the sequence's activations, one layer's keys and values, and one tile of weights.
    """
    ids = torch.tensor(token_ids, dtype=torch.int64, device=transformer.device)
    positions = torch.arange(len(token_ids), device=transformer.device)
    chunks = positions.split(chunk_size)
    parts = [transformer.embed(ids[chunk]) for chunk in chunks]
    rotations = [transformer.rotation(chunk) for chunk in chunks]
    for layer in range(transformer.config.num_layers):
        cache = ProbeCache(transformer.config, watch, tile=tile)
        for index, chunk in enumerate(chunks):
            parts[index] = transformer.run_layer(layer, parts[index], chunk, rotations[index], cache)
        yield layer + 1


def over_group(per_head: Tensor, num_kv_heads: int) -> Tensor:
    """Return the largest of each KV head's query heads: [num_layers, num_heads] -> [num_layers, num_kv_heads].

    The largest and not the mean, as in RazorAttention (arXiv 2407.15891): a KV head whose window is cut is cut for
    all of its query heads, so it is worth what the neediest of them needs.
    """
    return per_head.unflatten(1, (num_kv_heads, -1)).amax(-1)
