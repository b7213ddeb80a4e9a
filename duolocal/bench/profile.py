"""Where the time of a decode step and of a prefill chunk goes, operation by operation, beside what the machine can do.

Only for the compiled kernels: their step is a list of operations, which is run again with a clock between them. The
ceilings are measured in the same process: reading memory, and a float32 product that fits the cache.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from duolocal.bench.decode import bytes_per_token
from duolocal.cache.compiled_backend import CompiledBackend
from duolocal.engine.engine import Engine
from duolocal.errors import SettingsError
from duolocal.kernels.cpu.operations import CpuKernels, Recording
from duolocal.kernels.cpu.structs import LinearArgs
from duolocal.quant.weight import DenseWeight, Linear
from duolocal.sampling import Sampler
from duolocal.settings import Sampling

_READ_BYTES = 256 << 20  # more than any cache holds
_PRODUCT = (512, 1024, 1024)  # rows of x, features in, features out
_CALIBRATION_S = 0.05


@dataclass(frozen=True)
class Ceilings:
    """What all threads together reach on this machine."""

    read_bytes_per_s: float
    flop_per_s: float

    def best(self, other: "Ceilings") -> "Ceilings":
        """Return the higher of each: what disturbs a measurement lowers it."""
        return Ceilings(max(self.read_bytes_per_s, other.read_bytes_per_s), max(self.flop_per_s, other.flop_per_s))


@dataclass(frozen=True)
class OperationShare:
    """One kind of operation in one step."""

    name: str
    calls: int
    elapsed_s: float  # of all calls; a sum of medians
    num_bytes: int = 0  # of weights, keys and values that must be read
    flop: int = 0

    def report(self, ceilings: Ceilings, whole_s: float) -> dict[str, object]:
        """Return the figures as JSON holds them."""
        return {
            "operation": self.name,
            "calls": self.calls,
            "ms": round(1e3 * self.elapsed_s, 4),
            "share": round(self.elapsed_s / whole_s, 4),
            "gb_per_s": round(self.num_bytes / self.elapsed_s / 1e9, 2) if self.num_bytes else None,
            "gflop_per_s": round(self.flop / self.elapsed_s / 1e9, 2) if self.flop else None,
            "of_ceiling": round(self.of_ceiling(ceilings), 3) if self.num_bytes or self.flop else None,
        }

    def of_ceiling(self, ceilings: Ceilings) -> float:
        """Return the share of the nearer ceiling that is reached."""
        least_s = max(self.num_bytes / ceilings.read_bytes_per_s, self.flop / ceilings.flop_per_s)
        return least_s / self.elapsed_s


@dataclass(frozen=True)
class StepProfile:
    """A step, its operations by falling time, and what is left for Python."""

    tokens: int  # computed in the step
    position: int  # tokens in the cache before it
    whole_s: float  # median of the step as the engine runs it, sampling included in decode
    operations: tuple[OperationShare, ...]

    @property
    def rest_s(self) -> float:
        """Seconds outside the kernels."""
        return max(0.0, self.whole_s - sum(operation.elapsed_s for operation in self.operations))


def compiled_kernels(engine: Engine) -> CpuKernels:
    """Return the engine's compiled kernels; raise SettingsError where it computes with others."""
    kernels = engine.transformer.kernels
    if not isinstance(kernels, CpuKernels):
        raise SettingsError(
            "there is a profile of the compiled CPU kernels only: leave out --kernels, --dtype, --device"
        )
    return kernels


