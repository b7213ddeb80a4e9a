"""Where files of ours lie on a user's machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder for what can be fetched or made again: $DUOLOCAL_CACHE, or the user's cache folder."""
    chosen = os.environ.get("DUOLOCAL_CACHE")
    if chosen:
        return user_path(chosen).resolve()
    import platformdirs

    return platformdirs.user_cache_path("duolocal", appauthor=False)


def sessions_folder(chosen: str | None = None) -> Path:
    """Return the folder for saved contexts: `chosen`, $DUOLOCAL_SESSIONS, or one in the user's data folder."""
    chosen = chosen or os.environ.get("DUOLOCAL_SESSIONS")
    if chosen:
        return user_path(chosen).resolve()
    import platformdirs

    return platformdirs.user_data_path("duolocal", appauthor=False) / "sessions"


def user_path(path: str | Path) -> Path:
    """Return `path` with ~ and ~NAME as the shell reads them; where no user has the name (~$report.docx), as it is."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises there
