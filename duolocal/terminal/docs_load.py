"""Reading documents from disk with a bar: what `--doc` and `/load` do before anything reaches the model."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from duolocal.documents import Document, Gathered, Loaded, gather, load_all
from duolocal.files import free_name

if TYPE_CHECKING:
    from rich.console import Console


def load_paths(paths: Sequence[str | Path], console: "Console") -> Loaded:
    """Load files, folders, patterns and zip archives, with a bar on `console`; raises DocumentError."""
    if not paths:
        return Loaded((), ())
    gathered = gather_with_bar(paths, console)
    from duolocal.terminal.clean import clean_line
    from duolocal.terminal.progress import bar

    with bar(console, "reading files", "files") as shown:

        def on_progress(done: int, total: int, name: str) -> None:
            shown.describe(f"reading {clean_line(name)}")
            shown.update(done, total)

        return load_all(gathered, on_progress=on_progress)


def gather_with_bar(paths: Sequence[str | Path], console: "Console") -> Gathered:
    """Find what can be loaded, with a bar on `console`; raises DocumentError."""
    from duolocal.terminal.progress import bar

    with bar(console, "looking for files", "") as shown:
        return gather(paths, on_found=lambda count: shown.describe(f"looking for files: {count:,}"))


def by_name(documents: Iterable[Document], *, taken: Collection[str] = ()) -> dict[str, Document]:
    """Return documents by names of their own: a name that is taken becomes the path, and then a number is added."""
    named: dict[str, Document] = {}
    for document in documents:
        name = free_name(document.name, str(document.path), taken=lambda name: name in named or name in taken)
        named[name] = document
    return named
