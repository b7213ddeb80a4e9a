"""Attention in the open: one sequence through the model, layer by layer, with attention computed where it can be seen.

Owns a Cache that keeps what is appended as it comes and leaves attention to a function, and the ways to compute that:
fused, over everything or over a window, where only the result counts; by its weights, a tile of queries at a time,
where somebody looks at them. What is made of it (scores of heads, sources, sentences, digest channels) is the users'.
It stands where the model's own cache stands, so it works for every model that runs, in whatever bits.

Query heads lie beside each other by the KV head they read: q [num_kv_heads, group, q_len, head_dim], k and v
[num_kv_heads, kv_len, head_dim].
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from duolocal.kernels.interface import Rotation, StepTraits
from duolocal.models.transformer import Cache, Transformer

BAND_TILE = 256  # queries of streaming attention at a time
# Attention weights that exist at one time: 64 MB in float32.
TILE_ELEMENTS = 1 << 24
MAX_TILE = 128  # queries

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (q, k, v, positions [q_len]) to q's shape, as above


def full_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Attend causally, of a whole sequence fed at once. Differentiable; memory grows with its length."""
    assert q.shape[2] == k.shape[1], "a whole sequence is fed at once"
    heads, keys, values = _side_by_side(q, k, v)
    return scaled_dot_product_attention(heads, keys, values, is_causal=True).view(q.shape)


def streaming_attention(
    q: Tensor, k: Tensor, v: Tensor, *, sink_size: int, recent_size: int, positions: Tensor | None = None
) -> Tensor:
    """Attend as a streaming head does: j <= i and (j < sink_size or i - j < recent_size); else as `full_attention`.

    positions: of the queries, ascending int64 [q_len]; None for one at every key.
    """
    kv_len = k.shape[1]
    if positions is None:
        positions = torch.arange(kv_len, device=q.device)
    assert q.shape[2] == len(positions)
    heads, keys, values = _side_by_side(q, k, v)
    tiles = []
    for start in range(0, kv_len, BAND_TILE):
        stop = min(start + BAND_TILE, kv_len)
        here = (positions >= start) & (positions < stop)
        if not here.any():
            continue
        near = max(start - recent_size + 1, 0)  # the first key that the tile sees because it is recent
        sinks = min(sink_size, near)
        j = torch.cat((torch.arange(sinks, device=q.device), torch.arange(near, stop, device=q.device)))
        i = positions[here, None]
        seen = (j <= i) & ((j < sink_size) | (i - j < recent_size))  # [t, keys]
        band_k, band_v = (torch.cat((x[:, :, :sinks], x[:, :, near:stop]), 2) for x in (keys, values))
        tiles.append(scaled_dot_product_attention(heads[:, :, here], band_k, band_v, attn_mask=seen))
    return torch.cat(tiles, 2).view(q.shape)


def attention_weights(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """Return the weights of q [..., group, q_len, head_dim] on k [..., kv_len, head_dim] in float32 or wider.

    hidden: bool, what is not seen; it broadcasts to the result [..., group, q_len, kv_len], whose rows sum to 1.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = (q.to(wide) * q.shape[-1] ** -0.5).flatten(-3, -2)  # [..., group * q_len, head_dim]
    scores = (rows @ k.to(wide).mT).unflatten(-2, q.shape[-3:-1])
    return scores.masked_fill_(hidden, float("-inf")).softmax(-1)


def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """Return the sums of v [..., kv_len, head_dim] by `attention_weights`: [..., group, q_len, head_dim]."""
    return (weights.flatten(-3, -2) @ v.to(weights.dtype)).unflatten(-2, weights.shape[-3:-1])


def shown_attention(show: Callable[[Tensor, Tensor], None] | None = None, *, tile: int | None = None) -> Attention:
    """Return full attention, of chunks too, whose weights are shown.

    show: is given positions [t] and weights [num_heads, t, kv_len], float32 or wider, keys from 0; every query once.
    tile: queries at a time, None for as many as TILE_ELEMENTS weights allow.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        num_heads, q_len, kv_len = q.shape[0] * q.shape[1], q.shape[2], k.shape[1]
        step = tile or max(1, min(MAX_TILE, TILE_ELEMENTS // (num_heads * kv_len)))
        wide = torch.promote_types(q.dtype, torch.float32)
        k, v, out = k.to(wide), v.to(wide), torch.empty_like(q)
        for start in range(0, q_len, step):
            rows = slice(start, min(start + step, q_len))
            seen = int(positions[rows][-1]) + 1  # later keys are nobody's in this tile
            hidden = torch.arange(seen, device=q.device) > positions[rows, None]
            weights = attention_weights(q[:, :, rows], k[:, :seen], hidden)
            if show is not None:
                show(positions[rows], weights.flatten(0, 1))
            out[:, :, rows] = weighted_values(weights, v[:, :seen]).to(q.dtype)
        return out

    return attention


class ObservedCache:
    """A Cache that keeps, dense, what is appended to each layer, and attends by `attention`."""

    traits = StepTraits()

    def __init__(self, attention: Attention = full_attention) -> None:
        self._attention = attention
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}  # [num_kv_heads, kv_len, head_dim]

    def append(self, layer: int, k: Tensor, v: Tensor, rotation: Rotation | None = None) -> None:
        """Keep k and v [q_len, num_kv_heads, head_dim]."""
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        kept = self._kv.get(layer)
        # Copies in any case: compiled kernels may write their next result where k and v lie.
        self._kv[layer] = (
            (k.clone(), v.clone()) if kept is None else (torch.cat((kept[0], k), 1), torch.cat((kept[1], v), 1))
        )

    def attend(self, layer: int, q: Tensor, positions: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Attend from q [q_len, num_heads, head_dim]."""
        k, v = self._kv[layer]
        grouped = q.unflatten(1, (k.shape[0], -1)).permute(1, 2, 0, 3)
        return self._attention(grouped, k, v, positions).permute(2, 0, 1, 3).reshape(q.shape).to(q.dtype)


def layer_by_layer(
    transformer: Transformer,
    token_ids: Tensor,
    cache_of: Callable[[int], Cache],
    *,
    positions: Tensor | None = None,
    chunk_size: int | None = None,
    after: tuple[int, list[Tensor]] | None = None,
) -> Iterator[list[Tensor]]:
    """Run one sequence through the model; yield what each layer returns, [n, hidden_size] per chunk.

    cache_of: gives the cache of a layer before it runs; a new one for each bounds memory to the activations of the
    sequence and one layer's keys and values. positions: of the tokens, None from 0 on; chunk_size: None for all at
    once; after: how many layers were run before, and what the last of them returned.
    """
    if positions is None:
        positions = torch.arange(len(token_ids), device=transformer.device)
    chunks = positions.split(chunk_size or len(positions))
    first, states = after or (0, [transformer.embed(ids) for ids in token_ids.split(chunk_size or len(positions))])
    rotations = [transformer.rotation(chunk) for chunk in chunks]
    for layer in range(first, transformer.config.num_layers):
        cache = cache_of(layer)
        for at, chunk in enumerate(chunks):
            states[at] = transformer.run_layer(layer, states[at], chunk, rotations[at], cache)
        yield states


def _side_by_side(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as the fused kernels want them: [1, num_heads, n, head_dim]; query head h reads h // group."""
    k, v = (x.repeat_interleave(q.shape[1], 0)[None] for x in (k, v))
    return q.flatten(0, 1)[None], k, v
