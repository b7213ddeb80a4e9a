"""What a section measures with: device, time left, records, and a clock that suits the device.

On a GPU the clock is the device's own (events around replays of a captured graph, or around single long calls); on a
CPU, where tests run the sections in Triton's interpreter, it is the host's and says nothing.
"""

import contextlib
import gc
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from duolocal.bench.gpu.sizes import Sizes
from duolocal.models.synthetic import random_int4
from duolocal.quant.grouped import GroupedWeight

Call = Callable[[], Any]
_TRACE_CHARACTERS = 1500
_REPLAY_S = 2e-3  # a replay should last about as long: events are exact to a microsecond


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    least: float
    most: float
    runs: int

    def report(self) -> dict[str, float]:
        """Return the figures as JSON holds them, in microseconds."""
        names = ("us", "us_min", "us_max")
        values = (self.median, self.least, self.most)
        return {name: round(1e6 * value, 3) for name, value in zip(names, values, strict=True)} | {"runs": self.runs}


@dataclass(frozen=True)
class Ceilings:
    """What the device was measured to do: a copy's bytes per second, read and written, and a bf16 product's FLOP/s."""

    copy_bytes_per_s: float
    matmul_flop_per_s: float


@dataclass
class Bench:
    """One section's run."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    deadline: float  # on time.monotonic()
    emit: Callable[[dict[str, Any]], None]
    known_ceilings: Ceilings | None = None
    profile_path: str | None = None
    seed: int = 0
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator(device=self.device).manual_seed(self.seed)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left_s(self) -> float:
        """Seconds until the section must have ended."""
        return self.deadline - time.monotonic()

    @cached_property
    def ceilings(self) -> Ceilings:
        """What the device does at best; measured here where the suite did not hand it down."""
        return self.known_ceilings or measure_ceilings(self)

    def record(self, what: str, **fields: Any) -> None:
        """Hand a result on; it survives whatever happens afterwards."""
        self.emit({"what": what, **fields})

    def fits(self, wanted_s: float, what: str, **fields: Any) -> bool:
        """Say whether `wanted_s` more seconds fit, and record what is left out where they do not."""
        if self.left_s >= wanted_s:
            return True
        skipped = f"wanted {wanted_s:.0f} s, {max(0.0, self.left_s):.0f} s were left"
        self.record(what, **fields, skipped=skipped)
        return False

    @contextlib.contextmanager
    def item(self, what: str, **fields: Any) -> Iterator[None]:
        """Contain a failure inside: it becomes a record with `error`, and the section goes on with the next item.

        An error of the device itself does not go away in this process, so that one ends the section.
        """
        try:
            yield
        except Exception as error:  # noqa: BLE001  one configuration that fails must not hide the others
            trace = traceback.format_exc()
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            self.record(what, **fields, error=_one_line(error), trace=trace[-_TRACE_CHARACTERS:])
            sys.stdout.write(trace)
            sys.stdout.flush()
            self.synchronize()
        self.release()

    def release(self) -> None:
        """Give the device all memory back that nothing holds any more; an engine and its decoder hold each other."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def randn(self, *shape: int, dtype: torch.dtype | None = None, std: float = 1.0) -> Tensor:
        """Return normal numbers on the device in `dtype` (the compute dtype when None)."""
        x = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return x.normal_(std=std, generator=self._generator)

    def int4(self, out_features: int, in_features: int) -> GroupedWeight:
        """Return a random 4-bit weight on the device, in the suite's groups."""
        return random_int4(out_features, in_features, self.sizes.group_size, self._generator)

    def copies(self, num_bytes: int) -> int:
        """Return among how many inputs of `num_bytes` to rotate, so that none comes from a cache."""
        return max(1, min(self.sizes.most_copies, -(-self.sizes.rotate_bytes // max(1, num_bytes))))

    def time(self, calls: Sequence[Call], *, graph: bool = True, repeats: int | None = None) -> Timing:
        """Time calls that do the same work on different inputs, one after the other; return the time of one.

        graph: capture them as one CUDA graph, so that launching costs nothing; for what a CUDA graph cannot hold or
        what takes milliseconds, False.
        """
        repeats = repeats or self.sizes.repeats
        if not self.on_gpu:
            return _timing([_host_time(call) for call in calls[:repeats]])
        if not graph:
            for call in calls[:2]:
                call()
            return _timing([_event_time(calls[i % len(calls)]) for i in range(repeats)])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:  # compiled and loaded before a capture
                call()
        torch.cuda.current_stream().wait_stream(stream)
        once = _event_time(lambda: [call() for call in calls])
        rounds = max(1, min(50, round(_REPLAY_S / max(once, 1e-6))))
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(rounds):
                for call in calls:
                    call()
        captured.replay()
        times = [_event_time(captured.replay) for _ in range(repeats)]
        del captured
        return _timing([elapsed / (rounds * len(calls)) for elapsed in times])

    def check(
        self, call: Callable[[], Tensor], wanted: Tensor | None = None, *, tolerance: float = 0.0
    ) -> float | None:
        """Run `call` with every torch.empty poisoned: all of its result must be written, and near `wanted`.

        Returns ‖result − wanted‖ / ‖wanted‖, None without `wanted`. Raises ArithmeticError beyond `tolerance` or
        where a number is not finite.
        """
        with poisoned():
            result = call()
            self.synchronize()
        if not bool(result.isfinite().all()):
            raise ArithmeticError("the result has numbers that are not finite, or that were never written")
        if wanted is None:
            return None
        assert result.shape == wanted.shape, (result.shape, wanted.shape)
        error = float((result.double() - wanted.double()).norm() / wanted.double().norm())
        if not error <= tolerance:
            raise ArithmeticError(f"relative error {error:.2e}, at most {tolerance:.0e} was expected")
        return error

    def of_copy(self, num_bytes: float, elapsed_s: float) -> dict[str, float]:
        """Return bytes per second and the share of the measured copy bandwidth that is."""
        rate = num_bytes / elapsed_s
        return {"gb_per_s": round(rate / 1e9, 2), "of_copy": round(rate / self.ceilings.copy_bytes_per_s, 4)}

    def of_matmul(self, flop: float, elapsed_s: float) -> dict[str, float]:
        """Return FLOP per second and the share of the measured rate of a large bf16 product that is."""
        rate = flop / elapsed_s
        return {"tflop_per_s": round(rate / 1e12, 3), "of_matmul": round(rate / self.ceilings.matmul_flop_per_s, 4)}

    def memory(self) -> dict[str, int]:
        """Return the peak bytes of torch's allocator since `forget_peak`, {} on a CPU."""
        if not self.on_gpu:
            return {}
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }

    def forget_peak(self) -> None:
        """Begin to count the peak anew."""
        self.release()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Let torch.empty return NaN, and the largest integers, inside."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that other operations may sum in another order is no matter here
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


@contextlib.contextmanager
def changed(module: ModuleType, values: dict[str, Any]) -> Iterator[None]:
    """Give constants of a module other values inside."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def measure_ceilings(bench: Bench) -> Ceilings:
    """Measure a large copy and a large 16-bit product on random data; record both."""
    source = torch.empty(bench.sizes.copy_bytes // 4, dtype=torch.int32, device=bench.device)
    source.random_(generator=bench._generator)
    target = torch.empty_like(source)
    copy = bench.time([partial(target.copy_, source)], graph=False)
    assert torch.equal(target[-1024:], source[-1024:])
    del source, target
    bench.release()
    n = bench.sizes.matmul
    a, b = bench.randn(n, n), bench.randn(n, n)
    out = torch.empty_like(a)
    product = bench.time([lambda: torch.mm(a, b, out=out)], graph=False)
    found = Ceilings(2 * bench.sizes.copy_bytes / copy.median, 2 * n**3 / product.median)
    bench.record("copy", bytes=bench.sizes.copy_bytes, **copy.report(), gb_per_s=round(found.copy_bytes_per_s / 1e9, 2))
    bench.record("matmul", n=n, **product.report(), tflop_per_s=round(found.matmul_flop_per_s / 1e12, 3))
    bench.record("ceilings", **asdict(found))
    return found


def _event_time(call: Call) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _host_time(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _timing(seconds: Sequence[float]) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
