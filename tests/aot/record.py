"""Note what a kernel launch would compile, in place of launching it.

Owns the one place that reaches into triton: `JITFunction.run` still binds the arguments and derives signature,
specialisation (integers equal to 1, pointers and integers divisible by 16) and options itself, as in a real launch,
with a stand-in for the driver that names the architecture; only the compilation at its end is put off.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction, driver

from tests.aot.device import gpu

ARCHITECTURES = (80, 86, 89, 90)  # A100, RTX 3090, RTX 4090, H100
GRID_LIMITS = (2**31 - 1, 65535, 65535)  # blocks along x, y, z


@dataclass
class Launch:
    """One compilation that launches asked for; `cases` says which."""

    kernel: str
    module: str
    arch: int
    source: ASTSource
    options: dict[str, Any]
    constants: dict[str, Any]
    signature: dict[str, str]
    cases: list[str] = field(default_factory=list)
    grids: list[tuple[int, ...]] = field(default_factory=list)
    bad_grids: list[str] = field(default_factory=list)


class _Driver:
    """A driver of a device whose number is its architecture: triton keeps its caches per device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


class Recorder:
    """The launches noted so far, each (kernel, signature, constants, options, architecture) once."""

    def __init__(self) -> None:
        self.launches: dict[tuple[Any, ...], Launch] = {}

    def run(self, case: str, operation: Callable[[], object], architectures: tuple[int, ...] = ARCHITECTURES) -> None:
        """Run `operation` on a stand-in for each of `architectures`; note its launches under the name `case`."""
        for arch in architectures:
            with gpu(arch), self._noting(case, arch):
                operation()

    @contextmanager
    def _noting(self, case: str, arch: int) -> Iterator[None]:
        run, compile_ = JITFunction.run, JITFunction._do_compile
        noted: list[Launch] = []

        def note(
            fn: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, attributes: Any, warmup: bool
        ) -> None:
            names = list(fn.signature.parameters)
            where = (fn.module, fn.fn.__qualname__, key, device)
            launch = self.launches.get(where)
            if launch is None:
                launch = self.launches[where] = Launch(
                    kernel=fn.fn.__name__,
                    module=fn.module,
                    arch=device,
                    source=ASTSource(fn, signature, constants, attributes),
                    options=dict(options.__dict__),
                    constants={names[path[0]]: value for path, value in constants.items()},
                    signature={
                        name: kind + ("/16" if attributes.get((i,)) else "")
                        for i, (name, kind) in enumerate(signature.items())
                        if kind != "constexpr"
                    },
                )
            noted.append(launch)

        def run_and_note(fn: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            noted.clear()
            for name, value in zip(fn.arg_names, args, strict=False):
                assert getattr(value, "is_cuda", True), f"{fn.fn.__name__}: {name} is on the {value.device.type}"
            # warmup: nothing after the compilation is done. It returns early, for `note` returns no kernel.
            run(fn, *args, grid=grid, warmup=True, **kwargs)
            (launch,) = noted
            if case not in launch.cases:
                launch.cases.append(case)
            if callable(grid):
                named = {name: value for name, value in kwargs.items() if name in fn.arg_names}
                grid = grid(fn.signature.bind_partial(*args, **named).arguments)
            grid = tuple(int(n) for n in grid)
            launch.grids.append(grid)
            if not all(1 <= n <= limit for n, limit in zip(grid, GRID_LIMITS, strict=False)):
                launch.bad_grids.append(f"{case}: {grid}")

        driver.set_active(_Driver(arch))
        JITFunction.run, JITFunction._do_compile = run_and_note, note
        try:
            yield
        finally:
            JITFunction.run, JITFunction._do_compile = run, compile_
