"""The numbers of a Word document's paragraphs, counted as Word counts them (numbering.xml).

Paragraphs of one list definition count on, whatever stands between them; a list with a start of its own counts for
itself.
"""

import re
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element

from duolocal.documents.numbering import numbered
from duolocal.documents.xml_tree import attribute, child, is_on, local, val, whole

_PLACE = re.compile("%([1-9])")
_MAX_LEVEL = 8
BULLET = "- "


@dataclass(frozen=True)
class _Level:
    start: int = 1
    style: str = "decimal"
    text: str = ""
    is_legal: bool = False  # all numbers in digits
    restart: int | None = None  # begins anew after a level up to this one, counted from 1; 0: never
    paragraph_style: str = ""


@dataclass
class _Definition:
    levels: dict[int, _Level] = field(default_factory=dict)
    link: str = ""  # the style that has the levels instead


@dataclass
class _List:
    definition: str
    levels: dict[int, _Level] = field(default_factory=dict)  # of its own
    starts: dict[int, int] = field(default_factory=dict)  # of its own


class Numbering:
    """The lists of a document, and how far each has counted."""

    def __init__(self, root: Element | None, list_of_style: dict[str, str]) -> None:
        """Read numbering.xml; `list_of_style` says which list a style has."""
        self._definitions: dict[str, _Definition] = {}
        self._lists: dict[str, _List] = {}
        self._counts: dict[str, dict[int, int]] = {}  # by definition, or by list
        for item in () if root is None else root:
            if local(item.tag) == "abstractNum":
                self._definitions[attribute(item, "abstractNumId")] = _definition(item)
            elif local(item.tag) == "num":
                self._lists[attribute(item, "numId")] = _list(item)
        for found in self._lists.values():
            link = self._definitions.get(found.definition, _Definition()).link
            other = self._lists.get(list_of_style.get(link, ""))
            if link and other is not None:
                found.definition = other.definition

    def level_of_style(self, key: str, style: str) -> int:
        """Return the level of a list that belongs to a paragraph style."""
        found = self._lists.get(key)
        levels = self._definitions.get(found.definition, _Definition()).levels if found else {}
        return next((at for at, level in levels.items() if level.paragraph_style == style), 0)

    def count(self, key: str, at: int) -> str | None:
        """Count one paragraph of a list and return what stands before it: "3.", "(b)", BULLET; None without a list."""
        found = self._lists.get(key)
        if found is None or not 0 <= at <= _MAX_LEVEL:
            return None
        level = self._level(found, at)
        counts = self._counts.setdefault(key if found.starts else found.definition, {})
        counts[at] = counts[at] + 1 if at in counts else self._start(found, at)
        for deeper in [other for other in counts if other > at]:
            restart = self._level(found, deeper).restart
            if restart is None or at < restart:
                del counts[deeper]
        if level.style == "bullet":
            return BULLET

        def shown(match: re.Match[str]) -> str:
            other = int(match[1]) - 1
            style = "decimal" if level.is_legal else self._level(found, other).style
            return _number(counts.get(other, self._start(found, other)), style)

        return _PLACE.sub(shown, level.text).strip()

    def _level(self, found: _List, at: int) -> _Level:
        levels = self._definitions.get(found.definition, _Definition()).levels
        return found.levels.get(at) or levels.get(at) or _Level(text=f"%{at + 1}.")

    def _start(self, found: _List, at: int) -> int:
        return found.starts.get(at, self._level(found, at).start)


def _number(number: int, style: str) -> str:
    if style.isdigit():  # "001": as many digits
        return f"{number:0{len(style)}}"
    return numbered(number, style)


def _definition(item: Element) -> _Definition:
    levels = {whole(attribute(at, "ilvl")): _read_level(at) for at in item if local(at.tag) == "lvl"}
    return _Definition(levels, val(item, "numStyleLink"))


def _list(item: Element) -> _List:
    found = _List(val(item, "abstractNumId"))
    for override in item:
        if local(override.tag) != "lvlOverride":
            continue
        at = whole(attribute(override, "ilvl"))
        start, level = child(override, "startOverride"), child(override, "lvl")
        if level is not None:
            found.levels[at] = _read_level(level)
        if start is not None:
            found.starts[at] = whole(attribute(start, "val"))
    return found


def _read_level(item: Element) -> _Level:
    formats = [inner for inner in item.iter() if local(inner.tag) == "numFmt"]  # a newer one, and one for old readers
    style = attribute(formats[0], "val", "decimal") if formats else "decimal"
    if style == "custom":
        pattern = re.match(r"0*1(?=\D|$)", attribute(formats[0], "format"))
        style = pattern[0] if pattern else attribute(formats[-1], "val", "decimal")
    return _Level(
        start=whole(val(item, "start")),
        style=style,
        text=val(item, "lvlText"),
        is_legal=is_on(item, "isLgl"),
        restart=whole(restart) if (restart := val(item, "lvlRestart")) else None,
        paragraph_style=val(item, "pStyle"),
    )
