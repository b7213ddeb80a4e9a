"""Outcomes of earlier compilations, kept in the user's cache folder: what has not changed is not compiled again."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.compiler.compiler import get_cache_key

from duolocal.paths import cache_folder
from tests.aot.record import Launch

_KEPT = 5000  # outcomes of some hundred bytes; the longest unused go first


class Known:
    """Outcomes by key. Failures are never kept: what failed is compiled again."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or cache_folder() / "aot-outcomes.json"
        try:
            self.outcomes: dict[str, dict[str, Any]] = dict(json.loads(self.file.read_text()))
        except (OSError, ValueError, TypeError):
            self.outcomes = {}

    def get(self, key: str) -> dict[str, Any] | None:
        outcome = self.outcomes.pop(key, None)
        if outcome is not None:
            self.outcomes[key] = outcome  # the last used is the last dropped
        return outcome

    def add(self, key: str, outcome: dict[str, Any]) -> None:
        if outcome.get("error") is None:
            self.outcomes[key] = outcome

    def save(self, file: Path | None = None) -> None:
        """Write what is known; a folder that cannot be written only costs the next run its time."""
        file = file or self.file
        half = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            half.write_text(json.dumps(dict(list(self.outcomes.items())[-_KEPT:])))
            half.replace(file)
        except OSError:
            return


def key_of(launch: Launch) -> str:
    """Return what tells a compilation from all others: triton's own key, and this folder's reading of its outcome.

    Triton's has its version, the source of the kernel and of all it calls, signature, constants, options, architecture.
    """
    backend = make_backend(GPUTarget("cuda", launch.arch, 32))
    options = backend.parse_options(dict(launch.options))
    key = get_cache_key(launch.source, backend, options, env_vars=get_cache_invalidating_env_vars())
    reading = (Path(__file__).with_name("build.py")).read_text()
    return hashlib.sha256(f"{key}-{reading}".encode()).hexdigest()
