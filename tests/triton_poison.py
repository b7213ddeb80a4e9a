"""Poison for the tests of GPU kernels: results begin as NaN, and NaN stands around them."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

_MARGIN = 64  # numbers before and after a result


class _PoisonedTorch:
    """The torch module, but what `empty` returns is NaN, and so is the memory around it."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = int(torch.Size(shape).numel())
        buffer = torch.full((size + 2 * _MARGIN,), float("nan"), dtype=dtype, device=device)
        self.buffers.append(buffer)
        return buffer[_MARGIN : _MARGIN + size].view(shape)

    def empty_like(self, x: Tensor) -> Tensor:
        return self.empty(x.shape, dtype=x.dtype, device=x.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def poison(patch: pytest.MonkeyPatch, *modules: ModuleType) -> Iterator[None]:
    """Inside, what `modules` allocate starts as NaN; at the end nothing beside it may have been written."""
    fake = _PoisonedTorch()
    for module in modules:
        patch.setattr(module, "torch", fake)
    yield
    for buffer in fake.buffers:
        assert buffer[:_MARGIN].isnan().all(), "written before the result"
        assert buffer[-_MARGIN:].isnan().all(), "written beyond the result"


def surrounded(x: Tensor) -> Tensor:
    """Return a contiguous copy of x that begins at a multiple of 128 bytes, with bytes 0xFF around it."""
    data = x.contiguous().view(-1).view(torch.uint8)
    buffer = torch.full((data.shape[0] + 512,), 0xFF, dtype=torch.uint8, device=x.device)
    begin = 256 - buffer.data_ptr() % 128
    buffer[begin : begin + data.shape[0]] = data
    return buffer[begin : begin + data.shape[0]].view(x.dtype).view(x.shape)
