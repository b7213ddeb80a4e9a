"""XML of strangers, to a tree or piece by piece: no entities of its own, bounded depth and size."""

from collections.abc import Callable
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from duolocal.documents.converted import ConversionError

_MAX_DEPTH = 256
_MAX_ELEMENTS = 4_000_000


class DamagedXmlError(ConversionError):
    """XML that breaks off or is not well formed; what came before has been handed over."""


def scan_xml(
    data: bytes,
    what: str,
    *,
    start: Callable[[str, dict[str, str]], None],
    end: Callable[[str], None],
    characters: Callable[[str], None],
    max_elements: int = _MAX_ELEMENTS,
) -> None:
    """Call back for every tag and text, tags and attributes as `namespace}name`; raises ConversionError.

    `what` names the file. An entity that the file declares (a few of them can stand for gigabytes) is refused,
    whatever it stands for.
    """
    parser = expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True
    depth = count = 0

    def opened(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1
        if depth > _MAX_DEPTH or count > max_elements:
            raise ConversionError(f"holds {what} nested too deep or too large: it is damaged or made to harm")
        start(tag, attributes)

    def closed(tag: str) -> None:
        nonlocal depth
        depth -= 1
        end(tag)

    def entity(*_: object) -> None:
        raise ConversionError(f"holds {what} that declares entities, which no such file needs: it is made to harm")

    parser.StartElementHandler = opened
    parser.EndElementHandler = closed
    parser.CharacterDataHandler = characters
    parser.EntityDeclHandler = entity
    try:
        parser.Parse(data.lstrip(b" \t\r\n"), True)  # before the declaration XML allows no space; some writers do
    except expat.ExpatError as error:
        raise DamagedXmlError(f"is damaged ({what}: {error}): open it elsewhere and save it anew") from None


def parse_xml(data: bytes, what: str) -> Element:
    """Return the root; tags are `{namespace}name`. `what` names the file; raises ConversionError."""
    builder = TreeBuilder()

    def start(tag: str, attributes: dict[str, str]) -> None:
        builder.start(_name(tag), {_name(key): value for key, value in attributes.items()})

    def end(tag: str) -> None:
        builder.end(_name(tag))

    scan_xml(data, what, start=start, end=end, characters=builder.data)
    return builder.close()


def _name(tag: str) -> str:
    return "{" + tag if "}" in tag else tag


def local(tag: str) -> str:
    """Return a tag or attribute without its namespace."""
    return tag.rpartition("}")[2]


def attribute(item: Element | None, name: str, default: str = "") -> str:
    """Return an attribute by its name without namespace; the default where it, or the element, is missing."""
    if item is None:
        return default
    value = item.get(name)
    if value is not None:
        return value
    return next((value for key, value in item.attrib.items() if local(key) == name), default)


def child(item: Element | None, *names: str) -> Element | None:
    """Return the first child of that name, and of that the child of the next; None where there is none."""
    for name in names:
        if item is None:
            return None
        item = next((inner for inner in item if local(inner.tag) == name), None)
    return item


def val(item: Element | None, *names: str, default: str = "") -> str:
    """Return the `val` of a descendant, as Office writes most properties; the default where it is missing."""
    return attribute(child(item, *names), "val", default)


def is_on(item: Element | None, *names: str) -> bool:
    """Tell whether a property of Office that is on or off is there, and on."""
    found = child(item, *names)
    return found is not None and attribute(found, "val", "1") not in ("0", "false", "off", "none")


def whole(text: str) -> int:
    """Return a number as attributes write it; 0 for what is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
