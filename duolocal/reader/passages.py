"""What is carried from chunk to chunk: the sentences that a question looked at most, and at the end their passages.

Owns the bound: however long the text, no more than `MAX_CARRIED` sentences are kept for a question, and none of their
text (where it stands is enough). Scores are comparable across chunks, so a sentence found early keeps its place until
better ones come.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from duolocal.reader.sentences import Sentence

MAX_CARRIED = 64  # sentences
LEAST_SHARE = 0.4  # of the best score: what is looked at less is no passage


@dataclass(frozen=True, order=True)
class Carried:
    """A sentence that is carried along; the order is that of the scores, earlier ones first among equals."""

    score: float
    place: tuple[int, int]  # minus (document, start)
    stop: int = field(compare=False)
    around: tuple[int, int] = field(compare=False)

    @property
    def document(self) -> int:
        return -self.place[0]

    @property
    def start(self) -> int:
        return -self.place[1]


@dataclass(frozen=True)
class Passage:
    """Characters start … stop - 1 of a document, with the best score of the sentences it was chosen for."""

    document: int
    start: int
    stop: int
    score: float


class Carry:
    """The best sentences so far of one question."""

    def __init__(self, carried: Sequence[Carried] = ()) -> None:
        self._heap = list(carried)
        heapq.heapify(self._heap)

    def offer(self, sentence: Sentence, score: float) -> None:
        """Take a sentence along, if it is among the best."""
        place = (-sentence.document, -sentence.start)
        carried = Carried(score, place, sentence.stop, sentence.around)
        if len(self._heap) < MAX_CARRIED:
            heapq.heappush(self._heap, carried)
        else:
            heapq.heappushpop(self._heap, carried)

    def best(self) -> list[Carried]:
        """Return what is carried, the best first."""
        return sorted(self._heap, reverse=True)


def choose(carried: Sequence[Carried], count: Callable[[int, int, int], int], *, budget: int) -> list[Passage]:
    """Return the passages of the best sentences, with their neighbours, in the order of the text.

    carried: best first; count(document, start, stop): tokens of a passage; budget: tokens of all. Sentences are taken
    as long as there is room, and those that are looked at little beside the best are left out.
    """
    passages: list[Passage] = []
    for each in carried:
        if each.score < LEAST_SHARE * carried[0].score or each.score <= 0:
            break
        for start, stop in (each.around, (each.start, each.stop)):
            joined = _join(passages, Passage(each.document, start, stop, each.score))
            if sum(count(one.document, one.start, one.stop) for one in joined) <= budget:
                passages = joined
                break
        else:
            break
    return passages


def _join(passages: Sequence[Passage], new: Passage) -> list[Passage]:
    """Return the passages with one more; those that touch become one."""
    apart = []
    for old in passages:
        if old.document == new.document and old.start <= new.stop and new.start <= old.stop:
            start, stop = min(old.start, new.start), max(old.stop, new.stop)
            new = Passage(new.document, start, stop, max(old.score, new.score))
        else:
            apart.append(old)
    return sorted([*apart, new], key=lambda passage: (passage.document, passage.start))
