"""The oracle that every cache and attention kernel is judged by: dense, float64, with an explicit mask.

Owns the design's visibility rule in its plainest form. Nothing here is fast, tiled, quantized or shared with
the code under test.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from duolocal.kernels.interface import StepTraits
from duolocal.models.config import ModelConfig


def naive_visibility(i: int, j: int, *, retrieval: bool, sink_size: int, recent_size: int) -> bool:
    """Say whether a query at position `i` sees position `j`: the rule of the design, word for word."""
    if retrieval:
        return j <= i
    return j <= i and (j < sink_size or i - j < recent_size)


def visibility_mask(positions: Tensor, kv_len: int, *, retrieval: bool, sink_size: int, recent_size: int) -> Tensor:
    """Return the same rule as a boolean mask [q_len, kv_len] for queries at `positions` [q_len]."""
    i = positions.to("cpu", torch.int64)[:, None]
    j = torch.arange(kv_len)[None, :]
    if retrieval:
        return j <= i
    return (j <= i) & ((j < sink_size) | (i - j < recent_size))


def oracle_weights(
    q: Tensor, k: Tensor, positions: Tensor, *, retrieval: Sequence[bool], sink_size: int = 0, recent_size: int = 1
) -> Tensor:
    """Return the attention weights of q [q_len, num_heads, head_dim] on k [kv_len, num_kv_heads, head_dim].

    Row j of k is position j; `positions` [q_len] are those of the queries; `retrieval` has one entry per KV head.
    Returns [num_heads, q_len, kv_len] float64 on the CPU.
    """
    q, k = (tensor.detach().to("cpu", torch.float64) for tensor in (q, k))
    kv_len, num_kv_heads, head_dim = k.shape
    num_heads = q.shape[1]
    assert num_heads % num_kv_heads == 0
    assert len(retrieval) == num_kv_heads
    assert int(positions.max()) < kv_len, "a query comes after the last key: append was not called"
    weights = torch.full((num_heads, q.shape[0], kv_len), float("nan"), dtype=torch.float64)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        mask = visibility_mask(
            positions, kv_len, retrieval=retrieval[kv_head], sink_size=sink_size, recent_size=recent_size
        )
        scores = q[:, head] @ k[:, kv_head].T / head_dim**0.5  # [q_len, kv_len]
        weights[head] = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights


def oracle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    retrieval: Sequence[bool],
    sink_size: int,
    recent_size: int,
) -> Tensor:
    """Attend by `oracle_weights` to v of k's shape; return [q_len, num_heads, head_dim] float64 on the CPU."""
    assert v.shape == k.shape
    weights = oracle_weights(q, k, positions, retrieval=retrieval, sink_size=sink_size, recent_size=recent_size)
    return _weighted(weights, v)


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    values = v.detach().to("cpu", torch.float64).repeat_interleave(weights.shape[0] // v.shape[1], dim=1)
    return torch.einsum("hqk,khd->qhd", weights, values)


class OracleCache:
    """A `Cache` that keeps all keys and values as they came, and the attention weights of every call.

    `plan_retrieval[layer][kv_head]` says which heads are retrieval heads; None: all.
    """

    traits = StepTraits()

    def __init__(
        self,
        config: ModelConfig,
        plan_retrieval: Sequence[Sequence[bool]] | None = None,
        *,
        sink_size: int = 0,
        recent_size: int = 1,
    ) -> None:
        if plan_retrieval is None:
            plan_retrieval = [[True] * config.num_kv_heads for _ in range(config.num_layers)]
        assert len(plan_retrieval) == config.num_layers
        self.plan_retrieval = plan_retrieval
        self.sink_size = sink_size
        self.recent_size = recent_size
        empty = torch.empty(0, config.num_kv_heads, config.head_dim, dtype=torch.float64)
        self.k = [empty for _ in range(config.num_layers)]  # [kv_len, num_kv_heads, head_dim] float64 per layer
        self.v = [empty for _ in range(config.num_layers)]
        self.weights: list[Tensor] = []  # [num_heads, q_len, kv_len] float64 per call of attend

    def append(self, layer: int, k: Tensor, v: Tensor, rotation: object = None) -> None:
        """Add the next tokens' k and v [q_len, num_kv_heads, head_dim]."""
        assert k.shape == v.shape
        assert k.shape[1:] == self.k[layer].shape[1:]
        self.k[layer] = torch.cat((self.k[layer], k.detach().to("cpu", torch.float64)))
        self.v[layer] = torch.cat((self.v[layer], v.detach().to("cpu", torch.float64)))

    def attend(self, layer: int, q: Tensor, positions: Tensor, rotation: object = None) -> Tensor:
        """Attend from q [q_len, num_heads, head_dim]; return its shape, dtype and device."""
        weights = oracle_weights(
            q,
            self.k[layer],
            positions,
            retrieval=self.plan_retrieval[layer],
            sink_size=self.sink_size,
            recent_size=self.recent_size,
        )
        self.weights.append(weights)
        return _weighted(weights, self.v[layer]).to(q.device, q.dtype)
