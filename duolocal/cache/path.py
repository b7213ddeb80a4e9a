"""What computes inside a cache: one interface; a path in plain torch, one in compiled CPU kernels, one on the GPU."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from duolocal.kernels.interface import Rotation


@dataclass
class Step:
    """An open transaction: tokens start..end-1, and the ring slots it overwrites as they were."""

    start: int
    end: int
    slots: slice | Tensor
    saved: Tensor
    k: Tensor | None = None  # of the layer between its append and its attend
    v: Tensor | None = None


class Path(Protocol):
    """Stores new tokens and attends from them, one layer after the other: append, then attend."""

    @property
    def capturable(self) -> bool:
        """Whether a decode step reads nothing on the host."""
        ...

    @property
    def rotates(self) -> bool:
        """Whether q and k come without RoPE and with a Rotation."""
        ...

    def append(self, layer: int, step: Step, k: Tensor, v: Tensor) -> None: ...

    def chooses(self, step: Step) -> bool:
        """Whether this decode step makes lists of blocks anew: a captured graph holds one kind of step."""
        ...

    def digest(self, layer: int, first: int, last: int) -> None:
        """Make the digests of blocks first..last-1, which were read back; called only where blocks are selected."""
        ...

    def attend(self, layer: int, step: Step, q: Tensor, positions: Tensor, rotation: Rotation | None) -> Tensor: ...
