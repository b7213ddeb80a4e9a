"""The config.json and generation_config.json of a quantized checkpoint, from a model folder or from a GGUF file.

A folder's config is kept as it is, with how the weights are quantized added. A GGUF's is written from ModelConfig in
transformers' terms; what those cannot say is refused before any work.
"""

from dataclasses import replace
from typing import Any

import torch

from duolocal.errors import ConfigError
from duolocal.models.config import ModelConfig, RopeScaling
from duolocal.models.hf_config import config_from_hf
from duolocal.models.loader import ModelSource
from duolocal.models.rope import rope_frequencies
from duolocal.models.safetensors_folder import read_json

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# How Llama 3.1, 3.2 and 3.3 were scaled: a GGUF file holds only the factors that came of it.
_LLAMA3_ORIGINAL = 8192
_LLAMA3_TOLERANCE = 1e-4


def quantization_config(group_size: int) -> dict[str, Any]:
    """Return what tells readers of AutoAWQ checkpoints how the weights are packed."""
    return {
        "bits": 4,
        "group_size": group_size,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }


def checkpoint_config(source: ModelSource, *, group_size: int) -> dict[str, Any]:
    """Return the config.json of the quantized model. Raises ConfigError."""
    if source.kind == "gguf":
        raw = config_to_hf(source.config, str(source.path))
    else:
        raw = read_json(source.path / "config.json")
    # Kernels for this layout compute in float16; readers take the dtype from here, under its old or new name.
    names = [name for name in ("torch_dtype", "dtype") if name in raw] or ["torch_dtype"]
    return {**raw, **dict.fromkeys(names, "float16"), "quantization_config": quantization_config(group_size)}


def generation_config(source: ModelSource) -> dict[str, Any] | None:
    """Return the generation_config.json of the quantized model, None where there is nothing to say."""
    if source.kind != "gguf":
        path = source.path / "generation_config.json"
        return read_json(path) if path.is_file() else None
    found = {"bos_token_id": source.config.bos_id, "eos_token_id": _ids(source.config)}
    return {name: value for name, value in found.items() if value is not None} or None


def config_to_hf(config: ModelConfig, where: str) -> dict[str, Any]:
    """Return `config` as a config.json that transformers reads, and that `config_from_hf` reads back as the same.

    `where` names the file in errors. Raises ConfigError where transformers has no words for it.
    """
    if config.rope_freq_factors is not None:
        config = replace(config, rope_scaling=_llama3_scaling(config, where), rope_freq_factors=None)
    architecture = config.architecture
    if architecture == "llama" and config.sliding_window is not None:
        architecture = "mistral"  # a GGUF file of Mistral 7B calls itself llama
    raw: dict[str, Any] = {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": _ids(config),
    }
    if architecture in ("llama", "qwen3"):
        raw["attention_bias"] = config.qkv_bias
    if architecture == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if architecture == "mistral":
        raw["sliding_window"] = config.sliding_window
    if architecture in ("qwen2", "qwen3"):
        slides = config.sliding_window is not None
        raw |= {"sliding_window": config.sliding_window, "use_sliding_window": slides}
        raw["max_window_layers"] = 0 if slides else config.num_layers
    understood = config_from_hf(raw, where)
    if understood != replace(config, architecture=architecture):
        wrong = [name for name in vars(config) if getattr(understood, name) != getattr(config, name)]
        raise ConfigError(
            f"{where}: {', '.join(wrong) or 'it'} cannot be written in a config.json of {architecture}; "
            "quantize the model's safetensors folder instead"
        )
    return raw


def _ids(config: ModelConfig) -> int | list[int] | None:
    if not config.eos_ids:
        return None
    return config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids)


def _rope(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == "none":
        return None
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.original_max_positions is not None:
        values["original_max_position_embeddings"] = scaling.original_max_positions
    if scaling.kind == "llama3":
        values |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        optional = {name: getattr(scaling, name) for name in ("attention_factor", "mscale", "mscale_all_dim")}
        values |= {name: value for name, value in optional.items() if value is not None}
        values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
    return values


def _llama3_scaling(config: ModelConfig, where: str) -> RopeScaling:
    """Return the scaling whose frequencies a GGUF's factors are, found by trying Llama 3's."""
    assert config.rope_freq_factors is not None
    wanted, _ = rope_frequencies(config, config.max_positions)
    scaling = RopeScaling(kind="llama3", factor=max(config.rope_freq_factors), original_max_positions=_LLAMA3_ORIGINAL)
    found, _ = rope_frequencies(replace(config, rope_scaling=scaling, rope_freq_factors=None), config.max_positions)
    if config.rope_scaling.kind != "none" or not torch.allclose(found, wanted, rtol=_LLAMA3_TOLERANCE, atol=0):
        raise ConfigError(
            f"{where}: its RoPE frequency factors are not those of Llama 3, so config.json cannot say them; "
            "quantize the model's safetensors folder instead"
        )
    return scaling
