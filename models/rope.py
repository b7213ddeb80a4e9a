"""RoPE: frequencies for every kind of scaling, angles for absolute positions, and contexts beyond training.

Owns the frequencies and the choice of a scaling; does not rotate anything (`duolocal.kernels.pointwise`) and
does not read files (`duolocal.models.config`). The formulas are those of transformers 5; here they are taken
in float64, and an angle is the float64 product of position and frequency, so that positions of many millions
are as exact as the first.

Linear: position interpolation, arXiv 2306.15595. Dynamic: NTK-aware scaling of the base. YaRN: arXiv
2309.00071. llama3: the smoothed interpolation of Llama 3.1, arXiv 2407.21783.
"""

import math
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from duolocal.errors import ConfigError, SettingsError
from duolocal.models.config import ModelConfig, RopeKind, RopeScaling

DEFAULT_EXTENSION: RopeKind = "dynamic"  # what `extended` applies to a model that brings no scaling of its own
OVERRIDES = "none, linear:FACTOR, dynamic, dynamic:FACTOR or yarn:FACTOR"


def rope_frequencies(config: ModelConfig, context: int) -> tuple[Tensor, float]:
    """Return (inv_freq, attention_scale): radians per token of every pair, and the factor on cos and sin.

    inv_freq is [head_dim/2] float64 on the CPU. `context` is the most tokens that will ever be in context;
    only dynamic NTK depends on it, and takes its base from it ONCE. (transformers takes it anew from the
    running length, so there a prompt cut in two gives other keys than the same prompt in one piece; here
    cutting never changes a result.) Raises ConfigError for settings that have no meaning.
    """
    scaling, dim = config.rope_scaling, config.head_dim
    if dim % 2:
        raise ConfigError(f"head_dim is {dim}: RoPE wants an even number; this model cannot be run")
    if scaling.kind != "none" and not (math.isfinite(scaling.factor) and scaling.factor > 0):
        raise ConfigError(f"RoPE scaling factor is {scaling.factor}: wanted a number above 0")
    attention_scale = 1.0
    if scaling.kind == "none":
        inv_freq = _inverse_frequencies(config.rope_theta, dim)
    elif scaling.kind == "linear":
        inv_freq = _inverse_frequencies(config.rope_theta, dim) / scaling.factor
    elif scaling.kind == "dynamic":
        inv_freq = _inverse_frequencies(_dynamic_theta(config, context), dim)
    elif scaling.kind == "yarn":
        inv_freq = _yarn(config)
        attention_scale = _yarn_attention_scale(scaling)
    elif scaling.kind == "llama3":
        inv_freq = _llama3(config)
    else:
        raise ConfigError(f"RoPE scaling kind is {scaling.kind!r}: wanted one of {', '.join(get_args(RopeKind))}")
    factors = config.rope_freq_factors
    if factors:
        if len(factors) != dim // 2:
            raise ConfigError(f"{len(factors)} RoPE frequency factors for head_dim {dim}: wanted {dim // 2}")
        inv_freq = inv_freq / torch.tensor(factors, dtype=torch.float64)
    return inv_freq, attention_scale


