"""What is to be summarised: files that are read when their turn comes, or documents that are there already."""

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from duolocal.documents import Document, Found, Skipped, gather
from duolocal.errors import DocumentError

Summarizable = str | Path | Found | Document | Skipped


@dataclass(frozen=True)
class Input:
    """One document to be summarised, at its place among all."""

    index: int
    name: str
    source: str  # the path; of a file in an archive: the archive's, "/" and the name inside
    item: Found | Document | Skipped
    digest: str | None = None  # SHA-256 of the file's bytes, hex; None where they cannot be read
    occurrence: int = 0  # how many of the inputs before this one have the same bytes

    def load(self) -> Document:
        """Return the document; raises DocumentError."""
        if isinstance(self.item, Skipped):
            raise DocumentError(f"left out: {self.item.reason}")
        return self.item if isinstance(self.item, Document) else self.item.load()


def inputs_of(
    documents: Iterable[Summarizable], *, without: Iterable[Path] = ()
) -> tuple[list[Input], tuple[Skipped, ...]]:
    """Return the inputs in order, and what was left out; paths, folders, patterns and archives are gathered.

    without: files that are none, wherever they are found: those that are being written. Raises DocumentError.
    """
    found: list[Found | Document] = []
    skipped: list[Skipped] = []
    for are_paths, items in itertools.groupby(documents, key=lambda item: isinstance(item, str | Path)):
        if are_paths:
            gathered = gather([item for item in items if isinstance(item, str | Path)])
            found += gathered.found
            skipped += gathered.skipped
        else:
            for item in items:
                if isinstance(item, Skipped):
                    skipped.append(item)
                elif not isinstance(item, str | Path):
                    found.append(item)
    ours = {os.path.realpath(path) for path in without}
    kept = [item for item in found if isinstance(item, Document) or os.path.realpath(item.path) not in ours]
    return [Input(index, item.name, _source(item), item) for index, item in enumerate(kept)], tuple(skipped)


def with_digests(inputs: Sequence[Input]) -> Iterator[Input]:
    """Yield the inputs with digest and occurrence; nothing is converted."""
    seen: Counter[str | None] = Counter()
    for item in inputs:
        digest = _digest(item.item)
        yield Input(item.index, item.name, item.source, item.item, digest, seen[digest])
        seen[digest] += 1


def _source(item: Found | Document) -> str:
    member = item.member if isinstance(item, Found) else None
    return f"{item.path}/{member}" if member is not None else str(item.path)


def _digest(item: Found | Document | Skipped) -> str | None:
    if isinstance(item, Skipped):
        return None
    if isinstance(item, Document):
        return item.digest or hashlib.sha256(item.text.encode("utf-8", "surrogatepass")).hexdigest()
    try:
        if item.member is None and item.path.exists() and not item.path.is_file():
            return None  # a pipe gives its bytes only once
        return hashlib.sha256(item.read_bytes()).hexdigest()
    except DocumentError:
        return None  # said when it is loaded
