"""The parts of an Office file (OOXML) and how they refer to each other; transitional and strict files alike."""

import io
import posixpath
import zipfile
from typing import NamedTuple
from urllib.parse import unquote
from xml.etree.ElementTree import Element, tostring

from duolocal.documents.converted import ConversionError
from duolocal.documents.xml_tree import attribute, child, local, parse_xml
from duolocal.documents.zipped import Archive


class Relation(NamedTuple):
    """What a part refers to: `kind` is the last word of the relation's type, such as "worksheet"."""

    key: str
    kind: str
    target: str  # the name of a member; of what is outside the file its address
    is_external: bool


def unflattened(data: bytes) -> bytes:
    """Return an Office file that was saved as one XML file (xmlPackage) as a zip, and any other as it is."""
    if data.startswith(b"PK"):
        return data
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for part in parse_xml(data, "the document"):
            content = child(part, "xmlData")
            if local(part.tag) == "part" and content is not None and len(content):
                archive.writestr(attribute(part, "name").lstrip("/"), tostring(content[0]))
    return out.getvalue()


class Package:
    """The parts of an open archive, by name; case and the kind of slashes do not matter."""

    def __init__(self, archive: Archive, *, most: int) -> None:
        self._archive = archive
        self._most = most  # bytes of XML in all
        self._left = most
        self._names = {name.lower().replace("\\", "/"): name for name in reversed(archive.names())}

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._names

    def read(self, name: str) -> bytes:
        """Return a part; raises ArchiveError where it is missing, ConversionError beyond the bound."""
        data = self._archive.read(self._names.get(name.lower(), name), most=self._most)
        self._left -= len(data)
        if self._left < 0:
            raise ConversionError(f"unpacks to more than {self._most // 2**20} MiB of XML: cut it up")
        return data

    def tree(self, name: str) -> Element:
        """Return a part as a tree."""
        return parse_xml(self.read(name), name)

    def main(self, usual: str) -> str:
        """Return the name of the main part; `usual` where the package does not say."""
        for relation in self.relations(""):
            if relation.kind == "officeDocument" and relation.target in self:
                return relation.target
        if usual not in self:
            folder = posixpath.dirname(usual)
            raise ConversionError(f"holds no {folder} folder: it is damaged or something else; save it anew")
        return usual

    def relations(self, name: str) -> list[Relation]:
        """Return what a part refers to, "" for the package itself; empty where that cannot be read."""
        folder, base = posixpath.split(name)
        member = posixpath.join(folder, "_rels", f"{base}.rels")
        if member not in self:
            return []
        found = []
        for item in self.tree(member):
            if local(item.tag) != "Relationship":
                continue
            target, is_external = item.get("Target", ""), item.get("TargetMode") == "External"
            if not is_external:
                plain = posixpath.normpath(posixpath.join("/", folder, target.replace("\\", "/"))).lstrip("/")
                target = plain if plain in self else unquote(plain)
            kind = item.get("Type", "").rpartition("/")[2]
            found.append(Relation(item.get("Id", ""), kind, target, is_external))
        return found


def alternative(item: Element) -> Element:
    """Return the content of an mc:AlternateContent for new readers, or that for old ones where only that has text."""
    choices = [inner for inner in item if local(inner.tag) in ("Choice", "Fallback")]
    return next((inner for inner in choices if has_text(inner)), choices[0] if choices else Element("none"))


def has_text(item: Element) -> bool:
    """Tell whether a reader would see text in it."""
    return any(
        (local(inner.tag) in ("t", "textpath", "sym") and (inner.text or inner.attrib)) or local(inner.tag) == "relIds"
        for inner in item.iter()
    )
