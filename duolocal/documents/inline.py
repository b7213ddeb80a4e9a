"""How struck, raised and lowered text is written in plain text, the same from every format."""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

_SIMPLE = re.compile(r"[+\-−–]?\w+(?:[.,/]\w+)*")  # what reads as one after ^ or _
# What is raised by custom alone: marks of notes and rights, and the ends of "1st" and "2nd".
_CUSTOM = re.compile(r"\[.{0,12}\]|[*†‡§™®©℠°ºª.,;:]+")
_ORDINAL = re.compile(r"st|nd|rd|th|er|ère|ème", re.IGNORECASE)


class Style(NamedTuple):
    """What changes the meaning of a run of text."""

    is_struck: bool = False
    level: int = 0  # 1: superscript, -1: subscript


PLAIN = Style()


def marked(runs: Iterable[tuple[str, Style]]) -> str:
    """Write runs as text: 10^6, CO_2, ~~struck~~. Runs of one style that follow each other count as one."""
    runs = list(runs)
    if all(style == PLAIN for _, style in runs):
        return "".join(text for text, _ in runs)
    pieces: list[str] = []
    for is_struck, group in groupby(_levelled(_joined(runs)), key=lambda run: run[1]):
        text = "".join(text for text, _ in group)
        core = text.strip()
        if is_struck and core:
            at = text.index(core)
            text = f"{text[:at]}~~{core}~~{text[at + len(core) :]}"
        pieces.append(text)
    return "".join(pieces)


def _joined(runs: Iterable[tuple[str, Style]]) -> list[tuple[str, Style]]:
    filled = ((text, style) for text, style in runs if text)
    return [("".join(text for text, _ in group), style) for style, group in groupby(filled, key=lambda run: run[1])]


def _levelled(runs: list[tuple[str, Style]]) -> Iterator[tuple[str, bool]]:
    """Yield text with its raised and lowered runs written out, and whether it is struck."""
    before = ""
    for at, (text, style) in enumerate(runs):
        core = text.strip()
        if style.level and core:
            left, _, right = text.partition(core)
            following, changed = runs[at + 1] if at + 1 < len(runs) else ("", PLAIN)
            after = right or (following if changed == style._replace(level=0) else "")  # no mark in between
            text = left + _shifted(core, style.level, (left or before)[-1:], after[:1]) + right
        before = text
        yield text, style.is_struck


def _shifted(core: str, level: int, before: str, after: str) -> str:
    if level > 0 and (_CUSTOM.fullmatch(core) or (before.isdigit() and _ORDINAL.fullmatch(core))):
        return core
    mark = "^" if level > 0 else "_"
    runs_on = after.isdigit() or (after.isalpha() and core[-1].isalpha())
    return f"{mark}{core}" if _SIMPLE.fullmatch(core) and not runs_on else f"{mark}{{{core}}}"
