"""A 16-bit model that is quantized while it is loaded (`--weights nf4|int8`), one matrix after the other.

Owns which matrices are quantized (those of the layers; embedding, output matrix, norms and biases stay as they are)
and that the 16-bit model never lies in memory whole: a matrix is read, quantized and let go, and the pages of
the file that were touched are given back. The formats are `duolocal.quant.bitsandbytes`.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from duolocal.errors import ModelFileError, SettingsError
from duolocal.models.assemble import Role, TensorSource, roles
from duolocal.models.loader import ModelSource
from duolocal.quant import bitsandbytes
from duolocal.quant.bitsandbytes import KINDS, Kind
from duolocal.quant.weight import DenseWeight, Weight

NAMES = ("auto", *KINDS)


@runtime_checkable
class DenseSource(TensorSource, Protocol):
    """A TensorSource that may hold 16- or 32-bit matrices."""

    def dense_bytes(self, role: Role) -> int | None:
        """Return the bytes of a tensor in the file, None where it is quantized."""
        ...

    def release(self, role: Role) -> None:
        """Give back the pages of the file that reading `role` has left in memory; matrices in use stay valid."""
        ...


def quantize_on_load(source: ModelSource, weights: str) -> ModelSource:
    """Return the model as it will be loaded with `--weights` of that name; "auto": as it is.

    `size_bytes` and `weight_format` are those after loading, and the fingerprint is another one: what was measured
    with the 16-bit weights does not hold for these. Raises SettingsError for an unknown name, for a model that is
    quantized already, and where bitsandbytes is not installed; nothing is loaded before.
    """
    if weights == "auto":
        return source
    kind = next((kind for kind in KINDS if kind == weights), None)
    if kind is None:
        raise SettingsError(f"--weights is {weights!r}: give one of {', '.join(NAMES)}")
    tensors = source.tensors
    if isinstance(tensors, QuantizedOnLoad) and tensors.kind == kind:
        return source
    sizes = (
        {role: tensors.dense_bytes(role) for role in roles(source.config)} if isinstance(tensors, DenseSource) else {}
    )
    if not sizes or any(size is None for role, size in sizes.items() if _is_linear(role)):
        raise SettingsError(
            f"--weights {kind} makes {kind} of 16-bit weights, and {source.path} is {source.weight_format} already: "
            "leave --weights out, or give the unquantized (BF16 or F16) model"
        )
    bitsandbytes.require(kind)
    assert isinstance(tensors, DenseSource)
    total = 0
    for role, size in sizes.items():
        total += bitsandbytes.quantized_bytes(kind, *role.shape) if _is_quantized(role) else size or 0
    return replace(
        source,
        size_bytes=total,
        weight_format=f"{kind.upper()} from {source.weight_format}",
        fingerprint=hashlib.sha256(f"{source.fingerprint} {kind}".encode()).hexdigest(),
        tensors=QuantizedOnLoad(tensors, kind),
    )


def kept_dense_note(source: ModelSource) -> str | None:
    """Return a line naming the matrices that stay as they are because their rows are no whole blocks, or None."""
    if not isinstance(source.tensors, QuantizedOnLoad):
        return None
    kept = {
        role.name.partition(".")[0] for role in roles(source.config) if _is_linear(role) and not _is_quantized(role)
    }
    if not kept:
        return None
    return (
        f"{', '.join(sorted(kept))} stay {source.weight_format.rpartition(' ')[2]}: "
        f"their rows are no multiple of {bitsandbytes.BLOCK_SIZE} values"
    )


@dataclass(frozen=True)
class QuantizedOnLoad:
    """A TensorSource that quantizes the matrices of the layers of another."""

    source: DenseSource
    kind: Kind

    def weight(self, role: Role, device: torch.device) -> Weight:
        """Return a matrix on `device`: of a layer quantized, else in the bits of the file."""
        if not _is_quantized(role):
            return self.source.weight(role, device)
        found = self.source.weight(role, device)
        name = f"layer {role.layer}, {role.name}"
        if not isinstance(found, DenseWeight):  # said before loading, unless a source forgot a kind
            raise ModelFileError(
                f"{name} is {found.format}, wanted 16 bits to make {self.kind} of: leave --weights out"
            )
        quantized = bitsandbytes.quantize(found, self.kind, name=name)
        del found
        self.source.release(role)
        return quantized

    def vector(self, role: Role, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a norm weight or a bias in `dtype` on `device`."""
        return self.source.vector(role, device, dtype)


def _is_linear(role: Role) -> bool:
    return role.layer is not None and len(role.shape) == 2


def _is_quantized(role: Role) -> bool:
    return _is_linear(role) and bitsandbytes.quantizes(role.shape[1])
