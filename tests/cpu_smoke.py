"""Runs every compiled operation of a given library once; `tests/test_cpu_build.py` starts it as a process of its own.

    python -m tests.cpu_smoke LIBRARY

The library is one with traps at undefined behaviour, or for another CPU. All memory that it is given ends at a page
that may not be touched, so reading or writing beyond the end is a crash. What it was doing is the last line printed.
"""

import ctypes
import itertools
import math
import mmap
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duolocal.cache import DuoCache
from duolocal.cache import pool as block_pool
from duolocal.cache import ring as ring_module
from duolocal.heads import HeadPlan
from duolocal.kernels import pointwise
from duolocal.kernels.cpu import attention, operations
from duolocal.kernels.cpu import pool as thread_pool
from duolocal.kernels.cpu.operations import CpuKernels
from duolocal.kernels.matrix import PACKINGS
from duolocal.quant.awq import AWQWeight
from duolocal.quant.bitsandbytes import InRows
from duolocal.quant.gguf import GGUFWeight
from duolocal.quant.kv import KV_FORMATS, kv_layout
from duolocal.quant.weight import DenseWeight, Linear, Weight
from tests.compiled import DENSE, decoded, normal, random_weight
from tests.test_cpu_attention import feed

_PROT_NONE = 0


def doing(*what: object) -> None:
    """Say what comes next, also if it is the last that is heard."""
    sys.stdout.write(" ".join(map(str, what)) + "\n")
    sys.stdout.flush()


def walled(x: Tensor) -> Tensor:
    """Return a contiguous copy whose last byte is followed by a page that may not be touched."""
    page = mmap.PAGESIZE
    size = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    if x.numel() == 0:
        return x
    out = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes).view(x.shape)
    return out.copy_(x)


class _WalledTorch:
    """The torch module, but new tensors end at a wall and are NaN (bytes: 0xFF)."""

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        bits = torch.full((math.prod(shape) * dtype.itemsize,), 0xFF, dtype=torch.uint8)
        return walled(bits.view(dtype).view(shape))

    def empty_like(self, x: Tensor) -> Tensor:
        return self.empty(*x.shape, dtype=x.dtype)

    def zeros(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: Any = None) -> Tensor:
        return self.empty(*shape, dtype=dtype)

    def full(self, shape: tuple[int, ...], value: int, *, dtype: torch.dtype, device: Any = None) -> Tensor:
        return walled(torch.full(shape, value, dtype=dtype))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def walled_weight(weight: Weight) -> Weight:
    """Return the weight with every part before a wall of its own; GGUF rows one after the other."""
    if isinstance(weight, AWQWeight):
        return AWQWeight(walled(weight.qweight), walled(weight.qzeros), walled(weight.scales))
    if isinstance(weight, GGUFWeight):
        return GGUFWeight(walled(weight.raw), weight.type, weight.in_features)
    if isinstance(weight, InRows):
        return InRows(walled(weight.raw), weight.kind, weight.in_features)
    assert isinstance(weight, DenseWeight)
    return DenseWeight(walled(weight.tensor))


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    limit = tolerance * max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(got.double(), wanted.double(), rtol=0, atol=limit)


def products(kernels: CpuKernels) -> None:
    for packing, num_rows in itertools.product(PACKINGS, (1, 5, 40)):
        wide = (512, 1280) if packing not in DENSE else (5, 301, 1100)
        for in_features, out_features in itertools.product(wide, (8, 40) if packing == "AWQ" else (1, 7, 40)):
            doing("linear", packing, num_rows, in_features, out_features)
            weight = walled_weight(random_weight(packing, out_features, in_features, group_size=64))
            values = decoded(weight)
            x, bias = walled(normal(num_rows, in_features)), walled(normal(out_features, seed=1))
            residual = walled(normal(num_rows, out_features, seed=2))
            (got,) = kernels.linear(x, (Linear(weight, bias),), residual=residual)
            close(got, x.double() @ values.double().T + bias + residual, 1e-4)
            if packing != "AWQ":
                doing("embed", packing)
                ids = walled(torch.tensor([out_features - 1, 0]))
                assert torch.equal(kernels.embed(weight, ids), values[ids])


def pointwise_operations(kernels: CpuKernels) -> None:
    doing("pointwise")
    for size in (6, 16, 37, 64, 1030):
        x, up, weight = walled(normal(19, size)), walled(normal(19, size, seed=1)), walled(normal(size, seed=2))
        close(kernels.rms_norm(x, weight, eps=1e-5), pointwise.rms_norm(x, weight, eps=1e-5), 1e-5)
        close(kernels.silu_mul(x * 60, up), pointwise.silu_mul(x * 60, up), 1e-5)
    for scale in (0.0, 1e-40, 1e4, 1e30):
        gate = walled(normal(3, 37) * scale)
        assert kernels.silu_mul(gate, torch.ones_like(gate)).isfinite().all()
    for dim in (6, 64, 80):
        x, angles = walled(normal(19, 3, dim)), normal(19, dim // 2, seed=1)
        cos, sin = walled(angles.cos()), walled(angles.sin())
        close(kernels.rotary_embedding(x, cos, sin), pointwise.rotary_embedding(x, cos, sin), 1e-6)


def cached_attention(kernels: CpuKernels) -> None:
    plan = HeadPlan(((True, False), (False, True)), sink_size=3, recent_size=40, source="smoke")
    for kv, (dim, block_size) in itertools.product(KV_FORMATS, ((64, 32), (80, 16), (128, 64))):
        layout = kv_layout(kv, head_dim=dim, dtype=torch.float32, block_size=block_size)
        q = normal(2, 240, 6, dim)
        k, v = normal(2, 2, 240, 2, dim, seed=1)
        v[:, 50] = 0.0
        v[:, 51] = 1e6
        v[:, 52] *= 1e-40
        results = []
        for which in (kernels, None):
            doing("attention", kv, dim, block_size, "torch" if which is None else "compiled")
            cache = DuoCache(
                plan,
                layout,
                num_heads=6,
                context=240,
                device=torch.device("cpu"),
                dtype=torch.float32,
                kernels=which,
            )
            results.append(feed(cache, q, k, v, [150, 1, 1, 40, 1, 47], place=walled))
        close(results[0], results[1], 2e-5)


def main() -> None:
    library = Path(sys.argv[1])
    torch.set_num_threads(1)
    thread_pool.build = lambda **_: library
    fake = _WalledTorch()
    for module in (operations, attention, block_pool, ring_module):
        module.torch = fake  # type: ignore[attr-defined]
    kernels = CpuKernels(2)
    assert kernels.pool._library._name == str(library)
    pointwise_operations(kernels)
    products(kernels)
    cached_attention(kernels)
    doing("done")


if __name__ == "__main__":
    main()
