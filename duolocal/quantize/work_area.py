"""The work area of a quantization: a folder inside the output that holds every finished layer.

A layer is written whole or not at all, so an interrupted run goes on after the last one. What the run depends on is
written beside them; a folder of another model or other settings is refused, never mixed in.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from duolocal.errors import ModelFileError, SettingsError
from duolocal.files import Lock, read_json
from duolocal.quantize.files import write_json, write_tensors
from duolocal.quantize.layer import QuantizedLayer
from duolocal.quantize.results import LayerLosses

NAME = "unfinished"
_FORMAT = "duolocal-quantize-work"
_SETTINGS = "settings.json"


class WorkArea:
    """Finished layers 0 … n - 1 of one quantization; only one process may have it open."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        """Open or make the work area in `out`. Raises SettingsError where it is of other settings, or in use."""
        self.out = out
        self.folder = out / NAME
        new = not self.folder.exists()
        if new and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise SettingsError(f"--out {out} exists and is not empty: name another folder, or remove it")
        try:
            self._lock = Lock(self.folder / "lock")
        except TimeoutError:
            raise SettingsError(
                f"--out {out}: another process is quantizing into it: wait for it, or name another"
            ) from None
        except OSError as error:
            raise SettingsError(f"--out {out}: cannot be written ({error.strerror or error}); use another") from error
        try:
            self._check(settings)
        except BaseException:
            self._lock.release()
            raise

    def _check(self, settings: Mapping[str, Any]) -> None:
        path = self.folder / _SETTINGS
        if not path.exists():
            write_json(path, {"format": _FORMAT, "version": 1, "settings": dict(settings)})
            return
        kept = read_json(path, format=_FORMAT, version=1)
        if kept is None or not isinstance(kept.get("settings"), dict):
            raise SettingsError(f"{path} is damaged, or another version's: remove {self.folder} to begin anew")
        there = kept["settings"]
        different = [name for name in {**there, **settings} if there.get(name) != settings.get(name)]
        if different:
            raise SettingsError(
                f"--out {self.out} holds an unfinished run with {_compared(different[0], there, settings)}: "
                f"give the same, name another --out, or remove {self.folder}"
            )

    def count(self) -> int:
        """Return how many layers are finished."""
        count = 0
        while self.path(count).is_file():
            count += 1
        return count

    def path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def save(self, layer: int, result: QuantizedLayer) -> None:
        """Keep a finished layer."""
        losses = {name: dict(getattr(result.losses, name)) for name in ("losses", "plain", "alphas")}
        write_tensors(self.path(layer), result.tensors, {"format": "pt", "losses": json.dumps(losses)})

    def load(self, layer: int) -> QuantizedLayer:
        """Return a finished layer, its tensors views of the file."""
        path = self.path(layer)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                losses = LayerLosses(**json.loads(file.metadata()["losses"]))
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise ModelFileError(f"{path} is damaged: remove it, and the same command makes it again") from error
        return QuantizedLayer(tensors, losses)

    def close(self) -> None:
        """Let other processes in; the finished layers stay."""
        self._lock.release()

    def remove(self) -> None:
        """Delete the work area: what was made of it is written."""
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)


def _compared(name: str, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    if name in ("model", "text"):
        return f"another {name}"
    return f"{name} {there.get(name)}, not {wanted.get(name)}"
