"""What the formats of cells say of their values: dates, durations, what is struck, raised or lowered."""

import datetime
import re
from typing import Literal
from xml.etree.ElementTree import Element

from duolocal.documents.inline import PLAIN, Style
from duolocal.documents.package import Package, Relation
from duolocal.documents.xml_tree import DamagedXmlError, attribute, child, is_on, local, val, whole

Kind = Literal["number", "date", "duration"]
LEVELS = {"superscript": 1, "subscript": -1}
_DATE_FORMATS = frozenset((*range(14, 23), *range(27, 37), 45, 47, *range(50, 59)))  # built in; 46 is [h]:mm:ss
_DURATION_FORMAT = 46
_LITERAL = re.compile(r'"[^"]*"|\\.|_.|\*.')  # of a number format
_ELAPSED = re.compile(r"\[(h+|m+|s+)\]", re.IGNORECASE)


class CellStyles:
    """What the formats of cells say of their values; where they are broken, nothing."""

    def __init__(self, package: Package, relations: list[Relation]) -> None:
        self.kinds: list[Kind] = []  # by number of the format
        self.styles: list[Style] = []
        self.fault = ""  # why they cannot be read
        name = next((relation.target for relation in relations if relation.kind == "styles"), "")
        if name not in package:
            return
        try:
            self._read(package.tree(name))
        except DamagedXmlError as error:
            self.fault = f"its formats cannot be read, dates stand as numbers (days since 1899-12-30): {error}"

    def _read(self, root: Element) -> None:
        codes: dict[int, str] = {}
        fonts: list[Style] = []
        for item in root:
            if local(item.tag) == "numFmts":
                codes = {whole(attribute(code, "numFmtId")): attribute(code, "formatCode") for code in item}
            elif local(item.tag) == "fonts":
                fonts = [_font(font) for font in item]
        formats = child(root, "cellXfs")
        for item in () if formats is None else formats:
            number, font = whole(attribute(item, "numFmtId")), whole(attribute(item, "fontId"))
            self.kinds.append(_kind(number, codes.get(number)))
            self.styles.append(fonts[font] if 0 <= font < len(fonts) else PLAIN)


def _font(font: Element) -> Style:
    return Style(is_on(font, "strike"), LEVELS.get(val(font, "vertAlign"), 0))


def _kind(number: int, code: str | None) -> Kind:
    if code is None:
        return "duration" if number == _DURATION_FORMAT else "date" if number in _DATE_FORMATS else "number"
    code = _LITERAL.sub("", code).partition(";")[0]
    if _ELAPSED.search(code):
        return "duration"
    code = re.sub(r"\[[^\]]*\]", "", code).lower()
    return "date" if "general" not in code and re.search("[ymdhs]", code) else "number"


def date_of(number: float, *, is_1904: bool) -> str:
    """Return a number of days as a date, a time of day, or both; "" for what is none."""
    days = number + 1462 if is_1904 else number
    if number < 0 or days >= 2958466:  # the year 10000
        return ""
    start = datetime.datetime(1899, 12, 31 if days < 60 else 30)  # Excel has a 29th of February 1900
    moment = start + datetime.timedelta(milliseconds=round(days * 86_400_000))
    if 0 < number < 1:
        return _without_zeros(moment.time().isoformat())
    if number == 0:
        return ""
    if moment.time() == datetime.time():
        return moment.date().isoformat()
    return _without_zeros(str(moment))


def duration(number: float) -> str:
    """Return a number of days as hours, minutes and seconds."""
    sign, milliseconds = "-" if number < 0 else "", round(abs(number) * 86_400_000)
    seconds, rest = divmod(milliseconds, 1000)
    text = f"{sign}{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"{text}.{rest:03}".rstrip("0") if rest else text


def _without_zeros(text: str) -> str:
    return text.rstrip("0") if "." in text else text
