"""ModelConfig from a config.json as transformers writes it: model_type llama, mistral, qwen2 or qwen3.

Owns the translation of transformers' names, old (`rope_theta` + `rope_scaling`) and new (`rope_parameters`), and the
reviewed list of keys that do not change the computation; any other key is refused. Defaults are those of
transformers' configuration classes.
"""

from collections.abc import Mapping
from typing import Any

from duolocal.errors import ConfigError
from duolocal.models.config import ModelConfig, Reader, RopeScaling, check_config, label, shown
from duolocal.quant.awq import AWQSettings

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")

# Training, bookkeeping, output format and choice of implementation: no effect on the logits of a forward pass.
_IGNORED = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _flash_attn_2_enabled _from_model_config _name_or_path architectures attention_dropout attn_implementation
    bad_words_ids chunk_size_feed_forward decoder_start_token_id dtype finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hidden_dropout id2label initializer_range is_llama_config
    keys_to_ignore_at_inference label2id max_length max_sequence_length model_max_length num_labels
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type return_dict
    return_dict_in_generate sep_token_id task_specific_params temperature tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version unk_token_id unsloth_fixed unsloth_tracked_version
    unsloth_version use_cache use_return_dict repetition_penalty length_penalty do_sample num_beams min_length
    typical_p diversity_penalty early_stopping encoder_no_repeat_ngram_size no_repeat_ngram_size num_beam_groups
    num_return_sequences remove_invalid_values suppress_tokens begin_suppress_tokens
    exponential_decay_length_penalty attention_probs_dropout_prob attn_pdrop auto_map classifier_dropout embd_pdrop
    forced_decoder_ids hidden_dropout_prob ignore_index loss_function loss_type neftune_noise_alpha pad_token
    resid_pdrop summary_first_dropout use_flash_attention use_flash_attention_2 use_flash_attn
    _use_flash_attention_2
    """.split()  # noqa: SIM905  (one word per line would be a page)
)
# Keys that are harmless at these values only.
_ONLY_AT: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (None, 1.0),
    "pretraining_tp": (None, 1),
    "pruned_heads": (None, {}),
    "rope_interleaved": (None, False),
    "tf_legacy_loss": (False,),
    "tie_encoder_decoder": (False,),
    "use_bfloat16": (False,),
    "use_mrope": (None, False),
}
_ROPE_IGNORED = frozenset({"finetuned"})
# Of a quantization_config: how the weights were made or how to run them, not what they are.
_AWQ_IGNORED = frozenset(
    """
    act_group_aware backend batch_size block_name_to_quantize cache_block_outputs damp_percent dataset do_fuse
    exllama_config fuse_max_seq_len max_input_length meta model_seqlen module_name_preceding_first_block
    modules_in_block_to_quantize modules_to_fuse pad_token_id sym tokenizer true_sequential
    """.split()  # noqa: SIM905
)
_AWQ_ONLY_AT = {"desc_act": (False,), "format": ("gemm", "awq"), "checkpoint_format": ("gemm", "awq")}
# transformers' class defaults where the key is absent; llama and any null: num_attention_heads.
_NUM_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}


def config_from_hf(raw: Mapping[str, Any], where: str, *, generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return the ModelConfig of a config.json.

    `where` names the file in errors; `generation` is the generation_config.json beside it, which may list more
    end-of-text ids. Raises ConfigError for another model_type, an impossible value, or a key that would change the
    computation and is not understood.
    """
    read = Reader(raw, where)
    architecture = read.value("model_type")
    if architecture not in SUPPORTED:
        raise ConfigError(
            f"{where}: model_type is {shown(architecture)}; duolocal runs {', '.join(SUPPORTED)}: choose another model"
        )
    if read.value("hidden_act") not in ("silu", None):
        raise read.wrong("hidden_act", "silu, the only activation duolocal has")
    num_heads = read.integer("num_attention_heads")
    if num_heads < 1:
        raise read.wrong("num_attention_heads", "a positive integer")
    hidden_size = read.integer("hidden_size")
    head_dim = read.optional_integer("head_dim")
    if head_dim is None:
        head_dim = 128 if architecture == "qwen3" else hidden_size // num_heads
    max_positions = read.integer("max_position_embeddings")
    num_layers = read.integer("num_hidden_layers")
    attention_bias = read.boolean("attention_bias", False)
    if architecture == "mistral" and attention_bias:
        raise read.wrong("attention_bias", "false (transformers' Mistral has none)")
    if architecture == "qwen2" and not attention_bias and raw.get("attention_bias") is not None:
        raise read.wrong("attention_bias", "true (transformers' Qwen2 always has it)")
    mlp_bias = read.boolean("mlp_bias", False)
    if mlp_bias and architecture != "llama":
        raise read.wrong("mlp_bias", f"false (transformers' {architecture} has none)")
    default_kv_heads = num_heads if "num_key_value_heads" in raw else _NUM_KV_HEADS.get(architecture, num_heads)
    theta, scaling = _rope(read)
    read.value("quantization_config")  # awq_settings reads it
    config = ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=read.integer("num_key_value_heads", default_kv_heads),
        head_dim=head_dim,
        hidden_size=hidden_size,
        intermediate_size=read.integer("intermediate_size"),
        vocab_size=read.integer("vocab_size"),
        max_positions=max_positions,
        norm_eps=read.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=read.boolean("tie_word_embeddings", False),
        qkv_bias=architecture == "qwen2" or attention_bias,
        o_bias=architecture in ("llama", "qwen3") and attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=architecture == "qwen3",
        sliding_window=_sliding_window(read, architecture, num_layers),
        bos_id=read.optional_integer("bos_token_id"),
        eos_ids=_eos_ids(read, generation, where),
    )
    _refuse_unknown(read)
    return check_config(config, where)


