"""ModelConfig from config.json and from GGUF keys: translation, defaults, and refusal of what is not understood."""

import dataclasses
import json
from typing import Any

import pytest

from duolocal.errors import ConfigError
from duolocal.models.config import ModelConfig, RopeScaling, check_config, label, shown
from duolocal.models.gguf_config import config_from_gguf
from duolocal.models.hf_config import awq_settings, config_from_hf
from duolocal.quant.awq import AWQSettings

# As they stand on model hubs (shapes and switches), old and new style.
LLAMA31: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN25: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
MISTRAL: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
WHERE = "here/config.json"


def read(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return config_from_hf(raw | changes, WHERE)


def test_llama_31_in_full():
    assert read(LLAMA31) == ModelConfig(
        architecture="llama",
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        hidden_size=4096,
        intermediate_size=14336,
        vocab_size=128256,
        max_positions=131072,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(
            kind="llama3", factor=8.0, original_max_positions=8192, low_freq_factor=1.0, high_freq_factor=4.0
        ),
        bos_id=128000,
        eos_ids=(128001, 128008, 128009),
    )


def test_qwen_switches():
    config = read(QWEN25)
    assert (config.qkv_bias, config.o_bias, config.qk_norm, config.sliding_window) == (True, False, False, None)
    config = read(QWEN3)
    assert (config.qkv_bias, config.o_bias, config.qk_norm, config.head_dim) == (False, False, True, 128)
    assert config.tie_embeddings
    assert read(QWEN3, head_dim=None).head_dim == 128  # Qwen3's class default, not 1024 / 16
    config = read(QWEN3, attention_bias=True)
    assert (config.qkv_bias, config.o_bias) == (True, True)


def test_llama_biases():
    config = read(LLAMA31, attention_bias=True, mlp_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)


def test_defaults_are_those_of_transformers():
    bare = {
        key: LLAMA31[key]
        for key in (
            "model_type",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_hidden_layers",
            "max_position_embeddings",
            "vocab_size",
        )
    }
    config = config_from_hf(bare, WHERE)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.norm_eps) == (32, 128, 10000.0, 1e-6)
    assert (config.tie_embeddings, config.bos_id, config.eos_ids) == (False, None, ())
    assert config_from_hf(bare | {"model_type": "mistral"}, WHERE).num_kv_heads == 8
    assert config_from_hf(bare | {"model_type": "mistral", "num_key_value_heads": None}, WHERE).num_kv_heads == 32


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_transformers_writes_is_read_whatever_the_defaults(model_type):
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[model_type]
    written = getattr(transformers, f"{name}Config")()
    raw = json.loads(written.to_json_string(use_diff=False))
    config = config_from_hf(raw, WHERE)
    assert config.num_kv_heads == written.num_key_value_heads
    assert config.head_dim == getattr(written, "head_dim", written.hidden_size // written.num_attention_heads)
    assert config.max_positions == written.max_position_embeddings
    assert config.tie_embeddings == written.tie_word_embeddings
    assert config.norm_eps == written.rms_norm_eps
    assert config.sliding_window == (4096 if model_type == "mistral" else None)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (None, RopeScaling()),
        ({"rope_type": "default"}, RopeScaling()),
        ({"type": "linear", "factor": 4}, RopeScaling(kind="linear", factor=4.0)),
        ({"type": "dynamic", "factor": 2.0}, RopeScaling(kind="dynamic", factor=2.0)),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "finetuned": True},
            RopeScaling(kind="yarn", factor=4.0, original_max_positions=4096),
        ),
        ({"rope_type": "yarn", "factor": 4.0}, RopeScaling(kind="yarn", factor=4.0, original_max_positions=131072)),
        (
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 1024,
                "beta_fast": 16,
                "beta_slow": 2,
                "attention_factor": 1.5,
                "mscale": 0.7,
                "mscale_all_dim": 0.5,
                "truncate": False,
            },
            RopeScaling("yarn", 2.0, 1024, 16.0, 2.0, 1.5, 0.7, 0.5, False),
        ),
    ],
)
def test_rope_scaling_old_and_new_style(values, wanted):
    old = read(LLAMA31, rope_scaling=values)
    assert (old.rope_scaling, old.rope_theta) == (wanted, 500000.0)
    raw = {key: value for key, value in LLAMA31.items() if key not in ("rope_scaling", "rope_theta")}
    new = config_from_hf(raw | {"rope_parameters": (values or {}) | {"rope_theta": 7e5}}, WHERE)
    assert (new.rope_scaling, new.rope_theta) == (wanted, 7e5)


def test_yarn_takes_the_top_level_original_length_as_transformers_does():
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}
    config = read(LLAMA31, rope_scaling=scaling, original_max_position_embeddings=2048)
    assert config.rope_scaling.original_max_positions == 2048


