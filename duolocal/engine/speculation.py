"""Prompt-lookup speculation: what may follow is looked up in the context, and checked in the same step.

Owns where a continuation is found (`PromptLookup`) and how many of its tokens are worth a try (`Speculation`). A step
computes them along with the token before them; what the model draws in their place decides, so that the answer is the
one without speculation, draw by draw. Saxena 2023, "Prompt Lookup Decoding", without its rule for rejected tokens.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

NGRAM = 2  # tokens by which a continuation is found
MOST_MATCH = 8  # longer matches are as good
LOOK_AHEAD = (2, 4)  # tokens: each number is a recorded step of its own
WORTH = 1.1  # times as fast as single steps, by the estimates

# Where an engine begins, before its own figures: the chance that the next token is the one found, by the length of the
# match; what each token ahead adds to a step, in single steps, and the least that it can.
_FIRST_CHANCE = (0.3, 0.3, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85)
_FIRST_COST, _LEAST_COST = 0.5, 0.2
_CHANCE_RATE, _FORGET_RATE, _MEDIAN_STEP = 0.05, 0.005, 1.05  # of running estimates


class PromptLookup:
    """Finds where the last tokens of a context stood before, and what followed there; a token is added in O(1).

    Invariant: where `length` is above 0, the last `length` tokens (at most MOST_MATCH) are also those before `_at`.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        ids = np.asarray(token_ids, dtype=np.int64)
        self._ids = np.empty(max(64, 2 * len(ids)), np.int32)
        self._ids[: len(ids)] = ids
        self._count = len(ids)
        # By the hash of NGRAM tokens: the position after them, where they stood last; 0 for nowhere.
        self._bits = max(12, len(ids).bit_length() + 2)
        self._after = np.zeros(1 << self._bits, np.int32)
        # What the last tokens lead to is not known yet, so they are left out here.
        self._after[self._hash(ids[:-2], ids[1:-1])] = np.arange(NGRAM, max(NGRAM, len(ids)), dtype=np.int32)
        self.length = 0
        self._at = 0
        self._find()

    def add(self, token: int) -> None:
        """Take the next token of the context."""
        if self._count == len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
        self._ids[self._count] = token
        self._count += 1
        if self.length and self._ids[self._at] == token:
            self._at += 1
            self.length = min(self.length + 1, MOST_MATCH)
            self._remember()
        else:
            self._find()

    def proposal(self, count: int) -> list[int]:
        """Return `count` tokens that may follow, none where nothing is found; past its end the context repeats."""
        if not self.length:
            return []
        period = self._count - self._at
        return [int(self._ids[self._at + i % period]) for i in range(count)]

    def _find(self) -> None:
        """Look the last tokens up, and remember what follows them from now on."""
        self.length = 0
        self._at = self._remember()
        while self.length < min(MOST_MATCH, self._at) and (
            self._ids[self._at - 1 - self.length] == self._ids[self._count - 1 - self.length]
        ):
            self.length += 1
        if self.length < NGRAM:  # other tokens of the same hash
            self.length = 0

    def _remember(self) -> int:
        """Note where the last tokens stand; return where they stood before."""
        if self._count < NGRAM:
            return 0
        slot = self._hash(self._ids[self._count - 2 : self._count - 1], self._ids[self._count - 1 : self._count])
        before = int(self._after[slot][0])
        self._after[slot] = self._count
        return before

    def _hash(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        mixed = first.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + second.astype(np.uint64)
        return (mixed * np.uint64(0xC2B2AE3D27D4EB4F)) >> np.uint64(64 - self._bits)


@dataclass
class Counts:
    """Of one answer: steps that looked ahead, the tokens that they tried, and those that were drawn."""

    steps: int = 0
    tried: int = 0
    accepted: int = 0


class Speculation:
    """How far ahead to look, by what it was worth so far: running estimates over all answers of an engine."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._chance = list(_FIRST_CHANCE)
        self._single_s = 0.0
        # Seconds of a step by tokens ahead, in single steps.
        self.cost = {ahead: 1 + _FIRST_COST * ahead for ahead in LOOK_AHEAD}
        self._timed: set[int] = set()  # the first step of a kind is recorded, which takes longer

    def restart(self) -> None:
        """Begin an answer."""
        self.counts = Counts()

    def ahead(self, length: int, most: int) -> int:
        """Return how many tokens to try after a match of `length` tokens, at most `most`; 0 where none is worth it."""
        best, found = WORTH, 0
        expected, chance = 1.0, 1.0
        for count in range(1, most + 1):
            chance *= self._chance[min(length + count - 1, MOST_MATCH)]
            expected += chance
            if count in self.cost and expected / self.cost[count] > best:
                best, found = expected / self.cost[count], count
        return found

    def drawn(self, length: int, *, as_found: bool) -> None:
        """Learn from a token that was drawn after a match of `length` tokens, tried or not."""
        self._chance[length] += _CHANCE_RATE * (as_found - self._chance[length])

    @contextmanager
    def timing(self, ahead: int) -> Iterator[None]:
        """Learn from what a step costs."""
        began_s = time.perf_counter()
        yield
        elapsed_s = time.perf_counter() - began_s
        if ahead not in self._timed:
            self._timed.add(ahead)
        elif ahead and self._single_s:
            # Between steps of these kinds the machine may become faster or slower: what cannot be is not believed.
            cost = _toward_median(self.cost[ahead], elapsed_s / self._single_s)
            self.cost[ahead] = min(max(cost, 1 + _LEAST_COST * ahead), 1 + ahead)
        elif not ahead:
            self._single_s = _toward_median(self._single_s, elapsed_s) if self._single_s else elapsed_s
            for count, cost in self.cost.items():  # what was slow once is tried again
                self.cost[count] += _FORGET_RATE * (1 + _FIRST_COST * count - cost)


def _toward_median(estimate: float, found: float) -> float:
    """Return a running median after one more figure: steps that the system interrupts do not count for more."""
    return estimate * _MEDIAN_STEP if found > estimate else estimate / _MEDIAN_STEP
