"""One reading: a text goes in after the prompt, an answer comes out, and the engine returns to the prompt.

Owns the engine while a job runs. The tokens before the document are prefilled once; every reading begins with
`Engine.restore`, which prefills nothing.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from duolocal.cache import Snapshot
from duolocal.engine.engine import Cancelled, Engine
from duolocal.sampling import StopStrings
from duolocal.settings import Sampling
from duolocal.summarize.frame import Frame
from duolocal.summarize.repeats import Repeats

FinishReason = Literal["stop", "length", "sentence", "context", "repeat"]


@dataclass(frozen=True)
class Step:
    """Progress of a reading: tokens read, or written, of those in all (for writing: at most)."""

    doing: Literal["reading", "writing"]
    done: int
    total: int


@dataclass(frozen=True)
class Answer:
    """The end of a reading. `text` is stripped of space around it."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int  # read, without those of the prompt before the document
    completion_tokens: int
    prefill_s: float
    decode_s: float


class Reader:
    """Reads texts with one prompt. Raises Cancelled, for good, after `cancel`."""

    def __init__(self, engine: Engine, frame: Frame) -> None:
        self.engine = engine
        self.frame = frame
        self._snapshot: Snapshot | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """Stop what is running; safe from a signal handler."""
        self._cancelled = True
        self.engine.cancel()

    def begin(self) -> None:
        """Empty the context and prefill what comes before every document."""
        self.engine.reset()
        self._snapshot = None
        for _ in self.engine.iter_prefill(self.frame.prefix):
            self._check()
        self._snapshot = self.engine.snapshot()

    def read(self, text: str, sampling: Sampling, *, stop_repeats: bool = True) -> Iterator[Step | Answer]:
        """Read `text` and answer, yielding progress and at last an Answer; `begin` was called once before.

        Raises ContextOverflowError, before any work, for a text that does not fit.
        """
        assert self._snapshot is not None, "read before begin"
        engine, tokenizer = self.engine, self.frame.tokenizer
        token_ids = self.frame.ids(text)
        most = sampling.max_tokens or engine.context
        began_s = time.perf_counter()
        engine.restore(self._snapshot)
        yield Step("reading", 0, len(token_ids))
        for count in engine.iter_prefill(token_ids[:-1]):
            self._check()
            yield Step("reading", count, len(token_ids))
        stream, stops = tokenizer.stream(continues=True), StopStrings(sampling.stop)
        repeats = Repeats() if stop_repeats else None
        answer, produced, kept = "", 0, None
        decoding_since_s = time.perf_counter()
        for token in engine.generate(token_ids[-1:], sampling, eos_ids=tokenizer.eos_ids):
            if not produced:
                decoding_since_s = time.perf_counter()
            produced += 1
            shown = stops.push(stream.push(token))
            answer += shown
            kept = None if repeats is None else repeats.push(token, shown)
            if stops.stopped or kept is not None:
                break
            self._check()
            yield Step("writing", produced, most)
        self._check()
        reason: FinishReason = engine.finish_reason or "stop"
        if kept is None and not stops.stopped:
            answer += stops.push(stream.flush()) + stops.flush()
        if kept is None and repeats is not None:
            kept = repeats.finish()
        if kept is not None:
            answer, reason = answer[:kept], "repeat"
        elif stops.stopped:
            reason = "stop"
        now_s = time.perf_counter()
        yield Answer(
            answer.strip(),
            reason,
            len(token_ids),
            produced,
            decoding_since_s - began_s,
            now_s - decoding_since_s,
        )

    def _check(self) -> None:
        # A cancel between two steps of the engine would otherwise be forgotten by the next.
        if self._cancelled:
            raise Cancelled
