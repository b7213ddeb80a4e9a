"""The store of documents that were read: contexts found again by their token ids, bounded in size, oldest out.

Owns which files there are and which go. A file of the store is a context file of kind "documents"; its name means
nothing. What is in it is as private as the documents: the folder and the files are their owner's alone.
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
from duolocal.sessions.file import ContextFile, remove
from duolocal.sessions.identity import compatible
from duolocal.sessions.names import DOCUMENTS, SUFFIX, files_in, make_folder

DEFAULT_LIMIT = 8 << 30  # bytes
_SHARE_OF_FREE = 0.5  # of the disk, however large the limit


@dataclass
class DocumentStore:
    """The files below `folder`/documents, together at most `limit` bytes."""

    folder: Path
    limit: int = DEFAULT_LIMIT

    @property
    def place(self) -> Path:
        """The folder of the store."""
        return self.folder / DOCUMENTS

    def candidates(self, identity: Mapping[str, Any]) -> list[Path]:
        """Return the files whose contexts belong to `identity`, longest first."""
        found = []
        for path in files_in(self.place) if self.place.is_dir() else []:
            try:
                file = ContextFile.open(path)
            except SessionError:
                continue  # of another version, or damaged: it ages out
            assert file.opened is not None
            description = file.opened.description
            saved = description.get("identity")
            if description.get("kind") == "documents" and isinstance(saved, dict) and compatible(saved, identity):
                found.append((file.opened.index.num_tokens, path))
            file.close()
        return [path for _, path in sorted(found, reverse=True)]

    def begin(self, nbytes: int) -> ContextFile | None:
        """Begin a file that will have `nbytes`, removing the oldest to make room; None where it is too large."""
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
        return ContextFile.create(path)

    def shrink_to(self, nbytes: int, *, keep: Path | None = None) -> None:
        """Remove the files that were used longest ago until the others have at most `nbytes` together."""
        files = []
        for path in files_in(self.place):
            with contextlib.suppress(OSError):
                info = path.stat()
                files.append((info.st_mtime, info.st_size, path))
        excess = sum(size for _, size, _ in files) - nbytes
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            if path != keep:
                with contextlib.suppress(SessionError):  # in use by another process
                    remove(path)
                    excess -= size

    def touch(self, path: Path) -> None:
        """Note that a file was used."""
        with contextlib.suppress(OSError):
            os.utime(path)
