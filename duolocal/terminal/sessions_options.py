"""Options of saved contexts: `--session`, `--keep`, `--sessions-folder`; `duolocal sessions`. Light, for `--help`."""

import argparse
import os
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from duolocal.errors import SettingsError
from duolocal.paths import sessions_folder
from duolocal.settings import LoadSettings, parse_bytes, parse_tokens

if TYPE_CHECKING:
    from rich.console import Console

    from duolocal.sessions.keeper import ContextKeeper

KEEP_VARIABLE = "DUOLOCAL_KEEP"
_DEFAULT_KEEP = "8GiB"
_MORE = """\
Files of sessions hold the token ids and texts of documents and conversation, readable by you alone. `documents` are
those that took over ten seconds to read and were kept for next time; `chat --keep off` keeps none.
"""

_P = TypeVar("_P", bound=argparse.ArgumentParser)


def add_session_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `chat`."""
    group = parser.add_argument_group("saved contexts")
    group.add_argument(
        "--session",
        metavar="NAME",
        help="open this session, or begin it; it is saved after every turn and while documents are read",
    )
    group.add_argument(
        "--keep",
        metavar="SIZE",
        help="disk that documents may take to be opened next time instead of read; off keeps none "
        f"(default: ${KEEP_VARIABLE}, or {_DEFAULT_KEEP})",
    )
    _add_folder(group)


def _add_folder(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--sessions-folder",
        metavar="PATH",
        help="where they lie (default: $DUOLOCAL_SESSIONS, or a folder in your user data)",
    )


def add_sessions_parsers(what: "argparse._SubParsersAction[_P]") -> dict[str, _P]:
    """Add the commands below `sessions`; return their parsers by name."""
    found = {}
    for name, text in (
        ("list", "list the saved sessions and the documents that were kept"),
        ("info", "show what is in one session"),
        ("rm", "remove sessions, or the documents that were kept"),
    ):
        parser = what.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=_MORE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == "info":
            parser.add_argument("name", metavar="NAME", help="name of a session")
        if name == "rm":
            parser.add_argument("names", metavar="NAME", nargs="*", help="names of sessions")
            parser.add_argument("--documents", action="store_true", help="all documents that were kept")
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        _add_folder(parser)
        found[f"sessions {name}"] = parser
    return found


def run_sessions(options: argparse.Namespace, console: "Console") -> int:
    """Run a command below `sessions`; return the exit code. Raises DuoLocalError."""
    from duolocal.terminal import sessions_view

    folder = sessions_folder(options.sessions_folder)
    if options.action == "list":
        return sessions_view.show_list(folder, console, as_json=options.json)
    if options.action == "info":
        return sessions_view.show_info(folder, options.name, console, as_json=options.json)
    if not options.names and not options.documents:
        raise SettingsError("sessions rm: name a session, or give --documents; `duolocal sessions list` shows them")
    return sessions_view.remove_sessions(
        folder, options.names, console, documents=options.documents, as_json=options.json
    )


def settings_of_session(options: argparse.Namespace, settings: LoadSettings) -> tuple[LoadSettings, str | None]:
    """Return the settings with what `--session` was saved with where nothing was asked, and a line that says so."""
    if options.session is None:
        return settings, None
    from duolocal.sessions.file import ContextFile
    from duolocal.sessions.names import session_file

    path = session_file(sessions_folder(options.sessions_folder), options.session)
    if not path.is_file():
        return settings, None
    file = ContextFile.open(path)
    assert file.opened is not None
    words = file.opened.fields().texts("options")
    file.close()
    saved = dict(zip(words[::2], words[1::2], strict=False))
    taken: dict[str, object] = {}
    for name in ("context", "kv", "heads", "sink_size", "recent_size", "dtype", "rope", "weights", "outer_weights"):
        option = "--" + name.replace("_", "-")
        if option in saved and getattr(settings, name) == LoadSettings.__dataclass_fields__[name].default:
            number = name in ("context", "sink_size", "recent_size")
            taken[name] = parse_tokens(saved[option], option) if number and saved[option] != "0" else saved[option]
            if number and saved[option] == "0":
                taken[name] = 0
    if not taken:
        return settings, None
    asked = " ".join(f"--{name.replace('_', '-')} {saved['--' + name.replace('_', '-')]}" for name in taken)
    return replace(settings, **taken), f"as session {options.session} was saved: {asked}"  # type: ignore[arg-type]


def make_keeper(options: argparse.Namespace, settings: LoadSettings, *, private: bool = False) -> "ContextKeeper":
    """Return what keeps the contexts of a chat. private: a document came through a pipe; it is stored nowhere unasked.

    Raises SettingsError.
    """
    from duolocal.sessions.context import Origin
    from duolocal.sessions.keeper import ContextKeeper
    from duolocal.sessions.store import DocumentStore

    folder = sessions_folder(options.sessions_folder)
    limit = keep_bytes(options.keep)
    store = DocumentStore(folder, limit) if limit and not private else None
    return ContextKeeper(folder, Origin(settings.model, tuple(settings.options())), store=store)


def keep_bytes(text: str | None) -> int:
    """Return the bytes that the store may take, 0 for none; raises SettingsError."""
    option = "--keep" if text is not None else f"${KEEP_VARIABLE}"
    text = text if text is not None else os.environ.get(KEEP_VARIABLE) or _DEFAULT_KEEP
    return 0 if text.strip().lower() in ("off", "none", "0") else parse_bytes(text, option)
