"""What a loader hands to the Transformer."""

from collections.abc import Iterator
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
    """A whole model; `lm_head` is the very `embedding` object where they are tied.

    All of it is on one device, except that an untied embedding is in host memory.
    """

    embedding: Weight  # [vocab_size, hidden_size]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden_size]
    lm_head: Weight  # [vocab_size, hidden_size]

    def matrices(self) -> Iterator[Weight]:
        """Yield every matrix once."""
        for layer in self.layers:
            for linear in (
                layer.q_proj,
                layer.k_proj,
                layer.v_proj,
                layer.o_proj,
                layer.gate_proj,
                layer.up_proj,
                layer.down_proj,
            ):
                yield linear.weight
        yield self.embedding
        if self.lm_head is not self.embedding:
            yield self.lm_head
