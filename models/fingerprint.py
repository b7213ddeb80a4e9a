"""What names the weights of a model: a digest of headers, sizes and samples of the data."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from duolocal.errors import ModelFileError

_SAMPLES = 64
_SAMPLE_BYTES = 4096


def fingerprint(files: Sequence[tuple[Path, int]]) -> str:
    """Return the SHA-256 over the header (path, bytes) of every file, its size, and samples spread over the rest."""
    return _digest(files, with_headers=True)


def data_digest(path: Path, header_bytes: int) -> str:
    """Return the SHA-256 over the size of a file and samples of what follows its header."""
    return _digest([(path, header_bytes)], with_headers=False)


def _digest(files: Sequence[tuple[Path, int]], *, with_headers: bool) -> str:
    digest = hashlib.sha256()
    for path, head in files:
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                digest.update(f"{size}:{head}\n".encode())
                if with_headers:
                    digest.update(file.read(head))
                step = max(_SAMPLE_BYTES, (size - head) // _SAMPLES)
                for start in range(head, size, step):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise ModelFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()
