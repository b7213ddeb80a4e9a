"""EPUB books to text, chapter by chapter, in the order of the book. Needs nothing but Python.

A chapter is a file of the book's spine; its name is that of the table of contents where it has one.
"""

import posixpath
import re
import unicodedata
from collections.abc import Callable
from urllib.parse import unquote
from xml.etree.ElementTree import Element

from duolocal.documents.converted import Assembler, ConversionError, Converted
from duolocal.documents.html_text import Page, classes_of, declared_encoding, read_page
from duolocal.documents.inline import Style
from duolocal.documents.text import NotTextError, decode
from duolocal.documents.told import Told
from duolocal.documents.xml_tree import DamagedXmlError, attribute, child, local, parse_xml
from duolocal.documents.zipped import Archive, ArchiveError

MAX_CHAPTERS = 10_000
_MAX_XML_BYTES = 16 * 2**20
_MAX_CHAPTER_BYTES = 64 * 2**20
_PAGES = ("application/xhtml+xml", "text/html", "application/xml", "text/xml", "text/x-oeb1-document")
# Fonts may be scrambled in a book that anyone can read; whatever else is encrypted is locked.
_FONT_SCRAMBLING = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")
_PAGE_SUFFIXES = (".xhtml", ".html", ".htm", ".xml")
_MAX_SHEETS, _MAX_CSS_BYTES = 50, 2**20
_MAX_FALLBACKS = 10
_SHOWN = 5  # chapters and pages that notes list
_HEADING = re.compile(r"#{1,3} (.+)")


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert a book; its parts are its chapters. Raises ConversionError."""
    with Archive(data) as archive:
        return _book(archive, report)


def _book(archive: Archive, report: Callable[[int, int], None]) -> Converted:
    _refuse_locked(archive)
    names = _Names(archive)
    place = _package_name(archive, names)
    package = parse_xml(_xml(archive, place), place)
    folder = posixpath.dirname(place)
    items = [item for item in package.iter() if local(item.tag) == "item"]
    manifest = {item.get("id", ""): item for item in reversed(items)}
    spine = [item.get("idref", "") for item in package.iter() if local(item.tag) == "itemref"]
    notes = []
    if not spine:
        pages = [item for item in items if item.get("media-type") in _PAGES and not _is_contents(item)]
        spine = [item.get("id", "") for item in pages]
        notes.append("it does not say in which order it is read: chapters come as it lists them")
    if not spine or len(spine) > MAX_CHAPTERS:
        raise ConversionError(
            f"is an EPUB book of {len(spine):,} chapters: "
            + ("it is damaged; save it anew" if not spine else f"more than {MAX_CHAPTERS:,} are not read; cut it up")
        )
    classes = _classes(archive, items, names, folder)
    titles = _titles(archive, items, names, folder)
    assembler = Assembler()
    empty: list[int] = []
    broken: list[str] = []
    num_hidden, read = 0, set()
    for number, idref in enumerate(spine, 1):
        item = _page(manifest, idref)
        name = names.find(folder, item.get("href", "")) if item is not None else ""
        page, reason = Page("", "", 0), ""
        if item is None:
            reason = f"the book lists no {idref or 'item without a name'}"
        elif not name:
            reason = f"{item.get('href', '')[:80]} is not in the archive"
        elif _is_page(item, name):
            read.add(name)
            try:
                page = _chapter(archive.read(name, most=_MAX_CHAPTER_BYTES), classes)
            except (NotTextError, ArchiveError) as error:
                reason = f"{name[-80:]} {str(error)[:80]}"
        num_hidden += page.num_hidden
        if reason:
            broken.append(f"chapter {number}: {reason}")
        elif not page.text:
            empty.append(number)
        heading = _HEADING.match(page.text)
        title = titles.get(name) or (heading[1] if heading else "")
        assembler.add(f"chapter {number}: {title[:80]}" if title else f"chapter {number}", page.text)
        report(number, len(spine))
    if len(empty) + len(broken) == len(spine):
        why = f" ({broken[0]})" if broken else ""
        raise ConversionError(
            f"is an EPUB book of which {len(spine):,} of {len(spine):,} chapters yield no text{why}: it holds pictures "
            "of pages, or is damaged; run OCR over it or load another copy"
        )
    if empty:
        notes.append(f"{_chapters(empty)} of {len(spine):,} without text (pictures or blank)")
    notes += broken[:_SHOWN]
    if len(broken) > _SHOWN:
        notes.append(f"{len(broken) - _SHOWN:,} more chapters of {len(spine):,} are missing or unreadable")
    outside = _outside(items, names, folder, read)
    if outside:
        shown = ", ".join(outside[:_SHOWN]) + (" …" if len(outside) > _SHOWN else "")
        notes.append(f"pages that stand outside the order of the book are not read ({len(outside):,}): {shown[:250]}")
    notes += Told(hidden=num_hidden).notes()
    return Converted(assembler.text(), assembler.parts, tuple(notes))


def _package_name(archive: Archive, names: "_Names") -> str:
    """Return the member that says what is in the book."""
    files = [name for name in archive.names() if name.lower().endswith(".opf")]
    try:
        container = parse_xml(_xml(archive, "META-INF/container.xml"), "META-INF/container.xml")
    except (ArchiveError, DamagedXmlError):
        if not files:
            raise
        return files[0]
    roots = [item.get("full-path", "") for item in container.iter() if local(item.tag) == "rootfile"]
    found = [name for root in roots if (name := names.find("", root))] or files
    if not found:
        raise ConversionError("is an EPUB book that does not say what is in it: it is damaged; save it anew")
    return found[0]


def _page(manifest: dict[str, Element], key: str) -> Element | None:
    """Return the item of a chapter; of one in a format for few readers that which stands in for it."""
    item = manifest.get(key)
    for _ in range(_MAX_FALLBACKS):
        if item is None or item.get("media-type", _PAGES[0]) in _PAGES or item.get("fallback") not in manifest:
            break
        item = manifest[item.get("fallback", "")]
    return item


def _is_page(item: Element, name: str) -> bool:
    kind = item.get("media-type", "").strip().lower()
    return kind in _PAGES or (not kind.startswith("image/") and name.lower().endswith(_PAGE_SUFFIXES))


def _is_contents(item: Element) -> bool:
    return "nav" in (item.get("properties") or "").split()


def _outside(items: list[Element], names: "_Names", folder: str, read: set[str]) -> list[str]:
    """Return the pages that are in the book and in no place of it; its table of contents is none."""
    found = []
    for item in items:
        name = names.find(folder, item.get("href", ""))
        if name and name not in read and item.get("media-type") in _PAGES[:2] and not _is_contents(item):
            found.append(name.rpartition("/")[2])
    return found


class _Names:
    """Finds the members that links mean, however they are written: percent signs, case, accents, slashes."""

    def __init__(self, archive: Archive) -> None:
        self._names = set(archive.names())
        self._by_key: dict[str, str] = {}
        self._by_base: dict[str, list[str]] = {}
        self._found: dict[tuple[str, str], str] = {}
        for name in archive.names():
            key = _key(name)
            self._by_key.setdefault(key, name)
            self._by_base.setdefault(posixpath.basename(key), []).append(name)

    def find(self, folder: str, link: str) -> str:
        """Return the name of a member; "" where none is meant, or it lies outside the archive."""
        if (folder, link) not in self._found:
            self._found[folder, link] = self._find(folder, link.strip())
        return self._found[folder, link]

    def _find(self, folder: str, link: str) -> str:
        if not link or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", link):
            return ""
        plain = link.partition("#")[0].strip()
        forms = [link, link.rpartition("#")[0].strip() or plain, plain, plain.partition("?")[0]]
        tried = []
        for form in dict.fromkeys([*forms, *map(unquote, forms), *(unquote(unquote(form)) for form in forms)]):
            path = form.replace("\\", "/")
            for place in (posixpath.join(folder, path), posixpath.join(folder, path.lstrip("/")), path.lstrip("/")):
                tried.append(posixpath.normpath(place).lstrip("/"))
        for name in tried:
            if name in self._names:
                return name
        for name in tried:
            if (found := self._by_key.get(_key(name))) is not None:
                return found
        same = self._by_base.get(posixpath.basename(_key(tried[-1])), [])
        return same[0] if len(same) == 1 else ""


def _key(name: str) -> str:
    """Return what names have in common that mean the same member."""
    path = posixpath.normpath(unquote(name).replace("\\", "/")).lstrip("/")
    return unicodedata.normalize("NFC", path).casefold()


def _refuse_locked(archive: Archive) -> None:
    if "META-INF/encryption.xml" not in archive:
        return
    root = parse_xml(_xml(archive, "META-INF/encryption.xml"), "META-INF/encryption.xml")
    methods = [item.get("Algorithm", "") for item in root.iter() if local(item.tag) == "EncryptionMethod"]
    if any(method not in _FONT_SCRAMBLING for method in methods):
        raise ConversionError("is an EPUB book locked by rights management (DRM): load a copy without it")


def _xml(archive: Archive, name: str) -> bytes:
    return archive.read(name, most=_MAX_XML_BYTES)


def _chapter(data: bytes, classes: dict[str, Style]) -> Page:
    return read_page(decode(data, declared=declared_encoding(data)).text if data.strip() else "", classes)


def _classes(archive: Archive, items: list[Element], names: "_Names", folder: str) -> dict[str, Style]:
    """Return what the style sheets of the book do to text."""
    classes: dict[str, Style] = {}
    sheets = [item for item in items if item.get("media-type") == "text/css"]
    for item in sheets[:_MAX_SHEETS]:
        name = names.find(folder, item.get("href", ""))
        try:
            classes |= classes_of(archive.read(name, most=_MAX_CSS_BYTES).decode("utf-8", "replace")) if name else {}
        except ArchiveError:
            continue  # the text can be read without it
    return classes


def _titles(archive: Archive, items: list[Element], names: _Names, folder: str) -> dict[str, str]:
    """Return member -> title from the table of contents; empty where it has none that can be read."""
    titles: dict[str, str] = {}
    try:
        for item in items:
            name = names.find(folder, item.get("href", ""))
            inside = posixpath.dirname(name)
            if name and _is_contents(item):
                for link in parse_xml(_xml(archive, name), name).iter():
                    if local(link.tag) == "a" and link.get("href") and len(titles) < MAX_CHAPTERS:
                        target = names.find(inside, link.get("href", ""))
                        titles.setdefault(target, " ".join("".join(link.itertext()).split()))
            elif name and item.get("media-type") == "application/x-dtbncx+xml" and not titles:
                for point in parse_xml(_xml(archive, name), name).iter():
                    if local(point.tag) != "navPoint" or len(titles) >= MAX_CHAPTERS:
                        continue
                    source, label = child(point, "content"), child(point, "navLabel")
                    if source is not None and label is not None:
                        target = names.find(inside, attribute(source, "src"))
                        titles.setdefault(target, " ".join("".join(label.itertext()).split()))
    except ConversionError:
        return titles  # the chapters can be read without their names
    return titles


def _chapters(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:20])) + (" …" if len(numbers) > 20 else "")
    return f"chapter {shown}" if len(numbers) == 1 else f"chapters {shown}"
