"""Writing AutoAWQ's GEMM layout: the exact inverse of reading it, which `awq.py` does and describes."""

import torch
from torch import Tensor

from duolocal.quant.awq import CHANNEL_ORDER, AWQWeight
from duolocal.quant.rounding import LEVELS, GroupCodes


def pack_awq(codes: GroupCodes) -> AWQWeight:
    """Return `codes` as AutoAWQ packs them; out_features must be a multiple of 8."""
    return AWQWeight(
        qweight=pack_nibbles(codes.codes.t()),
        qzeros=pack_nibbles(codes.zeros.t()),
        scales=codes.scales.t().contiguous(),
    )


def pack_nibbles(values: Tensor) -> Tensor:
    """Return integers [n, 8 * columns], clamped to 0 … 15, as int32 [n, columns] in AWQ's order of channels.

    Clamped, because a 16 would end in its neighbour's bits.
    """
    n, out_features = values.shape
    assert out_features % 8 == 0
    nibbles = values.clamp(0, LEVELS).unflatten(1, (-1, 8))  # [n, columns, 8]
    packed = torch.zeros((n, out_features // 8), dtype=torch.int32, device=values.device)
    for i, channel in enumerate(CHANNEL_ORDER):
        packed |= nibbles[..., channel].to(torch.int32) << 4 * i  # the last sets the sign bit, as it should
    return packed
