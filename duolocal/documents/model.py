"""What a document is once it has been read. Owns the record, and nothing of how it came about."""

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """A page, sheet, slide or chapter: it goes from `start` to the start of the next part."""

    label: str  # "page 3", "sheet Sales", "chapter 2: Name"
    start: int  # characters from the beginning of the document's text


@dataclass(frozen=True)
class Document:
    """A file as text; newlines are `\\n`, a byte-order mark is gone.

    Invariant: `parts` are in the order of the text, and the first of them starts at 0.
    """

    name: str
    path: Path
    text: str
    encoding: str  # "utf-8", "utf-16-le", "cp1252", "latin-1" …; of a PDF, an archive of XML and the like: ""
    num_bytes: int
    num_replaced: int = 0  # bytes that fit no character and stand as U+FFFD
    kind: str = "text"  # "text", "markdown", "code", "html", "pdf", "docx", "epub", "csv", "json" …
    parts: tuple[Part, ...] = ()  # empty where the format has none
    notes: tuple[str, ...] = ()  # what is worth telling: pages without text, a guessed encoding
    digest: str = ""  # SHA-256 of the file's bytes, hex

    @property
    def note(self) -> str | None:
        """All notes as one line that names the document; None where there is nothing to tell."""
        return f"{self.name}: {'; '.join(self.notes)}" if self.notes else None

    @property
    def pages(self) -> int | None:
        """Parts of the document; None where its format has none."""
        return len(self.parts) or None

    def part_at(self, position: int) -> Part | None:
        """Return the part that holds the character at `position`; None where there are no parts."""
        if not self.parts or position < 0:
            return None
        return self.parts[bisect_right([part.start for part in self.parts], position) - 1]