def awq_settings(raw: Mapping[str, Any], where: str) -> AWQSettings | None:
    """Return how the weights beside a config.json are quantized, None where they are not.

    Raises ConfigError for every method but AWQ's GEMM layout with 4 bits and zero points.
    """
    quantization = raw.get("quantization_config")
    if quantization is None:
        return None
    where = f"{where}: quantization_config"
    if not isinstance(quantization, dict):
        raise ConfigError(f"{where} is {shown(quantization)}, wanted an object; the file is damaged")
    read = Reader(quantization, where)
    advice = "choose an AWQ (gemm, 4 bit), GGUF or unquantized file of this model"
    for key, wanted, default in (
        ("quant_method", "awq", None),
        ("version", "gemm", "gemm"),
        ("bits", 4, 4),
        ("zero_point", True, True),
    ):
        value = read.value(key)
        value = default if value is None else value
        value = value.lower() if isinstance(value, str) else value
        if type(value) is not type(wanted) or value != wanted:
            raise ConfigError(f"{where}.{key} is {shown(value)}, which duolocal does not read; {advice}")
    group_size = read.integer("group_size", 128)
    if group_size != -1 and group_size < 1:
        raise read.wrong("group_size", "a positive integer, or -1 for whole rows")
    modules = read.value("modules_to_not_convert") or []
    if not isinstance(modules, list) or not all(isinstance(name, str) and name for name in modules):
        raise read.wrong("modules_to_not_convert", "a list of module names or null")
    for key in read.unread():
        value = quantization[key]
        if value is None or key in _AWQ_IGNORED or value in _AWQ_ONLY_AT.get(key, ()):
            continue
        raise ConfigError(f"{where}.{label(key)} is {shown(value)}, which duolocal does not know; {advice}")
    return AWQSettings(group_size=group_size, dense_modules=tuple(modules))


def _rope(read: Reader) -> tuple[float, RopeScaling]:
    """Return theta and scaling from `rope_parameters`, or from `rope_theta` and `rope_scaling`."""
    new, old = read.value("rope_parameters"), read.value("rope_scaling")
    theta = read.number("rope_theta", 10000.0)
    own_original = read.optional_integer("original_max_position_embeddings")
    key = "rope_scaling" if new is None else "rope_parameters"
    values = old if new is None else new
    if new is not None and old is not None and new != old:
        raise read.wrong("rope_scaling", "absent or the same as rope_parameters")
    if values is None:
        if own_original is not None:
            raise read.wrong("original_max_position_embeddings", "absent where RoPE is not scaled")
        return theta, RopeScaling()
    if not isinstance(values, dict):
        raise read.wrong(key, "an object or null")
    inner = Reader(values, f"{read.where}: {key}")
    theta = inner.number("rope_theta", theta)
    if inner.number("partial_rotary_factor", 1.0) != 1:
        raise inner.wrong("partial_rotary_factor", "1 (partial RoPE is not supported)")
    scaling = _scaling(inner, read.integer("max_position_embeddings"), own_original)
    for name in inner.unread():
        if name not in _ROPE_IGNORED and values[name] is not None:
            raise ConfigError(
                f"{inner.where}.{label(name)} is {shown(values[name])}: it would change the computation in a way "
                "duolocal does not know; choose another model"
            )
    return theta, scaling


