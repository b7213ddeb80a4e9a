"""The head plan: which KV heads are retrieval heads and which are streaming heads.

The head class is data: nothing is reordered in the weights, kernels index heads.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise, starmap

from duolocal.errors import SettingsError

DEFAULT_SINK_SIZE = 64  # tokens
DEFAULT_RECENT_SIZE = 256  # tokens
WIDE_RECENT_SIZE = 1024  # tokens, of a model whose heads nobody has tried: docs/quality.md


@dataclass(frozen=True)
class HeadPlan:
    """Per layer and KV head: retrieval (sees everything) or streaming (sees sink and recent tokens)."""

    retrieval: tuple[tuple[bool, ...], ...]  # [num_layers][num_kv_heads]
    sink_size: int
    recent_size: int
    source: str  # for people

    def __post_init__(self) -> None:
        if self.sink_size < 0:
            raise SettingsError(f"sink_size is {self.sink_size}; it must be 0 or more")
        if self.recent_size < 1:
            raise SettingsError(f"recent_size is {self.recent_size}; it must be 1 or more")

    @property
    def num_layers(self) -> int:
        return len(self.retrieval)

    @property
    def num_kv_heads(self) -> int:
        return len(self.retrieval[0])

    @cached_property
    def num_retrieval(self) -> int:
        """Retrieval heads in all layers together."""
        return sum(map(sum, self.retrieval))

    @cached_property
    def retrieval_heads(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of each layer's retrieval heads, rising."""
        return tuple(tuple(head for head, flag in enumerate(flags) if flag) for flags in self.retrieval)

    @cached_property
    def rows(self) -> tuple[slice, ...]:
        """The rows of each layer in a table that has one for every retrieval head, layer after layer."""
        ends = list(accumulate(map(len, self.retrieval_heads), initial=0))
        return tuple(starmap(slice, pairwise(ends)))

    @property
    def num_streaming(self) -> int:
        return self.num_layers * self.num_kv_heads - self.num_retrieval

    def report(self) -> dict[str, int]:
        """Return the split and the window as JSON holds them."""
        return {
            "retrieval_heads": self.num_retrieval,
            "streaming_heads": self.num_streaming,
            "sink_size": self.sink_size,
            "recent_size": self.recent_size,
        }


def uniform_plan(
    *,
    num_layers: int,
    num_kv_heads: int,
    retrieval: bool,
    sink_size: int | None = None,
    recent_size: int | None = None,
) -> HeadPlan:
    """Return the plan in which all heads are retrieval heads, or none; sizes None for the default ones."""
    return HeadPlan(
        retrieval=((retrieval,) * num_kv_heads,) * num_layers,
        sink_size=DEFAULT_SINK_SIZE if sink_size is None else sink_size,
        recent_size=DEFAULT_RECENT_SIZE if recent_size is None else recent_size,
        source="all heads retrieval" if retrieval else "all heads streaming",
    )
