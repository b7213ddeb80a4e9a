"""One decoder layer, in float32, to packed weights: which linears share their scales, and where those are folded.

    attention_norm → q, k, v      v → o      mlp_norm → gate, up      up → down

The inputs of a group are divided by its scales, exactly, by dividing whatever makes them: a norm's weight, or the rows
(and bias) of the linear before. o reads weighted sums of v's outputs, channel by channel, and down reads up's outputs
times a gate, so both folds change nothing but rounding. With grouped-query attention all query heads of a KV head read
the same row of v: their channels of o share one scale. Between q, k and what reads them stand RoPE, a softmax and in
Qwen3 a norm: nothing is folded there, and as in AutoAWQ q and k are not clipped, because a clipped logit is amplified
by the softmax.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.errors import ModelFileError
from duolocal.models.assemble import layer_roles
from duolocal.models.config import ModelConfig
from duolocal.models.safetensors_folder import hf_module
from duolocal.models.weights import LayerWeights
from duolocal.quant.awq import AWQWeight
from duolocal.quant.awq_pack import pack_awq
from duolocal.quant.awq_search import (
    InputSummary,
    clip_groups,
    relative_error,
    search_clip,
    search_scales,
)
from duolocal.quant.rounding import round_to_nearest
from duolocal.quant.weight import DenseWeight, Linear
from duolocal.quantize.results import LayerLosses

Parts = dict[str, Tensor]  # float32, by role name: "q_proj.weight", "q_proj.bias", "attention_norm.weight"


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same inputs, and what makes those."""

    name: str
    linears: tuple[str, ...]
    before: str  # the norm or linear whose output channels are divided by the scales


GROUPS = (
    LinearGroup("qkv", ("q_proj", "k_proj", "v_proj"), "attention_norm"),
    LinearGroup("o", ("o_proj",), "v_proj"),
    LinearGroup("gate_up", ("gate_proj", "up_proj"), "mlp_norm"),
    LinearGroup("down", ("down_proj",), "up_proj"),
)
UNCLIPPED = frozenset({"q_proj", "k_proj"})
_PACKED = ("qweight", "qzeros", "scales")


@dataclass(frozen=True)
class QuantizedLayer:
    """A finished layer: its tensors under transformers' names, and what was lost."""

    tensors: Mapping[str, Tensor]  # on the CPU
    losses: LayerLosses


def quantize_layer(
    parts: Parts,
    inputs: Mapping[str, InputSummary] | None,
    config: ModelConfig,
    *,
    layer: int,
    group_size: int,
) -> Iterator[str | QuantizedLayer]:
    """Yield what is being done, for people, and at last the QuantizedLayer.

    parts: of this layer, changed in place; inputs: of every group by its name, None to round plainly.
    """
    rows, plain, alphas = {}, {}, {}
    for group in GROUPS if inputs is not None else ():
        yield f"searching scales of {group.name}"
        assert inputs is not None
        weights = [parts[f"{name}.weight"] for name in group.linears]
        mean_abs = _shared(inputs[group.name].mean_abs, group, config)
        kept = inputs[group.name].rows().to(weights[0].device)
        found = search_scales(weights, kept, mean_abs, group_size=group_size)
        fold(parts, group, found.scales, config)
        rows[group.name], plain[group.name], alphas[group.name] = kept / found.scales, found.plain_loss, found.alpha
    packed: dict[str, AWQWeight] = {}
    losses: dict[str, float] = {}
    for group in GROUPS:
        errors = []
        for name in group.linears:
            yield f"rounding {name}" if inputs is None else f"clipping {name}"
            weight = parts.pop(f"{name}.weight")
            rounded_to = weight
            if inputs is not None and name not in UNCLIPPED:
                limits = search_clip(weight, rows[group.name], group_size=group_size)
                rounded_to = clip_groups(weight, limits)
            codes = round_to_nearest(rounded_to, group_size=group_size)
            errors.append(_loss(weight, codes.decode(), rows.get(group.name)))
            packed[name] = pack_awq(codes)
        losses[group.name] = sum(errors) / len(errors)
    yield QuantizedLayer(
        tensors=_named(parts, packed, config, layer),
        losses=LayerLosses(losses=losses, plain=plain or losses, alphas=alphas),
    )


def fold(parts: Parts, group: LinearGroup, scales: Tensor, config: ModelConfig) -> None:
    """Multiply the input channels of `group` by `scales` [in_features], and divide what makes them."""
    for name in group.linears:
        parts[f"{name}.weight"] = parts[f"{name}.weight"] * scales
    if group.before == "v_proj":
        heads = scales.view(config.num_kv_heads, -1, config.head_dim)
        scales = heads[:, 0].reshape(-1)  # shared by the query heads of a KV head
    weight, bias = f"{group.before}.weight", f"{group.before}.bias"
    parts[weight] = parts[weight] / (scales if parts[weight].ndim == 1 else scales[:, None])
    if bias in parts:
        parts[bias] = parts[bias] / scales


def load_layer(tensors: Mapping[str, Tensor], config: ModelConfig, layer: int, device: torch.device) -> LayerWeights:
    """Return a quantized layer's tensors as weights to compute with in float32: decoded once, for many windows."""
    fields: dict[str, Tensor | Linear] = {}
    for role in layer_roles(config, layer):
        field, _, ending = role.name.partition(".")
        module = hf_module(role)
        if ending == "bias":
            continue
        if len(role.shape) == 1:
            fields[field] = tensors[f"{module}.weight"].to(device, torch.float32)
            continue
        bias = tensors.get(f"{module}.bias")
        packed = AWQWeight(*(tensors[f"{module}.{part}"].to(device) for part in _PACKED))
        fields[field] = Linear(
            DenseWeight(packed.dequantize(torch.float32)), None if bias is None else bias.to(device, torch.float32)
        )
    return LayerWeights(**fields)  # type: ignore[arg-type]  # roles are its fields


def to_half(tensor: Tensor, name: str) -> Tensor:
    """Return `tensor` in float16 on the CPU; raise ModelFileError where a value is beyond its range."""
    half = tensor.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise ModelFileError(
            f"{name} has values that float16 cannot hold, and AWQ checkpoints are float16: this model cannot be "
            "written as one"
        )
    return half.cpu()


def _shared(means: Tensor, group: LinearGroup, config: ModelConfig) -> Tensor:
    """Return `means` [in_features] with one value for all channels that must have one scale."""
    if group.before != "v_proj":
        return means
    heads = means.view(config.num_kv_heads, -1, config.head_dim)
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


def _loss(weight: Tensor, decoded: Tensor, rows: Tensor | None) -> float:
    if rows is not None:
        return relative_error(weight, decoded, rows)
    power = float(weight.square().sum(dtype=torch.float64))
    return float((decoded - weight).square().sum(dtype=torch.float64)) / max(power, torch.finfo(torch.float32).tiny)


def _named(parts: Parts, packed: Mapping[str, AWQWeight], config: ModelConfig, layer: int) -> dict[str, Tensor]:
    tensors = {}
    for role in layer_roles(config, layer):
        module, (field, _, ending) = hf_module(role), role.name.partition(".")
        if field in packed and ending == "weight":
            for part in _PACKED:
                tensors[f"{module}.{part}"] = getattr(packed[field], part).cpu()
        else:
            tensors[f"{module}.{ending}"] = to_half(parts[role.name], f"{module}.{ending}")
    return tensors
