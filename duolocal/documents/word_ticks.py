"""Content controls of Word that are boxes to tick."""

from xml.etree.ElementTree import Element

from duolocal.documents.xml_tree import attribute, child, local

_ON = ("1", "true", "on")


def tick(item: Element) -> str | None:
    """Return the mark of a content control that is a box to tick; None for any other."""
    box = child(item, "sdtPr", "checkbox")
    if box is None:
        return None
    checked = child(box, "checked")
    return "[x] " if checked is not None and attribute(checked, "val", "1") in _ON else "[ ] "


def show_tick(control: Element, mark: str) -> None:
    """Let the box of a content control around a cell be the mark."""
    for at, item in enumerate(inner for inner in control.iter() if local(inner.tag) in ("t", "sym")):
        item.tag, item.text = "t", "" if at else mark