@pytest.mark.parametrize(
    ("raw", "changes", "window"),
    [
        (MISTRAL, {}, 4096),
        (MISTRAL, {"sliding_window": None}, None),
        (QWEN25, {"use_sliding_window": True}, None),  # max_window_layers 28 of 28: no layer slides
        (QWEN25, {"use_sliding_window": True, "max_window_layers": 20}, 131072),
        (QWEN25, {"layer_types": ["full_attention"] * 28}, None),
        (QWEN25, {"layer_types": ["full_attention", "sliding_attention"] * 14, "use_sliding_window": True}, 131072),
    ],
)
def test_sliding_window(raw, changes, window):
    assert read(raw, **changes).sliding_window == window


def test_generation_config_adds_ends_of_text():
    config = config_from_hf(QWEN25, WHERE, generation={"eos_token_id": [151645, 151643]})
    assert config.eos_ids == (151645, 151643)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LLAMA31, {"model_type": "gemma"}, "gemma"),
    (LLAMA31, {"model_type": None}, "model_type is None"),
    (LLAMA31, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    (LLAMA31, {"num_key_value_heads": 7}, "num_kv_heads is 7"),
    (LLAMA31, {"num_attention_heads": 0}, "num_attention_heads is 0"),
    (LLAMA31, {"num_attention_heads": "32"}, "num_attention_heads is '32'"),
    (LLAMA31, {"num_hidden_layers": True}, "num_hidden_layers is True"),
    (LLAMA31, {"num_hidden_layers": 10**9}, "num_layers is 1000000000"),
    (LLAMA31, {"hidden_size": -4096, "head_dim": 128}, "hidden_size is -4096"),
    (LLAMA31, {"hidden_size": 10**400}, "hidden_size is 1000"),
    (LLAMA31, {"head_dim": 127}, "head_dim is 127"),
    (LLAMA31, {"vocab_size": None}, "vocab_size is None"),
    (LLAMA31, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    (LLAMA31, {"rms_norm_eps": 0}, "norm_eps is 0.0"),
    (LLAMA31, {"rope_theta": float("inf")}, "rope_theta is inf"),
    (LLAMA31, {"rope_theta": 0.5}, "rope_theta is 0.5"),
    (LLAMA31, {"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    (LLAMA31, {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'"),
    (LLAMA31, {"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    (LLAMA31, {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor is 0.5"),
    (LLAMA31, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mystery": 3}}, "mystery is 3"),
    (LLAMA31, {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
    (LLAMA31, {"rope_scaling": None, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    (LLAMA31, {"rope_parameters": {"rope_type": "default"}}, "rope_scaling is"),
    (LLAMA31, {"sliding_window": 4096}, "sliding_window is 4096"),
    (LLAMA31, {"layer_types": ["full_attention"]}, "layer_types is"),
    (LLAMA31, {"pretraining_tp": 2}, "pretraining_tp is 2"),
    (LLAMA31, {"eos_token_id": ["x"]}, "eos_token_id is ['x']"),
    (LLAMA31, {"attention_multiplier": 0.5}, "attention_multiplier is 0.5"),
    (LLAMA31, {"new\nkey": 1}, "is 1: it would change"),
    (QWEN25, {"dual_chunk_attention_config": {"chunk_size": 1}}, "dual_chunk_attention_config"),
    (QWEN25, {"attention_bias": False}, "attention_bias is False"),
    (QWEN25, {"layer_types": ["sliding_attention"] * 28}, "use_sliding_window"),
    (MISTRAL, {"attention_bias": True}, "attention_bias is True"),
    (MISTRAL, {"sliding_window": 0}, "sliding_window is 0"),
]


@pytest.mark.parametrize(("raw", "changes", "said"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_refused_with_one_line_that_names_file_key_and_value(raw, changes, said):
    with pytest.raises(ConfigError) as caught:
        read(raw, **changes)
    message = str(caught.value)
    assert said in message
    assert WHERE in message
    assert "\n" not in message
    assert len(message) < 400


AWQ = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}


def test_awq_settings():
    assert awq_settings(LLAMA31, WHERE) is None
    assert awq_settings({"quantization_config": AWQ}, WHERE) == AWQSettings(group_size=128)
    more = AWQ | {"version": "GEMM", "modules_to_not_convert": ["lm_head", "mlp.up_proj"], "group_size": -1}
    wanted = AWQSettings(group_size=-1, dense_modules=("lm_head", "mlp.up_proj"))
    assert awq_settings({"quantization_config": more}, WHERE) == wanted
    assert config_from_hf(LLAMA31 | {"quantization_config": AWQ}, WHERE) == read(LLAMA31)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": None}, "quant_method is None"),
        ({"version": "gemv"}, "gemv"),
        ({"bits": 8}, "bits is 8"),
        ({"bits": True}, "bits is True"),
        ({"zero_point": False}, "zero_point is False"),
        ({"group_size": 0}, "group_size is 0"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
        ({"desc_act": True}, "desc_act is True"),
    ],
)
def test_other_quantization_is_refused_with_the_reason(changes, said):
    with pytest.raises(ConfigError) as caught:
        awq_settings({"quantization_config": AWQ | changes}, WHERE)
    assert said in str(caught.value)
    assert WHERE in str(caught.value)
    with pytest.raises(ConfigError, match="wanted an object"):
        awq_settings({"quantization_config": [AWQ]}, WHERE)


GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "any",
    "llama.block_count": 4,
    "llama.context_length": 8192,
    "llama.embedding_length": 512,
    "llama.feed_forward_length": 1024,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 64,
    "llama.vocab_size": 1000,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 7,
}


def read_gguf(changes: dict[str, Any], **more: Any) -> ModelConfig:
    values = {key: value for key, value in (GGUF | changes).items() if value is not None}
    options: dict[str, Any] = {"vocab_size": 1000, "tensor_names": ["output.weight"]} | more
    return config_from_gguf(values, "a.gguf", **options)


def test_gguf_in_full():
    assert read_gguf({}) == ModelConfig(
        architecture="llama",
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        hidden_size=512,
        intermediate_size=1024,
        vocab_size=1000,
        max_positions=8192,
        norm_eps=1e-5,
        rope_theta=500000.0,
        bos_id=1,
        eos_ids=(2, 7),
    )


def test_gguf_tensors_tell_ties_biases_and_rope_factors():
    names = ["blk.0.attn_q.bias", "blk.0.attn_output.bias"]
    factors = tuple(1.0 + i for i in range(32))
    config = read_gguf({}, tensor_names=names, rope_freq_factors=factors)
    assert (config.tie_embeddings, config.qkv_bias, config.o_bias) == (True, True, True)
    assert config.rope_freq_factors == factors


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"type": "none"}, RopeScaling()),
        ({"type": "linear", "factor": 4.0}, RopeScaling(kind="linear", factor=4.0)),
        ({"factor": 4.0}, RopeScaling(kind="linear", factor=4.0)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 2048, "finetuned": True},
            RopeScaling(kind="yarn", factor=4.0, original_max_positions=2048),
        ),
        (
            {"type": "yarn", "factor": 4.0, "yarn_beta_fast": 16.0, "yarn_ext_factor": 1.0},
            RopeScaling(kind="yarn", factor=4.0, original_max_positions=8192, beta_fast=16.0),
        ),
    ],
)
def test_gguf_rope_scaling(changes, wanted):
    assert read_gguf({f"llama.rope.scaling.{key}": value for key, value in changes.items()}).rope_scaling == wanted


def test_gguf_counts_per_layer_must_agree():
    assert read_gguf({"llama.attention.head_count_kv": [2, 2, 2, 2]}).num_kv_heads == 2
    with pytest.raises(ConfigError, match="the same integer for every layer"):
        read_gguf({"llama.attention.head_count_kv": [2, 2, 2, 4]})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"general.architecture": "gemma2"}, "gemma2"),
        ({"general.architecture": "mistral3"}, "mistral3"),
        ({"general.architecture": None}, "general.architecture is None"),
        ({"llama.block_count": None}, "block_count is missing"),
        ({"llama.attention.head_count": 0}, "attention.head_count is 0"),
        ({"llama.attention.head_count_kv": 3}, "num_kv_heads is 3"),
        ({"llama.attention.value_length": 32}, "attention.value_length is 32"),
        ({"llama.rope.dimension_count": 32}, "rope.dimension_count is 32"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "longrope"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.factor is missing"),
        ({"llama.rope.scaling.attn_factor": 1.2}, "llama.rope.scaling.attn_factor is 1.2"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "layer_norm_rms_epsilon is 'x'"),
    ],
)
def test_gguf_refused_with_one_line(changes, said):
    with pytest.raises(ConfigError) as caught:
        read_gguf(changes)
    message = str(caught.value)
    assert said in message
    assert "a.gguf" in message
    assert "\n" not in message


def test_rope_factors_must_fit_the_head():
    with pytest.raises(ConfigError, match="32 positive numbers"):
        read_gguf({}, rope_freq_factors=(1.0, 2.0))
    with pytest.raises(ConfigError, match="32 positive numbers"):
        read_gguf({}, rope_freq_factors=(0.0,) * 32)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelConfig) if f.type is int])
def test_every_size_is_checked(field):
    good = read_gguf({})
    for value in (0, -1, 1 << 40):
        changes: dict[str, Any] = {field: value}
        with pytest.raises(ConfigError, match=field):
            check_config(dataclasses.replace(good, **changes), "a.gguf")


def test_values_in_messages_stay_short_and_on_one_line():
    deep: list[Any] = []
    for _ in range(50):
        deep = [deep]
    for value in ("x\n" * 10**6, list(range(10**6)), dict.fromkeys(range(10**4), "y" * 100), 10**4000, deep):
        assert len(shown(value)) <= 120
        assert "\n" not in shown(value)
    assert label("a.b") == "a.b"
    assert "\n" not in label("a\nb")
