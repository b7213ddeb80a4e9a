"""Pictures and other files that stand in a text as base64: tens of thousands of tokens that say nothing."""

import re
from dataclasses import replace

from duolocal.documents.converted import Converted

_LEAST = 200  # characters; less is no picture
_BASE64 = "[A-Za-z0-9+/_=%-]"
_NEXT_LINE = r"(?:\\?\r?\n[ \t]*| )"
_DATA = re.compile(
    r"data:(?P<type>[A-Za-z0-9.+-]{1,60}/[A-Za-z0-9.+-]{1,80})?(?:;[A-Za-z0-9=._-]{1,60}){0,4};base64,"
    rf"(?P<data>{_BASE64}{{20,}}(?:{_NEXT_LINE}{_BASE64}{{60,}})*(?:{_NEXT_LINE}[A-Za-z0-9+/]{{1,75}}={{1,2}})?)"
)
# How the base64 of pictures, PDFs and zips begins, where no address says what it is: in JSON, in XML, in vCards.
_KINDS = {
    "iVBORw0KGgo": "image/png",
    "/9j/": "image/jpeg",
    "R0lGOD": "image/gif",
    "UklGR": "image/webp",
    "JVBERi0": "application/pdf",
    "UEsDB": "application/zip",
}
_BARE = re.compile(
    rf"(?<![A-Za-z0-9+/])(?P<type>{'|'.join(map(re.escape, _KINDS))})"
    rf"(?P<data>[A-Za-z0-9+/]{{40,}}(?:(?:{_NEXT_LINE}|\\n)[A-Za-z0-9+/]{{60,}})*"
    rf"(?:(?:{_NEXT_LINE}|\\n)[A-Za-z0-9+/]{{1,75}}(?:={{1,2}}|(?=[\s\"'<\\])))?={{0,2}})"
)


def size_of(num_base64: int) -> str:
    """Say how large a file is, by the characters of its base64."""
    num_bytes = num_base64 * 3 // 4
    return f"{num_bytes:,} bytes" if num_bytes < 1024 else f"{num_bytes / 1024:,.0f} KB"


def left_out(kind: str, num_base64: int) -> str:
    """Return the note that stands for an embedded file."""
    what = "picture" if kind.startswith("image/") or not kind else "file"
    return f"[{what} left out: {f'{kind}, ' if kind else ''}{size_of(num_base64)}]"


def without_pictures(read: Converted) -> Converted:
    """Put a short note for every embedded file in a text without parts, and say so."""
    count = length = 0

    def note(match: re.Match[str]) -> str:
        nonlocal count, length
        if len(match["data"]) < _LEAST:
            return match[0]
        count, length = count + 1, length + len(match["data"])
        return left_out(_KINDS.get(match["type"], match["type"]) or "", len(match["data"]))

    text = _DATA.sub(note, read.text) if ";base64," in read.text else read.text
    text = _BARE.sub(note, text) if any(start in text for start in _KINDS) else text
    return replace(read, text=text, notes=(*read.notes, *pictures_note(count, length)))


def pictures_note(count: int, num_base64: int) -> tuple[str, ...]:
    """Return what is told of embedded files that were left out."""
    if not count:
        return ()
    what = "1 embedded picture or file" if count == 1 else f"{count:,} embedded pictures or files"
    return (f"{what} left out ({num_base64:,} characters of base64)",)
