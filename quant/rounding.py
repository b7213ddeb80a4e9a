"""Round to nearest in groups: a matrix to 4-bit codes with a float16 scale and a zero point for every group.

Owns the arithmetic of asymmetric group-wise rounding ("RTN"). A group is `group_size` neighbouring input features of
one output feature:

    scale = (max − min) / 15, rounded to float16      zero = round(−min / scale), 0 … 15
    code = clamp(round(w / scale) + zero, 0, 15)      w' = (code − zero) · scale

where max is at least 0 and min at most 0, so that 0 is always a value of its own. Codes are computed against the scale
that is stored, not against the exact one: what is judged is what is packed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.errors import ModelFileError

LEVELS = 15  # the largest code
_SMALLEST_SCALE = 2.0**-24  # of float16; for groups that are 0 throughout, or nearly


@dataclass(frozen=True)
class GroupCodes:
    """A matrix [out_features, in_features] as codes; decodes to (code - zero) * scale."""

    codes: Tensor  # [out_features, in_features] uint8, 0 … 15
    zeros: Tensor  # [out_features, groups] uint8, 0 … 15
    scales: Tensor  # [out_features, groups] float16

    def __post_init__(self) -> None:
        assert self.codes.dtype == self.zeros.dtype == torch.uint8 and self.scales.dtype == torch.float16
        assert self.zeros.shape == self.scales.shape and self.codes.shape[0] == self.zeros.shape[0]
        assert self.codes.shape[1] % self.zeros.shape[1] == 0

    def decode(self) -> Tensor:
        """Return the matrix in float32."""
        grouped = self.codes.unflatten(1, (self.zeros.shape[1], -1)).float()
        return grouped.sub_(self.zeros.unsqueeze(-1)).mul_(self.scales.float().unsqueeze(-1)).flatten(1)


def round_to_nearest(weight: Tensor, *, group_size: int) -> GroupCodes:
    """Return `weight` [out_features, in_features] float32 as codes; `group_size` divides in_features.

    Raises ModelFileError where a group is too wide for a float16 scale, or not finite.
    """
    grouped = weight.unflatten(1, (-1, group_size))
    scales, zeros = group_parameters(grouped)
    if not bool(scales.isfinite().all()):
        raise ModelFileError(
            "a weight is not finite, or a group of weights is wider than float16 scales reach (982,560)"
        )
    codes = _codes(grouped, scales, zeros)
    return GroupCodes(codes.flatten(1).byte(), zeros.squeeze(-1).byte(), scales.squeeze(-1).half())


def rounded(grouped: Tensor) -> Tensor:
    """Return what groups [..., group_size] float32 decode to after rounding, without making codes of them."""
    scales, zeros = group_parameters(grouped)
    return _codes(grouped, scales, zeros).sub_(zeros).mul_(scales)


def group_parameters(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point [..., 1] of groups [..., group_size], float32; the scale is a float16 number."""
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = ((high - low) / LEVELS).half().float().clamp_(min=_SMALLEST_SCALE)
    return scales, (-low / scales).round_().clamp_(0, LEVELS)


def _codes(grouped: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return (grouped / scales).round_().add_(zeros).clamp_(0, LEVELS)
