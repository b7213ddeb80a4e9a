"""XML of strangers to a tree: no entities of its own, bounded depth and size."""

from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from duolocal.documents.converted import ConversionError

_MAX_DEPTH = 256
_MAX_ELEMENTS = 4_000_000


def parse_xml(data: bytes, what: str) -> Element:
    """Return the root; tags are `{namespace}name`. `what` names the file; raises ConversionError.

    An entity that the file declares (a few of them can stand for gigabytes) is refused, whatever it stands for.
    """
    parser = expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True
    builder = TreeBuilder()
    depth = count = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1
        if depth > _MAX_DEPTH or count > _MAX_ELEMENTS:
            raise ConversionError(f"holds {what} nested too deep or too large: it is damaged or made to harm")
        builder.start(_name(tag), {_name(key): value for key, value in attributes.items()})

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(_name(tag))

    def entity(*_: object) -> None:
        raise ConversionError(f"holds {what} that declares entities, which no such file needs: it is made to harm")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = entity
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise ConversionError(f"is damaged ({what}: {error}): open it elsewhere and save it anew") from None
    return builder.close()


def _name(tag: str) -> str:
    return "{" + tag if "}" in tag else tag


def local(tag: str) -> str:
    """Return a tag or attribute without its namespace."""
    return tag.rpartition("}")[2]
