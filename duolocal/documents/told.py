"""What is told of a document that was read: how much of it is not there as it stands in the file, and why."""

from collections import Counter
from collections.abc import Sequence

_TEXTS = {
    "formula": "{} formula{s} not read",
    "written": "{} formula{s} written in one line",
    "picture": "{} picture{s} not read",
    "chart": "{} chart{s} not read",
    "object": "{} embedded file{s} not read",
    "hidden": "hidden text is not read ({} place{s})",
    "collapsed": "{} hidden row{s} or column{s} read too",
    "shape": "hidden shapes are not read ({} with text)",
    "deleted": "text that tracked changes deleted is not read ({} place{s})",
    "sign": "U+FFFD stands for {} sign{s} of a font of symbols",
    "chunk": "{} document{s} inside this one not read",
    "running": "{} header{s} or footer{s} not read",
    "comment": "{} comment{s} not read",
    "commented": "comments on {} slide{s} not read",
    "computed": "{} formula{s} never computed: what stands there is the formula; open and save it to have the value",
    "repeated": "{} repetition{s} of filled cells not written out",
    "attached": "{} attached file{s} listed, not read",
    "resource": "{} picture{s} or file{s} of the page not read",
    "damaged": "{} part{s} damaged or in an unknown encoding",
    "sparse": "{} row{s} with far gaps written cell by cell, each with its address",
    "unknown": "{} output{s} or cell{s} of unknown kinds not read",
}


class Told(Counter[str]):
    """Counts what is not read, by kind; adding False counts nothing."""

    def notes(self) -> tuple[str, ...]:
        """Return a line for every kind that was met."""
        return tuple(
            text.replace("{s}", "" if self[kind] == 1 else "s").format(f"{self[kind]:,}")
            for kind, text in _TEXTS.items()
            if self[kind]
        )


def listed(names: Sequence[str]) -> str:
    """Return the first names of a list."""
    return ", ".join(names[:20]) + (" …" if len(names) > 20 else "")


def blank_slides(numbers: Sequence[str], total: int) -> tuple[str, ...]:
    """Return what is told of slides without text."""
    what = f"{len(numbers):,} of {total:,} slides yield no text (pictures, charts or blank): {listed(numbers)}"
    return (what,) if numbers else ()
