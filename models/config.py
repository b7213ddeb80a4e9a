"""ModelConfig: the one description of a model, whatever file it came from.

Everything that differs between Llama 2/3/3.1, SmolLM2, Mistral, Qwen2/2.5 and Qwen3 is a field. The names of model
hubs are translated in `hf_config.py`, those of GGUF files in `gguf_config.py`, once; a key that would change the
computation and is not understood is refused there, never dropped. This file owns the fields, the ranges they may
have, and the reading of single values.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from duolocal.errors import ConfigError

RopeKind = Literal["none", "linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are changed to reach past the positions a model was pretrained on."""

    kind: RopeKind = "none"
    factor: float = 1.0
    original_max_positions: int | None = None  # tokens; yarn and llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: derived from factor and mscale
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of one Llama-class model."""

    architecture: str  # "llama", "mistral", "qwen2", "qwen3"
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int  # tokens the model was trained (or extended) for
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim on q and k, before RoPE
    sliding_window: int | None = None  # tokens; contexts beyond it are refused
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    rope_freq_factors: tuple[float, ...] | None = None  # [head_dim / 2], GGUF: inverse frequencies are divided by it


# Limits far above any real model: they keep a hostile file from asking for absurd work.
_LIMITS = {
    "num_layers": 4096,
    "num_heads": 1 << 16,
    "num_kv_heads": 1 << 16,
    "head_dim": 1 << 12,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 24,
    "max_positions": 1 << 31,
}


def check_config(config: ModelConfig, where: str) -> ModelConfig:
    """Return `config` if its values fit together; raise ConfigError naming `where`, the field and the value."""

    def wrong(name: str, value: object, wanted: str) -> ConfigError:
        return ConfigError(
            f"{where}: {name} is {shown(value)}, wanted {wanted}; the file is damaged or of another kind of model"
        )

    for name, limit in _LIMITS.items():
        value = getattr(config, name)
        if not 1 <= value <= limit:
            raise wrong(name, value, f"1 to {limit}")
    if config.num_heads % config.num_kv_heads:
        raise wrong("num_kv_heads", config.num_kv_heads, f"a divisor of num_heads = {config.num_heads}")
    if config.head_dim % 2:
        raise wrong("head_dim", config.head_dim, "an even number")
    if not 0 < config.norm_eps < 1:
        raise wrong("norm_eps", config.norm_eps, "a number between 0 and 1")
    if not 1 < config.rope_theta < 1e15:
        raise wrong("rope_theta", config.rope_theta, "a number above 1")
    if config.sliding_window is not None and config.sliding_window < 1:
        raise wrong("sliding_window", config.sliding_window, "a positive number of tokens or null")
    known = range(config.vocab_size)
    config = replace(
        config,
        bos_id=config.bos_id if config.bos_id in known else None,
        eos_ids=tuple(token for token in config.eos_ids if token in known),
    )
    factors = config.rope_freq_factors
    if factors is not None and (
        len(factors) != config.head_dim // 2 or not all(math.isfinite(f) and f > 0 for f in factors)
    ):
        raise wrong("rope_freqs", factors, f"{config.head_dim // 2} positive numbers")
    _check_rope(config.rope_scaling, wrong)
    return config


def stray_ids(ids: Mapping[str, Any], config: ModelConfig) -> tuple[str, ...]:
    """Return a line for people about special ids, by name, outside the vocabulary; `check_config` drops them."""
    every = [(name, token) for name, value in ids.items() for token in (value if isinstance(value, list) else [value])]
    found = [
        f"{name} {token:,}" for name, token in every if isinstance(token, int) and token not in range(config.vocab_size)
    ]
    if not found:
        return ()
    told = ", ".join(found)
    return (
        f"{told}: not in the vocabulary of {config.vocab_size:,} tokens, so what the chat template writes is taken",
    )


def _check_rope(rope: RopeScaling, wrong: Any) -> None:
    if not 1 <= rope.factor <= 1e6:
        raise wrong("the RoPE scaling factor", rope.factor, "a number from 1 on")
    if rope.original_max_positions is not None and not 1 <= rope.original_max_positions <= 1 << 31:
        raise wrong("RoPE original_max_position_embeddings", rope.original_max_positions, "a positive number of tokens")
    if not 0 < rope.beta_slow < rope.beta_fast:
        raise wrong("RoPE beta_fast, beta_slow", (rope.beta_fast, rope.beta_slow), "beta_fast > beta_slow > 0")
    if not 0 < rope.low_freq_factor < rope.high_freq_factor:
        pair = (rope.low_freq_factor, rope.high_freq_factor)
        raise wrong("RoPE low_freq_factor, high_freq_factor", pair, "0 < low_freq_factor < high_freq_factor")
    if rope.attention_factor is not None and rope.attention_factor <= 0:
        raise wrong("RoPE attention_factor", rope.attention_factor, "a positive number")
    for name, value in (("mscale", rope.mscale), ("mscale_all_dim", rope.mscale_all_dim)):
        if value is not None and value < 0:
            raise wrong(f"RoPE {name}", value, "a number from 0 on")


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 70, 70, 40


def shown(value: object) -> str:
    """Return `value` for a one-line message, cut where a hostile file made it long or deep."""
    text = _SHORT.repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def label(key: str) -> str:
    """Return a key or tensor name for a one-line message: as it is, or quoted where it is long or unprintable."""
    return key if key.isprintable() and len(key) <= 80 else shown(key)


class Reader:
    """Reads typed values out of one mapping and remembers which keys were asked for.

    Invariant: `unread()` is exactly the keys nobody asked for, so that what is not understood can be refused.
    """

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where
        self._read: set[str] = set()

    def unread(self) -> list[str]:
        """Return the keys that no method has been asked for, in the order of the file."""
        return [key for key in self.raw if key not in self._read]

    def value(self, key: str) -> Any:
        """Return the value of `key` as it is, None where it is absent."""
        self._read.add(key)
        return self.raw.get(key)

    def wrong(self, key: str, wanted: str) -> ConfigError:
        """Return the error for a `key` whose value is not what was `wanted`."""
        seen = shown(self.raw[key]) if key in self.raw else "missing"
        return ConfigError(
            f"{self.where}: {key} is {seen}, wanted {wanted}; the file is damaged or of another kind of model"
        )

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer; ConfigError where the key is absent and there is no `default`, or of another type."""
        value = self.optional_integer(key)
        if value is None:
            value = default
        if value is None:
            raise self.wrong(key, "an integer")
        return value

    def optional_integer(self, key: str) -> int | None:
        """Return an integer, or None where the key is absent or null."""
        value = self.value(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value.bit_length() > 63):
            raise self.wrong(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite float; ConfigError where the key is absent and there is no `default`."""
        value = self.optional_number(key)
        if value is None:
            value = default
        if value is None:
            raise self.wrong(key, "a number")
        return value

    def optional_number(self, key: str) -> float | None:
        """Return a finite float, or None where the key is absent or null."""
        value = self.value(key)
        if value is None:
            return None
        too_long = isinstance(value, int) and value.bit_length() > 127
        if not isinstance(value, int | float) or isinstance(value, bool) or too_long or not math.isfinite(value):
            raise self.wrong(key, "a number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """Return true or false, `default` where the key is absent or null."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value
