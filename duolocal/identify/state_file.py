"""A distillation on disk: what is needed to go on after an interruption, exactly.

JSON, because Python writes a float64 so that it reads back as the same number, and because a file of numbers cannot
run anything. A file of other settings or another model is refused, never mixed in.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duolocal.errors import SettingsError
from duolocal.files import read_json, write_json
from duolocal.identify.distill import DistillState

FORMAT = "duolocal-distill-state"
_TABLES = ("gates", "mean", "square", "gates_sum")


def save_state(path: Path, state: DistillState, fingerprint: str) -> None:
    """Write `state`, replacing what was there in one move; raises SettingsError where that is impossible."""
    data: dict[str, Any] = {"format": FORMAT, "version": 1, "fingerprint": fingerprint, "step": state.step}
    data |= {name: getattr(state, name).tolist() for name in _TABLES} | {"losses": state.losses}
    try:
        write_json(path, data, indent=None)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be written ({error.strerror or error}); use another place") from None


def load_state(path: Path, fingerprint: str, *, num_layers: int, num_kv_heads: int) -> DistillState | None:
    """Read what `save_state` wrote, None where there is no file.

    Raises SettingsError, saying what to do, for a file of other settings, another model or no state at all.
    """
    try:
        path.open("rb").close()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror or error})") from None
    data = read_json(path, format=FORMAT, version=1)
    if data is None:
        raise SettingsError(f"{path} is not the state of a distillation: move it away, or name another --out")
    if data.get("fingerprint") != fingerprint:
        raise SettingsError(
            f"{path} belongs to a distillation with other settings or of another model: "
            "go on with those, or delete it to begin anew"
        )
    try:
        tables = {name: torch.tensor(data[name], dtype=torch.float64) for name in _TABLES}
        losses = tuple(float(loss) for loss in data["losses"])
        state = DistillState(step=int(data["step"]), losses=losses, **tables)
        sound = len(losses) == state.step and all(
            _is_table(table, num_layers, num_kv_heads) for table in tables.values()
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise SettingsError(f"{path} is damaged: delete it to begin anew")
    return state


def _is_table(table: Tensor, num_layers: int, num_kv_heads: int) -> bool:
    return tuple(table.shape) == (num_layers, num_kv_heads) and bool(table.isfinite().all())
