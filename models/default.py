"""Which model is meant where none is named: one that answers well where it fits, else one that fits anywhere.

$DUOLOCAL_MODEL names another.
"""

import os

from duolocal.files import free_bytes
from duolocal.models.names import DEFAULT_MODEL, MODELS, SMALL_MODEL
from duolocal.models.registry import cached_path, models_folder

MODEL_VARIABLE = "DUOLOCAL_MODEL"
MEMORY_BYTES = 4_000_000_000  # the model, an 8K context and the process, with room for what else runs
_DISK_BYTES = MODELS[DEFAULT_MODEL].size_bytes + (256 << 20)  # a part, and the head pattern's and KV format's notes


def default_model(*, free_memory: int) -> tuple[str, str | None]:
    """Return the name of the model that is meant where none is given, and why it is not the better one, if so."""
    chosen = os.environ.get(MODEL_VARIABLE)
    if chosen:
        return chosen, None
    needed, free, what = MEMORY_BYTES, free_memory, "memory"
    if free >= needed and cached_path(DEFAULT_MODEL) is None:
        needed, free, what = _DISK_BYTES, free_bytes(models_folder()), f"disk in {models_folder()}"
    if free >= needed:
        return DEFAULT_MODEL, None
    return SMALL_MODEL, (
        f"model {SMALL_MODEL}: {DEFAULT_MODEL}, which answers better, needs {needed / 1e9:.1f} GB of free {what}, and "
        f"{free / 1e9:.1f} GB are free"
    )
