"""PDF to text, page by page, with PDFium (pypdfium2).

Owns what is said of pages without text. Runs in the converting process only: PDFium is C++, and a PDF is a program.
"""

import re
from collections.abc import Callable, Sequence

from duolocal.documents.converted import Assembler, ConversionError, Converted, missing_extra

MAX_PAGES = 20_000
_MAX_PAGE_CHARACTERS = 4 * 2**20
_BEYOND_THE_EDGE = 40  # characters, and a tenth of the page: printers' marks are not worth a note
_MAX_RANGES = 12  # that a note lists
_ERROR_PASSWORD, _ERROR_SECURITY = 4, 5  # FPDF_ERR_…
_WORD = re.compile(r"[^\W\d_]{2,}")
# PDFium joins a word that was cut at the end of a line, and leaves this mark where the hyphen stood.
_CUT = re.compile(r"([^\W\d_]+)[\x02\xad]([^\W\d_]+)")
# What a font has no Unicode value for comes as a control character or one of private use.
_UNKNOWN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ue000-\uf8ff\ufffe\uffff]")
_TRAILING = re.compile(r"[ \t\xa0]+(?=\n|$)")


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert a PDF; its parts are its pages. Raises ConversionError."""
    try:
        import pypdfium2 as pdfium
    except ImportError:
        raise missing_extra("a PDF") from None
    try:
        document = pdfium.PdfDocument(data)
        num_pages = len(document)
    except pdfium.PdfiumError as error:
        code = getattr(error, "err_code", None)
        if code == _ERROR_PASSWORD or "password" in str(error).lower():
            raise ConversionError("is a PDF locked with a password: save it without one and load that") from None
        if code == _ERROR_SECURITY or "security" in str(error).lower():
            raise ConversionError("is a PDF locked by rights management: load another copy of the text") from None
        raise ConversionError(f"is a damaged PDF ({error}): open it elsewhere and save it anew") from None
    if num_pages < 1:
        raise ConversionError("is a PDF without pages: open it elsewhere and save it anew")
    if num_pages > MAX_PAGES:
        raise ConversionError(f"is a PDF of {num_pages:,} pages, more than {MAX_PAGES:,}: cut it up")
    pages: list[str] = []
    broken: list[int] = []
    cropped: list[int] = []
    for number in range(num_pages):
        try:
            page = document[number]
            reader = page.get_textpage()
            num_characters = reader.count_chars()
            if num_characters > _MAX_PAGE_CHARACTERS:
                raise ConversionError(f"holds more than {_MAX_PAGE_CHARACTERS:,} characters on page {number + 1}")
            pages.append(reader.get_text_bounded())  # what stands within the page, as a reader sees it
            if num_characters - len(pages[-1]) > max(_BEYOND_THE_EDGE, len(pages[-1]) // 10):
                cropped.append(number + 1)
            reader.close()
            page.close()
        except pdfium.PdfiumError:
            pages.append("")
            broken.append(number + 1)
        report(number + 1, num_pages)
    has_form = document.get_formtype() != 0
    document.close()
    return _assembled(pages, broken, cropped, has_form=has_form)


def _assembled(pages: Sequence[str], broken: Sequence[int], cropped: Sequence[int], *, has_form: bool) -> Converted:
    total = len(pages)
    words = {word for page in pages for word in _WORD.findall(page)}
    assembler = Assembler()
    empty, unknown = [], 0
    for number, page in enumerate(pages, 1):
        text, replaced = _clean(page, words)
        unknown += replaced
        if not text and number not in broken:
            empty.append(number)
        assembler.add(f"page {number}", text)
    if len(empty) + len(broken) == total:
        if not empty:
            raise ConversionError("is a damaged PDF (no page of it can be read): open it elsewhere and save it anew")
        raise ConversionError(
            f"is a PDF of which {len(empty):,} of {total:,} pages yield no text: it holds pictures of pages; "
            "run OCR over it first"
        )
    notes = []
    if empty:
        notes.append(
            f"{_pages(empty)} of {total:,} {'yields' if len(empty) == 1 else 'yield'} no text (blank, or a picture: "
            "run OCR over it to have that too)"
        )
    if broken:
        notes.append(f"{_pages(broken)} of {total:,} cannot be read: damaged")
    if cropped:
        notes.append(f"text beyond the edge of {_pages(cropped)}, which no reader sees, is not read")
    if unknown:
        notes.append(f"{unknown:,} times U+FFFD stands for a sign whose font does not say what it is")
    if has_form:
        notes.append("it is a form: what was filled in is not read")
    return Converted(assembler.text(), assembler.parts, tuple(notes))


def _clean(page: str, words: set[str]) -> tuple[str, int]:
    """Return the text of a page and how many of its signs are unknown."""
    text = page.replace("\r\n", "\n").replace("\r", "\n")
    text = _CUT.sub(lambda cut: _mended(cut[1], cut[2], words), text)
    text = text.replace("\x02", "-").replace("\xad", "").replace("\xa0", " ")
    text, unknown = _UNKNOWN.subn("\ufffd", text)
    return _TRAILING.sub("", text).strip(), unknown


def _mended(left: str, right: str, words: set[str]) -> str:
    """Join a word cut at a hyphen: with it only where the document knows both halves, and not the whole."""
    whole = left + right
    return f"{left}-{right}" if whole not in words and left in words and right in words else whole


def _pages(numbers: Sequence[int]) -> str:
    """Write page numbers: `page 7`, `pages 3, 7-9 and 12`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    if len(words) > _MAX_RANGES:
        return f"{len(numbers):,} pages ({', '.join(words[:_MAX_RANGES])} …)"
    if len(words) > 1:
        words = [", ".join(words[:-1]), words[-1]]
    return ("page " if len(numbers) == 1 else "pages ") + " and ".join(words)
