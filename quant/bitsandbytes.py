"""NF4 and INT8 weights as bitsandbytes makes them from 16-bit ones.

Owns the two kinds of weight, their decoding, and the call into bitsandbytes that quantizes: only that (and decoding
NF4 on a GPU) needs the package. Which matrices of a model are quantized is decided in `duolocal.models.quantized`.

NF4 (QLoRA, arXiv 2305.14314, appendix E): 64 neighbouring values share an absmax in float32; each is a 4-bit code
for one of sixteen levels between -1 and 1. INT8 (LLM.int8(), arXiv 2208.07339): a row shares an absmax, a value is
code * absmax / 127; the weights are rounded to float16 first, as bitsandbytes does it. Activations are not quantized
and no outlier is held back.

A decoded value is the float32 product, rounded once to the wanted dtype: bit for bit what bitsandbytes decodes.
"""

import importlib.util
import logging
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from duolocal.errors import ModelFileError, SettingsError
from duolocal.kernels.matrix import PackedMatrix
from duolocal.quant.weight import DenseWeight, Weight

Kind = Literal["nf4", "int8"]
KINDS: tuple[Kind, ...] = ("nf4", "int8")
BLOCK_SIZE = 64  # input features that share an absmax of NF4; rows that are no multiple of it stay as they are
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_INT8_STEP = 7.874015718698502e-3  # 1 / 127, rounded as bitsandbytes has it
_CHUNK_ELEMENTS = 1 << 20  # quantized or decoded at a time: bounds the temporaries to about 30 MB


