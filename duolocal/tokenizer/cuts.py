"""Cutting a long text where the cut changes no token id.

A text of megabytes is encoded in parts, because both libraries keep hundreds of bytes per input byte while they
work. A cut is made only where the encoding of either side cannot depend on the other: before a space between
two ASCII letters, or between a single line break and the text that follows it. `find_safety` says which of the
two hold for a vocabulary; where none does (or the text has no such place) it is encoded whole.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PART_SIZE = 32_768  # characters

_WORD = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
_LINE = re.compile(r"(?<=\S\n)(?=\S)")
_EITHER = re.compile(f"{_WORD.pattern}|{_LINE.pattern}")
_WORD_CROSSED = re.compile(rb"[A-Za-z] ")
_LINE_CROSSED = re.compile(rb"\n[^ \t\n\r\x0b\x0c]")


@dataclass(frozen=True)
class CutSafety:
    """Which kinds of cut leave the ids as they are."""

    words: bool = False
    lines: bool = False

    def pattern(self) -> re.Pattern[str] | None:
        """Return what matches (with zero width) at the places where a cut is safe."""
        if self.words and self.lines:
            return _EITHER
        if self.words:
            return _WORD
        return _LINE if self.lines else None


def find_safety(token_bytes: Iterable[bytes], *, lines: bool) -> CutSafety:
    """Return the cuts that no token of the vocabulary (bytes by id, special tokens left out) could span.

    Without a token across the place there is no merge across it either. `lines` is False for a pre-tokenizer
    that may take a line break and what follows it into one word.
    """
    everything = b"\r".join(token_bytes)  # no pattern matches across a "\r"
    return CutSafety(
        words=_WORD_CROSSED.search(everything) is None,
        lines=lines and _LINE_CROSSED.search(everything) is None,
    )


def cut(text: str, safety: CutSafety, *, part_size: int = PART_SIZE) -> Iterator[str]:
    """Yield the parts of `text`, each at least `part_size` characters but for the last."""
    pattern = safety.pattern()
    start = 0
    while pattern is not None and len(text) - start > part_size:
        match = pattern.search(text, start + part_size)
        if match is None:
            break
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]
