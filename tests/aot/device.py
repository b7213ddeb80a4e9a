"""A GPU that is not there: tensors without memory on device "cuda", and what torch would say of the device.

Operations then choose as they would on that GPU: dtypes of products, routes, numbers of programs. Nothing is computed,
and an operation that asks for a value of a tensor fails, as no decode step may.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import EllipsisType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132}  # multiprocessors of an A100, RTX 3090, RTX 4090, H100 SXM
_MODE = FakeTensorMode()  # one for all: operations may keep tensors


@contextmanager
def gpu(arch: int) -> Iterator[None]:
    """Stand in for a GPU of architecture `arch`; tensors made inside, with device "cuda", have no memory."""
    properties = SimpleNamespace(
        major=arch // 10, minor=arch % 10, multi_processor_count=PROCESSORS[arch], name=f"sm_{arch}"
    )
    with ExitStack() as stack:
        for name, said in (
            ("get_device_properties", properties),
            ("get_device_capability", (arch // 10, arch % 10)),
            ("current_device", 0),
            ("is_available", True),
        ):
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, said=said, **__: said))
        # An allocation is aligned, so what triton asks of an address, whether 16 divides it, the offset answers.
        stack.enter_context(
            mock.patch.object(FakeTensor, "data_ptr", lambda x: x.storage_offset() * x.element_size(), create=True)
        )
        stack.enter_context(_MODE)
        stack.enter_context(_Unguarded())
        yield


class _Unguarded(TorchFunctionMode):
    """Do without the guard that these few methods set for a device: a torch without CUDA has none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _index(*args)
        if func is Tensor.__setitem__:
            target, index, value = args
            view = _index(target, index)
            view.copy_(value) if isinstance(value, Tensor) else view.fill_(value)
            return None
        if func is Tensor.copy_:
            return torch.ops.aten.copy_(*args, **(kwargs or {}))
        if func is Tensor.contiguous:
            (x,) = args
            return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))


def _index(x: Tensor, index: Any) -> Tensor:
    """Return x[index] for integers, slices, None and ..., and for a single tensor."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(part, EllipsisType) for part in parts):
        at = next(i for i, part in enumerate(parts) if isinstance(part, EllipsisType))
        named = sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (x.ndim - named)
    dim = 0
    for part in parts:
        if part is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(part, slice):
            x, dim = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1), dim + 1
        elif isinstance(part, int):
            x = x.select(dim, part)
        else:
            assert isinstance(part, Tensor) and part.ndim == 1, f"index {part!r}"
            x, dim = x.index_select(dim, part), dim + 1
    return x
