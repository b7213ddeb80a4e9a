"""What an identification yields: how far it is, and in the end the scores."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Method = Literal["distill", "copy", "echo", "drift", "attribution"]
METHODS: tuple[Method, ...] = ("distill", "copy", "echo", "drift", "attribution")

Result = TypeVar("Result")
Scores = tuple[tuple[float, ...], ...]  # [num_layers][num_kv_heads]


@dataclass(frozen=True)
class IdentifyProgress:
    """How far it is: `done` of `total` units; the last is yielded before the result."""

    done: int
    total: int
    unit: str  # "models", "layers", "steps"
    doing: str  # for people: "loading weights", "random tokens, draw 2 of 3", "distilling, 800 tokens"
    loss: float | None = None  # distill: the distance to the full model, without the pressure
    open_share: float | None = None  # distill: share of gates above 0.5


def last_of(events: Iterable[IdentifyProgress | Result]) -> Generator[IdentifyProgress, None, Result]:
    """Yield the progress among events; return the result that ends them."""
    for event in events:
        if isinstance(event, IdentifyProgress):
            yield event
        else:
            return event
    raise AssertionError("events without a result")


@dataclass(frozen=True)
class IdentifyResult:
    """How much each KV head needs the whole context, by one method; higher is more."""

    method: Method
    scores: Scores  # [num_layers][num_kv_heads]
    secondary: Scores  # decides between equal scores
    sink_size: int  # tokens; the window that a head which is no retrieval head would see
    recent_size: int  # tokens
    seed: int
    fingerprint: str | None  # of the model
    elapsed_s: float
    details: dict[str, Any] = field(default_factory=dict)  # settings and figures of the method, JSON-serialisable

    @property
    def num_layers(self) -> int:
        return len(self.scores)

    @property
    def num_kv_heads(self) -> int:
        return len(self.scores[0])
