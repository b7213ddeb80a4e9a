"""Folding leaves a model as it is; a quantized layer is what it says; AWQ loses less than plain rounding."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from duolocal.models.config import ModelConfig
from duolocal.models.observe import ObservedCache
from duolocal.models.transformer import Transformer
from duolocal.models.weights import LayerWeights, ModelWeights
from duolocal.quant.awq_search import InputSummary
from duolocal.quant.weight import DenseWeight
from duolocal.quantize.forward import advance, capture, dense_layer
from duolocal.quantize.layer import GROUPS, Parts, QuantizedLayer, fold, load_layer, quantize_layer
from tests.tiny import ARCHITECTURES, Architecture, random_model, tiny_config

GROUP_SIZE = 32
CPU = torch.device("cpu")


def parts_of(layer: LayerWeights, dtype: torch.dtype = torch.float32) -> Parts:
    parts: Parts = {}
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            parts[f"{name}.weight"] = value.to(dtype)
        elif value is not None:
            parts[f"{name}.weight"] = value.weight.dequantize(dtype)
            if value.bias is not None:
                parts[f"{name}.bias"] = value.bias.to(dtype)
    return parts


def run_layer(config: ModelConfig, layer: LayerWeights, x: Tensor) -> Tensor:
    nothing = DenseWeight(torch.empty(0, config.hidden_size, dtype=x.dtype))
    weights = ModelWeights(embedding=nothing, layers=(layer,), norm=layer.attention_norm, lm_head=nothing)
    model = Transformer(replace(config, num_layers=1), weights, context=64, device=CPU, dtype=x.dtype)
    positions = torch.arange(x.shape[0])
    return model.run_layer(0, x, positions, model.rotation(positions), ObservedCache())


def config_of(architecture: Architecture) -> ModelConfig:
    if architecture == "llama":
        return tiny_config("llama", qkv_bias=True, o_bias=True, mlp_bias=True, num_heads=4, num_kv_heads=2)
    return tiny_config(architecture)


def windows(config: ModelConfig, *, count: int = 3, hot: float = 1.0, seed: int = 5) -> list[Tensor]:
    """Return hidden states of which a few channels are `hot` times the others."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(40, config.hidden_size, generator=generator) for _ in range(count)]
    for window in found:
        window[:, [2, 33, 50]] *= hot
    return found


