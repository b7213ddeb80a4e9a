"""A pass through the layers that takes minutes, on disk: cut off, it goes on after the last layer that was kept.

Owns when what stands between two layers is written, and what of a file is believed. A file that cannot be written or
read only means that the pass begins anew.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from duolocal.files import write_file

KEEP_EVERY_S = 5.0  # the most that a kill loses, besides one layer


class LayerState:
    """Tensors by name after a number of steps of one pass.

    path: the file, None for a pass that is not kept; of: what makes passes different (JSON), so that the state of
    another one is not gone on from.
    """

    def __init__(self, path: Path | None, **of: Any) -> None:
        self._path = path
        self._key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
        self._kept_s = time.monotonic()

    def read(self) -> tuple[int, dict[str, Tensor]]:
        """Return the steps done and the tensors after them, on the CPU; (0, {}) where nothing usable was kept."""
        if self._path is None:
            return 0, {}
        try:
            with safe_open(self._path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("pass") != self._key:
                    return 0, {}
                return int(about["done"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError):
            return 0, {}

    def keep(self, done: int, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write what `tensors` returns unless that was done a moment ago."""
        if self._path is None or time.monotonic() - self._kept_s < KEEP_EVERY_S:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors().items()}
            write_file(self._path, save(data, metadata={"pass": self._key, "done": str(done)}))
        self._kept_s = time.monotonic()

    def forget(self) -> None:
        """Remove the file: the pass is done."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


NOT_KEPT = LayerState(None)
