"""ModelConfig as JSON and back, for the native format: every field under its own name, nothing left to a default.

Reading is strict: a field that is missing, unknown, or of another type is refused, so that a file of a later version
is never half understood.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, get_args

from duolocal.errors import ConfigError
from duolocal.models.config import ModelConfig, Reader, RopeKind, RopeScaling, check_config, label

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_MAX_LIST = 1 << 12  # eos ids, RoPE factors


def config_as_json(config: ModelConfig) -> dict[str, Any]:
    """Return `config` as an object that `config_from_json` reads back unchanged."""
    return asdict(config)


def config_from_json(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the ModelConfig in `raw`; raise ConfigError naming `where` for anything but exactly its fields."""
    read = Reader(raw, where)
    _check_fields(ModelConfig, read)
    architecture = read.value("architecture")
    if architecture not in ARCHITECTURES:
        raise read.wrong("architecture", f"one of {', '.join(ARCHITECTURES)}")
    config = ModelConfig(
        architecture=architecture,
        num_layers=read.integer("num_layers"),
        num_heads=read.integer("num_heads"),
        num_kv_heads=read.integer("num_kv_heads"),
        head_dim=read.integer("head_dim"),
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        vocab_size=read.integer("vocab_size"),
        max_positions=read.integer("max_positions"),
        norm_eps=read.number("norm_eps"),
        rope_theta=read.number("rope_theta"),
        rope_scaling=_rope(read),
        tie_embeddings=_flag(read, "tie_embeddings"),
        qkv_bias=_flag(read, "qkv_bias"),
        o_bias=_flag(read, "o_bias"),
        mlp_bias=_flag(read, "mlp_bias"),
        qk_norm=_flag(read, "qk_norm"),
        sliding_window=read.optional_integer("sliding_window"),
        bos_id=read.optional_integer("bos_id"),
        eos_ids=_integers(read, "eos_ids"),
        rope_freq_factors=_numbers(read, "rope_freq_factors"),
    )
    return check_config(config, where)


def _rope(read: Reader) -> RopeScaling:
    value = read.value("rope_scaling")
    if not isinstance(value, dict):
        raise read.wrong("rope_scaling", "an object")
    inner = Reader(value, f"{read.where}: rope_scaling")
    _check_fields(RopeScaling, inner)
    kind = inner.value("kind")
    if kind not in get_args(RopeKind):
        raise inner.wrong("kind", f"one of {', '.join(get_args(RopeKind))}")
    return RopeScaling(
        kind=kind,
        factor=inner.number("factor"),
        original_max_positions=inner.optional_integer("original_max_positions"),
        beta_fast=inner.number("beta_fast"),
        beta_slow=inner.number("beta_slow"),
        attention_factor=inner.optional_number("attention_factor"),
        mscale=inner.optional_number("mscale"),
        mscale_all_dim=inner.optional_number("mscale_all_dim"),
        truncate=_flag(inner, "truncate"),
        low_freq_factor=inner.number("low_freq_factor"),
        high_freq_factor=inner.number("high_freq_factor"),
    )


def _check_fields(kind: type, read: Reader) -> None:
    names = [field.name for field in fields(kind)]
    for name in names:
        if name not in read.raw:
            raise ConfigError(f"{read.where}: {name} is missing; convert the model again")
    for name in read.raw:
        if name not in names:
            raise ConfigError(
                f"{read.where}: {label(name)} is unknown: written by a newer duolocal? Convert the model again"
            )


def _flag(read: Reader, key: str) -> bool:
    if not isinstance(read.value(key), bool):
        raise read.wrong(key, "true or false")
    return read.boolean(key, False)


def _items(read: Reader, key: str) -> list[Any]:
    value = read.value(key)
    if not isinstance(value, list) or len(value) > _MAX_LIST:
        raise read.wrong(key, f"a list of at most {_MAX_LIST} numbers")
    return value


def _integers(read: Reader, key: str) -> tuple[int, ...]:
    items = _items(read, key)
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise read.wrong(key, "a list of integers")
    return tuple(items)


def _numbers(read: Reader, key: str) -> tuple[float, ...] | None:
    if read.value(key) is None:
        return None
    items = _items(read, key)
    if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in items):
        raise read.wrong(key, "a list of numbers, or null")
    return tuple(float(item) for item in items)
