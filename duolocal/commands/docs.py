"""The options of `duolocal docs`."""

from dataclasses import dataclass

from duolocal.commands.parsing import Command, Group, Taken
from duolocal.options import ANY, REQUIRED, flagged, option, repeated
from duolocal.settings import LoadSettings

_MORE = """\
PATH is a file, a folder (with all that is in it), a pattern such as 'docs/**/*.md', or a zip archive. Hidden files,
what .gitignore names, and what holds no text are left out, and listed with the reason. Only the tokenizer of the model
is opened. The tokens are those of the text and the two lines that name it; the chat template adds a few.
"""


@dataclass(frozen=True)
class Tokens:
    """Which documents are counted."""

    paths: tuple[str, ...] = option(
        repeated(ANY), "files, folders, patterns or zip archives", default=REQUIRED, metavar="PATH", positional=True
    )
    json: bool = flagged("print one JSON object, with everything left out")


GROUPS = (Group("docs", "what documents would take of the context"),)
COMMANDS = (
    Command(
        "docs tokens",
        "list name, pages, tokens and share of the context, before anything is read by the model",
        "docs_load:docs_tokens",
        (Tokens, Taken(LoadSettings, ("model", "context"))),
        description="List what documents would take of the context: name, kind, pages, tokens, share.",
        epilog=_MORE,
    ),
)
