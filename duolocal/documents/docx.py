"""Word documents to text: mammoth makes HTML of them, `html_text` makes text of that.

Headings, lists, tables, footnotes, comments and text boxes are kept; headers, footers, pictures, formulas and
deleted text are not.
"""

import io
import logging
import re
from collections import Counter
from collections.abc import Callable

from duolocal.documents.converted import ConversionError, Converted, missing_extra
from duolocal.documents.html_text import read_page
from duolocal.documents.zipped import Archive, ArchiveError

_MAX_XML_BYTES = 96 * 2**20  # mammoth makes a tree of it, many times that size
_IGNORED = "An unrecognised element was ignored"  # as mammoth puts it
_FORMULAS = ("oMath", "oMathPara")


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert a Word document; raises ConversionError."""
    try:
        import mammoth
    except ImportError:
        raise missing_extra("a Word document") from None
    check_office(data, "word/", most=_MAX_XML_BYTES)
    logging.disable(logging.CRITICAL)
    made = mammoth.convert_to_html(
        io.BytesIO(data),
        convert_image=mammoth.images.img_element(lambda image: {"src": "", "alt": image.alt_text or ""}),
        style_map="comment-reference => sup",
    )
    text = read_page(made.value).text
    if not text:
        raise ConversionError("is a Word document without text: it may hold pictures only; run OCR over them first")
    return Converted(text, (), _notes([message.message for message in made.messages]))


def _notes(messages: list[str]) -> tuple[str, ...]:
    ignored = Counter(re.split("[:}]", message)[-1].strip() for message in messages if message.startswith(_IGNORED))
    formulas = sum(ignored.pop(name, 0) for name in _FORMULAS)
    notes = [f"{formulas:,} formula{'' if formulas == 1 else 's'} not read"] if formulas else []
    if ignored:
        names = ", ".join(f"{name} ({count:,})" for name, count in ignored.most_common(5))
        notes.append(f"parts of unknown kinds are not read: {names}")
    return tuple(notes)


def check_office(data: bytes, folder: str, *, most: int) -> None:
    """Refuse an Office file whose XML declares entities, or unpacks to more than `most` bytes; raises ConversionError.

    Its own library would find out too late.
    """
    try:
        with Archive(data) as archive:
            total = 0
            for name in archive.names():
                if not name.lower().endswith((".xml", ".rels")):
                    continue
                content = archive.read(name, most=most)
                total += len(content)
                if total > most:
                    raise ArchiveError(f"unpacks to more than {most // 2**20} MiB of XML: cut it up")
                # In UTF-16 every second byte is a zero.
                if b"<!DOCTYPE" in content or (b"\0" in content and b"<!DOCTYPE" in content.replace(b"\0", b"")):
                    raise ArchiveError(f"declares entities in {name}, which no such file needs: it is made to harm")
            if not any(name.startswith(folder) for name in archive.members):
                raise ArchiveError(f"holds no {folder} folder: it is damaged or something else; save it anew")
    except ArchiveError as error:
        raise ConversionError(str(error)) from error
