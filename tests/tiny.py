"""Tiny seeded models: random ones made of torch alone, and checkpoints made and saved by transformers.

`random_model` needs no file and no transformers; `save_checkpoint` writes a folder as a model hub serves it
and returns transformers' own model, the oracle of the parity tests. Every bias and norm is random: at their
usual initial values (0 and 1) a test would not notice that they are dropped.
"""

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from duolocal.kernels.interface import Kernels
from duolocal.models.config import ModelConfig, RopeScaling
from duolocal.models.transformer import Transformer
from duolocal.models.weights import LayerWeights, ModelWeights
from duolocal.quant.weight import DenseWeight, Linear

Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "mistral", "qwen2", "qwen3")

TRAINED = 64  # tokens before any scaling
EXTENDED = 256  # max_position_embeddings where yarn or llama3 brought the model further
# As in config.json. With head_dim 16 and theta 10000 every branch is taken: llama3 keeps, blends and slows
# pairs; yarn's ramp covers pairs 0 to 3.
ROPE_VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
}
# The same, translated by hand and not by the loader.
ROPE_SCALINGS: dict[str, RopeScaling] = {
    "none": RopeScaling(),
    "linear": RopeScaling(kind="linear", factor=4.0),
    "dynamic": RopeScaling(kind="dynamic", factor=2.0),
    "yarn": RopeScaling(kind="yarn", factor=4.0, original_max_positions=TRAINED),
    "llama3": RopeScaling(
        kind="llama3", factor=4.0, original_max_positions=TRAINED, low_freq_factor=1.0, high_freq_factor=4.0
    ),
}


def tiny_config(
    architecture: Architecture = "llama", *, rope: str = "none", tie: bool = False, **changes: Any
) -> ModelConfig:
    """Return the ModelConfig of a tiny model; `changes` replaces fields."""
    fields: dict[str, Any] = {
        "architecture": architecture,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32 if architecture == "qwen3" else 16,  # Qwen3: num_heads * head_dim is not hidden_size
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 320,
        "max_positions": EXTENDED if rope in ("yarn", "llama3") else TRAINED,
        "norm_eps": 1e-3,  # large, so that a wrong one shows
        "rope_theta": 10000.0,
        "rope_scaling": ROPE_SCALINGS[rope],
        "tie_embeddings": tie,
        "qkv_bias": architecture == "qwen2",
        "qk_norm": architecture == "qwen3",
        "bos_id": 1,
        "eos_ids": (2,),
    }
    return ModelConfig(**(fields | changes))


