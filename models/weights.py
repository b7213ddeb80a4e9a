"""What a loader hands to the Transformer."""

from dataclasses import dataclass

from torch import Tensor

from duolocal.quant.weight import Linear, Weight


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Norm weights are [hidden_size] (or [head_dim]) in the compute dtype."""

    attention_norm: Tensor
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    mlp_norm: Tensor
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    q_norm: Tensor | None = None  # [head_dim], Qwen3
    k_norm: Tensor | None = None  # [head_dim], Qwen3


@dataclass(frozen=True)
class ModelWeights:
    """A whole model; `lm_head` is the very `embedding` object where they are tied."""

    embedding: Weight  # [vocab_size, hidden_size]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden_size]
    lm_head: Weight  # [vocab_size, hidden_size]
