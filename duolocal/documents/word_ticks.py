"""What of a Word document is a box to tick: content controls, and form fields of older versions."""

from xml.etree.ElementTree import Element

from duolocal.documents.xml_tree import child, is_on, local


def tick(item: Element) -> str | None:
    """Return the mark of a content control that is a box to tick; None for any other."""
    return _mark(child(item, "sdtPr", "checkbox"), "checked")


def field_tick(data: Element | None) -> str | None:
    """Return the mark of a form field that is a box to tick; None for any other."""
    box = child(data, "checkBox")
    return _mark(box, "default" if child(box, "checked") is None else "checked")


def _mark(box: Element | None, name: str) -> str | None:
    return None if box is None else "[x] " if is_on(box, name) else "[ ] "


def show_tick(control: Element, mark: str) -> None:
    """Let the box of a content control around a cell be the mark."""
    for at, item in enumerate(inner for inner in control.iter() if local(inner.tag) in ("t", "sym")):
        item.tag, item.text = "t", "" if at else mark
