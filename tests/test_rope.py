"""RoPE frequencies against transformers' own, angles against exact arithmetic, contexts beyond training."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any, cast

import pytest
import torch

from duolocal.errors import ConfigError, SettingsError
from duolocal.models.config import ModelConfig, RopeKind, RopeScaling
from duolocal.models.rope import RotaryAngles, describe, extended, parse_rope_scaling, rope_frequencies
from tests.tiny import tiny_config, wide_transformers

CPU = torch.device("cpu")
TRAINED = 8192

# name -> (config.json's rope_parameters, RopeScaling)
SCALINGS: dict[str, tuple[dict[str, Any], RopeScaling]] = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, RopeScaling(kind="linear", factor=4.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, RopeScaling(kind="dynamic", factor=2.0)),
    "dynamic-1": ({"rope_type": "dynamic", "factor": 1.0}, RopeScaling(kind="dynamic", factor=1.0)),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        RopeScaling(kind="yarn", factor=4.0, original_max_positions=2048),
    ),
    "yarn-default-original": (
        {"rope_type": "yarn", "factor": 2.5},
        RopeScaling(kind="yarn", factor=2.5),
    ),
    "yarn-smooth": (
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 512,
            "truncate": False,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
        },
        RopeScaling(
            kind="yarn",
            factor=16.0,
            original_max_positions=512,
            truncate=False,
            beta_fast=20.0,
            beta_slow=2.0,
        ),
    ),
    "yarn-mscale": (
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 0.707,
            "mscale_all_dim": 1.3,
        },
        RopeScaling(kind="yarn", factor=40.0, original_max_positions=4096, mscale=0.707, mscale_all_dim=1.3),
    ),
    "yarn-mscale-alone": (  # has no effect without mscale_all_dim
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "mscale": 0.707},
        RopeScaling(kind="yarn", factor=4.0, original_max_positions=2048, mscale=0.707),
    ),
    "yarn-ramp-past-the-end": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1_000_000},
        RopeScaling(kind="yarn", factor=4.0, original_max_positions=1_000_000),
    ),
    "yarn-step": (  # no pair makes a turn: both ends of the ramp are 0
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
        RopeScaling(kind="yarn", factor=4.0, original_max_positions=4),
    ),
    "yarn-attention-factor": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
            "attention_factor": 1.5,
        },
        RopeScaling(kind="yarn", factor=4.0, original_max_positions=2048, attention_factor=1.5),
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 1024,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        RopeScaling(kind="llama3", factor=8.0, original_max_positions=1024),
    ),
    "llama3-32": (
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "low_freq_factor": 1.5,
            "high_freq_factor": 6.0,
        },
        RopeScaling(kind="llama3", factor=32.0, original_max_positions=4096, low_freq_factor=1.5, high_freq_factor=6.0),
    ),
}


@pytest.mark.parametrize("context", [100, TRAINED, 50_000])
@pytest.mark.parametrize(("head_dim", "theta"), [(16, 10_000.0), (64, 100_000.0), (128, 500_000.0)])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str, head_dim: int, theta: float, context: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, scaling = SCALINGS[name]
    theirs = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_theta": theta, **parameters},
    )
    with wide_transformers():
        wanted, wanted_scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, CPU, seq_len=context)
    ours = tiny_config(head_dim=head_dim, max_positions=TRAINED, rope_theta=theta, rope_scaling=scaling)
    inv_freq, scale = rope_frequencies(ours, context)
    assert inv_freq.dtype == torch.float64
    # Float64 on both sides; ln(theta) * 2^-53 is what a rounded exponent costs.
    torch.testing.assert_close(inv_freq, wanted.double(), rtol=1e-14, atol=0)
    assert scale == pytest.approx(wanted_scale, rel=1e-15)


def test_unscaled_frequencies_are_the_powers_of_theta() -> None:
    inv_freq, scale = rope_frequencies(tiny_config(head_dim=8, rope_theta=10_000.0), 100)
    torch.testing.assert_close(inv_freq, torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64), rtol=1e-15, atol=0)
    assert scale == 1.0


def test_frequency_factors_divide() -> None:
    config = tiny_config(head_dim=8, rope_theta=10_000.0, rope_freq_factors=(1.0, 2.0, 4.0, 8.0))
    wanted = torch.tensor([1, 0.05, 0.0025, 0.000125], dtype=torch.float64)
    torch.testing.assert_close(rope_frequencies(config, 100)[0], wanted, rtol=1e-15, atol=0)
    with pytest.raises(ConfigError, match="3 RoPE frequency factors for head_dim 8: wanted 4"):
        rope_frequencies(replace(config, rope_freq_factors=(1.0, 2.0, 4.0)), 100)


def test_dynamic_stretch_slows_the_slowest_pair_by_context_over_trained() -> None:
    plain = rope_frequencies(scaled("none"), 0)[0]
    stretched = rope_frequencies(scaled("dynamic"), 4 * TRAINED)[0]
    assert (plain / stretched)[0].item() == 1.0
    assert (plain / stretched)[-1].item() == pytest.approx(4.0, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 15}, "head_dim is 15"),
        ({"rope_scaling": RopeScaling(kind="linear", factor=0.0)}, "factor is 0.0"),
        ({"rope_scaling": RopeScaling(kind="linear", factor=math.nan)}, "factor is nan"),
        ({"rope_scaling": RopeScaling(kind=cast(Any, "longrope"))}, "'longrope': wanted one of none, linear"),
        ({"rope_scaling": RopeScaling(kind="llama3", low_freq_factor=4.0)}, "must be above low_freq_factor"),
        ({"head_dim": 2, "rope_scaling": RopeScaling(kind="dynamic")}, "head_dim is 2"),
    ],
)
def test_settings_without_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rope_frequencies(tiny_config(**changes), 100)


def test_angles_stay_exact_at_millions_of_positions() -> None:
    config = tiny_config(head_dim=16, rope_theta=500_000.0)
    positions = [0, 1, 8191, 1_000_003, 7_999_999]
    angles = RotaryAngles(config, 8_000_000, device=CPU, dtype=torch.float64)
    cos, sin = angles(torch.tensor(positions))
    # The reference reduces position * frequency modulo 2 pi in rational arithmetic, pi to 50 digits.
    turn = 2 * Fraction(31415926535897932384626433832795028841971693993751, 10**49)
    for row, position in enumerate(positions):
        for pair, frequency in enumerate(angles.inv_freq.tolist()):
            angle = float(Fraction(position) * Fraction(frequency) % turn)
            # One rounding of the product: half a unit in the last place of the angle.
            limit = 2**-53 * max(1.0, position * frequency) + 1e-15
            assert cos[row, pair].item() == pytest.approx(math.cos(angle), abs=limit)
            assert sin[row, pair].item() == pytest.approx(math.sin(angle), abs=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_angles_are_rounded_once_into_the_compute_dtype(dtype: torch.dtype) -> None:
    config = replace(scaled("none"), rope_scaling=SCALINGS["yarn-attention-factor"][1])
    positions = torch.tensor([3, 3_999_999])
    exact = RotaryAngles(config, 4_000_000, device=CPU, dtype=torch.float64)(positions)
    rounded = RotaryAngles(config, 4_000_000, device=CPU, dtype=dtype)(positions)
    for wide, narrow in zip(exact, rounded, strict=True):
        assert narrow.dtype == dtype
        assert torch.equal(wide.to(dtype), narrow)
    assert (exact[0] ** 2 + exact[1] ** 2).sqrt().flatten().tolist() == pytest.approx([1.5] * 16)


def scaled(text: str, **changes: Any) -> ModelConfig:
    config = tiny_config(head_dim=16, max_positions=TRAINED, **changes)
    return replace(config, rope_scaling=parse_rope_scaling(text, config))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("none", RopeScaling()),
        ("linear:4", RopeScaling(kind="linear", factor=4.0, original_max_positions=TRAINED)),
        ("dynamic", RopeScaling(kind="dynamic", factor=1.0)),
        ("dynamic:4", RopeScaling(kind="dynamic", factor=4.0)),
        (" YaRN:2.5 ", RopeScaling(kind="yarn", factor=2.5, original_max_positions=TRAINED)),
    ],
)
def test_scaling_is_parsed(text: str, wanted: RopeScaling) -> None:
    assert scaled(text).rope_scaling == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yarn",
        "linear",
        "linear:",
        "dynamic:",
        "none:4",
        "longrope:4",
        "yarn:x",
        "yarn:0.5",
        "yarn:inf",
        "yarn:nan",
    ],
)
def test_unusable_scaling_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(SettingsError, match="RoPE scaling") as caught:
        parse_rope_scaling(text, tiny_config())
    assert "\n" not in str(caught.value)


def test_an_override_starts_from_the_pretrained_length() -> None:
    llama3 = tiny_config(
        max_positions=131072, rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_positions=8192)
    )
    assert parse_rope_scaling("yarn:16", llama3).original_max_positions == 8192
    with pytest.raises(SettingsError, match="cannot replace this model's llama3 scaling from 8192 tokens"):
        parse_rope_scaling("dynamic", llama3)
    with pytest.raises(SettingsError, match="frequency factors of its own"):
        parse_rope_scaling("none", tiny_config(rope_freq_factors=(1.0,) * 8))


def test_a_context_within_reach_changes_nothing_and_says_nothing() -> None:
    config = tiny_config(max_positions=TRAINED)
    assert extended(config, TRAINED) == (config, None)
    # Qwen2.5's way: max_position_embeddings stays at the original length.
    yarn = tiny_config(
        max_positions=32768, rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_positions=32768)
    )
    assert extended(yarn, 131072) == (yarn, None)


def test_a_context_beyond_training_is_extended_and_said() -> None:
    config, line = extended(tiny_config(max_positions=TRAINED), 4 * TRAINED)
    assert line == (
        "context 32768 is beyond the 8192 tokens this model was trained for: "
        "RoPE scaling dynamic factor 4.0 applied; quality past 8192 is not assured"
    )
    assert config.rope_scaling.kind == "dynamic"
    plain = rope_frequencies(tiny_config(max_positions=TRAINED), 0)[0]
    slowest = (plain / rope_frequencies(config, 4 * TRAINED)[0])[-1].item()
    assert slowest == pytest.approx(4.0)  # what is said is what is done


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_other_default_extensions_reach_the_context(kind: RopeKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duolocal.models.rope.DEFAULT_EXTENSION", kind)
    config, line = extended(tiny_config(max_positions=TRAINED), 4 * TRAINED)
    assert config.rope_scaling == RopeScaling(kind=kind, factor=4.0, original_max_positions=TRAINED)
    assert line is not None
    assert f"RoPE scaling {kind} factor 4.0 applied" in line
    assert extended(config, 4 * TRAINED) == (config, None)


def test_a_scaling_of_the_file_is_kept_and_its_end_is_said() -> None:
    llama3 = tiny_config(
        max_positions=131072, rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_positions=8192)
    )
    assert extended(llama3, 131073) == (
        llama3,
        "context 131073 is beyond the 131072 tokens this model reaches with its RoPE scaling "
        "llama3 factor 8.0; quality past 131072 is not assured",
    )
    dynamic = tiny_config(max_positions=TRAINED, rope_scaling=RopeScaling(kind="dynamic", factor=2.0))
    config, line = extended(dynamic, 4 * TRAINED)
    assert config == dynamic
    assert line is not None
    assert "RoPE scaling dynamic factor 7.0 applied; quality past 8192" in line  # 2 * 4 - (2 - 1)
    factors = tiny_config(max_positions=TRAINED, rope_freq_factors=(1.0,) * 8)
    config, line = extended(factors, TRAINED + 1)
    assert config == factors
    assert line is not None
    assert "reaches with its RoPE scaling by the factors in its file" in line


def test_an_override_is_taken_as_asked() -> None:
    config = tiny_config(max_positions=TRAINED)
    for text in ("linear:4", "dynamic", "dynamic:2", "yarn:4"):
        override = parse_rope_scaling(text, config)
        for context in (TRAINED, 4 * TRAINED, 8 * TRAINED):
            got, line = extended(config, context, override=override)
            assert got.rope_scaling == override
            assert line is not None
            assert describe(got, context) in line
            reach = TRAINED if override.kind == "dynamic" else 4 * TRAINED
            assert ("not assured" in line) == (context > reach)
    off, line = extended(config, TRAINED + 1, override=parse_rope_scaling("none", config))
    assert off == config
    assert line == (
        "context 8193 is beyond the 8192 tokens this model was trained for and RoPE scaling is off as asked; "
        "quality past 8192 is not assured"
    )
    assert extended(config, TRAINED, override=RopeScaling()) == (config, None)
