"""What the styles of an OpenDocument file say: how text looks, how lists and headings are numbered, what is hidden."""

import re
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from duolocal.documents.inline import Style
from duolocal.documents.numbering import numbered
from duolocal.documents.xml_tree import attribute, local, whole

BULLET = "- "
_MAX_CHAIN = 20  # styles based on each other
_NUMBER_STYLES = {"a": "lowerLetter", "A": "upperLetter", "i": "lowerRoman", "I": "upperRoman", "1": "decimal"}


@dataclass(frozen=True)
class _Look:
    """What a style says of text; None: as the one that it is based on."""

    is_struck: bool | None = None
    level: int | None = None
    is_hidden: bool | None = None
    is_shown: bool = True  # of a sheet or slide
    base: str = ""
    list_name: str = ""


@dataclass(frozen=True)
class Level:
    style: str = "decimal"  # "": no number
    prefix: str = ""
    suffix: str = ""
    start: int = 1
    num_levels: int = 1  # how many of the numbers are shown
    is_bullet: bool = False


class OpenStyles:
    def __init__(self, roots: list[Element]) -> None:
        self._looks: dict[str, _Look] = {}
        self.lists: dict[str, dict[int, Level]] = {}
        self.outline: dict[int, Level] = {}
        for root in reversed(roots):
            for item in root.iter():
                match local(item.tag):
                    case "style":
                        self._looks[attribute(item, "name")] = _look(item)
                    case "list-style":
                        self.lists[attribute(item, "name")] = _levels(item)
                    case "outline-style":
                        self.outline = _levels(item)

    def is_shown(self, name: str) -> bool:
        return self._looks.get(name, _Look()).is_shown

    def list_of(self, name: str) -> str:
        return self._looks.get(name, _Look()).list_name

    def look(self, name: str, style: Style, *, is_hidden: bool) -> tuple[Style, bool]:
        """Return how text looks that has a style in the midst of other text."""
        struck = level = hidden = None
        for _ in range(_MAX_CHAIN):
            found = self._looks.get(name)
            if found is None:
                break
            struck = found.is_struck if struck is None else struck
            level = found.level if level is None else level
            hidden = found.is_hidden if hidden is None else hidden
            name = found.base
        style = Style(style.is_struck if struck is None else struck, style.level if level is None else level)
        return style, is_hidden if hidden is None else hidden


def _look(item: Element) -> _Look:
    struck, level, hidden, shown = None, None, None, True
    for properties in item:
        line = attribute(properties, "text-line-through-style") or attribute(properties, "text-line-through-type")
        if line:
            struck = line != "none"
        position = attribute(properties, "text-position").split(" ")[0]
        if position:
            raised = position.rstrip("%")
            level = 1 if position == "super" else -1 if position == "sub" else _sign(raised)
        if attribute(properties, "display") in ("none", "true") and local(properties.tag) == "text-properties":
            hidden = attribute(properties, "display") == "none"
        if attribute(properties, "display") == "false" or attribute(properties, "visibility") == "hidden":
            shown = False
    base, list_name = attribute(item, "parent-style-name"), attribute(item, "list-style-name")
    return _Look(struck, level, hidden, shown, base, list_name)


def _sign(text: str) -> int:
    number = float(text) if re.fullmatch(r"-?\d{1,4}(\.\d{1,4})?", text) else 0.0
    return (number > 0) - (number < 0)


def _levels(item: Element) -> dict[int, Level]:
    levels = {}
    for level in item:
        style = attribute(level, "num-format")
        levels[whole(attribute(level, "level", "1"))] = Level(
            style=_NUMBER_STYLES.get(style, "decimal" if style else ""),
            prefix=attribute(level, "num-prefix"),
            suffix=attribute(level, "num-suffix"),
            start=whole(attribute(level, "start-value", "1")),
            num_levels=max(1, whole(attribute(level, "display-levels", "1"))),
            is_bullet=local(level.tag) in ("list-level-style-bullet", "list-level-style-image"),
        )
    return levels


def list_mark(levels: dict[int, Level], at: int, counts: dict[int, int]) -> str:
    """Return what stands before an item of a level."""
    level = levels.get(at, Level(is_bullet=True) if not levels else Level())
    if level.is_bullet:
        return BULLET
    if not level.style:
        return (level.prefix + level.suffix).strip()
    shown = []
    for other in range(max(1, at - level.num_levels + 1), at + 1):
        style = levels.get(other, Level()).style if other != at else level.style
        if style:
            shown.append(numbered(counts.get(other, levels.get(other, Level()).start), style))
    return f"{level.prefix}{'.'.join(shown)}{level.suffix}".strip()
