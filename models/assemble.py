"""Puts the tensors of a model file together as ModelWeights, one layer after the other.

Owns the list of tensors a ModelConfig asks for (`roles`) and the order of loading. Where a tensor comes from, under
which name and in which bits, is a TensorSource: `gguf_weights.py` or `safetensors_folder.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from duolocal.models.config import ModelConfig
from duolocal.models.weights import LayerWeights, ModelWeights
from duolocal.quant.weight import Linear, Weight


@dataclass(frozen=True)
class Role:
    """One tensor a model needs: `name` is a field of LayerWeights (or ModelWeights) with ".weight" or ".bias"."""

    name: str  # "q_proj.weight", "q_proj.bias", "attention_norm.weight", "embedding.weight" …
    layer: int | None  # None: not of a layer
    shape: tuple[int, ...]  # [out_features, in_features], or [size] of a vector


class TensorSource(Protocol):
    """An opened model file whose tensor table is known to fit `roles(config)`."""

    def weight(self, role: Role, device: torch.device) -> Weight:
        """Return a matrix in the bits of the file on `device`; on the CPU without a copy where possible."""
        ...

    def vector(self, role: Role, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a norm weight or a bias in `dtype` on `device`."""
        ...


def layer_roles(config: ModelConfig, layer: int) -> Iterator[Role]:
    """Yield what layer number `layer` is made of."""
    hidden, q_size = config.hidden_size, config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    projections = (
        ("q_proj", q_size, hidden, config.qkv_bias),
        ("k_proj", kv_size, hidden, config.qkv_bias),
        ("v_proj", kv_size, hidden, config.qkv_bias),
        ("o_proj", hidden, q_size, config.o_bias),
        ("gate_proj", config.intermediate_size, hidden, config.mlp_bias),
        ("up_proj", config.intermediate_size, hidden, config.mlp_bias),
        ("down_proj", hidden, config.intermediate_size, config.mlp_bias),
    )
    for name in ("attention_norm", "mlp_norm"):
        yield Role(f"{name}.weight", layer, (hidden,))
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield Role(f"{name}.weight", layer, (config.head_dim,))
    for name, rows, columns, has_bias in projections:
        yield Role(f"{name}.weight", layer, (rows, columns))
        if has_bias:
            yield Role(f"{name}.bias", layer, (rows,))


def outer_roles(config: ModelConfig) -> Iterator[Role]:
    """Yield what belongs to no layer; the output matrix only where it is not the embedding."""
    yield Role("embedding.weight", None, (config.vocab_size, config.hidden_size))
    yield Role("norm.weight", None, (config.hidden_size,))
    if not config.tie_embeddings:
        yield Role("lm_head.weight", None, (config.vocab_size, config.hidden_size))


def roles(config: ModelConfig) -> Iterator[Role]:
    """Yield every tensor that a model of this config is made of."""
    yield from outer_roles(config)
    for layer in range(config.num_layers):
        yield from layer_roles(config, layer)


def assemble(
    config: ModelConfig,
    source: TensorSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    arrange: Callable[[Weight], Weight] | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> ModelWeights:
    """Load layer by layer; `on_layer` is called with (layers done, layers in all) after each.

    Nothing is dequantized: matrices stay in the bits of the file, unless `arrange` makes of each what the kernels
    prefer; norm weights and biases are `dtype`. Beside a GPU an embedding that is not lm_head stays in host memory, as
    in the file: of it one row per token is read.
    """

    def weight(role: Role) -> Weight:
        found = source.weight(role, device)
        return found if arrange is None else arrange(found)

    layers = []
    for index in range(config.num_layers):
        layers.append(_layer(config, source, weight, index, device, dtype))
        if on_layer is not None:
            on_layer(index + 1, config.num_layers)
    outer = {role.name: role for role in outer_roles(config)}
    role = outer["embedding.weight"]
    on_host = device.type != "cpu" and not config.tie_embeddings
    embedding = source.weight(role, torch.device("cpu")) if on_host else weight(role)
    return ModelWeights(
        embedding=embedding,
        layers=tuple(layers),
        norm=source.vector(outer["norm.weight"], device, dtype),
        lm_head=embedding if config.tie_embeddings else weight(outer["lm_head.weight"]),
    )


def _layer(
    config: ModelConfig,
    source: TensorSource,
    weight: Callable[[Role], Weight],
    index: int,
    device: torch.device,
    dtype: torch.dtype,
) -> LayerWeights:
    found = {role.name: role for role in layer_roles(config, index)}

    def vector(name: str) -> Tensor:
        return source.vector(found[name], device, dtype)

    def linear(name: str) -> Linear:
        bias = f"{name}.bias"
        return Linear(weight(found[f"{name}.weight"]), vector(bias) if bias in found else None)

    return LayerWeights(
        attention_norm=vector("attention_norm.weight"),
        q_proj=linear("q_proj"),
        k_proj=linear("k_proj"),
        v_proj=linear("v_proj"),
        o_proj=linear("o_proj"),
        mlp_norm=vector("mlp_norm.weight"),
        gate_proj=linear("gate_proj"),
        up_proj=linear("up_proj"),
        down_proj=linear("down_proj"),
        q_norm=vector("q_norm.weight") if config.qk_norm else None,
        k_norm=vector("k_norm.weight") if config.qk_norm else None,
    )
