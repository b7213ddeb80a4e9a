"""Options and dispatch of `duolocal docs`. Light: the command line builds its parser with it for `--help`."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from duolocal.settings import parse_tokens

if TYPE_CHECKING:
    from rich.console import Console

_MORE = """\
PATH is a file, a folder (with all that is in it), a pattern such as 'docs/**/*.md', or a zip archive. Hidden files,
what .gitignore names, and what holds no text are left out, and listed with the reason. Only the tokenizer of the model
is opened. The tokens are those of the text and the two lines that name it; the chat template adds a few.
"""

_P = TypeVar("_P", bound=argparse.ArgumentParser)


def add_docs_parsers(
    what: "argparse._SubParsersAction[_P]", *, add_model: Callable[[argparse.ArgumentParser], None]
) -> dict[str, _P]:
    """Add the commands below `docs`; return their parsers by name."""
    parser = what.add_parser(
        "tokens",
        help="list name, pages, tokens and share of the context, before anything is read by the model",
        description="List what documents would take of the context: name, kind, pages, tokens, share.",
        epilog=_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files, folders, patterns or zip archives")
    add_model(parser)
    parser.add_argument(
        "--context",
        metavar="SIZE",
        help="tokens of context to compare with: 8192, 32K, 1M (default: as in chat, what the model was trained for, "
        "at most 32K)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with everything left out")
    return {"docs tokens": parser}


def run_docs(options: argparse.Namespace, console: "Console", progress: "Console") -> int:
    """Run a command below `docs`; return the exit code. Raises DuoLocalError."""
    context = None if options.context is None else parse_tokens(options.context)
    from duolocal.terminal.docs_load import gather_with_bar

    gathered = gather_with_bar(options.paths, progress)
    from duolocal.startup import without_collection
    from duolocal.terminal.progress import bar

    with bar(progress, "starting", ""), without_collection():  # importing torch takes seconds on a cold disk
        from duolocal.terminal.docs_tokens import count_gathered, print_json, print_table
    report = count_gathered(gathered, model=options.model, context=context, progress=progress)
    if options.json:
        print_json(report)
    else:
        print_table(report, console)
    return 0
