"""Reading documents from disk with a bar: what `--doc` and `/load` do before anything reaches the model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from duolocal.commands.docs import Tokens
from duolocal.documents import Document, Gathered, Loaded, gather, load_all
from duolocal.errors import DocumentError
from duolocal.files import free_name
from duolocal.settings import LoadSettings
from duolocal.startup import without_collection
from duolocal.terminal.consoles import new_console, progress_console, starting_notice

if TYPE_CHECKING:
    from rich.console import Console


def load_paths(
    paths: Sequence[str | Path], console: "Console", *, on_failure: Callable[[DocumentError], None] | None = None
) -> Loaded:
    """Load files, folders, patterns and zip archives, with a bar on `console`.

    on_failure: gets what is wrong with one path, and the others are loaded; None: it is raised as DocumentError.
    """
    if not paths:
        return Loaded((), ())
    gathered = gather_with_bar(paths, console, on_failure=on_failure)
    from duolocal.terminal.clean import clean_line
    from duolocal.terminal.progress import bar

    with bar(console, "reading files", "files") as shown:

        def on_progress(done: int, total: int, name: str) -> None:
            shown.describe(f"reading {clean_line(name)}")
            shown.update(done, total)

        return load_all(gathered, on_progress=on_progress, on_failure=on_failure)


def gather_with_bar(
    paths: Sequence[str | Path], console: "Console", *, on_failure: Callable[[DocumentError], None] | None = None
) -> Gathered:
    """Find what can be loaded, with a bar on `console`; raises DocumentError where no `on_failure` takes it."""
    from duolocal.terminal.progress import bar

    with bar(console, "looking for files", "") as shown:
        return gather(
            paths, on_found=lambda count: shown.describe(f"looking for files: {count:,}"), on_failure=on_failure
        )


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


def docs_tokens(options: Tokens, settings: LoadSettings) -> int:
    """Print what documents would take of the context; return the exit code. Raises DuoLocalError."""
    progress = progress_console()
    gathered = gather_with_bar(options.paths, progress)
    with starting_notice(progress), without_collection():
        from duolocal.terminal.docs_tokens import count_gathered, print_json, print_table
    report = count_gathered(gathered, model=settings.model, context=settings.context, progress=progress)
    if options.json:
        print_json(report)
    else:
        print_table(report, new_console())
    return 0
