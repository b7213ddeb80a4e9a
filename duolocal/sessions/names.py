"""Names of saved contexts and the folders they stand for. Owns which names are safe; opens nothing but folders."""

import difflib
import re
from pathlib import Path

from duolocal.errors import SessionError, SettingsError

MANIFEST = "manifest.json"  # of a saved context; without it there is none
SUFFIX = ".duo"
DOCUMENTS = "documents"  # folder of the store below that of the sessions
MAX_NAME = 80  # characters
_NAME = re.compile(r"\w(?:[\w .+-]*[\w+-])?")
# Devices on Windows, whatever follows a dot.
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)


def check_name(name: str) -> str:
    """Return `name` if it is one that a file can safely have everywhere; raises SettingsError."""
    if len(name) <= MAX_NAME and _NAME.fullmatch(name) and not _RESERVED.fullmatch(name):
        return name
    raise SettingsError(
        f"{name!r:.120} cannot name a session: give up to {MAX_NAME} letters, digits, spaces, and . _ + - (no slash), "
        "beginning with a letter or digit"
    )


def session_path(folder: Path, name: str) -> Path:
    """Return where the session of that name is; raises SettingsError for a name that is none."""
    return folder / (check_name(name) + SUFFIX)


def make_folder(folder: Path) -> None:
    """Make a folder that only its owner can look into; raises SessionError."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SessionError(
            f"{folder} cannot be made ({error.strerror or error}): choose another place with --sessions-folder"
        ) from error


def is_saved(path: Path) -> bool:
    """Return whether a saved context is there, of whatever layout."""
    return path.is_file() or (path / MANIFEST).exists()


def near_names(folder: Path, name: str) -> list[str]:
    """Return the names of sessions in a folder that `name` may have been meant to be, the nearest first."""
    names = {path.stem.lower(): path.stem for path in contexts_in(folder)}
    return [names[near] for near in difflib.get_close_matches(name.lower(), names, n=3)]


def no_session(folder: Path, name: str) -> SessionError:
    """Return the error for a name that no session has."""
    near = near_names(folder, name)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return SessionError(f"there is no session {name} in {folder}: {meant}`duolocal sessions list` shows what there is")


def contexts_in(folder: Path) -> list[Path]:
    """Return the saved contexts of a folder, by name, those of an older layout (files) too; none where it is not there.

    Raises SessionError where it cannot be read.
    """
    try:
        found = (path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))
        return sorted(filter(is_saved, found))
    except OSError as error:
        raise SessionError(f"{folder} cannot be read: {error.strerror or error}") from error
