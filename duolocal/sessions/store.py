"""The store of documents that were read: contexts found again by their token ids, bounded in size, oldest out.

Owns which contexts there are and which go; they are of kind "documents", and their names mean nothing. What is in them
is as private as the documents: folders and files are their owner's alone.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duolocal.errors import SessionError
from duolocal.sessions.folder import ContextFolder, bytes_on_disk, remove
from duolocal.sessions.identity import compatible
from duolocal.sessions.names import DOCUMENTS, MANIFEST, SUFFIX, contexts_in, make_folder

DEFAULT_LIMIT = 8 << 30  # bytes
_SHARE_OF_FREE = 0.5  # of the disk, however large the limit


@dataclass
class DocumentStore:
    """The contexts below `folder`/documents, together at most `limit` bytes."""

    folder: Path
    limit: int = DEFAULT_LIMIT

    @property
    def place(self) -> Path:
        """The folder of the store."""
        return self.folder / DOCUMENTS

    def candidates(self, identity: Mapping[str, Any]) -> list[Path]:
        """Return the contexts that belong to `identity`."""
        found = []
        for path in contexts_in(self.place):
            with contextlib.suppress(SessionError):  # of another version, or damaged: it ages out
                description = ContextFolder.open(path).description
                saved = description.get("identity")
                if description.get("kind") == "documents" and isinstance(saved, dict) and compatible(saved, identity):
                    found.append(path)
        return found

    def begin(self, nbytes: int) -> ContextFolder | None:
        """Begin a context that will have `nbytes`, removing the oldest to make room; None where it is too large."""
        make_folder(self.place)
        try:
            free = shutil.disk_usage(self.place).free
        except OSError as error:
            raise SessionError(f"{self.place} cannot be used: {error.strerror or error}") from error
        if nbytes > self.limit or nbytes > _SHARE_OF_FREE * free:
            return None
        self.shrink_to(self.limit - nbytes)
        path = self.place / f"{secrets.token_hex(4)}{SUFFIX}"
        while path.exists():
            path = self.place / f"{secrets.token_hex(4)}{SUFFIX}"
        return ContextFolder.create(path)

    def shrink_to(self, nbytes: int, *, keep: Path | None = None) -> None:
        """Remove what was used longest ago until the rest takes at most `nbytes`."""
        contexts = []
        for path in contexts_in(self.place):
            with contextlib.suppress(OSError):
                contexts.append((_used(path).stat().st_mtime, bytes_on_disk(path), path))
        excess = sum(size for _, size, _ in contexts) - nbytes
        for _, size, path in sorted(contexts):
            if excess <= 0:
                return
            if path != keep:
                with contextlib.suppress(SessionError):  # in use by another process
                    remove(path)
                    excess -= size

    def touch(self, path: Path) -> None:
        """Note that a context was used."""
        with contextlib.suppress(OSError):
            os.utime(_used(path))


def _used(path: Path) -> Path:
    """Return the file whose time says when a context was used."""
    return path / MANIFEST if path.is_dir() else path
