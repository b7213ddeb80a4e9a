"""duolocal beside other runtimes: the same file, the same text, the same threads, runs that take turns.

Every runner is a child that is loaded once and stays. The cache of each is filled once with the same token ids, in
pieces of at most PIECE tokens, runner after runner before the next piece; at each length all decode in turn, round
after round, and their decoded tokens are removed again. So a disturbance hits all of them, and a long context costs
one prefill.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from duolocal.bench.child import Child
from duolocal.bench.compare import Measured, RunnerResult, RunnerSpec
from duolocal.bench.timing import Spread, spread, total

PIECE = 2048  # tokens: a multiple of every runner's batch
REPEATED_UNTIL = 4096  # tokens: pieces up to here are filled once per round, for a median; later ones once
_WARM_TOKENS = 64
METHOD = (
    "One process per runner, all kept and idle while another computes. The cache is filled once with the same ids of "
    f"real text in pieces of up to {PIECE} tokens, the runners taking turns after each; prefill is the time of all "
    f"pieces (pieces that end by {REPEATED_UNTIL} tokens: median of the rounds). At each length the runners take turns "
    "again, decoding greedily; the first token of a round is not timed, and decoded tokens are removed. Decode is the "
    "median of the rounds. Peak memory is that of the whole process, mapped files included, until the length was done; "
    "every context is reserved for the longest length, which some runtimes touch at once and some as it fills."
)


@dataclass
class PeersRun:
    """A comparison under way: results fill up length by length."""

    results: list[RunnerResult] = field(default_factory=list)
    elapsed_s: float = 0.0  # asked and waited for
    idle_cpu_s: float = 0.0  # processor time that the others used meanwhile

    @property
    def idle_cpu_share(self) -> float:
        """Cores that children used on average while another was measured; 0 is right."""
        return self.idle_cpu_s / self.elapsed_s if self.elapsed_s else 0.0


class _Runner:
    """A child and its result."""

    def __init__(self, child: Child, result: RunnerResult) -> None:
        self.child = child
        self.result = result
        self.pieces: list[Spread] = []
        self.peak_bytes = 0

    @property
    def limit(self) -> float:
        limit = self.result.spec.limit
        return float("inf") if limit is None else limit


def measure_peers(
    specs: Sequence[RunnerSpec],
    token_ids: Sequence[int],
    contexts: Sequence[int],
    *,
    threads: int,
    repeats: int,
    decode_tokens: int,
    run: PeersRun,
    on_step: Callable[[str], None] = lambda _: None,
) -> Iterator[int]:
    """Measure all runners at the ascending `contexts`, yielding each length when `run` holds its results.

    `token_ids` holds at least one more token than the longest context. Raises DuoLocalError where a child fails.
    """
    with ExitStack() as stack:
        runners: list[_Runner] = []
        for spec in specs:
            on_step(f"loading {spec.name}")
            child = stack.enter_context(Child(spec.name, spec.command, threads=threads))
            result = RunnerResult(spec, child.ask("load", **spec.options))
            run.results.append(result)
            runners.append(_Runner(child, result))
        for runner in runners:
            on_step(f"warming {runner.result.spec.name}")
            runner.child.ask("prefill", token_ids=list(token_ids[: min(_WARM_TOKENS, *contexts)]), keep=False)
            runner.child.ask("decode", token_id=token_ids[0], num_tokens=1)
        start = 0
        for context in contexts:
            for runner in [runner for runner in runners if runner.limit < context]:
                runner.child.close()  # its memory is worth more to the others
                runners.remove(runner)
            piece = 0
            for piece_start in range(start, context, PIECE):
                piece_end = min(piece_start + PIECE, context)
                rounds = repeats if piece_end <= REPEATED_UNTIL else 1
                piece = piece_end - piece_start
                _fill(run, runners, token_ids[piece_start:piece_end], rounds, on_step, done=piece_end)
            _decode(run, runners, context, piece, token_ids[context], repeats, decode_tokens, on_step)
            start = context
            yield context


def _fill(
    run: PeersRun,
    runners: Sequence[_Runner],
    token_ids: Sequence[int],
    rounds: int,
    on_step: Callable[[str], None],
    *,
    done: int,
) -> None:
    times: list[list[float]] = [[] for _ in runners]
    for turn, (runner, elapsed) in itertools.product(range(rounds), list(zip(runners, times, strict=True))):
        on_step(f"{runner.result.spec.name}: filling up to {done:,} tokens, round {turn + 1} of {rounds}")
        keep = turn == rounds - 1
        answer = _ask(run, runner, runners, "prefill", token_ids=list(token_ids), keep=keep)
        assert answer["position"] == (done if keep else done - len(token_ids)), answer["position"]
        elapsed.append(answer["elapsed_s"])
    for runner, elapsed in zip(runners, times, strict=True):
        runner.pieces.append(spread(elapsed))


def _decode(
    run: PeersRun,
    runners: Sequence[_Runner],
    context: int,
    piece: int,
    token_id: int,
    rounds: int,
    num_tokens: int,
    on_step: Callable[[str], None],
) -> None:
    times: list[list[float]] = [[] for _ in runners]
    greedy_ids: list[list[int]] = [[] for _ in runners]
    for turn, (index, runner) in itertools.product(range(rounds), list(enumerate(runners))):
        on_step(f"{runner.result.spec.name}: decoding after {context:,} tokens, round {turn + 1} of {rounds}")
        answer = _ask(run, runner, runners, "decode", token_id=token_id, num_tokens=num_tokens)
        assert answer["position"] == context, (runner.result.spec.name, answer["position"], context)
        times[index].append(answer["elapsed_s"] / num_tokens)
        greedy_ids[index] = answer["greedy_ids"]
    for runner, elapsed, ids in zip(runners, times, greedy_ids, strict=True):
        runner.result.measured[context] = Measured(
            context=context,
            prefill_s=total(runner.pieces),
            last_tokens=piece,
            last_s=runner.pieces[-1],
            token_s=spread(elapsed),
            peak_bytes=runner.peak_bytes,
            greedy_ids=tuple(ids),
        )


def _ask(run: PeersRun, runner: _Runner, runners: Sequence[_Runner], do: str, **fields: Any) -> dict[str, Any]:
    """Ask one runner, and see to it that the others are idle meanwhile."""
    others = [other.child for other in runners if other is not runner]
    before = sum(child.cpu_s() for child in others)
    answer = runner.child.ask(do, **fields)
    run.idle_cpu_s += sum(child.cpu_s() for child in others) - before
    run.elapsed_s += answer["elapsed_s"]
    runner.peak_bytes = answer["peak_bytes"]
    return answer