def _scaling(inner: Reader, max_positions: int, own_original: int | None) -> RopeScaling:
    old_kind, kind = inner.value("type"), inner.value("rope_type")
    kind = (old_kind if kind is None else kind) or "default"
    if kind == "default":
        inner.optional_number("factor")  # without a kind it has no effect
        return RopeScaling()
    if kind not in ("linear", "dynamic", "yarn", "llama3"):
        raise ConfigError(
            f"{inner.where}.rope_type is {shown(kind)}; duolocal knows default, linear, dynamic, yarn and llama3: "
            "choose another model"
        )
    factor = inner.number("factor")
    # Not used by linear and dynamic (nor by transformers there), but often present.
    original = inner.optional_integer("original_max_position_embeddings")
    original = own_original or original or max_positions
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind == "dynamic":
        return RopeScaling(kind="dynamic", factor=factor)
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=factor,
            original_max_positions=original,
            low_freq_factor=inner.number("low_freq_factor"),
            high_freq_factor=inner.number("high_freq_factor"),
        )
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=inner.number("beta_fast", 32.0),
        beta_slow=inner.number("beta_slow", 1.0),
        attention_factor=inner.optional_number("attention_factor"),
        mscale=inner.optional_number("mscale"),
        mscale_all_dim=inner.optional_number("mscale_all_dim"),
        truncate=inner.boolean("truncate", True),
    )


def _sliding_window(read: Reader, architecture: str, num_layers: int) -> int | None:
    """Return the window, in tokens, of the layers that have one; None where every layer sees everything."""
    layer_types = read.value("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or not all(kind in ("full_attention", "sliding_attention") for kind in layer_types)
    ):
        raise read.wrong("layer_types", f"a list of {num_layers} times full_attention or sliding_attention")
    window = read.optional_integer("sliding_window")
    if architecture == "llama":
        if layer_types is not None and "sliding_attention" in layer_types:
            raise read.wrong("layer_types", "full_attention only (transformers' Llama has no window)")
        if window is not None:
            raise read.wrong("sliding_window", "null (transformers' Llama has no window)")
        return None
    if architecture == "mistral":
        return window if "sliding_window" in read.raw else 4096
    use = read.boolean("use_sliding_window", False)
    first = read.integer("max_window_layers", 28)
    if not use:
        if layer_types is not None and "sliding_attention" in layer_types:
            raise read.wrong("use_sliding_window", "true, as layer_types has sliding_attention")
        return None
    window = window if "sliding_window" in read.raw else 4096
    slides = first < num_layers if layer_types is None else "sliding_attention" in layer_types
    return window if slides else None


def _eos_ids(read: Reader, generation: Mapping[str, Any] | None, where: str) -> tuple[int, ...]:
    """Return the ids that end an answer, each once: those of config.json, then those of generation_config.json."""
    found: list[int] = []
    sources = [read] if generation is None else [read, Reader(generation, f"{where} (generation_config.json)")]
    for source in sources:
        value = source.value("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise source.wrong("eos_token_id", "an integer, a list of integers or null")
        found.extend(ids)
    return tuple(dict.fromkeys(found))


def _refuse_unknown(read: Reader) -> None:
    for key in read.unread():
        value = read.raw[key]
        if value is None or key in _IGNORED or (key in _ONLY_AT and value in _ONLY_AT[key]):
            continue
        raise ConfigError(
            f"{read.where}: {label(key)} is {shown(value)}: it would change the computation in a way duolocal does not "
            "know; choose another model, or remove the key if you are sure that it has no effect"
        )
