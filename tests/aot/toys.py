"""Kernels that show that the check can fail: one is good, each of the others is bad in one way."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl


@triton.jit
def good_kernel(x, out, n, factor, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=0.0) * factor, mask=i < n)


@triton.jit
def spilling_kernel(x, out, SIZE: tl.constexpr):
    """A [SIZE, SIZE] tile in one warp: SIZE² / 32 values live in every thread."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tile = tl.load(x + at)
    for _ in range(8):
        tile = tile * tl.max(tile, axis=0)[None, :] + tl.sum(tile, axis=1)[:, None]
    tl.store(out + at, tile)


@triton.jit
def shared_kernel(x, out, steps, SIZE: tl.constexpr):
    """Two [SIZE, SIZE] float16 operands in shared memory, as often as there are stages."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(steps):
        a = tl.load(x + 2 * step * SIZE * SIZE + at)
        b = tl.load(x + (2 * step + 1) * SIZE * SIZE + at)
        total = tl.dot(a, b, total)
    tl.store(out + at, total)


@triton.jit
def fp8_kernel(x, out, SIZE: tl.constexpr):
    """Converts from float8_e4m3fn, which sm_80 cannot."""
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(tl.float8e4nv, bitcast=True).to(tl.float16))


def toy_cases() -> dict[str, Callable[[], object]]:
    """Return what launches each toy, by name."""

    def new(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(1 << 20, dtype=dtype, device="cuda")

    def good(n: int, dtype: torch.dtype = torch.float32, first: int = 0) -> None:
        x = new(dtype)[first:]
        good_kernel[lambda meta: (triton.cdiv(n, meta["SIZE"]),)](x, x, n, 2.0, SIZE=128)

    f32, f16, u8 = torch.float32, torch.float16, torch.uint8
    return {
        "good 1": lambda: good(1),
        "good 48": lambda: good(48),
        "good 64": lambda: good(64),  # divisible by 16, as 48 is: the same compilation
        "good 65": lambda: good(65),
        "good unaligned": lambda: good(65, first=1),
        "good half": lambda: good(65, f16),
        "good long": lambda: good(2**31 + 1),
        "wide grid": lambda: good_kernel[(1, 65536)](new(f32), new(f32), 65, 3.0, SIZE=256),
        "spilling": lambda: spilling_kernel[(1,)](new(f32), new(f32), SIZE=128, num_warps=1),
        "shared": lambda: shared_kernel[(1,)](new(f16), new(f32), 100, SIZE=128, num_warps=8, num_stages=4),
        "fp8": lambda: fp8_kernel[(1,)](new(u8), new(f16), SIZE=128),
    }


def failing_operations() -> dict[str, Callable[[], object]]:
    """Return what no operation may do, by name."""

    def read_back() -> None:
        torch.zeros(4, device="cuda").sum().item()

    def on_the_host() -> None:
        x = torch.zeros(4)
        good_kernel[(1,)](x, x, 4, 2.0, SIZE=128)

    return {"reads back": read_back, "on the host": on_the_host}
