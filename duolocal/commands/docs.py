"""`duolocal docs`: what documents would take of the context."""

from dataclasses import dataclass
from typing import Annotated

from duolocal.commands.parsing import Fields, Group, command
from duolocal.options import ANY, REQUIRED, flagged, option, repeated
from duolocal.settings import LoadSettings
from duolocal.terminal.consoles import new_console, progress_console

_MORE = """\
PATH is a file, a folder (with all that is in it), a pattern such as 'docs/**/*.md', or a zip archive. Hidden files,
what .gitignore names, and what holds no text are left out, and listed with the reason. Only the tokenizer of the model
is opened. The tokens are those of the text and the two lines that name it; the chat template adds a few.
"""
GROUP = Group("docs", "what documents would take of the context")


@dataclass(frozen=True)
class Tokens:
    """Which documents are counted."""

    paths: tuple[str, ...] = option(
        repeated(ANY), "files, folders, patterns or zip archives", default=REQUIRED, metavar="PATH", positional=True
    )
    json: bool = flagged("print one JSON object, with everything left out")


@command(
    "docs tokens",
    "list name, pages, tokens and share of the context, before anything is read by the model",
    description="List what documents would take of the context: name, kind, pages, tokens, share.",
    epilog=_MORE,
)
def tokens(options: Tokens, settings: Annotated[LoadSettings, Fields(("model", "context"))]) -> int:
    """Count the tokens of documents."""
    from duolocal.terminal.docs_load import gather_with_bar

    progress = progress_console()
    gathered = gather_with_bar(options.paths, progress)
    from duolocal.startup import without_collection
    from duolocal.terminal.progress import bar

    with bar(progress, "starting", ""), without_collection():  # importing torch takes seconds on a cold disk
        from duolocal.terminal.docs_tokens import count_gathered, print_json, print_table
    report = count_gathered(gathered, model=settings.model, context=settings.context, progress=progress)
    if options.json:
        print_json(report)
    else:
        print_table(report, new_console())
    return 0
