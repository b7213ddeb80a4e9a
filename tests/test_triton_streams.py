"""Blocks that come from host memory beside the attention: the order that two streams are told to keep.

Without a GPU the streams are played: what is asked of each is done in order, and which of them gets on is drawn.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from duolocal.kernels.gpu import library_attention
from duolocal.kernels.gpu.library_attention import decoded_spans


class Later:
    """Two GPU streams, played after everything was asked of them: each in order, waiting for events as CUDA does."""

    def __init__(self) -> None:
        self.now = self.here = Stream()
        self.aside = Stream()

    def play(self, generator: random.Random) -> None:
        streams = [self.here, self.aside]
        while any(stream.queue for stream in streams):
            stream = generator.choice([one for one in streams if one.queue and one.queue[0][0]()])
            stream.queue.pop(0)[1]()


class Stream:
    def __init__(self) -> None:
        self.queue: list[tuple[Callable[[], bool], Callable[[], object]]] = []
        self.done = 0

    def ask(self, work: Callable[[], object], when: Callable[[], bool] = lambda: True) -> None:
        self.queue.append((when, work))

    def wait_event(self, event: "Event") -> None:
        wanted = event.recorded
        self.ask(lambda: None, lambda: event.reached >= wanted)

    def wait_stream(self, other: "Stream") -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)


class Event:
    def __init__(self) -> None:
        self.recorded = self.reached = 0

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        number = self.recorded
        stream.ask(lambda: setattr(self, "reached", number))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_spans_from_host_memory_are_there_when_they_are_used(
    count: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order two streams get on: a buffer is not read before it is filled, nor filled while it is used."""
    gpu, seen = Later(), []

    @contextmanager
    def stream(wanted: Stream) -> Iterator[None]:
        before, gpu.now = gpu.now, wanted
        yield
        gpu.now = before

    def fill(_: object, begin: int, end: int, *__: object, out: torch.Tensor) -> torch.Tensor:
        gpu.now.ask(lambda: out.fill_(begin))
        return out[:, : end - begin]

    def look(span: torch.Tensor) -> Callable[[], None]:
        return lambda: seen.append(span.clone())

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(library_attention, "two_streams", lambda _: (gpu.here, gpu.aside))
    monkeypatch.setattr(library_attention, "decode_span", fill)
    cache = SimpleNamespace(beyond=True, records=torch.empty(0), num_retrieval=1, head_dim=1)
    for span in decoded_spans(cache, 5, 5 + 2 * count - 1, torch.float32, span=4):  # type: ignore[arg-type]
        gpu.now.ask(look(span))  # type: ignore[arg-type]  # here one tensor, not keys and values
    gpu.play(random.Random(seed))
    wanted = [5 + 2 * number for number in range(count)]
    assert [int(span[0, 0]) for span in seen] == wanted
    assert all(bool((span == first).all()) for span, first in zip(seen, wanted, strict=True))
    assert [span.shape[1] for span in seen] == [2] * (count - 1) + [1]
