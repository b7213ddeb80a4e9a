"""What was measured of several runtimes, the fastest setting of each, and the ratios of duolocal to them."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from duolocal.bench.timing import Spread

DUOLOCAL = "duolocal"


@dataclass(frozen=True)
class RunnerSpec:
    """One configuration of a runtime: a child process of its own."""

    name: str
    peer: str  # configurations of one peer compete for "the fastest setting"
    command: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)  # of its "load"
    limit: int | None = None  # tokens; longer contexts are left out


@dataclass(frozen=True)
class Measured:
    """One runner at one length."""

    context: int  # tokens
    prefill_s: Spread  # seconds for all tokens from an empty cache
    last_tokens: int  # tokens of the last piece that was filled
    last_s: Spread  # seconds for it
    token_s: Spread  # seconds per decoded token
    peak_bytes: int  # of the process, from its start until this length was finished
    greedy_ids: tuple[int, ...]

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens per second over the whole prefix."""
        return self.context / self.prefill_s.median

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second."""
        return 1 / self.token_s.median

    def report(self) -> dict[str, object]:
        """Return the figures as JSON holds them."""
        return {
            "context": self.context,
            "prefill_tokens_per_s": self.prefill_s.per_s(self.context),
            "last_piece_tokens": self.last_tokens,
            "last_piece_tokens_per_s": self.last_s.per_s(self.last_tokens),
            "decode_tokens_per_s": self.token_s.per_s(1),
            "decode_ms_per_token": self.token_s.milliseconds(),
            "peak_bytes": self.peak_bytes,
            "greedy_ids": list(self.greedy_ids),
        }


@dataclass
class RunnerResult:
    """A runner and what was measured of it so far."""

    spec: RunnerSpec
    loaded: dict[str, Any]
    measured: dict[int, Measured] = field(default_factory=dict)  # by context

    def report(self) -> dict[str, object]:
        """Return the figures as JSON holds them."""
        return {
            "name": self.spec.name,
            "peer": self.spec.peer,
            "settings": self.loaded.get("info", {}),
            "load_s": self.loaded.get("load_s"),
            "imported_bytes": self.loaded.get("imported_bytes"),
            "limit": self.spec.limit,
            "results": [self.measured[context].report() for context in sorted(self.measured)],
        }


@dataclass(frozen=True)
class Fastest:
    """The best of all configurations of a peer at one length, each figure picked by itself."""

    peer: str
    context: int
    prefill_runner: str
    prefill_tokens_per_s: float
    decode_runner: str
    decode_tokens_per_s: float
    peak_runner: str
    peak_bytes: int


@dataclass(frozen=True)
class Ratio:
    """duolocal divided by a peer: above 1 is faster, and takes more memory."""

    context: int
    runner: str  # a configuration of duolocal
    against: str  # a runner, or "<peer>, fastest"
    prefill: float
    decode: float
    peak_memory: float


def fastest(results: Iterable[RunnerResult], peer: str, context: int) -> Fastest | None:
    """Return the best figures of a peer at one length; None where it was not measured."""
    found = [
        (result.spec.name, result.measured[context])
        for result in results
        if result.spec.peer == peer and context in result.measured
    ]
    if not found:
        return None
    prefill_runner, prefill = max(found, key=lambda pair: pair[1].prefill_tokens_per_s)
    decode_runner, decode = max(found, key=lambda pair: pair[1].decode_tokens_per_s)
    peak_runner, peak = min(found, key=lambda pair: pair[1].peak_bytes)
    return Fastest(
        peer=peer,
        context=context,
        prefill_runner=prefill_runner,
        prefill_tokens_per_s=prefill.prefill_tokens_per_s,
        decode_runner=decode_runner,
        decode_tokens_per_s=decode.decode_tokens_per_s,
        peak_runner=peak_runner,
        peak_bytes=peak.peak_bytes,
    )


def best_of(peer: str) -> str:
    """Name the fastest settings of a peer, as in `Ratio.against`."""
    return f"{peer}, fastest"


def peers_of(results: Iterable[RunnerResult]) -> list[str]:
    """Return the peers that are not duolocal, each once, in the order of their runners."""
    return [peer for peer in dict.fromkeys(result.spec.peer for result in results) if peer != DUOLOCAL]


def ratios(results: Sequence[RunnerResult], context: int) -> list[Ratio]:
    """Return every configuration of duolocal against every other runner and every peer's fastest setting."""
    found = []
    for ours in results:
        if ours.spec.peer != DUOLOCAL or context not in ours.measured:
            continue
        own = ours.measured[context]
        for other in results:
            if other.spec.peer != DUOLOCAL and context in other.measured:
                its = other.measured[context]
                found.append(
                    _ratio(
                        ours, own, other.spec.name, its.prefill_tokens_per_s, its.decode_tokens_per_s, its.peak_bytes
                    )
                )
        for peer in peers_of(results):
            best = fastest(results, peer, context)
            if best is not None:
                rates = best.prefill_tokens_per_s, best.decode_tokens_per_s, best.peak_bytes
                found.append(_ratio(ours, own, best_of(peer), *rates))
    return found


def _ratio(ours: RunnerResult, own: Measured, against: str, prefill: float, decode: float, peak: int) -> Ratio:
    return Ratio(
        context=own.context,
        runner=ours.spec.name,
        against=against,
        prefill=round(own.prefill_tokens_per_s / prefill, 4),
        decode=round(own.decode_tokens_per_s / decode, 4),
        peak_memory=round(own.peak_bytes / peak, 4),
    )


def comparison(results: Sequence[RunnerResult], contexts: Sequence[int]) -> dict[str, object]:
    """Return runners, fastest settings and ratios as JSON holds them."""
    best = [fastest(results, peer, context) for context in contexts for peer in peers_of(results)]
    return {
        "runners": [result.report() for result in results],
        "fastest": [asdict(entry) for entry in best if entry is not None],
        "ratios": [asdict(ratio) for context in contexts for ratio in ratios(results, context)],
    }
