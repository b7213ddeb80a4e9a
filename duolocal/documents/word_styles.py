"""What the styles of a Word document say of text: headings, lists, what is struck, raised or hidden."""

import re
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from duolocal.documents.inline import Style
from duolocal.documents.xml_tree import attribute, child, is_on, local, val, whole

_HEADING = re.compile(r"heading ?([1-9])")
_MAX_CHAIN = 20  # styles based on each other
_LEVELS = {"superscript": 1, "subscript": -1}


@dataclass(frozen=True)
class RunFormat:
    """How a run looks, where that changes what it says; None: as the style says."""

    is_struck: bool | None = None
    level: int | None = None
    is_hidden: bool | None = None
    font: str | None = None

    def over(self, other: "RunFormat") -> "RunFormat":
        """Return this format, and the other where this says nothing."""
        return RunFormat(
            other.is_struck if self.is_struck is None else self.is_struck,
            other.level if self.level is None else self.level,
            other.is_hidden if self.is_hidden is None else self.is_hidden,
            self.font or other.font,
        )

    @property
    def style(self) -> Style:
        return Style(bool(self.is_struck), self.level or 0)


@dataclass(frozen=True)
class ParagraphFormat:
    """What a paragraph is; `list_key` and `list_level` are None where nothing says so."""

    outline: int | None = None  # 1 for a heading of the first level; 0 for text
    list_key: str | None = None
    list_level: int | None = None
    run: RunFormat = RunFormat()


@dataclass(frozen=True)
class _Style:
    name: str
    base: str
    format: ParagraphFormat


class Styles:
    """The styles of a document by their keys."""

    def __init__(self, root: Element | None) -> None:
        self._styles: dict[str, _Style] = {}
        self._resolved: dict[str, ParagraphFormat] = {}
        self.default = RunFormat()
        self.default_paragraph = ""
        if root is None:
            return
        self.default = run_format(child(root, "docDefaults", "rPrDefault", "rPr"))
        for item in root:
            if local(item.tag) != "style":
                continue
            key = attribute(item, "styleId")
            self._styles[key] = _Style(
                val(item, "name").lower(),
                val(item, "basedOn"),
                paragraph_format(child(item, "pPr"), run=run_format(child(item, "rPr"))),
            )
            if attribute(item, "type") == "paragraph" and attribute(item, "default") in ("1", "true", "on"):
                self.default_paragraph = key

    def lists(self) -> dict[str, str]:
        """Return the list of every style that names one."""
        return {key: item.format.list_key for key, item in self._styles.items() if item.format.list_key}

    def paragraph(self, key: str) -> ParagraphFormat:
        """Return what a style says, with all that it is based on."""
        if key not in self._resolved:
            self._resolved[key] = self._resolve(key or self.default_paragraph)
        return self._resolved[key]

    def _resolve(self, key: str) -> ParagraphFormat:
        outline, list_key, list_level, run = None, None, None, RunFormat()
        if key not in self._styles and (heading := _HEADING.fullmatch(key.lower())):
            outline = int(heading[1])
        for _ in range(_MAX_CHAIN):
            style = self._styles.get(key)
            if style is None:
                break
            if outline is None:
                heading = _HEADING.fullmatch(style.name)
                outline = int(heading[1]) if heading else 1 if style.name == "title" else style.format.outline
            list_key = style.format.list_key if list_key is None else list_key
            list_level = style.format.list_level if list_level is None else list_level
            run = run.over(style.format.run)
            key = style.base
        return ParagraphFormat(outline, list_key, list_level, run)


def paragraph_format(properties: Element | None, *, run: RunFormat = RunFormat()) -> ParagraphFormat:
    """Return what a pPr says of its paragraph."""
    if properties is None:
        return ParagraphFormat(run=run)
    outline, number = child(properties, "outlineLvl"), child(properties, "numPr")
    level = whole(attribute(outline, "val")) if outline is not None else None
    key, at = child(number, "numId"), child(number, "ilvl")
    return ParagraphFormat(
        None if level is None else level + 1 if level < 9 else 0,
        attribute(key, "val") if key is not None else None,
        whole(attribute(at, "val")) if at is not None else None,
        run,
    )


def run_format(properties: Element | None) -> RunFormat:
    """Return what an rPr says of its run."""
    struck, level, hidden, font = None, None, None, None
    for item in () if properties is None else properties:
        match local(item.tag):
            case "strike" | "dstrike":
                struck = bool(struck) or is_on(item)
            case "vertAlign":
                level = _LEVELS.get(attribute(item, "val"), 0)
            case "position" if level is None and (raised := attribute(item, "val").strip("0")):
                level = -1 if raised.startswith("-") else 1
            case "vanish":
                hidden = is_on(item)
            case "rFonts":
                font = attribute(item, "ascii") or attribute(item, "hAnsi") or None
    return RunFormat(struck, level, hidden, font)
