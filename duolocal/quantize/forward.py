"""Calibration windows through one layer at a time, and what its linears read on the way.

Owns nothing that outlives a layer: the hidden states belong to the caller. A layer is run by the one Transformer, made
of that layer alone; whole windows are fed at once, through the seam that every cache uses.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from duolocal.kernels.interface import Norm
from duolocal.kernels.matrix import Affine
from duolocal.kernels.pointwise import rms_norm
from duolocal.kernels.torch_kernels import TorchKernels
from duolocal.models.config import ModelConfig
from duolocal.models.observe import ObservedCache
from duolocal.models.transformer import Transformer
from duolocal.models.weights import LayerWeights, ModelWeights
from duolocal.quant.awq_search import InputSummary
from duolocal.quant.weight import DenseWeight, Linear
from duolocal.quantize.layer import GROUPS, Parts


class _ListeningKernels(TorchKernels):
    """Plain float32 kernels that show every linear's input to `listener`, with the first linear that reads it."""

    def __init__(self, listener: Callable[[Affine, Tensor], None]) -> None:
        super().__init__(torch.float32)
        self._listener = listener

    def linear(
        self, x: Tensor, layers: Sequence[Affine], *, norm: Norm | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        if norm is not None:
            x = rms_norm(x, norm.weight, eps=norm.eps)
        self._listener(layers[0], x)
        return super().linear(x, layers, residual=residual)


def dense_layer(parts: Parts) -> LayerWeights:
    """Return a layer's float32 parts as weights to compute with."""
    fields: dict[str, Tensor | Linear] = {}
    for name, tensor in parts.items():
        field, _, ending = name.partition(".")
        if ending == "weight":
            is_norm = tensor.ndim == 1
            fields[field] = tensor if is_norm else Linear(DenseWeight(tensor), parts.get(f"{field}.bias"))
    return LayerWeights(**fields)  # type: ignore[arg-type]  # roles are its fields


def capture(
    config: ModelConfig, parts: Parts, hidden: Sequence[Tensor], *, seed: int
) -> Iterator[int | dict[str, InputSummary]]:
    """Run every window through a layer; yield how many are done, and at last the inputs of every linear group.

    hidden: what the layer reads, [num_tokens, hidden_size] float32 per window; it is left as it is.
    """
    weights = dense_layer(parts)
    device = weights.attention_norm.device
    num_tokens = sum(window.shape[0] for window in hidden)
    by_linear, inputs = {}, {}
    for index, group in enumerate(GROUPS):
        first: Linear = getattr(weights, group.linears[0])
        summary = InputSummary(first.weight.in_features, num_tokens=num_tokens, seed=seed + index)
        inputs[group.name] = by_linear[id(first)] = summary

    def listen(linear: Affine, x: Tensor) -> None:
        by_linear[id(linear)].add(x)

    for done, _ in enumerate(_run(config, weights, hidden, device, _ListeningKernels(listen)), 1):
        yield done
    yield inputs


def advance(config: ModelConfig, weights: LayerWeights, hidden: list[Tensor], *, device: torch.device) -> Iterator[int]:
    """Replace every window's states, in place, by what the layer makes of them; yield how many are done."""
    for index, x in enumerate(_run(config, weights, hidden, device, TorchKernels(torch.float32))):
        hidden[index] = x
        yield index + 1


def _run(
    config: ModelConfig, layer: LayerWeights, hidden: Sequence[Tensor], device: torch.device, kernels: TorchKernels
) -> Iterator[Tensor]:
    nothing = DenseWeight(torch.empty(0, config.hidden_size, device=device))
    model = Transformer(
        replace(config, num_layers=1),
        ModelWeights(embedding=nothing, layers=(layer,), norm=layer.attention_norm, lm_head=nothing),
        context=max(window.shape[0] for window in hidden),
        device=device,
        dtype=torch.float32,
        kernels=kernels,
    )
    for window in hidden:
        positions = torch.arange(window.shape[0], device=device)
        yield model.run_layer(0, window.to(device), positions, model.rotation(positions), ObservedCache()).cpu()
