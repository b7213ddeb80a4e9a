"""The one Transformer: Llama, Mistral, Qwen2 and Qwen3 as data in ModelConfig and ModelWeights.

Owns the order of operations in a layer, and nothing that changes: the keys and values of the past are a
Cache's. It does not know retrieval and streaming heads, chunks, or where a block lives; it is handed absolute
positions and calls `cache.append` and `cache.attend` once per layer.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from duolocal.kernels.interface import Kernels, Norm, Rotation, StepTraits
from duolocal.kernels.torch_kernels import TorchKernels
from duolocal.models.config import ModelConfig
from duolocal.models.rope import RotaryAngles
from duolocal.models.weights import LayerWeights, ModelWeights
from duolocal.quant.weight import DenseWeight


class Cache(Protocol):
    """The keys and values of every layer, and attention over them."""

    @property
    def traits(self) -> StepTraits:
        """What it takes off the model in the step that is open."""
        ...

    def append(self, layer: int, k: Tensor, v: Tensor, rotation: Rotation | None = None) -> None:
        """Add the next tokens' k and v, each [q_len, num_kv_heads, head_dim], to `layer`.

        RoPE has been applied to k, unless `rotation` is given.
        """
        ...

    def attend(self, layer: int, q: Tensor, positions: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Attend from q [q_len, num_heads, head_dim] at `positions` [q_len]; return q's shape and dtype.

        Called after `append` of the same tokens, with the same rotation. The scale is head_dim ** -0.5; query head h
        reads KV head h // (num_heads // num_kv_heads).
        """
        ...


class Transformer:
    """A model's weights and how to compute with them; the invariant is that no call leaves anything behind.

    `context` is the most tokens that will ever be in context: dynamic RoPE takes its base from it once (see
    `rope_frequencies`). kernels: None for plain torch. Raises ConfigError where the RoPE settings have no meaning.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        context: int,
        device: torch.device,
        dtype: torch.dtype,
        kernels: Kernels | None = None,
    ) -> None:
        _check(config, weights)
        self.config = config
        self.weights = weights
        self.context = context
        self.device = device
        self.dtype = dtype
        self.kernels = TorchKernels(dtype) if kernels is None else kernels
        self._angles = RotaryAngles(config, context, device=device, dtype=self.kernels.angle_dtype)

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
        `before_layer` is called with the number of every layer before it runs, of a repeated step only with 0; what it
        raises passes through and leaves the cache with the layers done so far. Raises ValueError on mismatched shapes.
        """
        if token_ids.ndim != 1 or token_ids.shape != positions.shape:
            raise ValueError(
                f"hidden: token_ids {tuple(token_ids.shape)}, positions {tuple(positions.shape)}: "
                "wanted [q_len] for both"
            )
        if before_layer is not None:
            before_layer(0)

        def compute(token_ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return self._layers(self.embed(token_ids), positions, Rotation(cos, sin), cache, before_layer)

        rotation, repeat = self.rotation(positions), cache.traits.repeat  # one rotation serves all layers
        if repeat is None:
            return compute(token_ids, *rotation)
        return repeat(compute, token_ids, *rotation, model=self)

    def hidden_of(self, x: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Do as `hidden` with x [q_len, hidden_size], what `embed` returned, in place of token ids; records nothing."""
        return self._layers(x, positions, self.rotation(positions), cache, None)

    def _layers(
        self,
        x: Tensor,
        positions: Tensor,
        rotation: Rotation,
        cache: Cache,
        before_layer: Callable[[int], None] | None,
    ) -> Tensor:
        for layer in range(self.config.num_layers):
            if layer and before_layer is not None:
                before_layer(layer)
            x = self.run_layer(layer, x, positions, rotation, cache)
        return self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Multiply `hidden` [n, hidden_size] with the output matrix; return [n, vocab_size] float32."""
        if hidden.ndim != 2 or hidden.shape[1] != self.config.hidden_size:
            raise ValueError(f"logits: hidden {tuple(hidden.shape)}: wanted [n, hidden_size {self.config.hidden_size}]")
        return self.kernels.logits(hidden, self.weights.lm_head)

    def rotation(self, positions: Tensor) -> Rotation:
        """Return the angles of RoPE at `positions` [q_len]: what `run_layer` wants."""
        return Rotation(*self._angles(positions))

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return what the first layer reads for token_ids [q_len] int64: [q_len, hidden_size]."""
        weight = self.weights.embedding
        if not self.embeds_on_host or self.device.type != "cuda":
            return self.kernels.embed(weight, token_ids.to(self.device))
        # In the file's own numbers, which the GPU rounds sooner; pinned, so that the copy waits for no chunk before it.
        rows = weight.rows(token_ids.cpu(), weight.tensor.dtype if isinstance(weight, DenseWeight) else self.dtype)
        return rows.pin_memory().to(self.device, non_blocking=True).to(self.dtype)

    @property
    def embeds_on_host(self) -> bool:
        """Whether the embedding is in host memory, so that no graph of the device can read it."""
        return self.weights.embedding is not self.weights.lm_head

    def run_layer(self, layer: int, x: Tensor, positions: Tensor, rotation: Rotation, cache: Cache) -> Tensor:
        """Run one layer over x [q_len, hidden_size], for those who go through the layers themselves; return the same.

        Differentiable in x, and in what `cache` does, with `TorchKernels`.
        """
        weights = self.weights.layers[layer]
        return self._mlp(weights, self._attention(layer, weights, x, positions, rotation, cache))

    def final_norm(self, x: Tensor) -> Tensor:
        """Return x [q_len, hidden_size] of the last layer as `hidden` returns it."""
        return self.kernels.rms_norm(x, self.weights.norm, eps=self.config.norm_eps)

    def _attention(
        self, layer: int, weights: LayerWeights, x: Tensor, positions: Tensor, rotation: Rotation, cache: Cache
    ) -> Tensor:
        config, eps, kernels = self.config, self.config.norm_eps, self.kernels
        q, k, v = kernels.linear(
            x, (weights.q_proj, weights.k_proj, weights.v_proj), norm=Norm(weights.attention_norm, eps)
        )
        q = q.unflatten(-1, (config.num_heads, config.head_dim))
        k = k.unflatten(-1, (config.num_kv_heads, config.head_dim))
        v = v.unflatten(-1, (config.num_kv_heads, config.head_dim))
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k = kernels.rms_norm(q, weights.q_norm, eps=eps), kernels.rms_norm(k, weights.k_norm, eps=eps)
        if cache.traits.rotates:
            cache.append(layer, k, v, rotation)
            attended = cache.attend(layer, q, positions, rotation)
        else:
            q, k = kernels.rotate(q, k, rotation)
            cache.append(layer, k, v)
            attended = cache.attend(layer, q, positions)
        return kernels.linear(attended.flatten(1), (weights.o_proj,), residual=x)[0]  # [q_len, hidden_size]

    def _mlp(self, weights: LayerWeights, x: Tensor) -> Tensor:
        kernels, norm = self.kernels, Norm(weights.mlp_norm, self.config.norm_eps)
        gated = kernels.gated_linear(x, weights.gate_proj, weights.up_proj, norm=norm)
        return kernels.linear(gated, (weights.down_proj,), residual=x)[0]


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