def quantized(config: ModelConfig, parts: Parts, hidden: list[Tensor], *, method: str) -> QuantizedLayer:
    captured: int | dict[str, InputSummary] | None = None
    if method == "awq":
        *_, captured = capture(config, dict(parts), hidden, seed=0)
    inputs = captured if isinstance(captured, dict) else None
    *_, result = quantize_layer(dict(parts), inputs, config, layer=0, group_size=GROUP_SIZE)
    assert isinstance(result, QuantizedLayer)
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_any_scales_changes_nothing_but_rounding(architecture: Architecture):
    config, weights = random_model(config_of(architecture), dtype=torch.float64)
    parts = parts_of(weights.layers[0], torch.float64)
    x = windows(config)[0].double()
    before = run_layer(config, dense_layer(parts), x)
    generator = torch.Generator().manual_seed(1)
    for group in GROUPS:
        size = parts[f"{group.linears[0]}.weight"].shape[1]
        scales = torch.rand(size, generator=generator, dtype=torch.float64) * 3 + 0.2
        if group.before == "v_proj":  # one scale for the query heads of a KV head
            shared = scales.view(config.num_kv_heads, -1, config.head_dim)[:, :1]
            repeats = config.num_heads // config.num_kv_heads
            scales = shared.expand(-1, repeats, -1).reshape(-1)
        old = {name: parts[f"{name}.weight"] for name in (*group.linears, group.before)}
        fold(parts, group, scales, config)
        assert all(not torch.equal(old[name], parts[f"{name}.weight"]) for name in old)
    after = run_layer(config, dense_layer(parts), x)
    assert (after - before).abs().max() < 1e-12 * before.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_captured_is_what_each_linear_reads(architecture: Architecture):
    config, weights = random_model(config_of(architecture))
    parts, hidden = parts_of(weights.layers[0]), windows(config, count=1)
    *steps, inputs = capture(config, parts, hidden, seed=0)
    assert steps == [1] and isinstance(inputs, dict)
    # What comes out of the layer, put together again from what was captured.
    layer = dense_layer(parts)

    def product(name: str, x: Tensor) -> Tensor:
        bias = parts.get(f"{name}.bias")
        return x @ parts[f"{name}.weight"].T + (0 if bias is None else bias)

    x = hidden[0] + product("o_proj", inputs["o"].rows())
    gated = torch.nn.functional.silu(product("gate_proj", inputs["gate_up"].rows()))
    gated = gated * product("up_proj", inputs["gate_up"].rows())
    assert torch.allclose(gated, inputs["down"].rows(), atol=1e-5)
    out = run_layer(config, layer, hidden[0])
    assert torch.allclose(x + product("down_proj", gated), out, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_the_packed_layer_computes_nearly_the_same(architecture: Architecture, method: str):
    config, weights = random_model(config_of(architecture))
    parts, hidden = parts_of(weights.layers[0]), windows(config)
    result = quantized(config, parts, hidden, method=method)
    assert all(tensor.dtype in (torch.int32, torch.float16) for tensor in result.tensors.values())
    loaded = load_layer(result.tensors, config, 0, CPU)
    before = [run_layer(config, dense_layer(parts), x) - x for x in hidden]
    after = [x.clone() for x in hidden]
    assert list(advance(config, loaded, after, device=CPU)) == [1, 2, 3]
    error = sum(float((a - x - b).square().sum()) for a, b, x in zip(after, before, hidden, strict=True))
    assert error < 0.03 * sum(float(b.square().sum()) for b in before)  # 4 bits: about 1% a linear


def hot_parts(architecture: Architecture) -> tuple[ModelConfig, Parts, list[Tensor]]:
    """Return a layer three of whose channels are read at 40 times the others' size, as outliers in real models are."""
    config, weights = random_model(config_of(architecture), seed=3)
    parts = parts_of(weights.layers[0])
    for norm in ("attention_norm.weight", "mlp_norm.weight"):
        parts[norm][[5, 20, 44]] *= 40
    return config, parts, windows(config, count=4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_awq_loses_less_than_rounding_where_channels_are_hot(architecture: Architecture):
    config, parts, hidden = hot_parts(architecture)
    fresh = windows(config, count=2, seed=77)  # not what it was calibrated on
    wanted = [run_layer(config, dense_layer(parts), x).double() for x in fresh]
    errors = {}
    for method in ("awq", "rtn"):
        loaded = load_layer(quantized(config, parts, hidden, method=method).tensors, config, 0, CPU)
        found = [run_layer(config, loaded, x).double() for x in fresh]
        errors[method] = sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True))
    assert errors["awq"] < 0.5 * errors["rtn"]


def test_losses_are_those_of_the_packed_weights_and_below_rounding():
    config, parts, hidden = hot_parts("llama")
    *_, inputs = capture(config, dict(parts), hidden, seed=0)
    assert isinstance(inputs, dict)
    result = quantized(config, parts, hidden, method="awq")
    losses = result.losses
    assert set(losses.losses) == set(losses.plain) == set(losses.alphas) == {group.name for group in GROUPS}
    assert losses.alphas["qkv"] > 0 and losses.mean < losses.plain_mean
    for group in GROUPS:
        assert losses.losses[group.name] <= losses.plain[group.name] * 1.0001
    # o's, computed anew from the packed layer: its inputs are divided by what v's rows were.
    loaded = load_layer(result.tensors, config, 0, CPU)
    by_v = parts["v_proj.bias"] / result.tensors["model.layers.0.self_attn.v_proj.bias"].float()
    heads = by_v.view(config.num_kv_heads, 1, config.head_dim)
    scales = heads.expand(-1, config.num_heads // config.num_kv_heads, -1).reshape(-1)
    rows = inputs["o"].rows().double()
    exact = rows @ parts["o_proj.weight"].double().T
    found = (rows / scales.double()) @ loaded.o_proj.weight.dequantize(torch.float64).T
    error = float((found - exact).square().sum() / exact.square().sum())
    assert error == pytest.approx(losses.losses["o"], rel=0.02)  # v's bias is float16
