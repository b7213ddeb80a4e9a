"""Writing the files of a checkpoint, and what is said when a disk is full."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from duolocal.errors import SettingsError
from duolocal.files import replacing


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, replacing what was there in one move. Raises SettingsError."""
    with _replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as JSON to `path`, as `write_bytes` does."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file to `path`, as `write_bytes` does."""
    with _replacing(path) as temporary:
        mode = temporary.stat().st_mode  # as the user's umask has it; the library's own files only the owner can read
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        temporary.chmod(mode)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    try:
        with replacing(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise SettingsError(
            f"{path}: cannot be written ({reason[:200]}); make room or use another --out: finished layers are kept, "
            "the same command goes on from them"
        ) from error
