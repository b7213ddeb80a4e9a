"""Reading documents from disk with a bar: what `--doc` and `/load` do before anything reaches the model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from duolocal.commands.docs import Tokens
from duolocal.documents import Gathered, Loaded, gather, load_all
from duolocal.errors import DocumentError
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
