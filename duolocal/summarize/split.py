"""A long text in parts that fit, cut where a reader would pause.

Owns where to cut: at a page, chapter or sheet, else between paragraphs, else lines, else sentences, else words. Only a
word longer than a part itself is cut inside. Sizes are those of the real tokenizer.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

_PART, _PARAGRAPH, _LINE, _SENTENCE, _WORD, _INSIDE = 5, 4, 3, 2, 1, 0
_BORDERS = (
    (_SENTENCE, re.compile(r"[.!?…]+[\"'”’»)\]]*\s+|[。！？]+[」』”’]*")),
    (_LINE, re.compile(r"\n+")),
    (_PARAGRAPH, re.compile(r"\n[ \t]*\n\s*|\f\s*")),
)
_SPACES = re.compile(r"\s+")
_FINEST = 16  # runs between borders are made no longer than this fraction of a part
_LEAST = 0.6  # of an even share: a part is not made smaller only to end at a better border


@dataclass(frozen=True)
class Piece:
    """The characters start … end of a text, and their tokens."""

    start: int
    end: int
    num_tokens: int
    inside_word: bool = False  # whether it had to end inside a word


@dataclass(frozen=True)
class _Run:
    end: int
    num_tokens: int
    border: int  # how good a place its end is


def cut(text: str, count: Callable[[str], int], *, limit: int, parts: Sequence[int] = ()) -> list[Piece]:
    """Return pieces of at most `limit` tokens that together are `text`, as even as its borders allow.

    count: tokens of a string; parts: where pages, chapters or sheets begin, in characters.
    """
    assert limit >= 1, limit
    runs = list(_runs(text, count, limit=limit, parts=frozenset(parts)))
    ends = [0]
    for run in runs:
        ends.append(ends[-1] + run.num_tokens)
    pieces: list[Piece] = []
    first, start = 0, 0
    while first < len(runs):
        last = _choose(runs, ends, first, limit)
        # Tokens across borders add up only nearly: the whole is counted.
        while (num_tokens := count(text[start : runs[last].end])) > limit and last > first:
            last -= 1
        pieces.append(Piece(start, runs[last].end, num_tokens, runs[last].border == _INSIDE))
        first, start = last + 1, runs[last].end
    return pieces


def _choose(runs: Sequence[_Run], ends: Sequence[int], first: int, limit: int) -> int:
    """Return the last run of the piece that begins with `first`."""
    left = ends[-1] - ends[first]
    if left <= limit:
        return len(runs) - 1
    num_pieces = math.ceil(left / limit)
    aim = left / num_pieces
    least = max(_LEAST * aim, left - (num_pieces - 1) * limit)
    best, last = None, first
    for index in range(first, len(runs)):
        size = ends[index + 1] - ends[first]
        if size > limit:
            break
        last = index
        score = (runs[index].border, -abs(size - aim))
        if size >= least and (best is None or score > best[0]):
            best = (score, index)
    return last if best is None else best[1]


def _runs(text: str, count: Callable[[str], int], *, limit: int, parts: frozenset[int]) -> Iterator[_Run]:
    """Yield the text between neighbouring borders, none of it longer than a fraction of a part."""
    borders: dict[int, int] = {}
    for border, pattern in _BORDERS:
        for match in pattern.finditer(text):
            borders[match.end()] = max(border, borders.get(match.end(), 0))
    borders |= dict.fromkeys(parts, _PART)
    borders.pop(0, None)
    borders[len(text)] = _PART
    start = 0
    for end in sorted(end for end in borders if end <= len(text)):
        if end > start:
            yield from _halved(text, start, end, borders[end], count, most=max(1, limit // _FINEST))
        start = end


def _halved(text: str, start: int, end: int, border: int, count: Callable[[str], int], *, most: int) -> Iterator[_Run]:
    """Yield a run, in halves of halves between words where it has more than `most` tokens."""
    num_tokens = count(text[start:end])
    if num_tokens <= most or end - start == 1:
        yield _Run(end, num_tokens, border)
        return
    middle, kind = _between_words(text, start, end)
    yield from _halved(text, start, middle, kind, count, most=most)
    yield from _halved(text, middle, end, border, count, most=most)


def _between_words(text: str, start: int, end: int) -> tuple[int, int]:
    """Return a place near the middle between two words, or else inside one, but not inside a character."""
    middle = (start + end) // 2
    for reach in (256, end - start):
        low, high = max(start, middle - reach), min(end, middle + reach)
        places = [match.end() for match in _SPACES.finditer(text, low, high) if start < match.end() < end]
        if places:
            return min(places, key=lambda place: abs(place - middle)), _WORD
    for place in (*range(middle, end), *range(middle - 1, start, -1)):
        if place > start and not _joins(text[place]):
            return place, _INSIDE
    return middle, _INSIDE


def _joins(character: str) -> bool:
    """Tell whether a character belongs to the one before it."""
    return unicodedata.combining(character) != 0 or character in "\u200d\ufe0f\u200c"
