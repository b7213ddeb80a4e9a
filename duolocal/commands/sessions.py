"""The options of `duolocal sessions`, and what `--keep` stands for."""

import os
from dataclasses import dataclass
from functools import partial

from duolocal.commands.parsing import Command, Group
from duolocal.errors import SettingsError
from duolocal.options import ANY, REQUIRED, Kind, flagged, option, repeated
from duolocal.sizes import parse_bytes

KEEP_VARIABLE = "DUOLOCAL_KEEP"
_DEFAULT_KEEP = "8GiB"
_MORE = """\
Sessions hold the token ids and texts of documents and conversation, readable by you alone. documents/ID are documents
that took over ten seconds to read and were kept for next time; `chat --keep off` keeps none.
"""


def _read_keep(text: str, name: str) -> int:
    return 0 if text.strip().lower() in ("off", "none", "0") else parse_bytes(text, name)


KEEP = Kind(_read_keep)  # bytes, 0 for none
sessions_option = partial(
    option, ANY, "where they lie", metavar="PATH", default_help="$DUOLOCAL_SESSIONS, or a folder in your user data"
)


def keep_bytes(keep: int | None) -> int:
    """Return the bytes that the store may take, 0 for none; raises SettingsError for a wrong $DUOLOCAL_KEEP."""
    if keep is not None:
        return keep
    return _read_keep(os.environ.get(KEEP_VARIABLE) or _DEFAULT_KEEP, f"${KEEP_VARIABLE}")


@dataclass(frozen=True)
class Listing:
    """Options of all commands below `sessions`."""

    json: bool = flagged("print one JSON object")
    sessions_folder: str | None = sessions_option()


@dataclass(frozen=True)
class One:
    """Which session is shown."""

    name: str = option(ANY, "name of a session, or documents/ID", default=REQUIRED, metavar="NAME", positional=True)


@dataclass(frozen=True)
class Removed:
    """What is removed."""

    names: tuple[str, ...] = option(
        repeated(ANY), "names of sessions, or documents/ID", default=(), metavar="NAME", positional=True
    )
    documents: bool = flagged("all documents that were kept")


def _refuse(removed: Removed, options: Listing) -> None:
    if not removed.names and not removed.documents:
        raise SettingsError(
            "sessions rm: name a session or documents/ID, or give --documents; `duolocal sessions list` shows them"
        )


GROUPS = (Group("sessions", "list, show or remove saved contexts"),)
COMMANDS = (
    Command(
        "sessions list",
        "list the saved sessions and the documents that were kept",
        "sessions_view:show_list",
        (Listing,),
        epilog=_MORE,
    ),
    Command("sessions info", "show what is in one session", "sessions_view:show_info", (One, Listing), epilog=_MORE),
    Command(
        "sessions rm",
        "remove sessions, or the documents that were kept",
        "sessions_view:remove_sessions",
        (Removed, Listing),
        _refuse,
        epilog=_MORE,
    ),
)
