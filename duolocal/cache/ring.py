"""The sink and recent tokens of every KV head, in the compute dtype: constant size, whatever the context."""

import torch
from torch import Tensor


class Ring:
    """Keys and values of positions 0..sink_size-1 and of the last `recent_size` positions, for all layers.

    Invariant: after n tokens, slot(p) holds position p for every p < n that is a sink or satisfies
    n - p <= recent_size. Every other slot holds nothing that may be read.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        sink_size: int,
        recent_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.sink_size = sink_size
        self.recent_size = recent_size
        shape = (2, num_layers, num_kv_heads, sink_size + recent_size, head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)  # keys, then values
        self._slots = torch.arange(sink_size + recent_size, device=device)

    @property
    def num_slots(self) -> int:
        return self.sink_size + self.recent_size

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def slots(self, positions: Tensor) -> Tensor:
        """Return the slot of each position, int64."""
        recent = self.sink_size + (positions - self.sink_size) % self.recent_size
        return torch.where(positions < self.sink_size, positions, recent)

    def positions(self, num_tokens: int) -> Tensor:
        """Return the position that each slot holds after `num_tokens` tokens, -1 for none: int64 [num_slots]."""
        sink, recent = self.sink_size, self.recent_size
        # The newest position p < num_tokens with (p - sink) % recent == slot - sink.
        newest = num_tokens - 1 - (num_tokens - 1 - self._slots) % recent
        held = torch.where(self._slots < sink, self._slots, newest)
        unused = torch.where(self._slots < sink, self._slots >= num_tokens, newest < sink)
        return held.masked_fill(unused, -1)

    def read(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [num_kv_heads, n, head_dim] of held `positions` [n]."""
        k, v = self.data[:, layer].index_select(2, self.slots(positions))
        return k, v

    def write(self, layer: int, k: Tensor, v: Tensor, *, start: int) -> None:
        """Store positions start..start+n-1; k, v: [num_kv_heads, n, head_dim]. Only what stays is stored."""
        end = start + k.shape[1]
        first_recent = max(start, end - self.recent_size)
        positions = torch.arange(start, end, device=k.device)
        kept = positions[(positions < self.sink_size) | (positions >= first_recent)]
        slots = self.slots(kept)
        self.data[0, layer, :, slots] = k[:, kept - start]
        self.data[1, layer, :, slots] = v[:, kept - start]

    def overwritten(self, *, start: int, count: int) -> slice | Tensor:
        """Return the slots that storing positions start..start+count-1 overwrites, to index them with."""
        if count >= self.num_slots:
            return slice(None)
        if count == 1:
            slot = start if start < self.sink_size else self.sink_size + (start - self.sink_size) % self.recent_size
            return slice(slot, slot + 1)  # a view: no index travels to the device for a decode step
        return self.slots(torch.arange(start, start + count)).unique().to(self._slots.device)
