"""Where files of ours lie on a user's machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder for what can be fetched or made again: $DUOLOCAL_CACHE, or the user's cache folder."""
    chosen = os.environ.get("DUOLOCAL_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    import platformdirs

    return platformdirs.user_cache_path("duolocal", appauthor=False)
