"""Files that are not the model that their name says: what they are instead, and what to do."""

from pathlib import Path

_PAGES = (b"<!doc", b"<html", b"<head", b"<?xml")


def stand_in(begins: bytes) -> str | None:
    """Return what a file is that begins so and is no model, None where that is not known."""
    if not begins:
        return "is empty: download it again"
    if begins.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file itself: run `git lfs pull` in its folder, or download the file"
    if begins.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        return "is a web page and not the file itself: take the address of its download, not of its page"
    return None


def stand_in_at(path: Path) -> str | None:
    """Do as `stand_in` for a file; None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return stand_in(file.read(64))
    except OSError:
        return None
