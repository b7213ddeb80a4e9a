"""What a converter gives back, and how it says that it cannot. Loads nothing."""

from dataclasses import dataclass

from duolocal.documents.model import Part

# Ten times what a million tokens are in English; what converts to more is no document.
MAX_TEXT = 64 * 2**20  # characters


class ConversionError(Exception):
    """A file that cannot be converted; `str()` goes on after the name of the file and says what to do."""


@dataclass(frozen=True)
class Converted:
    """The text of a file of some format."""

    text: str
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()
    encoding: str = ""
    num_replaced: int = 0


def missing_extra(what: str) -> ConversionError:
    """Return the error for a library that is not installed; `what` is "a PDF"."""
    return ConversionError(f'is {what}, which needs one more package: pip install "duolocal[documents]"')


class Assembler:
    """Joins parts into one text and keeps count of where each begins; raises ConversionError beyond MAX_TEXT."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._parts: list[Part] = []
        self._length = 0

    def add(self, label: str, text: str) -> None:
        """Append a part; a blank line goes between two that have text. Soft hyphens are left out."""
        text = text.replace("\xad", "").strip("\n")
        if text and self._length:
            self._push("\n\n")
        self._parts.append(Part(label, self._length))
        self._push(text)

    def _push(self, text: str) -> None:
        self._length += len(text)
        if self._length > MAX_TEXT:
            raise ConversionError(f"holds more than {MAX_TEXT:,} characters of text: cut it up")
        self._pieces.append(text)

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(self._parts)

    def text(self) -> str:
        """Return all of it."""
        return "".join(self._pieces)
