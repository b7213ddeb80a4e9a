"""A model made by hand in which exactly one KV head does induction, so that what finds retrieval heads can be judged.

Hidden dimensions 0..15 hold the token, 16..31 the token before it, 32..47 what the induction head found. Layer 0,
query head 0 looks one token back, by position alone, and writes that token to 16..31: a streaming head. Layer 1,
query head 3 looks for the place whose previous token is the current one and writes the token there: the retrieval
head, of KV head 1. All other heads look everywhere alike and write nothing.
"""

import torch
from torch import Tensor

from duolocal.models.config import ModelConfig
from duolocal.models.weights import LayerWeights, ModelWeights
from duolocal.quant.weight import DenseWeight, Linear
from tests.tiny import tiny_config

RETRIEVAL = (1, 1)  # layer, KV head
_SIZE = 16  # of a token
_SLOW = [*range(8, 16), *range(24, 32)]  # dimensions of a head of 32 that RoPE hardly turns here
_FAST = range(4)  # pairs that it turns by different angles per token


def induction_model(dtype: torch.dtype = torch.float64) -> tuple[ModelConfig, ModelWeights]:
    """Return the config and weights described above."""
    config = tiny_config(
        "qwen2", num_layers=2, head_dim=32, norm_eps=1e-8, rope_theta=1e12, max_positions=4096, tie=True
    )
    inv_freq = config.rope_theta ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    tokens = torch.randn(config.vocab_size, _SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    embedding = torch.zeros(config.vocab_size, config.hidden_size, dtype=torch.float64)
    embedding[:, :_SIZE] = tokens / tokens.norm(dim=1, keepdim=True)

    back = _empty(config)
    for pair in _FAST:  # q · k is the sum of cos(inv_freq · (i - j - 1)): largest one token back
        back["q_bias"][pair], back["q_bias"][pair + 16] = inv_freq[pair].cos() * 300, -inv_freq[pair].sin() * 300
        back["k_bias"][pair] = 1.0
    back["v"][:_SIZE, :_SIZE] = torch.eye(_SIZE) / 8  # the norm makes a lone token of length 1 one of length 8
    back["o"][_SIZE : 2 * _SIZE, :_SIZE] = torch.eye(_SIZE)

    look_up = _empty(config)
    query_head, kv_head = 3, 1
    for token, dim in enumerate(_SLOW):
        look_up["q"][query_head * 32 + dim, token] = 8.0
        look_up["k"][kv_head * 32 + dim, _SIZE + token] = 1.0
        look_up["v"][kv_head * 32 + token, token] = 1.0
        look_up["o"][2 * _SIZE + token, query_head * 32 + token] = 1.0
    layers = tuple(_layer(config, parts, dtype) for parts in (back, look_up))
    matrix = DenseWeight(embedding.to(dtype))
    norm = torch.ones(config.hidden_size, dtype=dtype)
    return config, ModelWeights(embedding=matrix, layers=layers, norm=norm, lm_head=matrix)


def _empty(config: ModelConfig) -> dict[str, Tensor]:
    q_size, kv_size, hidden = config.num_heads * 32, config.num_kv_heads * 32, config.hidden_size
    shapes = {"q": (q_size, hidden), "k": (kv_size, hidden), "v": (kv_size, hidden), "o": (hidden, q_size)}
    matrices = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    biases = {"q_bias": q_size, "k_bias": kv_size, "v_bias": kv_size}
    return matrices | {name: torch.zeros(size, dtype=torch.float64) for name, size in biases.items()}


def _layer(config: ModelConfig, parts: dict[str, Tensor], dtype: torch.dtype) -> LayerWeights:
    hidden, inner = config.hidden_size, config.intermediate_size

    def linear(name: str) -> Linear:
        bias = parts.get(f"{name}_bias")
        return Linear(DenseWeight(parts[name].to(dtype)), None if bias is None else bias.to(dtype))

    def nothing(out_features: int, in_features: int) -> Linear:
        return Linear(DenseWeight(torch.zeros(out_features, in_features, dtype=dtype)))

    return LayerWeights(
        attention_norm=torch.ones(hidden, dtype=dtype),
        q_proj=linear("q"),
        k_proj=linear("k"),
        v_proj=linear("v"),
        o_proj=linear("o"),
        mlp_norm=torch.ones(hidden, dtype=dtype),
        gate_proj=nothing(inner, hidden),
        up_proj=nothing(inner, hidden),
        down_proj=nothing(hidden, inner),
    )
