"""What the loader tests share: every matrix and vector of a loaded model under its transformers name."""

from typing import Any

import torch
from torch import Tensor

from duolocal.models.weights import ModelWeights
from duolocal.quant.weight import Linear

LINEARS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
_NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


def loaded_state(weights: ModelWeights, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return all tensors under transformers' names, matrices dequantized to `dtype`, vectors as they are."""
    state = {
        "model.embed_tokens.weight": weights.embedding.dequantize(dtype),
        "model.norm.weight": weights.norm,
        "lm_head.weight": weights.lm_head.dequantize(dtype),
    }
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        for field, name in LINEARS.items():
            linear: Linear = getattr(layer, field)
            state[f"{prefix}.{name}.weight"] = linear.weight.dequantize(dtype)
            if linear.bias is not None:
                state[f"{prefix}.{name}.bias"] = linear.bias
        for field, name in _NORMS.items():
            norm = getattr(layer, field)
            if norm is not None:
                state[f"{prefix}.{name}.weight"] = norm
    return state


def assert_same_state(found: dict[str, Tensor], model: Any) -> None:
    """Assert that `found` is exactly transformers' own state, name by name."""
    wanted = model.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
