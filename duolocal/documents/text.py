"""Bytes of plain text to a string: which codec they are in, found and, where it is a guess, said.

Knows nothing of files or formats.
"""

import codecs
import re
from dataclasses import dataclass

from duolocal.documents.converted import ConversionError
from duolocal.documents.guess import guess_encoding, guess_utf16, has_normalizer

# Control characters that do occur in text: tab, newlines, form feed, escape (in logs), backspace (man pages).
_TEXT_CONTROLS = frozenset(b"\t\n\r\x0b\x0c\x1b\x08")
_NO_CONTROLS = bytes(code for code in range(256) if code >= 32 or code in _TEXT_CONTROLS)
_PLAIN = bytes(range(0x61, 0x7B)) + bytes(range(0x41, 0x5B)) + b"0123456789 \t\r\n,;.:-_\"'/()"
_ZEROS = re.compile("\0+")
_ZERO_BYTES = re.compile(b"\0+")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16: its mark begins with the same two bytes
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class NotTextError(ConversionError):
    """Bytes that are no text; `str()` goes on after the name of a file."""


@dataclass(frozen=True)
class Decoded:
    """A text, and how sure we are of it."""

    text: str  # newlines are \\n
    encoding: str
    num_replaced: int = 0  # bytes that fit no character and stand as U+FFFD
    notes: tuple[str, ...] = ()


def is_blank(data: bytes) -> bool:
    """Tell whether there is nothing but white space and zeros."""
    return not data.strip(b" \t\r\n\x0b\x0c\0")


def looks_binary(data: bytes) -> bool:
    """Tell whether the first bytes of a file are no text in any encoding; guesses none."""
    if data.startswith(tuple(mark for mark, _ in _MARKS)) or _is_text_with_zeros(data):
        return False
    return guess_utf16(data) is None if b"\0" in data else _many_controls(data)


def decode(data: bytes, *, declared: str | None = None) -> Decoded:
    """Decode text in whatever encoding it is in; raises NotTextError.

    `declared` is what the file says of itself (HTML does); it is believed where nothing speaks against it.
    """
    encoding = _detect(data)
    if encoding is None:
        raise NotTextError("is a binary file, not text: load a text file instead")
    guessed = encoding not in ("utf-8", "utf-8-sig", "utf-16", "utf-32")
    if guessed and declared is not None and (known := _known(declared, data)):
        encoding, guessed = known, False
    num_replaced = 0
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding.startswith("utf-") and encoding != "utf-8":
            raise NotTextError(
                f"starts like {encoding} but breaks off at byte {error.start:,}: save it as UTF-8"
            ) from error
        text = data.decode(encoding, errors="replace")
        num_replaced = text.count("\ufffd")
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    notes = []
    if "\0" in text:
        text, num_zeros = _ZEROS.subn("\ufffd", text)
        notes.append(
            f"{num_zeros:,} {'run of zero bytes stands' if num_zeros == 1 else 'runs of zero bytes stand'} as U+FFFD"
        )
    if guessed and encoding not in ("utf-16-le", "utf-16-be"):
        better = "" if has_normalizer() else '; pip install "duolocal[documents]" makes better guesses'
        notes.append(f"not UTF-8: read as {encoding}, a guess; look at its accents before you rely on it{better}")
    if num_replaced:
        notes.append(f"not quite UTF-8: {num_replaced:,} times U+FFFD stands for what was unreadable")
    return Decoded(text, "utf-8" if encoding == "utf-8-sig" else encoding, num_replaced, tuple(notes))


def _known(declared: str, data: bytes) -> str | None:
    """Return the codec of that name, where it is one of text and can read the data."""
    try:
        name = codecs.lookup(declared).name
        # Browsers read these three as Windows does, since so many pages mean that.
        name = {"iso8859-1": "cp1252", "ascii": "cp1252", "gb2312": "gb18030"}.get(name, name)
        data.decode(name)
    except (LookupError, UnicodeError, ValueError):
        return None
    return name


def _detect(data: bytes) -> str | None:
    """Name the codec of `data`, or None when it is no text."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding
    if _is_text_with_zeros(data):
        data = data.replace(b"\0", b"")
    elif b"\0" in data:
        return guess_utf16(data)
    elif _many_controls(data):
        return None
    if data.isascii() and (b"\x1b$B" in data or b"\x1b$@" in data):
        return "iso2022_jp"  # seven bits: it would pass for UTF-8
    if _mostly_utf8(data):
        return "utf-8"
    return guess_encoding(data)


def _many_controls(data: bytes) -> bool:
    sample = data[:65536]
    return len(sample.translate(None, delete=_NO_CONTROLS)) > len(sample) * 0.02


def _is_text_with_zeros(data: bytes) -> bool:
    """Tell whether `data` is text in bytes but for a few runs of zeros: a stray one, or the hole that a crash left."""
    if b"\0" not in data:
        return False
    sample = data[:65536]
    runs = len(_ZERO_BYTES.findall(sample))
    rest = sample.replace(b"\0", b"")
    plain = len(rest) - len(rest.translate(None, delete=_PLAIN))
    return runs <= max(1, 0.01 * len(rest)) and plain >= 0.7 * len(rest) and not _many_controls(rest)


def _mostly_utf8(data: bytes) -> bool:
    """Tell whether `data` is UTF-8, allowing a few stray bytes among many valid characters."""
    text = data.decode("utf-8", errors="replace")
    stray = text.count("\ufffd")
    if not stray:
        return True
    # In an 8-bit encoding next to no accent happens to form a valid UTF-8 sequence.
    accented = sum(1 for character in text if character > "\x7f") - stray
    return accented >= 10 * stray
