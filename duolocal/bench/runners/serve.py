"""The child's end of the wire: one JSON object per line in, one per line out, until the input ends.

Requests of a runtime's runner:
    {"do": "load", ...}                                          options are the runner's own
    {"do": "prefill", "token_ids": [...], "keep": true}          without keep the tokens are removed again
    {"do": "decode", "token_id": 7, "num_tokens": 32}            greedy; its tokens are always removed again
Every answer has `peak_bytes`. What the user can act on is answered as {"error", "kind"}; anything else ends the child
with a traceback on stderr, which the parent shows.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from duolocal.errors import DuoLocalError
from duolocal.processes import answer_on_stdout, peak_bytes, resident_bytes, send

Handler = Callable[..., dict[str, Any]]


class Runner(Protocol):
    """A runtime with one model and one context."""

    @property
    def position(self) -> int:
        """Tokens in the cache."""

    @property
    def load(self) -> Callable[..., dict[str, Any]]:
        """Load the model and reserve the context, with options of its own; return what was chosen, for the report."""

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Append tokens; done when it returns."""

    def greedy(self, token_id: int, num_tokens: int) -> Iterator[int]:
        """Append a token, then yield the likeliest next one and append it, `num_tokens` times."""

    def mark(self) -> Any:
        """Remember this moment."""

    def rewind(self, mark: Any) -> None:
        """Remove what was appended since."""


def serve_runner(runner: Runner) -> None:
    """Answer requests with a runtime until the input ends."""

    def load(**options: Any) -> dict[str, Any]:
        imported = resident_bytes()
        began_s = time.perf_counter()
        info = runner.load(**options)
        return {"imported_bytes": imported, "load_s": time.perf_counter() - began_s, "info": info}

    def prefill(token_ids: Sequence[int], keep: bool) -> dict[str, Any]:
        before = runner.position
        mark = None if keep else runner.mark()
        began_s = time.perf_counter()
        runner.prefill(token_ids)
        elapsed_s = time.perf_counter() - began_s
        assert runner.position == before + len(token_ids), (before, runner.position)
        if not keep:
            _rewind(runner, mark, before)
        return {"elapsed_s": elapsed_s, "position": runner.position}

    def decode(token_id: int, num_tokens: int) -> dict[str, Any]:
        before, mark = runner.position, runner.mark()
        steps = runner.greedy(token_id, num_tokens + 1)
        greedy_ids = [next(steps)]  # not timed: the processor's caches hold what another runner left there
        began_s = time.perf_counter()
        greedy_ids += steps
        elapsed_s = time.perf_counter() - began_s
        assert len(greedy_ids) == num_tokens + 1, (len(greedy_ids), num_tokens)
        _rewind(runner, mark, before)
        return {"elapsed_s": elapsed_s, "position": runner.position, "greedy_ids": greedy_ids}

    serve({"load": load, "prefill": prefill, "decode": decode})


def _rewind(runner: Runner, mark: Any, position: int) -> None:
    runner.rewind(mark)
    assert runner.position == position, (runner.position, position)


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answer each request with the handler that its "do" names."""
    replies = answer_on_stdout()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request.pop("do")](**request)
        except DuoLocalError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        send(replies, {**answer, "peak_bytes": peak_bytes()})