def measure_ceilings(kernels: CpuKernels) -> Ceilings:
    """Measure with float32 matrices and the kernels themselves: the best of many runs."""
    wide = Linear(DenseWeight(torch.ones(_READ_BYTES // 4 // 4096, 4096)))
    x = torch.ones(1, 4096)
    read_s = min(_times(lambda: kernels.linear(x, (wide,)), 10))
    rows, features_in, features_out = _PRODUCT
    square = Linear(DenseWeight(torch.ones(features_out, features_in)))
    many = torch.ones(rows, features_in)
    product_s = min(_times(lambda: kernels.linear(many, (square,)), 20))
    return Ceilings(_READ_BYTES / read_s, 2 * rows * features_in * features_out / product_s)


@torch.inference_mode()
def profile_decode(engine: Engine, token_id: int, *, repeats: int) -> StepProfile:
    """Profile one token at the engine's position; the cache is left as it was."""
    kernels, moment = compiled_kernels(engine), engine.snapshot()
    sampler = Sampler(Sampling(temperature=0))
    hidden = engine.transformer.logits(engine.step([token_id], decode=True))  # the first step is recorded
    whole_s = []
    for _ in range(repeats):
        engine.restore(moment)
        began_s = time.perf_counter()
        hidden = engine.step([token_id], decode=True)
        sampler(engine.transformer.logits(hidden)[0], [])
        whole_s.append(time.perf_counter() - began_s)
    assert isinstance(engine.cache.backend, CompiledBackend)
    step = engine.cache.backend.recorder.recordings[1]
    with kernels.record() as head:
        engine.transformer.logits(hidden)
    # In turn, as in real steps: what one reads drives the other's weights out of the cache.
    of_step, of_head = _timed((step, head), repeats)
    tick_s = _tick_s(kernels)
    operations = _shares(step, of_step, tick_s, attention_bytes=bytes_per_token(engine)[1])
    operations += _shares(head, of_head, tick_s, only="lm_head")
    engine.restore(moment)
    return _profile(1, moment.num_tokens, whole_s, operations)


@torch.inference_mode()
def profile_prefill(engine: Engine, token_ids: Sequence[int], *, repeats: int) -> StepProfile:
    """Profile one chunk at the engine's position; the cache is left as it was."""
    kernels, moment = compiled_kernels(engine), engine.snapshot()
    count, start = len(token_ids), engine.position
    whole_s = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        engine.step(token_ids)
        whole_s.append(time.perf_counter() - began_s)
        engine.restore(moment)
    engine.cache.begin(count)
    try:
        with kernels.record() as chunk:
            ids, positions = torch.tensor(token_ids), torch.arange(start, start + count)
            engine.transformer.hidden(ids, positions, engine.cache)
        (runs,) = _timed((chunk,), repeats)
        operations = _shares(chunk, runs, _tick_s(kernels), attention_flop=_attention_flop(engine, start, count))
    finally:
        engine.cache.rollback()
    return _profile(count, start, whole_s, operations)


def _profile(tokens: int, position: int, whole_s: Sequence[float], operations: Sequence[OperationShare]) -> StepProfile:
    ordered = sorted(operations, key=lambda operation: -operation.elapsed_s)
    return StepProfile(tokens, position, statistics.median(whole_s), tuple(ordered))


def _timed(recordings: Sequence[Recording], repeats: int) -> list[list[list[int]]]:
    """Run the recordings in turn; return for each and every run the ticks of its operations."""
    runs: list[list[list[int]]] = [[] for _ in recordings]
    for _ in range(repeats):
        for found, recording in zip(runs, recordings, strict=True):
            found.append([after - before for before, after in itertools.pairwise(recording.timed())])
    return runs


def _shares(
    recording: Recording,
    runs: Sequence[Sequence[int]],
    tick_s: float,
    *,
    only: str | None = None,
    attention_bytes: int = 0,
    attention_flop: int = 0,
) -> list[OperationShare]:
    """Add up the medians of a recording's operations by name."""
    found: dict[str, OperationShare] = {}
    for i, (name, args) in enumerate(_named(recording)):
        name = only or name
        before = found.get(name, OperationShare(name, 0, 0.0))
        elapsed_s = statistics.median(run[i] for run in runs) * tick_s
        num_bytes, flop = _linear_work(args) if isinstance(args, LinearArgs) else (0, 0)
        found[name] = OperationShare(
            name,
            before.calls + 1,
            before.elapsed_s + elapsed_s,
            before.num_bytes + num_bytes,
            before.flop + flop,
        )
    for name in ("decode_attention", "prefill_attention"):
        if name in found:
            share = found[name]
            found[name] = OperationShare(name, share.calls, share.elapsed_s, attention_bytes, attention_flop)
    return list(found.values())


def _named(recording: Recording) -> Iterator[tuple[str, object]]:
    """Yield (name, arguments), the products told apart by what they follow."""
    after = {"qkv": "o", "gate, up": "down"}
    last = ""
    for name, args in recording.calls:
        if isinstance(args, LinearArgs):
            last = {3: "qkv", 2: "gate, up"}.get(args.count, after.get(last, "product"))
            yield last, args
        else:
            yield name, args


def _linear_work(args: LinearArgs) -> tuple[int, int]:
    num_bytes = flop = 0
    for matrix in args.w[: args.count]:
        # AWQ has no rows of its own: four bits per weight, and 20 bits per group.
        awq = matrix.rows * matrix.cols // 2 + matrix.rows * matrix.cols // max(1, matrix.group) * 5 // 2
        num_bytes += matrix.rows * matrix.row_bytes or awq
        flop += 2 * args.num_rows * matrix.rows * matrix.cols
    return num_bytes, flop


def _attention_flop(engine: Engine, start: int, count: int) -> int:
    """Return the operations on the keys and values that a chunk's queries see, in all layers."""
    plan, config = engine.plan, engine.config
    positions = range(start, start + count)
    retrieval = sum(i + 1 for i in positions)
    streaming = sum(min(i + 1, plan.sink_size + plan.recent_size) for i in positions)
    seen = plan.num_retrieval * retrieval + plan.num_streaming * streaming
    return seen * (config.num_heads // config.num_kv_heads) * config.head_dim * 4


def _tick_s(kernels: CpuKernels) -> float:
    began_s, began = time.perf_counter(), kernels.pool.ticks()
    time.sleep(_CALIBRATION_S)
    return (time.perf_counter() - began_s) / (kernels.pool.ticks() - began)


def _times(run: object, repeats: int) -> Iterator[float]:
    assert callable(run)
    run()
    for _ in range(repeats):
        began_s = time.perf_counter()
        run()
        yield time.perf_counter() - began_s
