"""INT4 weights in AutoAWQ's GEMM layout.

Owns the layout of one quantized linear layer; which modules of a checkpoint are quantized is read from its config in
`duolocal.models.hf_config`. Layout, input features first:

- qweight int32 [in, out / 8]: bits 4i … 4i+3 of column c hold output channel 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
- qzeros int32 [in / group, out / 8], packed alike
- scales float16 [in / group, out]
- W[out, in] = (q - z) * scale

Source: AutoAWQ 0.2.9, `WQLinear_GEMM` (arXiv 2306.00978). A decoded value is (q - z) * scale rounded once to the
wanted dtype: the product is exact in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.kernels.matrix import PackedMatrix

CHANNEL_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output channel, within 8, of the i-th nibble from below
_CHUNK_ELEMENTS = 1 << 18  # decoded at a time: bounds the temporaries to 2 MB and keeps them in cache


@dataclass(frozen=True)
class AWQSettings:
    """What `quantization_config` of a checkpoint says."""

    group_size: int  # input features per scale; -1: all of them
    dense_modules: tuple[str, ...] = ()  # parts of module names that are not quantized

    def is_dense(self, module: str) -> bool:
        """Return whether the config excludes `module`, e.g. "model.layers.0.mlp.up_proj", from quantization."""
        return any(part in module for part in self.dense_modules)


@dataclass(frozen=True)
class AWQWeight:
    """A weight [out_features, in_features] as packed in the file; the group size divides in_features."""

    qweight: Tensor  # [in_features, out_features / 8] int32, eight int4 per item
    qzeros: Tensor  # [in_features / group_size, out_features / 8] int32
    scales: Tensor  # [in_features / group_size, out_features] float16

    def __post_init__(self) -> None:
        groups, packed = self.qzeros.shape
        assert self.qweight.dtype == self.qzeros.dtype == torch.int32
        assert self.qweight.shape[1] == packed and self.qweight.shape[0] % groups == 0
        assert self.scales.shape == (groups, packed * 8)

    @property
    def out_features(self) -> int:
        return self.qweight.shape[1] * 8

    @property
    def in_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def group_size(self) -> int:
        """Input features that share a scale and a zero point."""
        return self.qweight.shape[0] // self.qzeros.shape[0]

    @property
    def nbytes(self) -> int:
        return self.qweight.nbytes + self.qzeros.nbytes + self.scales.nbytes

    @property
    def format(self) -> str:
        return f"awq-int4-g{self.group_size}"

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the whole matrix [out_features, in_features] in `dtype`, a transposed view of [in, out]."""
        out = torch.empty((self.in_features, self.out_features), dtype=dtype, device=self.qweight.device)
        groups = self.qzeros.shape[0]
        step = max(1, _CHUNK_ELEMENTS // (self.group_size * self.out_features))
        for start in range(0, groups, step):
            part = slice(start, min(start + step, groups))
            rows = slice(part.start * self.group_size, part.stop * self.group_size)
            grouped = (-1, self.group_size, self.out_features)
            part_out = out[rows].view(grouped)
            exact = part_out if dtype == torch.float32 else torch.empty_like(part_out, dtype=torch.float32)
            exact.copy_(_unpack(self.qweight[rows]).view(grouped))
            zeros, scales = _unpack(self.qzeros[part]).float(), self.scales[part].float()
            exact.sub_(zeros.unsqueeze(1)).mul_(scales.unsqueeze(1))
            if exact is not part_out:
                part_out.copy_(exact)
        return out.t()

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows `index` [n] as [n, in_features] in `dtype`, dequantizing only those."""
        shift = 4 * torch.tensor(CHANNEL_ORDER, device=index.device).argsort()[index % 8]  # [n]
        codes = self.qweight[:, index // 8] >> shift & 15  # [in, n]; the mask drops the copied sign
        zeros = self.qzeros[:, index // 8] >> shift & 15  # [groups, n]
        grouped = codes.view(-1, self.group_size, index.shape[0]) - zeros.unsqueeze(1)
        exact = grouped.float() * self.scales[:, index].float().unsqueeze(1)
        return exact.view(self.in_features, -1).t().to(dtype)

    def row_range(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows start..stop-1 as [stop - start, in_features] in `dtype`."""
        return self.rows(torch.arange(start, stop, device=self.qweight.device), dtype)

    def packed(self) -> PackedMatrix:
        """Return the bytes as they are, for kernels that decode on the way."""
        data, zeros, scales = (tensor.contiguous() for tensor in (self.qweight, self.qzeros, self.scales))
        return PackedMatrix(
            "AWQ",
            data,
            self.out_features,
            self.in_features,
            row_bytes=0,
            zeros=zeros,
            scales=scales,
            group_size=self.group_size,
        )


def _unpack(packed: Tensor) -> Tensor:
    """Return [n, 8 * columns] uint8, 0 … 15, output channels in order, from [n, columns] int32.

    The low half of a column holds channels 0, 2, 4, 6 and the high half 1, 3, 5, 7: each half is spread over the
    even bytes of 64 bits, and the two are interleaved. Four times faster than a permuting copy of nibbles.
    """
    n, columns = packed.shape
    word = packed.contiguous().view(torch.int16).to(torch.int64)  # [n, 2 * columns]; the sign is masked away below
    upper = (word << 24).bitwise_and_(0x000000FF_00000000)
    word.bitwise_and_(0xFF).bitwise_or_(upper)  # nibbles 0, 1 in bits 0 … 7; 2, 3 in bits 32 … 39
    word.bitwise_or_(word << 12).bitwise_and_(0x000F000F_000F000F)
    even, odd = word.view(n, columns, 2).unbind(-1)
    return (even | odd << 8).view(torch.uint8)
