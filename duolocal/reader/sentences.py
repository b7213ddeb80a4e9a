"""Cutting a text of any length into sentences, and packing their tokens into chunks.

Owns where the cuts are. Nothing is lost and nothing said twice: the sentences of a text joined are the text, and each
of them lies in exactly one chunk. A cut goes before a space and after a line break, where tokenizers cut words too.
Memory is that of a chunk: everything here is lazy.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

MIN_CHARACTERS = 40  # shorter sentences join the next one: a heading, a list item, "Mr."
MAX_CHARACTERS = 400  # a text without sentence ends (a table, code) is cut at its lines, or else between words
MAX_TOKENS = 128  # of one sentence, in whatever script

_END = re.compile(
    r"(?<=[.!?…])[\"')\]»”’]*(?:(?=[ \t]+\S)|[ \t]*\n\s*)"  # the end of a sentence, and the line break after it
    r"|(?<=[。！？])(?=\S)"
    r"|[ \t]*\n[ \t]*\n\s*"  # an empty line
)
_LINE = re.compile(r"\n[ \t]*")
_SPACE = re.compile(r"(?=[ \t\u3000])|(?<=[、，；])")


@dataclass(frozen=True)
class Sentence:
    """Characters start … stop - 1 of a document, its number among those read, and its tokens.

    around: the same with the sentence before and the one after it, as far as the document has them.
    """

    document: int
    start: int
    stop: int
    token_ids: tuple[int, ...]
    around: tuple[int, int]


def cut(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the sentences of `text`, in order: none is empty, and together they are all of it."""
    start = 0
    for match in _END.finditer(text):
        if match.end() - start >= MIN_CHARACTERS:
            yield from _pieces(text, start, match.end())
            start = match.end()
    yield from _pieces(text, start, len(text))


def _pieces(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    while stop - start > MAX_CHARACTERS:
        end = _last_cut(text, start + MIN_CHARACTERS, start + MAX_CHARACTERS)
        yield start, end
        start = end
    if start < stop:
        yield start, stop


def _last_cut(text: str, least: int, most: int) -> int:
    """Return the last good place for a cut from `least` to `most`; `most` where there is none."""
    for pattern in (_LINE, _SPACE):
        ends = [match.end() for match in pattern.finditer(text, least, most) if match.end() >= least]
        if ends:
            return ends[-1]
    return most


def sentences(texts: Sequence[str], encode: Callable[[str], Sequence[int]]) -> Iterator[Sentence]:
    """Yield the sentences of all texts with their tokens, in order."""
    for document, text in enumerate(texts):
        before: tuple[int, int, tuple[int, ...]] | None = None
        earlier = 0  # start of the sentence before `before`
        for start, stop, token_ids in _encoded(text, encode):
            if before is not None:
                yield Sentence(document, *before, (earlier, stop))
                earlier = before[0]
            else:
                earlier = start
            before = start, stop, token_ids
        if before is not None:
            yield Sentence(document, *before, (earlier, before[1]))


def _encoded(text: str, encode: Callable[[str], Sequence[int]]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    for start, stop in cut(text):
        left = [(start, stop)]
        while left:
            start, stop = left.pop()
            token_ids = tuple(encode(text[start:stop]))
            if len(token_ids) > MAX_TOKENS and stop - start > 1:  # a script of which a character is several tokens
                middle = (start + stop) // 2
                left += [(middle, stop), (start, middle)]
            else:
                yield start, stop, token_ids


def chunks(found: Iterator[Sentence], size: int) -> Iterator[list[Sentence]]:
    """Pack sentences into chunks of up to `size` tokens, of one document each."""
    chunk: list[Sentence] = []
    count = 0
    for sentence in found:
        length = len(sentence.token_ids)
        if chunk and (count + length > size or sentence.document != chunk[0].document):
            yield chunk
            chunk, count = [], 0
        chunk.append(sentence)
        count += length
    if chunk:
        yield chunk
