"""Everything that was gathered, loaded: what the user named must work, what was found beside it may be left out."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from duolocal.documents.finding import Gathered, Skipped
from duolocal.documents.model import Document
from duolocal.errors import DocumentError
from duolocal.files import free_name

Progress = Callable[[int, int, str], None]  # files done, of how many, what is being read


@dataclass(frozen=True)
class Loaded:
    """Documents in the order in which they were found, and what was left out, and why."""

    documents: tuple[Document, ...]
    skipped: tuple[Skipped, ...]


def iter_load(
    gathered: Gathered,
    *,
    on_progress: Progress = lambda done, total, name: None,
    on_failure: Callable[[DocumentError], None] | None = None,
) -> Iterator[Document | Skipped]:
    """Load file after file: a Document each, or Skipped for one found in a folder or archive that cannot be read.

    Raises DocumentError for one that the user named, where no `on_failure` takes it, and at the end where nothing at
    all could be read.
    """
    total, num_read, last = len(gathered.found), 0, None
    for done, found in enumerate(gathered.found):
        on_progress(done, total, found.name)

        def on_page(page: int, pages: int, done: int = done, name: str = found.name) -> None:
            on_progress(done, total, f"{name}, page {page:,} of {pages:,}" if pages > 1 else name)

        try:
            document = found.load(on_progress=on_page)
        except DocumentError as error:
            if found.named:
                if on_failure is None:
                    raise
                on_failure(error)
                continue
            last = Skipped(found.name, str(error).removeprefix(found.source).strip())
            yield last
        else:
            num_read += 1
            yield document
    if last is not None and not num_read:
        raise DocumentError(f"none of {total:,} files could be read (the last, {last.name}, {last.reason})")


def load_all(
    gathered: Gathered,
    *,
    on_progress: Progress = lambda done, total, name: None,
    on_failure: Callable[[DocumentError], None] | None = None,
) -> Loaded:
    """Load all files; see `iter_load`. What was skipped when gathering comes first."""
    documents: list[Document] = []
    skipped = list(gathered.skipped)
    for item in iter_load(gathered, on_progress=on_progress, on_failure=on_failure):
        if isinstance(item, Skipped):
            skipped.append(item)
        else:
            documents.append(item)
    return Loaded(tuple(documents), tuple(skipped))


def summary(skipped: Sequence[Skipped]) -> str | None:
    """Return one line about what was left out: how many, and why; None where nothing was."""
    if not skipped:
        return None
    reasons = Counter(item.reason.partition(":")[0] for item in skipped)
    shown = ", ".join(f"{reason} ×{count:,}" for reason, count in reasons.most_common(4))
    more = len(reasons) - 4
    rest = f" and {more:,} other reasons" if more > 0 else ""
    what = "1 file or folder" if len(skipped) == 1 else f"{len(skipped):,} files or folders"
    return f"{what} left out ({shown}{rest}); `duolocal docs tokens PATH` lists them"


def beside(
    documents: Iterable[Document], known: Mapping[str, Document | None]
) -> tuple[dict[str, Document], list[str]]:
    """Return documents by names of their own, without those that are known already, and what is to be said of that.

    known: those that are there, by name; None for one of which no more is known. A name that is taken becomes the
    path, and then a number is added.
    """
    named: dict[str, Document] = {}
    notes: list[str] = []
    called: dict[str, list[str]] = {}  # by text
    for name, there in known.items():
        if there is not None:
            called.setdefault(there.text, []).append(name)
    for document in documents:
        if any(_may_be_called(document, name) for name in called.get(document.text, ())):
            notes.append(f"{document.name} is in the context already")
            continue
        earlier = known.get(document.name)
        has_changed = earlier is not None and earlier.path == document.path
        names = (document.name,) if has_changed else (document.name, str(document.path))
        name = free_name(*names, taken=lambda name: name in known or name in named)
        named[name] = document
        called.setdefault(document.text, []).append(name)
        if has_changed:
            notes.append(f"{document.name} has changed since: it is read as {name}, and the earlier text stays as well")
        elif name != document.name and document.name in known:
            notes.append(f"another {document.name} is in the context: this one is {name}")
    return named, notes


def _may_be_called(document: Document, name: str) -> bool:
    return name in (document.name, str(document.path)) or name.startswith(f"{document.name} (")
