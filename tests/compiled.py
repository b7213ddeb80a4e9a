"""What the tests of the compiled CPU kernels share: thread pools, poisoned results, inputs with poison around them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from duolocal.kernels.cpu import attention, build, operations
from duolocal.kernels.cpu.operations import CpuKernels
from duolocal.quant.awq import AWQWeight
from duolocal.quant.bitsandbytes import InRows
from duolocal.quant.gguf import GGUF_TYPES, GGUFWeight
from duolocal.quant.weight import DenseWeight, Weight

THREADS = (1, 2, 3)
UNIT = 2.0**-24  # the relative error of one float32 rounding
GGUF_KINDS = {kind.name: kind for kind in GGUF_TYPES.values()}
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Where the float16 numbers of a block stand: random bytes there would be NaN or infinite.
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
_MARGIN = 65  # floats before and after a result; odd, so that results begin on no vector's boundary

# The mark of a module that runs compiled kernels.
compiled_kernels = [
    pytest.mark.skipif(build.unsupported() is not None, reason=f"compiled kernels: {build.unsupported()}"),
    pytest.mark.usefixtures("one_torch_thread"),
]


@cache
def compiled(num_threads: int, activations: str = "float32") -> CpuKernels:
    return CpuKernels(num_threads, activations=activations)


class _PoisonedTorch:
    """The torch module, but what `empty` returns is NaN, and so is the memory around it."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def empty(self, *shape: int) -> Tensor:
        size = int(np.prod(shape))
        buffer = torch.full((size + 2 * _MARGIN,), float("nan"))
        self.buffers.append(buffer)
        return buffer[_MARGIN : _MARGIN + size].view(shape)

    def empty_like(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return self.empty(*x.shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, results of compiled operations start as NaN; at the end nothing beside them may have been written."""
    fake = _PoisonedTorch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "torch", fake)
        patch.setattr(attention, "torch", fake)
        yield
    for buffer in fake.buffers:
        assert buffer[:_MARGIN].isnan().all(), "written before the result"
        assert buffer[-_MARGIN:].isnan().all(), "written beyond the result"


def surrounded(x: Tensor, *, offset: int = 1) -> Tensor:
    """Return a contiguous copy of x with bytes 0xFF (NaN in every float format) around it, from byte `offset` on.

    `offset`: beyond a multiple of 64.
    """
    data = x.contiguous().view(-1).view(torch.uint8)
    buffer = torch.full((data.shape[0] + 256,), 0xFF, dtype=torch.uint8)
    begin = 64 - buffer.data_ptr() % 64 + offset
    buffer[begin : begin + data.shape[0]] = data
    return buffer[begin : begin + data.shape[0]].view(x.dtype).view(x.shape)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Return float32 normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def random_weight(packing: str, out_features: int, in_features: int, *, seed: int = 0, group_size: int = 32) -> Weight:
    """Return a weight of random bits whose scales are of one magnitude, so that every wrong number shows.

    A weight in rows of bytes is a view: it begins at an odd byte, and there are bytes of others between its rows.
    """
    rng = np.random.default_rng(seed)
    if packing == "AWQ":
        groups = in_features // group_size
        qweight, qzeros = (
            torch.from_numpy(rng.integers(-(2**31), 2**31, (n, out_features // 8)).astype(np.int32))
            for n in (in_features, groups)
        )
        scales = torch.from_numpy(_halves(rng, (groups, out_features)))
        return AWQWeight(*(surrounded(part, offset=4) for part in (qweight, qzeros, scales)))
    if packing in DENSE:
        values = torch.from_numpy(rng.standard_normal((out_features, in_features + 3))).to(DENSE[packing])
        return DenseWeight(surrounded(values, offset=values.element_size())[:, 2:-1])  # rows of a wider matrix
    if packing in ("NF4", "INT8"):
        blocks, block_codes = (in_features // 64, 32) if packing == "NF4" else (1, in_features)
        codes = rng.integers(0, 256, (out_features, blocks, block_codes), dtype=np.uint8)
        absmax = rng.uniform(0.5, 1.0, (out_features, blocks, 1)).astype(np.float32).view(np.uint8)
        whole = torch.from_numpy(np.concatenate((absmax, codes), 2)).flatten(1)
        return InRows(_at_odd_bytes(whole), "nf4" if packing == "NF4" else "int8", in_features)
    kind = GGUF_KINDS[packing]
    raw = rng.integers(0, 256, (out_features, in_features // kind.block_size, kind.block_bytes), dtype=np.uint8)
    for at in HALVES.get(packing, (0,)):
        raw[:, :, at : at + 2] = _halves(rng, raw.shape[:2])[..., None].view(np.uint8)
    return GGUFWeight(_at_odd_bytes(torch.from_numpy(raw).flatten(1)), kind, in_features)


def _at_odd_bytes(raw: Tensor) -> Tensor:
    rows = torch.full((raw.shape[0], raw.shape[1] + 6), 0xFF, dtype=torch.uint8)
    rows[:, 3:-3] = raw
    return surrounded(rows, offset=0)[:, 3:-3]


def decoded(weight: Weight) -> Tensor:
    """Return the whole matrix in float32, from a copy: torch does not read float16 numbers at odd bytes."""
    if isinstance(weight, GGUFWeight):
        weight = GGUFWeight(weight.raw.clone(), weight.type, weight.in_features)
    return weight.dequantize(torch.float32)


def _halves(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (rng.uniform(0.01, 0.02, shape) * rng.choice([-1, 1], shape)).astype(np.float16)
