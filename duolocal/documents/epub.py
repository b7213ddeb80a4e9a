"""EPUB books to text, chapter by chapter, in the order of the book. Needs nothing but Python.

A chapter is a file of the book's spine; its name is that of the table of contents where it has one.
"""

import posixpath
import re
from collections.abc import Callable
from urllib.parse import unquote
from xml.etree.ElementTree import Element

from duolocal.documents.converted import Assembler, ConversionError, Converted
from duolocal.documents.html_text import Page, declared_encoding, hidden_note, read_page
from duolocal.documents.text import NotTextError, decode
from duolocal.documents.xml_tree import local, parse_xml
from duolocal.documents.zipped import Archive, ArchiveError

MAX_CHAPTERS = 10_000
_MAX_XML_BYTES = 16 * 2**20
_MAX_CHAPTER_BYTES = 64 * 2**20
_PAGES = ("application/xhtml+xml", "text/html", "application/xml", "text/xml", "text/x-oeb1-document")
# Fonts may be scrambled in a book that anyone can read; whatever else is encrypted is locked.
_FONT_SCRAMBLING = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")
_HEADING = re.compile(r"#{1,3} (.+)")


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert a book; its parts are its chapters. Raises ConversionError."""
    try:
        with Archive(data) as archive:
            return _book(archive, report)
    except ArchiveError as error:
        raise ConversionError(str(error)) from error


def _book(archive: Archive, report: Callable[[int, int], None]) -> Converted:
    _refuse_locked(archive)
    container = parse_xml(_xml(archive, "META-INF/container.xml"), "META-INF/container.xml")
    packages = [item.get("full-path", "") for item in container.iter() if local(item.tag) == "rootfile"]
    if not packages or not packages[0]:
        raise ConversionError("is an EPUB book that does not say what is in it: it is damaged; save it anew")
    package = parse_xml(_xml(archive, packages[0]), packages[0])
    folder = posixpath.dirname(packages[0])
    manifest = {item.get("id", ""): item for item in package.iter() if local(item.tag) == "item"}
    spine = [item.get("idref", "") for item in package.iter() if local(item.tag) == "itemref"]
    if not spine or len(spine) > MAX_CHAPTERS:
        raise ConversionError(
            f"is an EPUB book of {len(spine):,} chapters: "
            + ("it is damaged; save it anew" if not spine else f"more than {MAX_CHAPTERS:,} are not read; cut it up")
        )
    titles = _titles(archive, package, manifest, folder)
    assembler = Assembler()
    empty, broken, num_hidden = [], [], 0
    for number, idref in enumerate(spine, 1):
        item = manifest.get(idref)
        name = _inside(folder, item.get("href", "")) if item is not None else ""
        text = ""
        if item is None or name not in archive:
            broken.append(number)
        elif item.get("media-type", _PAGES[0]) in _PAGES:
            try:
                page = _chapter(archive.read(name, most=_MAX_CHAPTER_BYTES))
                text = page.text
                num_hidden += page.num_hidden
            except NotTextError:
                broken.append(number)
        if not text and number not in broken:
            empty.append(number)
        heading = _HEADING.match(text)
        title = titles.get(name) or (heading[1] if heading else "")
        assembler.add(f"chapter {number}: {title[:80]}" if title else f"chapter {number}", text)
        report(number, len(spine))
    if len(empty) + len(broken) == len(spine):
        raise ConversionError(
            f"is an EPUB book of which {len(spine):,} of {len(spine):,} chapters yield no text: it holds pictures of "
            "pages, or is damaged; run OCR over it or load another copy"
        )
    notes = []
    if empty:
        notes.append(f"{_chapters(empty)} of {len(spine):,} without text (pictures or blank)")
    if broken:
        notes.append(f"{_chapters(broken)} of {len(spine):,} missing or unreadable: the file is damaged")
    notes += hidden_note(num_hidden)
    return Converted(assembler.text(), assembler.parts, tuple(notes))


def _refuse_locked(archive: Archive) -> None:
    if "META-INF/encryption.xml" not in archive:
        return
    root = parse_xml(_xml(archive, "META-INF/encryption.xml"), "META-INF/encryption.xml")
    methods = [item.get("Algorithm", "") for item in root.iter() if local(item.tag) == "EncryptionMethod"]
    if any(method not in _FONT_SCRAMBLING for method in methods):
        raise ConversionError("is an EPUB book locked by rights management (DRM): load a copy without it")


def _xml(archive: Archive, name: str) -> bytes:
    return archive.read(name, most=_MAX_XML_BYTES)


def _chapter(data: bytes) -> Page:
    return read_page(decode(data, declared=declared_encoding(data)).text if data.strip() else "")


def _inside(folder: str, href: str) -> str:
    """Return the name of the member that a link means; one that leads out of the archive names none."""
    return posixpath.normpath(posixpath.join(folder, unquote(href.partition("#")[0])))


def _titles(archive: Archive, package: Element, manifest: dict[str, Element], folder: str) -> dict[str, str]:
    """Return member -> title from the table of contents; empty where it has none that can be read."""
    titles: dict[str, str] = {}
    try:
        for item in manifest.values():
            name = _inside(folder, item.get("href", ""))
            if name not in archive:
                continue
            if "nav" in (item.get("properties") or "").split():
                for link in parse_xml(_xml(archive, name), name).iter():
                    if local(link.tag) == "a" and link.get("href"):
                        target = _inside(posixpath.dirname(name), link.get("href", ""))
                        titles.setdefault(target, " ".join("".join(link.itertext()).split()))
            elif item.get("media-type") == "application/x-dtbncx+xml" and not titles:
                for point in parse_xml(_xml(archive, name), name).iter():
                    if local(point.tag) != "navPoint":
                        continue
                    source = next((at.get("src", "") for at in point if local(at.tag) == "content"), "")
                    label = next((at for at in point if local(at.tag) == "navLabel"), None)
                    if source and label is not None:
                        target = _inside(posixpath.dirname(name), source)
                        titles.setdefault(target, " ".join("".join(label.itertext()).split()))
    except ConversionError:
        return titles  # the chapters can be read without their names
    return titles


def _chapters(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:20])) + (" …" if len(numbers) > 20 else "")
    return f"chapter {shown}" if len(numbers) == 1 else f"chapters {shown}"