def random_model(
    config: ModelConfig | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[ModelConfig, ModelWeights]:
    """Return a config and random dense weights for it, the same for every call with one seed."""
    config = tiny_config() if config is None else config
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float, mean: float = 0.0) -> Tensor:
        return (mean + std * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    def linear(out_features: int, in_features: int, bias: bool) -> Linear:
        # Variance is kept from layer to layer, so that attention is neither uniform nor one-hot.
        weight = DenseWeight(normal(out_features, in_features, std=in_features**-0.5))
        return Linear(weight, normal(out_features, std=0.3) if bias else None)

    def norm(size: int) -> Tensor:
        return normal(size, std=0.2, mean=1.0)

    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    embedding = DenseWeight(normal(config.vocab_size, hidden, std=1.0))
    layers = tuple(
        LayerWeights(
            attention_norm=norm(hidden),
            q_proj=linear(q_size, hidden, config.qkv_bias),
            k_proj=linear(kv_size, hidden, config.qkv_bias),
            v_proj=linear(kv_size, hidden, config.qkv_bias),
            o_proj=linear(hidden, q_size, config.o_bias),
            mlp_norm=norm(hidden),
            gate_proj=linear(inner, hidden, config.mlp_bias),
            up_proj=linear(inner, hidden, config.mlp_bias),
            down_proj=linear(hidden, inner, config.mlp_bias),
            q_norm=norm(config.head_dim) if config.qk_norm else None,
            k_norm=norm(config.head_dim) if config.qk_norm else None,
        )
        for _ in range(config.num_layers)
    )
    head = embedding if config.tie_embeddings else DenseWeight(normal(config.vocab_size, hidden, std=0.125))
    return config, ModelWeights(embedding=embedding, layers=layers, norm=norm(hidden), lm_head=head)


def transformer_of(
    model: tuple[ModelConfig, ModelWeights], *, context: int | None = None, kernels: Kernels | None = None
) -> Transformer:
    """Return the Transformer of a model in the dtype of its norms, on the CPU; context: None for all it reaches."""
    config, weights = model
    return Transformer(
        config,
        weights,
        context=config.max_positions if context is None else context,
        device=torch.device("cpu"),
        dtype=weights.norm.dtype,
        kernels=kernels,
    )


def tensor_bytes() -> int:
    """Return the bytes of all tensors that live."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if issubclass(type(each), Tensor):
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values())


def huggingface_model(
    architecture: Architecture = "llama",
    *,
    rope: str = "none",
    tie: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Any:
    """Return transformers' model with the shapes of `tiny_config`; `changes` go into its config.json.

    It is float32, or float64 inside `wide_transformers`.
    """
    import transformers

    kinds = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    tiny = tiny_config(architecture, rope=rope)
    values: dict[str, Any] = {
        "num_hidden_layers": tiny.num_layers,
        "num_attention_heads": tiny.num_heads,
        "num_key_value_heads": tiny.num_kv_heads,
        "hidden_size": tiny.hidden_size,
        "intermediate_size": tiny.intermediate_size,
        "vocab_size": tiny.vocab_size,
        "max_position_embeddings": tiny.max_positions,
        "rms_norm_eps": tiny.norm_eps,
        "rope_parameters": {"rope_theta": tiny.rope_theta, **ROPE_VARIANTS[rope]},
        "tie_word_embeddings": tie,
        "bos_token_id": tiny.bos_id,
        "eos_token_id": tiny.eos_ids[0],
        "attn_implementation": "eager",
    }
    if architecture == "mistral":
        values["sliding_window"] = None  # transformers' default is 4096
    if architecture != "qwen2":
        values["head_dim"] = tiny.head_dim
    config = getattr(transformers, f"{kinds[architecture]}Config")(**(values | changes))
    model = getattr(transformers, f"{kinds[architecture]}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise * (0.125 if tie else 1.0))
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


class _WideTorch:
    """The torch module, but `float` and `float32` mean float64."""

    float = torch.float64
    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def wide_transformers() -> Iterator[None]:
    """Let transformers' own RoPE, RMSNorm and softmax compute in float64, where they ask for float32.

    Models made and run inside are float64 throughout. What remains between them and us is rounding, so a
    parity test can ask for 1e-12 where plain transformers allows 1e-5.
    """
    from transformers import modeling_rope_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_rope_utils, "torch", _WideTorch())
        for architecture in ARCHITECTURES:
            module = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
            patch.setattr(module, "torch", _WideTorch())
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def save_checkpoint(
    folder: Path,
    architecture: Architecture = "llama",
    *,
    rope: str = "none",
    tie: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Any:
    """Write `huggingface_model(...)` to `folder` as config.json and safetensors; return the model."""
    model = huggingface_model(architecture, rope=rope, tie=tie, seed=seed, **changes)
    model.save_pretrained(folder)
    return model


def weights_of(model: Any, dtype: torch.dtype = torch.float32) -> ModelWeights:
    """Take the weights out of a transformers model, independently of the loaders."""
    state = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}

    def linear(name: str) -> Linear:
        return Linear(DenseWeight(state[f"{name}.weight"]), state.get(f"{name}.bias"))

    layers = []
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        layers.append(
            LayerWeights(
                attention_norm=state[f"{prefix}.input_layernorm.weight"],
                q_proj=linear(f"{prefix}.self_attn.q_proj"),
                k_proj=linear(f"{prefix}.self_attn.k_proj"),
                v_proj=linear(f"{prefix}.self_attn.v_proj"),
                o_proj=linear(f"{prefix}.self_attn.o_proj"),
                mlp_norm=state[f"{prefix}.post_attention_layernorm.weight"],
                gate_proj=linear(f"{prefix}.mlp.gate_proj"),
                up_proj=linear(f"{prefix}.mlp.up_proj"),
                down_proj=linear(f"{prefix}.mlp.down_proj"),
                q_norm=state.get(f"{prefix}.self_attn.q_norm.weight"),
                k_norm=state.get(f"{prefix}.self_attn.k_norm.weight"),
            )
        )
    embedding = DenseWeight(state["model.embed_tokens.weight"])
    tied = bool(model.config.tie_word_embeddings)
    return ModelWeights(
        embedding=embedding,
        layers=tuple(layers),
        norm=state["model.norm.weight"],
        lm_head=embedding if tied else DenseWeight(state["lm_head.weight"]),
    )
