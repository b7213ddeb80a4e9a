"""Formulas of Office files (OMML) in one line: (a+b)/2, x^2, √(x), ∑_{i=1}^{n} x_i."""

import re
from xml.etree.ElementTree import Element

from duolocal.documents.xml_tree import attribute, child, local

_ONE = re.compile(r"\w+|[^\w\s]|\(.*\)")  # needs no brackets around it


def formula(root: Element) -> str:
    """Return a formula as text; "" for one that is empty."""
    return " ".join(_text(root).split())


def _text(item: Element | None) -> str:
    if item is None:
        return ""
    match local(item.tag):
        case "t":
            return item.text or ""
        case "f":
            return f"{_grouped(_part(item, 'num'))}/{_grouped(_part(item, 'den'))}"
        case "sSup" | "sSub" | "sSubSup" | "sPre":
            return _part(item, "e") + _script("_", _part(item, "sub")) + _script("^", _part(item, "sup"))
        case "rad":
            degree = _part(item, "deg")
            return f"{degree}√({_part(item, 'e')})"
        case "nary":
            sign = _property(item, "naryPr", "chr", "∫")
            return sign + _script("_", _part(item, "sub")) + _script("^", _part(item, "sup")) + f" {_part(item, 'e')}"
        case "limLow" | "limUpp":
            return _part(item, "e") + _script("_" if local(item.tag) == "limLow" else "^", _part(item, "lim"))
        case "d":
            separator = _property(item, "dPr", "sepChr", "|")
            inner = separator.join(_text(part) for part in item if local(part.tag) == "e")
            return _property(item, "dPr", "begChr", "(") + inner + _property(item, "dPr", "endChr", ")")
        case "func":
            return f"{_part(item, 'fName')} {_part(item, 'e')}"
        case "m" | "eqArr":
            rows = (part for part in item if local(part.tag) in ("mr", "e"))
            return "; ".join(_text(row) for row in rows)
        case "mr":
            return ", ".join(_text(part) for part in item if local(part.tag) == "e")
        case "del" | "moveFrom" | "rPr" | "ctrlPr":
            return ""
        case _:
            return "".join(_text(part) for part in item)


def _part(item: Element, name: str) -> str:
    return _text(child(item, name)).strip()


def _property(item: Element, group: str, name: str, default: str) -> str:
    found = child(item, group, name)
    return attribute(found, "val") if found is not None else default


def _grouped(text: str) -> str:
    return text if _ONE.fullmatch(text) else f"({text})"


def _script(mark: str, text: str) -> str:
    return "" if not text else f"{mark}{text}" if re.fullmatch(r"[+\-−]?\w+", text) else f"{mark}{{{text}}}"