class RotaryAngles:
    """cos and sin for absolute positions, computed for the tokens at hand and kept nowhere.

    There is no table over the context: at a million tokens it would be larger than a layer's streaming cache.
    """

    def __init__(self, config: ModelConfig, context: int, *, device: torch.device, dtype: torch.dtype) -> None:
        inv_freq, self.attention_scale = rope_frequencies(config, context)
        self.inv_freq = inv_freq.to(device)  # [head_dim/2] float64, also where the compute dtype is 16 bits
        self.dtype = dtype

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [num_tokens, head_dim/2] in the compute dtype for `positions` [num_tokens]."""
        angles = positions.to(torch.float64)[:, None] * self.inv_freq  # [num_tokens, head_dim/2]
        cos, sin = angles.cos() * self.attention_scale, angles.sin() * self.attention_scale
        return cos.to(self.dtype), sin.to(self.dtype)


def parse_rope_scaling(text: str, config: ModelConfig) -> RopeScaling:
    """Read a user's choice of scaling: none, linear:FACTOR, dynamic, dynamic:FACTOR or yarn:FACTOR.

    It replaces whatever scaling the model's file asks for. `dynamic` alone stretches the base by
    context / trained tokens; `dynamic:FACTOR` takes transformers' factor. Raises SettingsError.
    """
    if config.rope_freq_factors:
        # What they were made from is not in the file, so there is nothing to go back to.
        raise SettingsError(
            f"RoPE scaling {text!r} cannot be used: this model's file has RoPE frequency factors of its own; "
            "leave the option out"
        )
    kind, colon, number = text.strip().lower().partition(":")
    if kind not in ("none", "linear", "dynamic", "yarn") or (kind == "none" and colon):
        raise SettingsError(f"RoPE scaling {text!r} is unknown: use {OVERRIDES}")
    if kind == "none":
        return RopeScaling()
    if kind == "dynamic" and not colon:
        factor = 1.0
    else:
        try:
            factor = float(number)
        except ValueError:
            raise SettingsError(f"RoPE scaling {text!r} has no factor: use {OVERRIDES}, e.g. {kind}:4") from None
        if not (math.isfinite(factor) and factor >= 1):
            raise SettingsError(f"RoPE scaling factor is {factor:g}: wanted 1 or more, e.g. {kind}:4")
    trained = config.rope_scaling.original_max_positions or config.max_positions
    if kind == "dynamic":
        if trained != config.max_positions:
            # The base would be stretched from max_positions, a length that the model reaches only by the
            # scaling that is being replaced.
            raise SettingsError(
                f"RoPE scaling {text!r} cannot replace this model's {config.rope_scaling.kind} scaling from "
                f"{trained} tokens: use none, linear:FACTOR or yarn:FACTOR"
            )
        return RopeScaling(kind="dynamic", factor=factor)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor, original_max_positions=trained)
    return RopeScaling(kind="yarn", factor=factor, original_max_positions=trained)


def extended(
    config: ModelConfig, context: int, *, override: RopeScaling | None = None
) -> tuple[ModelConfig, str | None]:
    """Return the config to run `context` tokens with, and a line for people where that needs one.

    A model without scaling whose training ends before `context` gets DEFAULT_EXTENSION; a scaling that the
    file asks for stays as it is. `override` (from `parse_rope_scaling`) is taken as it is, "none" included.
    """
    if override is not None:
        config = replace(config, rope_scaling=override)
    scaling, reach = config.rope_scaling, _reach(config)
    beyond = f"context {context} is beyond the {reach} tokens this model "
    doubt = f"quality past {reach} is not assured"
    if context <= reach:
        asked = override is not None and override.kind != "none"
        return config, f"RoPE scaling {describe(config, context)} applied as asked" if asked else None
    if override is not None and override.kind == "none":
        return config, f"{beyond}was trained for and RoPE scaling is off as asked; {doubt}"
    if scaling.kind == "none" and not config.rope_freq_factors:
        config = replace(config, rope_scaling=_default_extension(config.max_positions, context))
        return config, f"{beyond}was trained for: RoPE scaling {describe(config, context)} applied; {doubt}"
    if scaling.kind == "dynamic":
        return config, f"{beyond}was trained for: RoPE scaling {describe(config, context)} applied; {doubt}"
    return config, f"{beyond}reaches with its RoPE scaling {describe(config, context)}; {doubt}"


def describe(config: ModelConfig, context: int) -> str:
    """Name a config's scaling for people: "yarn factor 4.0"; dynamic with what it comes to at `context`."""
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return "by the factors in its file" if config.rope_freq_factors else "none"
    factor = _dynamic_stretch(config, context) if scaling.kind == "dynamic" else scaling.factor
    return f"{scaling.kind} factor {round(factor, 2)}"


def _default_extension(trained: int, context: int) -> RopeScaling:
    if DEFAULT_EXTENSION == "dynamic":
        return RopeScaling(kind="dynamic", factor=1.0)  # at factor 1 the stretch is context / trained
    return RopeScaling(kind=DEFAULT_EXTENSION, factor=context / trained, original_max_positions=trained)


def _reach(config: ModelConfig) -> int:
    """Tokens up to which the model, with its scaling, was meant to work."""
    scaling = config.rope_scaling
    if scaling.kind in ("none", "dynamic") or scaling.original_max_positions is None:
        return config.max_positions
    # Qwen2.5's YaRN leaves max_position_embeddings at the original length; Llama 3.1 names the extended one.
    return max(config.max_positions, int(scaling.original_max_positions * scaling.factor))


def _inverse_frequencies(theta: float, dim: int) -> Tensor:
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)  # [dim/2]


def _dynamic_stretch(config: ModelConfig, context: int) -> float:
    factor, trained = config.rope_scaling.factor, config.max_positions
    return factor * max(context, trained) / trained - (factor - 1)


def _dynamic_theta(config: ModelConfig, context: int) -> float:
    # The slowest pair turns `stretch` times slower, the fastest as before.
    dim = config.head_dim
    if dim <= 2:
        raise ConfigError(f"head_dim is {dim}: dynamic RoPE scaling wants 4 or more; choose another scaling")
    return config.rope_theta * _dynamic_stretch(config, context) ** (dim / (dim - 2))


def _yarn(config: ModelConfig) -> Tensor:
    scaling, dim, theta = config.rope_scaling, config.head_dim, config.rope_theta
    original = scaling.original_max_positions or config.max_positions

    def pair_turning(turns: float) -> float:
        # The pair (as a real number) that makes `turns` full turns over the original context.
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as in transformers: a step instead of a division by zero
    pairs = torch.arange(dim // 2, dtype=torch.float64)
    interpolated = ((pairs - low) / (high - low)).clamp(0, 1)  # 0: as trained, 1: slowed by factor
    inv_freq = _inverse_frequencies(theta, dim)
    return inv_freq * (1 - interpolated) + inv_freq / scaling.factor * interpolated


def _yarn_attention_scale(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def _llama3(config: ModelConfig) -> Tensor:
    scaling = config.rope_scaling
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if high <= low:
        raise ConfigError(f"llama3 RoPE scaling: high_freq_factor {high} must be above low_freq_factor {low}")
    original = scaling.original_max_positions or config.max_positions
    inv_freq = _inverse_frequencies(config.rope_theta, config.head_dim)
    turns = original * inv_freq / (2 * math.pi)  # full turns over the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as trained, 0: slowed by factor
    return (1 - kept) * inv_freq / scaling.factor + kept * inv_freq
