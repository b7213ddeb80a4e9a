"""A model between full and streaming attention, by a gate per KV head: what DuoAttention distils (arXiv 2410.10819).

out = gate · full + (1 - gate) · streaming (eq. 1). Differentiable in everything, in torch alone. Where memory is short,
only one layer's activations exist at a time (checkpointing); it grows with the text, never with its square.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from duolocal.models.observe import Attention, ObservedCache, full_attention, streaming_attention
from duolocal.models.transformer import Transformer
from duolocal.models.weights import LayerWeights
from duolocal.plan.free import available_bytes
from duolocal.quant.weight import DenseWeight, Linear

DECODED_SHARE = 0.25  # of the free memory
ACTIVATIONS_SHARE = 0.25  # of the free memory


def mixed_attention(gates: Tensor, *, sink_size: int, recent_size: int) -> Attention:
    """Return the attention of a layer whose KV heads are mixed by `gates` [num_kv_heads]."""

    def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        full = full_attention(q, k, v, positions)
        streaming = streaming_attention(q, k, v, sink_size=sink_size, recent_size=recent_size)
        # In the gates' dtype: the difference of two 16-bit numbers is what a gate learns from.
        return streaming + gates[:, None, None, None] * (full.to(gates.dtype) - streaming)

    return attention


def mixed_hidden(
    transformer: Transformer,
    token_ids: Tensor,
    rows: Tensor,
    gates: Tensor | None,
    *,
    sink_size: int,
    recent_size: int,
    checkpointing: bool = False,
) -> Tensor:
    """Return the last hidden state at `rows` [r] of a sequence, every head mixed by its gate: [r, hidden_size].

    gates: [num_layers, num_kv_heads], None for the full model.
    """
    positions = torch.arange(len(token_ids), device=token_ids.device)
    rotation = transformer.rotation(positions)

    def run(layer: int, x: Tensor, of_layer: Tensor | None) -> Tensor:
        attention: Attention = full_attention
        if of_layer is not None:
            attention = mixed_attention(of_layer, sink_size=sink_size, recent_size=recent_size)
        return transformer.run_layer(layer, x, positions, rotation, ObservedCache(attention))

    x = transformer.embed(token_ids)
    for layer in range(transformer.config.num_layers):
        of_layer = None if gates is None else gates[layer]
        if checkpointing:
            x = checkpoint(run, layer, x, of_layer, use_reentrant=False, preserve_rng_state=False)
        else:
            x = run(layer, x, of_layer)
    return transformer.final_norm(x[rows])


def needs_checkpointing(transformer: Transformer, num_tokens: int) -> bool:
    """Say whether the activations of all layers would take too much of the free memory."""
    config = transformer.config
    # Of what is kept for the way back about 0.7 of this was measured on SmolLM2.
    per_token = 8 * config.hidden_size + 4 * config.intermediate_size + 12 * config.num_heads * config.head_dim
    needed = num_tokens * config.num_layers * per_token * transformer.dtype.itemsize
    return needed > ACTIVATIONS_SHARE * available_bytes(transformer.device)


def decoded(transformer: Transformer) -> Transformer:
    """Return the same model to take gradients of: in plain torch, its matrices decoded once where memory is plenty.

    A step of `distill` reads every matrix three times, and decoding a small model's takes a fifth of it.
    """
    weights, dtype = transformer.weights, transformer.dtype
    elements = sum(matrix.out_features * matrix.in_features for matrix in weights.matrices())
    if elements * dtype.itemsize <= DECODED_SHARE * available_bytes(transformer.device):
        weights = replace(weights, layers=tuple(_decoded_layer(layer, dtype) for layer in weights.layers))
    return Transformer(transformer.config, weights, context=transformer.context, device=transformer.device, dtype=dtype)


def _decoded_layer(layer: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    dense = {
        name: Linear(DenseWeight(part.weight.dequantize(dtype)), part.bias)
        for name, part in vars(layer).items()
        if isinstance(part, Linear)
    }
    return replace(layer, **dense)  # type: ignore[arg-type]
