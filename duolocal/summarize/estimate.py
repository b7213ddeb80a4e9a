"""A dry run: what each input comes to in tokens, parts and, by a short measurement, time. Writes nothing."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from duolocal.errors import DuoLocalError
from duolocal.summarize.inputs import Summarizable, inputs_of
from duolocal.summarize.job import Summarizer
from duolocal.summarize.plan import BETWEEN

_MEASURE_PREFILL, _MEASURE_DECODE = 768, 16  # tokens


@dataclass(frozen=True)
class Speed:
    """Measured on this machine, with a short text: longer ones are read a little slower."""

    prefill: float  # tokens per second
    decode: float


@dataclass(frozen=True)
class FileEstimate:
    """One input; either `tokens` or `error` is set."""

    name: str
    tokens: int | None
    parts: int
    prompt_tokens: int  # that will be read, with merging
    completion_tokens: int  # at most
    seconds: float  # at most: answers may end sooner
    error: str | None = None


@dataclass(frozen=True)
class Estimate:
    """All inputs together."""

    files: tuple[FileEstimate, ...]
    speed: Speed

    @property
    def seconds(self) -> float:
        return sum(file.seconds for file in self.files)

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return sum(file.tokens or 0 for file in self.files)


def estimate(summarizer: Summarizer, documents: Iterable[Summarizable]) -> Iterator[tuple[int, int] | Estimate]:
    """Yield (inputs looked at, inputs in all), and at last an Estimate.

    Every document is read and counted, so it takes as long as that does. Raises DuoLocalError.
    """
    speed = measure(summarizer)
    inputs, _ = inputs_of(documents)
    files: list[FileEstimate] = []
    for item in inputs:
        yield len(files), len(inputs)
        try:
            plan = summarizer.plan(item.load())
        except DuoLocalError as error:
            files.append(FileEstimate(item.name, None, 0, 0, 0, 0.0, str(error)))
            continue
        sizes = [piece.num_tokens for piece in plan.pieces]
        read, written = _work(sizes, summarizer)
        seconds = read / speed.prefill + written / speed.decode
        files.append(FileEstimate(item.name, plan.tokens, len(sizes), read, written, seconds))
    yield len(files), len(inputs)
    yield Estimate(tuple(files), speed)


def measure(summarizer: Summarizer) -> Speed:
    """Read and write a little with the model, and return how fast it was. The context is empty afterwards."""
    engine, frame = summarizer.engine, summarizer.frame
    most = summarizer.limit + len(frame.prefix)
    words = frame.ids("The quick brown fox jumps over the lazy dog. " * 100)
    token_ids = [*frame.prefix, *words][: min(_MEASURE_PREFILL, most)]
    # The first steps of a process are slower: what they touch is loaded then.
    for _ in range(2):
        engine.reset()
        began_s = time.perf_counter()
        engine.prefill(token_ids[:-1])
        read_s = time.perf_counter() - began_s
        began_s, count = time.perf_counter(), 0
        sampling = replace(summarizer.sampling, max_tokens=_MEASURE_DECODE, stop=())
        for _ in engine.generate(token_ids[-1:], sampling, eos_ids=frozenset()):
            count += 1
        write_s = time.perf_counter() - began_s
    engine.reset()
    return Speed((len(token_ids) - 1) / read_s, count / write_s)


def _work(sizes: list[int], summarizer: Summarizer) -> tuple[int, int]:
    """Return the tokens to be read and, at most, to be written for pieces of these sizes."""
    most = summarizer.part_sampling.max_tokens or 0
    beside = len(summarizer.frame.ids(""))
    between = summarizer.frame.count(BETWEEN)
    read = written = 0
    while True:
        read += sum(sizes) + beside * len(sizes)
        if len(sizes) == 1:
            return read, written + (summarizer.sampling.max_tokens or 0)
        written += most * len(sizes)
        per_group = summarizer.limit // (most + between)
        groups = -(-len(sizes) // max(2, per_group))
        sizes = [len(sizes) * (most + between) // groups] * groups
