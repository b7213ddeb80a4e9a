"""AWQ's two searches (arXiv 2306.00978): scales per input channel, and how far to clip each group of weights.

Owns tensors only: what a linear group is, and where its scales are folded, is `duolocal.quantize`'s. Channels with
large activations are scaled up before rounding and their inputs down by the same factor, which leaves the product as
it is and makes the rounding errors that matter smaller:

    s = mean|x| ** α, normalised to √(max s · min s) = 1;   α* = argmin ‖Q(W diag(s)) diag(s)⁻¹ X − W X‖²   (eq. 4, 5)

over a grid of α in [0, 1); α = 0 is plain rounding, so the result is never worse than it on these inputs. Clipping
tries m = max|w| · (1 − i/20) per output feature and group, i = 0 … 9, and keeps the m whose rounded group is nearest.
(AutoAWQ's scales, which divide by mean|w| ** (1 − α), were tried as a second grid: a lower loss here, no lower KL.)

`inputs` are rows [n, in_features] of what the linears read, or any matrix with the same XᵀX: both searches ask for
nothing but ‖X Δ‖², so `InputSummary` folds any number of tokens into in_features rows. All losses are float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.quant.rounding import rounded

SCALE_GRID = 20  # values of α
CLIP_GRID = 20  # steps of max|w|
CLIP_STEPS = 10  # of them tried: down to 0.55 · max|w|
MAX_ROWS = 4096  # rows of inputs kept
_LEAST_MEAN = 1e-4  # of the largest channel's: a dead channel must not be divided by nothing
_TILE_ELEMENTS = 1 << 22  # weights rounded at a time: bounds the temporaries to about 100 MB


@dataclass(frozen=True)
class ScaleSearch:
    """The best scales for a linear group, and what they are worth."""

    scales: Tensor  # [in_features] float32: weights are multiplied by it, inputs divided
    alpha: float
    loss: float  # squared error of the linears' outputs, relative to the outputs; mean over the linears
    plain_loss: float  # the same for plain rounding


class InputSummary:
    """What is remembered of the inputs of a linear group: mean |x| per channel, and rows for the searches.

    Memory does not grow with the tokens: at most MAX_ROWS rows (and one window's) are held. Where in_features is no
    larger than that, rows are folded by QR into in_features rows with the very same XᵀX, so every token counts; else
    MAX_ROWS of the `num_tokens` rows are taken, drawn with `seed`.
    """

    def __init__(self, in_features: int, *, num_tokens: int, seed: int) -> None:
        self.in_features = in_features
        self.num_tokens = num_tokens
        self._sum = torch.zeros(in_features, dtype=torch.float64)
        self._seen = 0
        self._parts: list[Tensor] = []
        self._chosen: Tensor | None = None
        if num_tokens > MAX_ROWS and in_features > MAX_ROWS:
            order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
            self._chosen = order[:MAX_ROWS].sort().values

    def add(self, x: Tensor) -> None:
        """Take the inputs of some more tokens, [n, in_features] float32."""
        assert self._seen + x.shape[0] <= self.num_tokens
        self._sum += x.abs().sum(0, dtype=torch.float64).cpu()
        first, self._seen = self._seen, self._seen + x.shape[0]
        if self._chosen is None:
            self._parts.append(x)
            if self._held > MAX_ROWS:
                self._fold()
            return
        here = self._chosen[(self._chosen >= first) & (self._chosen < self._seen)] - first
        if len(here):
            self._parts.append(x[here.to(x.device)])

    @property
    def mean_abs(self) -> Tensor:
        """Mean |x| [in_features] float32 over all tokens, on the CPU."""
        return (self._sum / max(self._seen, 1)).float()

    def rows(self) -> Tensor:
        """Return at most MAX_ROWS rows [n, in_features] float32, and no more than in_features where that saves work."""
        if self._chosen is None and self._held > self.in_features:
            self._fold()
        return torch.cat(self._parts)

    @property
    def _held(self) -> int:
        return sum(part.shape[0] for part in self._parts)

    def _fold(self) -> None:
        self._parts = [torch.linalg.qr(torch.cat(self._parts), mode="r").R]


def search_scales(
    weights: Sequence[Tensor],
    inputs: Tensor,
    mean_abs: Tensor,
    *,
    group_size: int,
    grid: int = SCALE_GRID,
) -> ScaleSearch:
    """Return the scales with which the linears' outputs change least when their weights are rounded.

    weights: [out_features, in_features] float32 each, all reading `inputs` [n, in_features]; mean_abs [in_features]:
    channels with equal values get equal scales. Every linear's squared error counts relative to its own output, so
    that a small one (v beside q and k) is heard.
    """
    powers = [outputs_power(weight, inputs) for weight in weights]
    best: ScaleSearch | None = None
    for step in range(grid):
        alpha = step / grid
        scales = scales_for(mean_abs, alpha).to(inputs.device)
        errors = [_scaled_error(weight, inputs, scales, group_size=group_size) for weight in weights]
        loss = sum(error / power for error, power in zip(errors, powers, strict=True)) / len(weights)
        if best is None or loss < best.loss:
            plain = loss if best is None else best.plain_loss  # the first is α = 0
            best = ScaleSearch(scales=scales, alpha=alpha, loss=loss, plain_loss=plain)
    assert best is not None
    return best


def scales_for(mean_abs: Tensor, alpha: float) -> Tensor:
    """Return mean_abs ** alpha, normalised to √(max · min) = 1; it lies within a factor of 100 of 1."""
    most = mean_abs.max()
    if alpha == 0 or not bool(most > 0):
        return torch.ones_like(mean_abs)
    scales = (mean_abs / most).clamp(min=_LEAST_MEAN) ** alpha
    return scales / (scales.max() * scales.min()).sqrt()


def search_clip(weight: Tensor, inputs: Tensor, *, group_size: int) -> Tensor:
    """Return the largest |w| to keep, [out_features, groups] float32, for `weight` [out_features, in_features].

    The error of a group is that of its own part of the product, ‖X_g (w_g − w'_g)‖².
    """
    parts = inputs.unflatten(1, (-1, group_size)).transpose(0, 1)  # [groups, n, group_size]
    moments = parts.transpose(1, 2) @ parts  # [groups, group_size, group_size]
    limits = []
    for tile in weight.split(max(1, _TILE_ELEMENTS // weight.shape[1])):
        grouped = tile.unflatten(1, (-1, group_size)).transpose(0, 1)  # [groups, rows, group_size]
        most = grouped.abs().amax(-1, keepdim=True)
        best_limit, best_error = most, _moment_error(rounded(grouped) - grouped, moments)
        for step in range(1, CLIP_STEPS):
            limit = most * (1 - step / CLIP_GRID)
            error = _moment_error(rounded(clipped(grouped, limit)) - grouped, moments)
            better = error < best_error
            best_limit, best_error = torch.where(better, limit, best_limit), torch.where(better, error, best_error)
        limits.append(best_limit.squeeze(-1).t())
    return torch.cat(limits)


def clipped(weight: Tensor, limit: Tensor) -> Tensor:
    """Return `weight` between -limit and limit, which broadcasts."""
    return torch.minimum(torch.maximum(weight, -limit), limit)


def clip_groups(weight: Tensor, limits: Tensor) -> Tensor:
    """Return `weight` [out_features, in_features] clipped to `limits` [out_features, groups]."""
    grouped = weight.unflatten(1, (limits.shape[1], -1))
    return clipped(grouped, limits.unsqueeze(-1)).flatten(1)


def relative_error(weight: Tensor, approximation: Tensor, inputs: Tensor) -> float:
    """Return ‖X (W' − W)ᵀ‖² / ‖X Wᵀ‖²; 0 where both are nothing."""
    return _error(approximation - weight, inputs) / outputs_power(weight, inputs)


def outputs_power(weight: Tensor, inputs: Tensor) -> float:
    """Return ‖X Wᵀ‖², at least the smallest float32 so that it can be divided by."""
    return max(_error(weight, inputs), torch.finfo(torch.float32).tiny)


def _scaled_error(weight: Tensor, inputs: Tensor, scales: Tensor, *, group_size: int) -> float:
    """Return ‖Q(W diag(s)) diag(s)⁻¹ X − W X‖², a tile of output features at a time."""
    error = 0.0
    for tile in weight.split(max(1, _TILE_ELEMENTS // weight.shape[1])):
        grouped = (tile * scales).unflatten(1, (-1, group_size))
        error += _error((rounded(grouped) - grouped).flatten(1) / scales, inputs)
    return error


def _error(difference: Tensor, inputs: Tensor) -> float:
    """Return ‖X Δᵀ‖², summed in float64, a tile of output features at a time."""
    total = 0.0
    for tile in difference.split(max(1, _TILE_ELEMENTS // max(inputs.shape))):
        total += float((inputs @ tile.t()).square().sum(dtype=torch.float64))
    return total


def _moment_error(difference: Tensor, moments: Tensor) -> Tensor:
    """Return Δᵀ M Δ [groups, rows, 1] for Δ [groups, rows, group_size] and M [groups, group_size, group_size]."""
    return ((difference @ moments) * difference).sum(-1, keepdim=True)
