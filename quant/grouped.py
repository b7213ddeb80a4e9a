"""Weights regrouped for a GPU: codes, scales and offsets in planes of their own, no value changed.

Owns the exact repacking of AWQ, Q4_0, Q4_1 and Q8_0 into `GroupedMatrix` (the layout stands there), the way back, and
decoding in plain torch. Blocks of 18 or 34 bytes and int32 columns of eight channels suit a file and a CPU; a GPU wants
every row's codes in one run that 16-byte loads can take.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.kernels.matrix import GROUPED_RUN, GroupedMatrix, PackedMatrix
from duolocal.quant.awq import CHANNEL_ORDER, AWQWeight
from duolocal.quant.awq_pack import pack_nibbles
from duolocal.quant.gguf import GGUF_TYPES, GGUFWeight
from duolocal.quant.weight import Weight

_GGUF = {kind.name: kind for kind in GGUF_TYPES.values() if kind.name in ("Q4_0", "Q4_1", "Q8_0")}
_CHUNK_ELEMENTS = 1 << 22  # repacked or decoded at a time: bounds the temporaries to about 30 MB


@dataclass(frozen=True)
class GroupedWeight:
    """A weight [out_features, in_features] in planes; decodes to the bits that the original decodes to."""

    matrix: GroupedMatrix
    format: str  # of the file, for people: "Q4_1", "awq-int4-g128"

    @property
    def out_features(self) -> int:
        return self.matrix.out_features

    @property
    def in_features(self) -> int:
        return self.matrix.in_features

    @property
    def nbytes(self) -> int:
        planes = (self.matrix.codes, self.matrix.scales, self.matrix.zeros, self.matrix.minima)
        return sum(plane.nbytes for plane in planes if plane is not None)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the whole matrix [out_features, in_features] in `dtype`."""
        return self.row_range(0, self.out_features, dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows `index` [n] as [n, in_features] in `dtype`, dequantizing only those."""
        return _decode(self.matrix, index, dtype)

    def row_range(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows start..stop-1 as [stop - start, in_features] in `dtype`."""
        out = torch.empty((max(0, stop - start), self.in_features), dtype=dtype, device=self.matrix.codes.device)
        step = max(1, _CHUNK_ELEMENTS // self.in_features)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            out[first - start : last - start] = _decode(self.matrix, slice(first, last), dtype)
        return out

    def packed(self) -> PackedMatrix:
        """Refuse: kernels that read grouped weights take `matrix`."""
        raise AssertionError(f"{self.format} regrouped for a GPU has no packing that other kernels read")


def group(weight: Weight) -> Weight:
    """Return `weight` as a `GroupedWeight` where its format and shape allow, else `weight` itself.

    Regrouped are Q4_0, Q4_1, Q8_0, and AWQ whose group size is a multiple of 32. Works on the weight's device.
    """
    if isinstance(weight, GGUFWeight) and weight.type.name in _GGUF:
        return GroupedWeight(_group_gguf(weight), weight.format)
    if isinstance(weight, AWQWeight) and weight.group_size % GROUPED_RUN == 0:
        return GroupedWeight(_group_awq(weight), weight.format)
    return weight


def ungroup(weight: Weight) -> Weight:
    """Return a `GroupedWeight` in the bits that `group` took, as CPU kernels read them; others as they are."""
    if not isinstance(weight, GroupedWeight):
        return weight
    if weight.format in _GGUF:
        return _ungroup_gguf(weight.matrix, weight.format)
    return _ungroup_awq(weight.matrix)


def _group_gguf(weight: GGUFWeight) -> GroupedMatrix:
    """Part the blocks' bytes: 4-bit codes are paired as the layout has them, only their bytes change places."""
    name = weight.type.name
    blocks = weight.raw.unflatten(1, (-1, weight.type.block_bytes))  # [out, groups, block_bytes]
    num_halves = 2 if name == "Q4_1" else 1
    # Copied as bytes: in a file the float16 numbers may stand at odd addresses.
    scales, *minima = (
        blocks[..., 2 * i : 2 * i + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).squeeze(-1)
        for i in range(num_halves)
    )
    codes = _into_order(blocks[..., 2 * num_halves :])
    if name == "Q8_0":
        codes.bitwise_xor_(0x80)  # a signed byte + 128
    return GroupedMatrix(
        codes=codes,
        scales=scales,
        bits=8 if name == "Q8_0" else 4,
        zero={"Q4_0": 8, "Q8_0": 128}.get(name, 0),
        minima=minima[0] if minima else None,
    )


def _group_awq(weight: AWQWeight) -> GroupedMatrix:
    """Transpose to rows of output features and pair features 16 apart."""
    device = weight.qweight.device
    num_columns, in_features = weight.qweight.shape[1], weight.in_features
    codes = torch.empty((weight.out_features, in_features // 2), dtype=torch.uint8, device=device)
    step = max(1, _CHUNK_ELEMENTS // (8 * in_features))
    for start in range(0, num_columns, step):
        columns = slice(start, min(start + step, num_columns))
        low, high = _channels(weight.qweight[:, columns]).view(-1, in_features // GROUPED_RUN, 2, 16).unbind(2)
        codes[8 * columns.start : 8 * columns.stop] = _into_order(low | high << 4)
    scales = weight.scales.t().contiguous()
    return GroupedMatrix(codes=codes, scales=scales, bits=4, zeros=_channels(weight.qzeros))


def _ungroup_gguf(matrix: GroupedMatrix, name: str) -> GGUFWeight:
    codes = _from_order(matrix.codes).reshape(*matrix.scales.shape, -1)  # [out, groups, 16 or 32]
    if name == "Q8_0":
        codes = codes ^ 0x80
    halves = [half for half in (matrix.scales, matrix.minima) if half is not None]
    blocks = torch.cat((*(half.unsqueeze(-1).view(torch.uint8) for half in halves), codes), dim=-1)
    return GGUFWeight(blocks.flatten(1), _GGUF[name], matrix.in_features)


def _ungroup_awq(matrix: GroupedMatrix) -> AWQWeight:
    assert matrix.zeros is not None
    qweight = torch.empty((matrix.in_features, matrix.out_features // 8), dtype=torch.int32, device=matrix.codes.device)
    step = max(8, _CHUNK_ELEMENTS // matrix.in_features // 8 * 8)
    for start in range(0, matrix.out_features, step):
        codes = _from_order(matrix.codes[start : start + step])
        features = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)  # [rows, in_features]
        qweight[:, start // 8 : (start + step) // 8] = pack_nibbles(features.t())
    return AWQWeight(qweight, pack_nibbles(matrix.zeros.t()), matrix.scales.t().contiguous())


def _channels(packed: Tensor) -> Tensor:
    """Return [8 * columns, n] uint8, 0 … 15, from AWQ's [n, columns] int32."""
    n, columns = packed.shape
    channels = torch.empty((columns, 8, n), dtype=torch.uint8, device=packed.device)
    for i, channel in enumerate(CHANNEL_ORDER):
        channels[:, channel] = (packed >> 4 * i & 15).t()  # the mask drops the copied sign
    return channels.view(-1, n)


def _into_order(codes: Tensor) -> Tensor:
    """Return [n, bytes] in the layout's order of bytes, from [n, ..., 16 or 32] in order of features."""
    n = codes.shape[0]
    return codes.unflatten(-1, (-1, 2, 4, 2)).transpose(-2, -3).reshape(n, -1)  # 8a + 2m + b -> 4m + 2a + b


def _from_order(codes: Tensor) -> Tensor:
    """Return [n, runs, 16] in order of features, from [n, bytes] in the layout's order."""
    return codes.unflatten(1, (-1, 4, 2, 2)).transpose(2, 3).flatten(2)


def _decode(matrix: GroupedMatrix, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
    """Return rows as [n, in_features], each value the float32 one rounded once."""
    codes = _from_order(matrix.codes[rows])
    if matrix.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=2)
    values = codes.flatten(1).unflatten(1, (-1, matrix.group_size)).float()  # [n, groups, group_size]
    scales = matrix.scales[rows].float().unsqueeze(-1)
    if matrix.minima is not None:
        values.mul_(scales).add_(matrix.minima[rows].float().unsqueeze(-1))
    else:
        zeros = matrix.zero if matrix.zeros is None else matrix.zeros[rows].float().unsqueeze(-1)
        values.sub_(zeros).mul_(scales)
    return values.flatten(1).to(dtype)
