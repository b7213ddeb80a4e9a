"""lm_head and embedding in fewer bits (`--outer-weights int8|int4`), rounded while they are read.

Owns which matrices that concerns and when: only one that gets smaller by it, so what a file has in as few bits already
stays as it is; int4 asked for a Q8_0 matrix rounds it a second time, and the note says so. Tied matrices are one. The
formats are blocks of GGUF, which every backend multiplies with and looks rows up in (`duolocal.quant.gguf_pack`):

    int8: Q8_0, groups of 32 input features, a float16 scale each: 8.5 bits per weight
    int4: Q4_1, groups of 32 input features, a float16 scale and a float16 minimum each: 5 bits per weight
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duolocal.errors import SettingsError
from duolocal.models.assemble import Role, TensorSource, outer_roles
from duolocal.models.loader import ModelSource
from duolocal.models.quantized import DenseSource
from duolocal.quant.gguf import GGUF_TYPES
from duolocal.quant.gguf_pack import GROUP_SIZE, RowFormat, quantize_rows
from duolocal.quant.weight import Weight

NAMES = ("auto", "int8", "int4")
ROW_FORMATS: Mapping[str, RowFormat] = {"int8": "Q8_0", "int4": "Q4_1"}
_TYPES = {kind.name: kind for kind in GGUF_TYPES.values()}
_UNROUNDED = ("f16", "bf16", "f32")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class OuterChange:
    """One matrix that is rounded: `before` and `after` are formats for people."""

    name: str  # "embedding", "lm_head", or both where they are tied
    before: str
    after: RowFormat
    bytes_before: int
    bytes_after: int


def quantize_outer(
    source: ModelSource, wanted: str, *, on_progress: Callable[[int, int], None] | None = None
) -> ModelSource:
    """Return the model as it will be loaded with `--outer-weights wanted`; "auto": as it is.

    Reads no weights. `size_bytes` is that after loading; the fingerprint stays, since the layers do. `on_progress`
    gets (rows done, rows in all) of each matrix while it is rounded. Raises SettingsError for an unknown name, and
    where rows are no whole groups.
    """
    if wanted not in NAMES:
        raise SettingsError(f"--outer-weights is {wanted!r}: give one of {', '.join(NAMES)}")
    if wanted == "auto" or (isinstance(source.tensors, OuterQuantized) and source.tensors.wanted == wanted):
        return source
    after = ROW_FORMATS[wanted]
    if source.config.hidden_size % GROUP_SIZE:
        raise SettingsError(
            f"--outer-weights {wanted} takes rows of a multiple of {GROUP_SIZE} values, this model's have "
            f"{source.config.hidden_size}: leave it out"
        )
    changes = {}
    for role in _matrices(source):
        found = source.tensors.weight(role, _CPU)
        smaller = found.out_features * _TYPES[after].row_bytes(found.in_features)
        if smaller < found.nbytes:
            tied = role.name == "embedding.weight" and source.config.tie_embeddings
            name = "lm_head and embedding (tied)" if tied else role.name.partition(".")[0]
            changes[role.name] = OuterChange(name, found.format, after, found.nbytes, smaller)
    saved = sum(change.bytes_before - change.bytes_after for change in changes.values())
    tensors = OuterQuantized(source.tensors, wanted, changes, on_progress)
    return replace(source, size_bytes=source.size_bytes - saved, tensors=tensors)


def outer_note(source: ModelSource) -> str | None:
    """Return a line saying what `quantize_outer` made of this model, None where it was not asked."""
    if not isinstance(source.tensors, OuterQuantized):
        return None
    wanted = source.tensors.wanted
    if not source.tensors.changes:
        return f"lm_head and embedding are as in the file: --outer-weights {wanted} would not make them smaller"
    said = [
        f"{change.name} {change.after} made of {change.before} ({change.bytes_before / 1e6:,.0f} MB to "
        f"{change.bytes_after / 1e6:,.0f} MB)"
        for change in source.tensors.changes.values()
    ]
    return f"{', '.join(said)} (--outer-weights {wanted})"


def outer_formats(source: ModelSource) -> list[str]:
    """Return the formats of embedding and lm_head as they are computed with, which the fingerprint does not tell."""
    tensors = source.tensors
    changes = tensors.changes if isinstance(tensors, OuterQuantized) else {}
    inner = tensors.source if isinstance(tensors, OuterQuantized) else tensors
    formats = []
    for role in _matrices(source):
        change = changes.get(role.name)
        if change is None:
            formats.append(inner.weight(role, _CPU).format)
        else:
            # Rounded twice is another matrix than rounded once.
            once = change.before.lower() in _UNROUNDED
            formats.append(change.after if once else f"{change.after} of {change.before}")
    return formats


def _matrices(source: ModelSource) -> list[Role]:
    return [role for role in outer_roles(source.config) if len(role.shape) == 2]


@dataclass(frozen=True)
class OuterQuantized:
    """A TensorSource that rounds the outer matrices of another, by role name."""

    source: TensorSource
    wanted: str
    changes: Mapping[str, OuterChange]
    on_progress: Callable[[int, int], None] | None = None

    def weight(self, role: Role, device: torch.device) -> Weight:
        """Return a matrix on `device`; a changed one is read and rounded a few rows at a time."""
        change = self.changes.get(role.name) if role.layer is None else None
        if change is None:
            return self.source.weight(role, device)
        found = self.source.weight(role, _CPU)
        rounded = quantize_rows(found, change.after, device=device, name=change.name, on_progress=self.on_progress)
        del found
        if isinstance(self.source, DenseSource) and self.source.dense_bytes(role) is not None:
            self.source.release(role)
        return rounded

    def vector(self, role: Role, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a norm weight or a bias in `dtype` on `device`."""
        return self.source.vector(role, device, dtype)
