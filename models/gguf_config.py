"""ModelConfig from the key/values of a GGUF file: general.architecture llama, qwen2 or qwen3.

Owns the translation of `llama.*`, `qwen2.*` and `qwen3.*` keys (ggml's docs/gguf.md and llama.cpp's
`llama-arch.cpp`). A GGUF of Mistral 7B calls itself llama. The file reader is `gguf.py`.
"""

from collections.abc import Collection, Mapping
from typing import Any

from duolocal.errors import ConfigError
from duolocal.models.config import ModelConfig, Reader, RopeScaling, check_config, label, shown

ARCHITECTURE = "general.architecture"  # the key that says it
SUPPORTED = ("llama", "qwen2", "qwen3")

# Keys of an architecture that do not change what is computed here.
_IGNORED = frozenset(
    {
        "vocab_size",  # the embedding's shape says it
        "rope.scaling.finetuned",
        "tensor_data_layout",
    }
)
# Keys that are harmless at these values only.
_ONLY_AT: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "pooling_type": (0,),
    "use_parallel_residual": (False,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "logit_scale": (1.0,),
    "residual_scale": (1.0,),
    "embedding_scale": (1.0,),
}


def check_architecture(architecture: object, where: str) -> str:
    """Return the architecture, or raise ConfigError where duolocal does not run it; `where` names the file."""
    if not isinstance(architecture, str) or architecture not in SUPPORTED:
        raise ConfigError(
            f"{where}: {ARCHITECTURE} is {shown(architecture)}; duolocal runs {', '.join(SUPPORTED)} "
            "(Mistral 7B files say llama): choose another model"
        )
    return architecture


def config_from_gguf(
    metadata: Mapping[str, Any],
    where: str,
    *,
    vocab_size: int,
    tensor_names: Collection[str] = (),
    rope_freq_factors: tuple[float, ...] | None = None,
) -> ModelConfig:
    """Return the ModelConfig of a GGUF file.

    `where` names the file in errors. `vocab_size` is the number of rows of token_embd.weight; `tensor_names` tells
    which biases there are and whether the embedding is tied; `rope_freq_factors` is the tensor rope_freqs.weight
    (Llama 3.1). Raises ConfigError for another architecture, a missing or impossible value, or a key that would
    change the computation and is not understood.
    """
    architecture = check_architecture(metadata.get(ARCHITECTURE), where)
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    read = Reader(own, f"{where}: {architecture}.*")
    num_heads = _uniform(read, "attention.head_count")
    hidden_size = read.integer("embedding_length")
    if num_heads is None or num_heads < 1:
        raise read.wrong("attention.head_count", "a positive integer")
    head_dim = read.integer("attention.key_length", hidden_size // num_heads)
    value_length = read.integer("attention.value_length", head_dim)
    if value_length != head_dim:
        raise read.wrong("attention.value_length", f"the key length {head_dim}")
    if read.integer("rope.dimension_count", head_dim) != head_dim:
        raise read.wrong("rope.dimension_count", f"the head size {head_dim} (partial RoPE is not supported)")
    num_kv_heads = _uniform(read, "attention.head_count_kv")
    max_positions = read.integer("context_length")
    names = frozenset(tensor_names)
    config = ModelConfig(
        architecture=architecture,
        num_layers=read.integer("block_count"),
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        intermediate_size=_required(read, "feed_forward_length"),
        vocab_size=vocab_size,
        max_positions=max_positions,
        norm_eps=read.number("attention.layer_norm_rms_epsilon"),
        rope_theta=read.number("rope.freq_base", 10000.0),
        rope_scaling=_rope(read, max_positions),
        tie_embeddings="output.weight" not in names,
        qkv_bias=architecture == "qwen2" or "blk.0.attn_q.bias" in names,
        o_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_gate.bias" in names,
        qk_norm=architecture == "qwen3",
        sliding_window=read.optional_integer("attention.sliding_window") or None,
        bos_id=_token(metadata, "tokenizer.ggml.bos_token_id", where),
        eos_ids=_eos_ids(metadata, where),
        rope_freq_factors=rope_freq_factors,
    )
    _refuse_unknown(read)
    return check_config(config, where)


def _uniform(read: Reader, key: str) -> int | None:
    """Return an integer that some files give once per layer; they must all be the same."""
    value = read.value(key)
    if isinstance(value, list):
        if not value or any(v != value[0] for v in value):
            raise read.wrong(key, "the same integer for every layer")
        value = value[0]
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise read.wrong(key, "an integer")
    return value


def _required(read: Reader, key: str) -> int:
    value = _uniform(read, key)
    if value is None:
        raise read.wrong(key, "an integer")
    return value


def _rope(read: Reader, max_positions: int) -> RopeScaling:
    kind = read.value("rope.scaling.type")
    old_linear = read.optional_number("rope.scale_linear")  # before rope.scaling.* existed
    factor = read.optional_number("rope.scaling.factor")
    original = read.optional_integer("rope.scaling.original_context_length")
    beta_fast = read.number("rope.scaling.yarn_beta_fast", 32.0)
    beta_slow = read.number("rope.scaling.yarn_beta_slow", 1.0)
    if kind is None:
        if old_linear is not None and old_linear != 1:
            return RopeScaling(kind="linear", factor=old_linear)
        if factor is not None and factor != 1:
            return RopeScaling(kind="linear", factor=factor)  # llama.cpp's default for a factor without a type
        return RopeScaling()
    if kind == "none":
        return RopeScaling()
    if factor is None:
        raise read.wrong("rope.scaling.factor", f"a number, as rope.scaling.type is {shown(kind)}")
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind == "yarn":
        return RopeScaling(
            kind="yarn",
            factor=factor,
            original_max_positions=original or max_positions,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
        )
    raise read.wrong("rope.scaling.type", "none, linear or yarn")


def _token(metadata: Mapping[str, Any], key: str, where: str) -> int | None:
    return Reader(metadata, where).optional_integer(key)


def _eos_ids(metadata: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Return the end-of-text and end-of-turn ids, each once, the file's order."""
    found = (_token(metadata, f"tokenizer.ggml.{name}_token_id", where) for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _refuse_unknown(read: Reader) -> None:
    for key in read.unread():
        value = read.raw[key]
        if key in _IGNORED or (key in _ONLY_AT and value in _ONLY_AT[key]):
            continue
        raise ConfigError(
            f"{read.where.removesuffix('.*')}.{label(key)} is {shown(value)}: it would change the computation in a way "
            "duolocal does not know; choose another file of this model, or another model"
        )
