"""Attention between full and streaming, by a gate per KV head: what DuoAttention distils (arXiv 2410.10819, eq. 1).

out = gate · full + (1 - gate) · streaming. Differentiable in everything, in torch alone; the band of a streaming head
is computed in tiles of queries over the keys they see.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from duolocal.kernels.interface import Rotation

BAND_TILE = 256  # queries


class MixCache:
    """A Cache for whole sequences fed at once: it keeps the keys and values of the layer at hand until they are used.

    gates: [num_kv_heads] of that layer, or None for full attention.
    """

    recordable = rotates = False

    def __init__(self, gates: Tensor | None, *, sink_size: int, recent_size: int) -> None:
        self._gates = gates
        self._sink_size = sink_size
        self._recent_size = recent_size
        self._kv: tuple[Tensor, Tensor] | None = None

    def append(self, layer: int, k: Tensor, v: Tensor, rotation: Rotation | None = None) -> None:
        assert rotation is None and self._kv is None
        self._kv = k, v

    def attend(self, layer: int, q: Tensor, positions: Tensor, rotation: Rotation | None = None) -> Tensor:
        assert rotation is None and self._kv is not None
        k, v = self._kv
        self._kv = None
        assert q.shape[0] == k.shape[0], "a whole sequence is fed at once"
        q, k, v = heads_first(q, k, v)
        out = full_attention(q, k, v)
        if self._gates is not None:
            streaming = streaming_attention(q, k, v, sink_size=self._sink_size, recent_size=self._recent_size)
            gates = self._gates.repeat_interleave(q.shape[0] // len(self._gates))[:, None, None]
            # In the gates' dtype: the difference of two 16-bit numbers is what a gate learns from.
            out = (streaming + gates * (out.to(gates.dtype) - streaming)).to(q.dtype)
        return out.transpose(0, 1)


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [n, num_heads, head_dim], k and v [n, num_kv_heads, head_dim] as three [num_heads, n, head_dim].

    Query head h reads KV head h // group.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
    return q.transpose(0, 1), k, v


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally from q to k and v, each [num_heads, n, head_dim]."""
    return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


def streaming_attention(q: Tensor, k: Tensor, v: Tensor, *, sink_size: int, recent_size: int) -> Tensor:
    """Attend as a streaming head does: j <= i and (j < sink_size or i - j < recent_size); shapes as above."""
    tiles = []
    for start in range(0, q.shape[1], BAND_TILE):
        stop = min(start + BAND_TILE, q.shape[1])
        near = max(start - recent_size + 1, 0)  # the first key that the tile sees because it is recent
        sinks = min(sink_size, near)
        j = torch.cat((torch.arange(sinks, device=q.device), torch.arange(near, stop, device=q.device)))
        i = torch.arange(start, stop, device=q.device)[:, None]
        seen = (j <= i) & ((j < sink_size) | (i - j < recent_size))  # [t, keys]
        keys, values = (torch.cat((x[:, :sinks], x[:, near:stop]), 1) if sinks else x[:, near:stop] for x in (k, v))
        tiles.append(scaled_dot_product_attention(q[None, :, start:stop], keys[None], values[None], attn_mask=seen)[0])
    return torch.cat(tiles, 1)
