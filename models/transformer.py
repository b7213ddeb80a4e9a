"""The one Transformer: Llama, Mistral, Qwen2 and Qwen3 as data in ModelConfig and ModelWeights.

Owns the order of operations in a layer, and nothing that changes: the keys and values of the past are a
Cache's. It does not know retrieval and streaming heads, chunks, or where a block lives; it is handed absolute
positions and calls `cache.append` and `cache.attend` once per layer.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from duolocal.kernels.pointwise import rms_norm, rotary_embedding, silu_mul
from duolocal.models.config import ModelConfig
from duolocal.models.rope import RotaryAngles
from duolocal.models.weights import LayerWeights, ModelWeights
from duolocal.quant.weight import DenseWeight, Weight

# Rows of the vocabulary dequantized at a time, and rows of hidden states multiplied with them. A Llama-3
# lm_head whole would be 2.1 GB in float32; a tile of it is 134 MB, and a tile of the product 32 MB, whatever
# the prompt.
VOCAB_TILE = 8192
ROW_TILE = 1024


class Cache(Protocol):
    """The keys and values of every layer, and attention over them."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Add the next tokens' k (RoPE applied) and v, each [q_len, num_kv_heads, head_dim], to `layer`."""
        ...

    def attend(self, layer: int, q: Tensor, positions: Tensor) -> Tensor:
        """Attend from q [q_len, num_heads, head_dim] at `positions` [q_len]; return q's shape and dtype.

        Called after `append` of the same tokens. The scale is head_dim ** -0.5; query head h reads
        KV head h // (num_heads // num_kv_heads).
        """
        ...


class Transformer:
    """A model's weights and how to compute with them; the invariant is that no call leaves anything behind.

    `context` is the most tokens that will ever be in context: dynamic RoPE takes its base from it once (see
    `rope_frequencies`). Raises ConfigError where the RoPE settings have no meaning.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        context: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        _check(config, weights)
        self.config = config
        self.weights = weights
        self.context = context
        self.device = device
        self.dtype = dtype
        self._angles = RotaryAngles(config, context, device=device, dtype=dtype)

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: Cache,
        *,
        before_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Run tokens through all layers and the final norm, appending their keys and values to `cache`.

        token_ids and positions (absolute) [q_len] int64 -> [q_len, hidden_size] in the compute dtype.
        `before_layer` is called with the number of every layer before it runs; what it raises passes through
        and leaves the cache with the layers done so far. Raises ValueError on mismatched shapes.
        """
        if token_ids.ndim != 1 or token_ids.shape != positions.shape:
            raise ValueError(
                f"hidden: token_ids {tuple(token_ids.shape)}, positions {tuple(positions.shape)}: "
                "wanted [q_len] for both"
            )
        x = self.weights.embedding.rows(token_ids, self.dtype)  # [q_len, hidden_size]
        cos, sin = self._angles(positions)  # one computation serves all layers
        for layer, weights in enumerate(self.weights.layers):
            if before_layer is not None:
                before_layer(layer)
            x = x + self._attention(layer, weights, x, positions, cos, sin, cache)
            x = x + self._mlp(weights, x)
        return rms_norm(x, self.weights.norm, eps=self.config.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Multiply `hidden` [n, hidden_size] with the output matrix; return [n, vocab_size] float32.

        Each vocabulary tile is dequantized once, then used for all rows; beyond the result the memory needed
        does not grow with n.
        """
        if hidden.ndim != 2 or hidden.shape[1] != self.config.hidden_size:
            raise ValueError(f"logits: hidden {tuple(hidden.shape)}: wanted [n, hidden_size {self.config.hidden_size}]")
        head, num_rows = self.weights.lm_head, hidden.shape[0]
        logits = torch.empty(num_rows, head.out_features, dtype=torch.float32, device=hidden.device)
        for start in range(0, head.out_features, VOCAB_TILE):
            tile = _row_range(head, start, min(start + VOCAB_TILE, head.out_features), hidden)
            for row in range(0, num_rows, ROW_TILE):
                rows = slice(row, row + ROW_TILE)
                logits[rows, start : start + VOCAB_TILE] = hidden[rows] @ tile.T
        return logits

    def _attention(
        self,
        layer: int,
        weights: LayerWeights,
        x: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Cache,
    ) -> Tensor:
        config, eps = self.config, self.config.norm_eps
        x = rms_norm(x, weights.attention_norm, eps=eps)
        q = weights.q_proj(x).unflatten(-1, (config.num_heads, config.head_dim))
        k = weights.k_proj(x).unflatten(-1, (config.num_kv_heads, config.head_dim))
        v = weights.v_proj(x).unflatten(-1, (config.num_kv_heads, config.head_dim))
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k = rms_norm(q, weights.q_norm, eps=eps), rms_norm(k, weights.k_norm, eps=eps)
        cache.append(layer, rotary_embedding(k, cos, sin), v)
        attended = cache.attend(layer, rotary_embedding(q, cos, sin), positions)
        return weights.o_proj(attended.flatten(1))  # [q_len, hidden_size]

    def _mlp(self, weights: LayerWeights, x: Tensor) -> Tensor:
        x = rms_norm(x, weights.mlp_norm, eps=self.config.norm_eps)
        return weights.down_proj(silu_mul(weights.gate_proj(x), weights.up_proj(x)))


def _row_range(weight: Weight, start: int, stop: int, like: Tensor) -> Tensor:
    # A dense matrix is sliced, not gathered: in the compute dtype that is a view, so decode copies nothing.
    if isinstance(weight, DenseWeight):
        return weight.tensor[start:stop].to(like.dtype)
    return weight.rows(torch.arange(start, stop, device=like.device), like.dtype)


def _check(config: ModelConfig, weights: ModelWeights) -> None:
    # The loaders have checked every tensor of the file; a mismatch here is our own fault.
    assert len(weights.layers) == config.num_layers
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    assert config.num_heads % config.num_kv_heads == 0
    for layer in weights.layers:
        assert layer.q_proj.weight.out_features == q_size
        assert layer.k_proj.weight.out_features == layer.v_proj.weight.out_features == kv_size
        assert layer.o_proj.weight.in_features == q_size
        assert (layer.q_norm is not None) == (layer.k_norm is not None) == config.qk_norm
        assert (layer.q_proj.bias is not None) == config.qkv_bias