@dataclass(frozen=True)
class NF4Weight:
    """A weight [out_features, in_features] in bitsandbytes' own layout."""

    codes: Tensor  # [out_features, in_features / 2] uint8, two codes per byte, high nibble first
    absmax: Tensor  # [out_features, in_features / 64] float32

    def __post_init__(self) -> None:
        assert self.codes.dtype == torch.uint8 and self.absmax.dtype == torch.float32
        assert self.codes.shape == (self.absmax.shape[0], self.absmax.shape[1] * BLOCK_SIZE // 2)
        assert self.codes.is_contiguous() and self.absmax.is_contiguous()

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return 2 * self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes

    @property
    def format(self) -> str:
        return "nf4"

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the whole matrix [out_features, in_features] in `dtype`."""
        if self.codes.is_cuda and dtype in (torch.float32, torch.float16, torch.bfloat16):
            return decode_by_library(self, dtype)
        return self.row_range(0, self.out_features, dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows `index` [n] as [n, in_features] in `dtype`, dequantizing only those."""
        return _decode_nf4(self.codes[index], self.absmax[index], dtype)

    def row_range(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows start..stop-1 as [stop - start, in_features] in `dtype`."""
        return _decode_nf4(self.codes[start:stop], self.absmax[start:stop], dtype)

    def packed(self) -> PackedMatrix:
        """Refuse: kernels that decode on the way take `InRows`."""
        raise AssertionError("nf4 in bitsandbytes' layout has no packing that kernels read")


@dataclass(frozen=True)
class Int8Weight:
    """A weight [out_features, in_features] in 8 bits, row by row."""

    codes: Tensor  # [out_features, in_features] int8
    absmax: Tensor  # [out_features] float32

    def __post_init__(self) -> None:
        assert self.codes.dtype == torch.int8 and self.absmax.dtype == torch.float32
        assert self.absmax.shape == self.codes.shape[:1]

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes

    @property
    def format(self) -> str:
        return "int8"

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the whole matrix [out_features, in_features] in `dtype`."""
        return self.row_range(0, self.out_features, dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows `index` [n] as [n, in_features] in `dtype`, dequantizing only those."""
        return _decode_int8(self.codes[index], self.absmax[index], dtype)

    def row_range(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows start..stop-1 as [stop - start, in_features] in `dtype`."""
        return _decode_int8(self.codes[start:stop], self.absmax[start:stop], dtype)

    def packed(self) -> PackedMatrix:
        """Refuse: kernels that decode on the way take `InRows`."""
        raise AssertionError("int8 with its absmax apart has no packing that kernels read")


@dataclass(frozen=True)
class InRows:
    """An NF4 or INT8 weight with scales and codes of a row in one run of bytes, for the compiled CPU kernels.

    nf4: blocks of 36 bytes, float32 absmax | 16 bytes of values 0..15 (low nibbles) and 16..31 (high) | the same of
    values 32..63. int8: float32 absmax of the row | int8 codes. The codes are those of the original.
    """

    raw: Tensor  # [out_features, row_bytes] uint8
    kind: Kind
    in_features: int

    @property
    def out_features(self) -> int:
        return self.raw.shape[0]

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    @property
    def format(self) -> str:
        return self.kind

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the whole matrix [out_features, in_features] in `dtype`."""
        return self.row_range(0, self.out_features, dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows `index` [n] as [n, in_features] in `dtype`, dequantizing only those."""
        return _apart(self.raw[index], self.kind).dequantize(dtype)

    def row_range(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows start..stop-1 as [stop - start, in_features] in `dtype`."""
        out = torch.empty((max(0, stop - start), self.in_features), dtype=dtype, device=self.raw.device)
        step = max(1, _CHUNK_ELEMENTS // self.in_features)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            out[first - start : last - start] = _apart(self.raw[first:last], self.kind).dequantize(dtype)
        return out

    def packed(self) -> PackedMatrix:
        """Return the bytes as they are, for kernels that decode on the way."""
        packing: Literal["NF4", "INT8"] = "NF4" if self.kind == "nf4" else "INT8"
        return PackedMatrix(packing, self.raw, self.out_features, self.in_features, row_bytes=self.raw.stride(0))


def quantizes(in_features: int) -> bool:
    """Return whether a matrix with rows of so many values is quantized: whole blocks only."""
    return in_features % BLOCK_SIZE == 0


def quantized_bytes(kind: Kind, out_features: int, in_features: int) -> int:
    """Return the bytes that a matrix takes in `kind`."""
    if kind == "nf4":
        return out_features * in_features // BLOCK_SIZE * (BLOCK_SIZE // 2 + 4)
    return out_features * (in_features + 4)


def quantize(weight: DenseWeight, kind: Kind, *, name: str) -> Weight:
    """Quantize a 16- or 32-bit matrix with bitsandbytes, on the device where it lies.

    The rows must be whole blocks (`quantizes`). `name` is said where a value is not finite: ModelFileError. Raises
    SettingsError where bitsandbytes is missing.
    """
    functional = require(kind).functional
    tensor = weight.tensor
    assert quantizes(weight.in_features), tensor.shape
    device, shape = tensor.device, (weight.out_features, weight.in_features)
    # Made before the parts: lists of parts put together at the end would leave holes in memory, as much as the result.
    if kind == "nf4":
        codes = torch.empty((shape[0], shape[1] // 2), dtype=torch.uint8, device=device)
        absmax = torch.empty((shape[0], shape[1] // BLOCK_SIZE), device=device)
    else:
        codes = torch.empty(shape, dtype=torch.int8, device=device)
        absmax = torch.empty(shape[0], device=device)
    step = max(1, _CHUNK_ELEMENTS // shape[1])  # blocks do not cross rows: parts give the bits of the whole
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        part = tensor[rows].to(torch.float16 if kind == "int8" else tensor.dtype).contiguous()
        if not all(bool(extreme.isfinite()) for extreme in torch.aminmax(part)):
            wanted = "finite values" if kind == "nf4" else "values within float16"
            raise ModelFileError(f"{name} holds NaN or infinite values, wanted {wanted}: choose another file")
        if kind == "nf4":
            packed, state = functional.quantize_4bit(part, blocksize=BLOCK_SIZE, quant_type="nf4")
            codes[rows] = packed.view(len(part), -1)
            absmax[rows] = state.absmax.view(len(part), -1)
        else:
            codes[rows], absmax[rows], _ = functional.int8_vectorwise_quant(part)
            # A row of zeros is 0 / 0 to the library, and what a NaN becomes in 8 bits depends on the machine.
            codes[rows].masked_fill_(absmax[rows].view(-1, 1) == 0, 0)
    return NF4Weight(codes, absmax) if kind == "nf4" else Int8Weight(codes, absmax)


def in_rows(weight: Weight) -> Weight:
    """Return an NF4 or INT8 weight as `InRows`, any other as it is."""
    if isinstance(weight, NF4Weight):
        rows, blocks = weight.absmax.shape
        raw = torch.empty((rows, blocks, 4 + BLOCK_SIZE // 2), dtype=torch.uint8, device=weight.codes.device)
        raw[:, :, :4] = weight.absmax.unsqueeze(-1).view(torch.uint8)
        codes = weight.codes.view(rows, blocks, -1)
        low, high = torch.stack((codes >> 4, codes & 15), -1).view(rows, blocks, 2, 2, 16).unbind(3)
        raw[:, :, 4:] = (low | high << 4).flatten(2)
        return InRows(raw.flatten(1), "nf4", weight.in_features)
    if isinstance(weight, Int8Weight):
        absmax = weight.absmax.unsqueeze(-1).view(torch.uint8)
        return InRows(torch.cat((absmax, weight.codes.view(torch.uint8)), 1), "int8", weight.in_features)
    return weight


def _apart(raw: Tensor, kind: Kind) -> NF4Weight | Int8Weight:
    """Return rows of `InRows` as they were before."""
    if kind == "int8":
        absmax = _copy(raw[:, :4]).view(torch.float32).squeeze(1)
        return Int8Weight(raw[:, 4:].view(torch.int8), absmax)
    blocks = raw.unflatten(1, (-1, 4 + BLOCK_SIZE // 2))
    absmax = _copy(blocks[:, :, :4]).view(torch.float32).squeeze(-1)
    runs = blocks[:, :, 4:].reshape(len(raw), -1, 2, 16)
    values = torch.stack((runs & 15, runs >> 4), 3).view(len(raw), -1, 2)
    return NF4Weight(values[..., 0] << 4 | values[..., 1], absmax)


def _copy(raw: Tensor) -> Tensor:
    """Return bytes that may stand at any address as torch can read numbers from them."""
    return raw.clone(memory_format=torch.contiguous_format)


def _decode_nf4(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty((codes.shape[0], 2 * codes.shape[1]), dtype=dtype, device=codes.device)
    pairs = _pairs(codes.device)
    step = max(1, _CHUNK_ELEMENTS // out.shape[1])
    for start in range(0, codes.shape[0], step):
        part = slice(start, start + step)
        levels = pairs.index_select(0, codes[part].flatten().int()).view(-1, BLOCK_SIZE)
        out[part] = levels.mul_(absmax[part].reshape(-1, 1)).view(out[part].shape)
    return out


@cache
def _pairs(device: torch.device) -> Tensor:
    """Return [256, 2] float32: the levels of the two codes in each byte."""
    with torch.inference_mode(False):
        levels = torch.tensor(NF4_LEVELS, device=device)
        return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), 1)


def _decode_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, codes.shape[1]))
    for start in range(0, codes.shape[0], step):
        part = slice(start, start + step)
        out[part] = (codes[part] * absmax[part].unsqueeze(1)).mul_(_INT8_STEP)
    return out


def decode_by_library(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Return the whole matrix as bitsandbytes decodes it: one kernel on a GPU, the same bits as `dequantize`."""
    functional = require("nf4").functional
    state = functional.QuantState(
        absmax=weight.absmax.flatten(),
        shape=torch.Size((weight.out_features, weight.in_features)),
        dtype=dtype,
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
    )
    return functional.dequantize_4bit(weight.codes.view(-1, 1), state)


@cache
def require(kind: str) -> Any:
    """Return the package bitsandbytes; raise SettingsError, one line with what to do, where it cannot be had."""
    advice = 'pip install "duolocal[bitsandbytes]", or leave --weights out'
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SettingsError(f"--weights {kind} needs the package bitsandbytes, which is not installed: {advice}")
    # On import it looks for a package `kernels`, to load code from a hub (and complains where there is none): nothing
    # is fetched without being asked for, and in a checkout that name would find ours. And for triton, which only its
    # kernels for other GPUs than CUDA's use.
    unseen = ("kernels", "triton")
    hidden = {name: sys.modules[name] for name in sys.modules if name.partition(".")[0] in unseen}
    for name in hidden:
        del sys.modules[name]
    sys.modules |= dict.fromkeys(unseen)  # type: ignore[arg-type]
    noise = logging.getLogger("bitsandbytes")
    before, compile_as_ever = noise.level, torch.compile
    noise.setLevel(logging.CRITICAL)
    # It compiles two functions that are not used here, for which torch would load its compiler: seconds, and triton.
    torch.compile = lambda function, **_: function  # type: ignore[assignment]
    try:
        import bitsandbytes
        import bitsandbytes.functional
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(f"--weights {kind}: bitsandbytes cannot be used here ({reason}): {advice}") from error
    finally:
        noise.setLevel(before)
        torch.compile = compile_as_ever
        for name in unseen:
            del sys.modules[name]
        sys.modules.update(hidden)
    return bitsandbytes
