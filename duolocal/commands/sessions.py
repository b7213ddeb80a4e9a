"""`duolocal sessions`, and what `--session`, `--keep` and `--sessions-folder` of a chat stand for."""

import os
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING

from duolocal.commands.parsing import Group, command
from duolocal.errors import SettingsError
from duolocal.options import ANY, REQUIRED, Kind, flagged, option, repeated, values_in, words_of
from duolocal.paths import sessions_folder
from duolocal.settings import LoadSettings
from duolocal.sizes import parse_bytes
from duolocal.terminal.consoles import new_console

if TYPE_CHECKING:
    from duolocal.sessions.keeper import ContextKeeper

KEEP_VARIABLE = "DUOLOCAL_KEEP"
_DEFAULT_KEEP = "8GiB"
_TAKEN = frozenset(("context", "kv", "heads", "sink_size", "recent_size", "dtype", "rope", "weights", "outer_weights"))
_MORE = """\
Files of sessions hold the token ids and texts of documents and conversation, readable by you alone. `documents` are
those that took over ten seconds to read and were kept for next time; `chat --keep off` keeps none.
"""


def _read_keep(text: str, name: str) -> int:
    return 0 if text.strip().lower() in ("off", "none", "0") else parse_bytes(text, name)


KEEP = Kind(_read_keep)  # bytes, 0 for none
sessions_option = partial(
    option, ANY, "where they lie", metavar="PATH", default_help="$DUOLOCAL_SESSIONS, or a folder in your user data"
)
GROUP = Group("sessions", "list, show or remove saved contexts")


@dataclass(frozen=True)
class Listing:
    """Options of all commands below `sessions`."""

    json: bool = flagged("print one JSON object")
    sessions_folder: str | None = sessions_option()


@dataclass(frozen=True)
class _One:
    name: str = option(ANY, "name of a session", default=REQUIRED, metavar="NAME", positional=True)


@dataclass(frozen=True)
class _Removed:
    names: tuple[str, ...] = option(repeated(ANY), "names of sessions", default=(), metavar="NAME", positional=True)
    documents: bool = flagged("all documents that were kept")


@command("sessions list", "list the saved sessions and the documents that were kept", epilog=_MORE)
def list_sessions(options: Listing) -> int:
    """Print what is saved."""
    from duolocal.terminal.sessions_view import show_list

    return show_list(sessions_folder(options.sessions_folder), new_console(), as_json=options.json)


@command("sessions info", "show what is in one session", epilog=_MORE)
def session_info(one: _One, options: Listing) -> int:
    """Print what a session holds."""
    from duolocal.terminal.sessions_view import show_info

    return show_info(sessions_folder(options.sessions_folder), one.name, new_console(), as_json=options.json)


@command("sessions rm", "remove sessions, or the documents that were kept", epilog=_MORE)
def remove(removed: _Removed, options: Listing) -> int:
    """Remove sessions or documents."""
    if not removed.names and not removed.documents:
        raise SettingsError("sessions rm: name a session, or give --documents; `duolocal sessions list` shows them")
    from duolocal.terminal.sessions_view import remove_sessions

    return remove_sessions(
        sessions_folder(options.sessions_folder),
        removed.names,
        new_console(),
        documents=removed.documents,
        as_json=options.json,
    )


def settings_of_session(
    session: str | None, folder: str | None, settings: LoadSettings
) -> tuple[LoadSettings, str | None]:
    """Return the settings with what `session` was saved with where nothing was asked, and a line that says so."""
    if session is None:
        return settings, None
    from duolocal.sessions.file import ContextFile
    from duolocal.sessions.names import session_file

    path = session_file(sessions_folder(folder), session)
    if not path.is_file():
        return settings, None
    file = ContextFile.open(path)
    assert file.opened is not None
    saved = values_in(LoadSettings, file.opened.fields().texts("options"))
    file.close()
    taken = {
        item.name: saved[item.name]
        for item in fields(LoadSettings)
        if item.name in _TAKEN & saved.keys() and getattr(settings, item.name) == item.default
    }
    if not taken:
        return settings, None
    asked = words_of(replace(LoadSettings(), **taken))
    return replace(settings, **taken), f"as session {session} was saved: {' '.join(asked)}"


def keep_bytes(keep: int | None) -> int:
    """Return the bytes that the store may take, 0 for none; raises SettingsError for a wrong $DUOLOCAL_KEEP."""
    if keep is not None:
        return keep
    return _read_keep(os.environ.get(KEEP_VARIABLE) or _DEFAULT_KEEP, f"${KEEP_VARIABLE}")


def make_keeper(
    folder: str | None, keep: int | None, settings: LoadSettings, *, private: bool = False
) -> "ContextKeeper":
    """Return what keeps the contexts of a chat. private: a document came through a pipe; it is stored nowhere unasked.

    Raises SettingsError.
    """
    from duolocal.sessions.context import Origin
    from duolocal.sessions.keeper import ContextKeeper
    from duolocal.sessions.store import DocumentStore

    at = sessions_folder(folder)
    limit = keep_bytes(keep)
    store = DocumentStore(at, limit) if limit and not private else None
    return ContextKeeper(at, Origin(settings.model, tuple(settings.options())), store=store)
