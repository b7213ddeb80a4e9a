"""What can be done where documents do not fit into a context. Numbers and sentences only: loads nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

_NAMED = 4  # documents that a sentence names
_LONGEST_NAME = 48


@dataclass(frozen=True)
class Fit:
    """Documents beside a context: (name, tokens) each, and what is in use or kept free for a question."""

    sizes: tuple[tuple[str, int], ...]
    context: int
    used: int = 0
    kept: int = 0
    trained: int | None = None  # tokens that the model was trained for

    @property
    def total(self) -> int:
        """Tokens of all documents."""
        return sum(size for _, size in self.sizes)

    @property
    def fits(self) -> bool:
        return self.used + self.total + self.kept <= self.context

    @property
    def needed(self) -> str:
        """The context that holds all of it, as --context takes it."""
        return f"{-(-(self.used + self.total + self.kept) // 1024)}K"

    def _beyond(self) -> str:
        if self.trained is None or self.used + self.total + self.kept <= self.trained:
            return ""
        return f" (beyond the {self.trained:,} tokens that the model was trained for)"

    def to_drop(self) -> list[tuple[str, int]]:
        """Return the fewest documents without which the rest fits, the largest first; all where none fits."""
        over = self.used + self.total + self.kept - self.context
        dropped = []
        for name, size in sorted(self.sizes, key=lambda item: item[1], reverse=True):
            if over <= 0:
                break
            dropped.append((name, size))
            over -= size
        # The last one may be more than is needed: the smallest that is still enough keeps more of the text.
        if dropped and over < 0:
            last = dropped.pop()
            enough = [item for item in self.sizes if item not in dropped and last[1] + over <= item[1]]
            dropped.append(min(enough, key=lambda item: item[1], default=last))
        return dropped

    def refusal(self) -> str:
        """Say in one line that it does not fit, with the numbers and the choices."""
        many = len(self.sizes) > 1
        sizes = _list(sorted(self.sizes, key=lambda item: item[1], reverse=True))
        dropped = self.to_drop()
        choices = []
        if many and len(dropped) < len(self.sizes):
            choices.append(f"leave out {_list(dropped)}")
        elif self.used and self.total + self.kept <= self.context:
            choices.append("/reset all")
        choices.append(f"start with --context {self.needed}{self._beyond()}")
        choices.append(f"start with --reader retrieve, which reads {'them' if many else 'it'} for each question")
        choices.append("summarise first with `duolocal summarize`")
        return (
            f"{self.total:,} tokens of documents do not fit, {sizes}: the context is {self.context:,}, "
            f"{self.used:,} are in use and {self.kept} are kept for a question; "
            + ", ".join(choices[:-1])
            + f", or {choices[-1]}"
        )


def _list(sizes: Sequence[tuple[str, int]]) -> str:
    """Name documents with their tokens; of many the first few."""
    named = _NAMED if len(sizes) > _NAMED + 1 else len(sizes)
    words = [f"{_short(name)} ({size:,})" for name, size in sizes[:named]]
    if rest := sizes[named:]:
        words.append(f"{len(rest):,} more ({sum(size for _, size in rest):,})")
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
