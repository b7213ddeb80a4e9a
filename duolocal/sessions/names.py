"""Names of saved contexts and the files they stand for. Owns which names are safe; opens nothing but folders."""

import re
from pathlib import Path

from duolocal.errors import SessionError, SettingsError

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


def session_file(folder: Path, name: str) -> Path:
    """Return the file of the session of that name; raises SettingsError for a name that is none."""
    return folder / (check_name(name) + SUFFIX)


def make_folder(folder: Path) -> None:
    """Make a folder that only its owner can look into; raises SessionError."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SessionError(
            f"{folder} cannot be made ({error.strerror or error}): choose another place with --sessions-folder"
        ) from error


def files_in(folder: Path) -> list[Path]:
    """Return the context files of a folder, by name; raises SessionError where it cannot be read."""
    try:
        return sorted(path for path in folder.glob(f"*{SUFFIX}") if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise SessionError(f"{folder} cannot be read: {error.strerror or error}") from error
