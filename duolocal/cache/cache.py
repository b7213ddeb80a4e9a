"""The KV cache of one context: a ring of sink and recent tokens for every head, quantized blocks for retrieval heads.

A retrieval head is a streaming head with a history: what a query may see beyond the window, it reads from
quantized blocks. A block is written once, when its last token is known, from the values as computed; until a token
leaves the window it is read from the ring. So the precision in which position i sees position j depends on i and j
alone: never on chunks, undo, or where a block lives.

Appending is a transaction over all layers: begin, then append and attend per layer, then commit; `rollback`
leaves the cache as it was before `begin`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor

from duolocal.cache.backend import CacheBackend, CacheState, Step
from duolocal.cache.compiled_backend import CompiledBackend
from duolocal.cache.home import ON_DEVICE, Placement
from duolocal.cache.pool import BlockPool
from duolocal.cache.ring import Ring
from duolocal.cache.selection import Selection, SelectionPolicy
from duolocal.cache.torch_backend import TorchBackend
from duolocal.heads import HeadPlan
from duolocal.kernels.blocks import BlockLayout
from duolocal.kernels.cpu.operations import CpuKernels
from duolocal.kernels.interface import Kernels, Rotation, StepTraits
from duolocal.kernels.sparse import SparseCounts, SparsePrefill
from duolocal.kernels.torch_kernels import TorchKernels

# Retrieval heads keep at least this many recent tokens as computed. It is a constant, not the block size, so that
# the block size cannot change results; block sizes up to it are possible because a block is complete before its
# first token leaves the window.
MIN_EXACT_RECENT = 128


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The cache at one moment: constant size, since blocks are immutable and only ring and length are copied."""

    num_tokens: int
    ring: Tensor


@dataclass(frozen=True)
class CacheMemory:
    """Bytes really allocated, by head class; `outer_blocks` are those beyond the device."""

    retrieval_blocks: int
    retrieval_windows: int
    streaming_windows: int
    outer_blocks: int = 0
    digests: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.retrieval_blocks + self.retrieval_windows + self.streaming_windows + self.digests


class DuoCache:
    """Keys and values of up to `context` tokens under a HeadPlan and a block layout.

    kernels: what the model computes with, which decides how the cache computes; None for plain torch. placement: where
    blocks lie. select: how decode chooses those it reads; None for all. prefill: the same for the
    chunks of a prompt. Raises MemoryLimitError where a file for blocks has no room.
    """

    def __init__(
        self,
        plan: HeadPlan,
        layout: BlockLayout,
        *,
        num_heads: int,
        context: int,
        device: torch.device,
        dtype: torch.dtype,
        kernels: Kernels | None = None,
        placement: Placement = ON_DEVICE,
        select: SelectionPolicy | None = None,
        prefill: SparsePrefill | None = None,
    ) -> None:
        assert layout.block_size <= MIN_EXACT_RECENT, layout.block_size
        self.plan = plan
        self.layout = layout
        self.context = context
        self.device = device
        self.dtype = dtype
        self.num_tokens = 0
        self.query_group = num_heads // plan.num_kv_heads
        self.exact_recent = exact_recent_size(plan)  # tokens that retrieval heads see as computed
        self.ring = Ring(
            num_layers=plan.num_layers,
            num_kv_heads=plan.num_kv_heads,
            head_dim=layout.head_dim,
            sink_size=plan.sink_size,
            recent_size=self.exact_recent,
            device=device,
            dtype=dtype,
        )
        self.pool = BlockPool(
            layout,
            num_rows=plan.num_retrieval,
            max_blocks=context // layout.block_size,
            device=device,
            placement=placement,
        )
        self.selection: Selection | None = None
        if select is not None:
            self.selection = Selection(
                select, layout, num_rows=plan.num_retrieval, max_blocks=self.pool.max_blocks, device=device
            )
        # Tokens before the open transaction, where kernels read it: the position of the new token of a decode step.
        self.start = torch.zeros(1, dtype=torch.int64, device=device)
        self.prefill = prefill
        self.sparse_counts = None if prefill is None else SparseCounts(plan.num_retrieval, device=device)
        state = CacheState(
            plan,
            layout,
            self.query_group,
            self.exact_recent,
            self.ring,
            self.pool,
            self.start,
            self.selection,
            prefill,
            self.sparse_counts,
        )
        self.backend = _backend(state, kernels)
        self._step: Step | None = None
        self._ahead: Step | None = None  # the last step, where it looked ahead
        self._restorable: WeakSet[Snapshot] = WeakSet()  # those on the way that led here

    @property
    def traits(self) -> StepTraits:
        """What the model is to know of the open transaction."""
        assert self._step is not None, "no transaction is open"
        return self.backend.traits(self._step)

    @property
    def most_ahead(self) -> int:
        """How many tokens a decode step can look ahead with; 0: none."""
        return self.backend.most_ahead if isinstance(self.backend, CompiledBackend) else 0

    @property
    def looks_ahead(self) -> bool:
        """Whether the last step computed tokens that may still follow."""
        return self._ahead is not None and self.num_tokens - self._ahead.start <= self._ahead.ahead

    def begin(self, q_len: int, *, decode: bool = False, ahead: int = 0) -> None:
        """Start to append `q_len` tokens; the caller has checked that they fit into the context.

        decode: it is one token of an answer, which reads selected blocks; a prompt reads all, however it is cut.
        ahead: `append` and `attend` are given as many tokens more, which may follow; nothing of them is stored until
        `advance` says that they do.
        """
        assert self._step is None, "a transaction is open"
        assert q_len == 1 or not decode, q_len
        assert 0 <= ahead <= self.most_ahead and (decode or not ahead), ahead
        start, end = self.num_tokens, self.num_tokens + q_len
        assert end + ahead <= self.context, (start, q_len, ahead, self.context)
        self._ahead = None
        # A step that looks ahead writes nothing before it is committed.
        slots = slice(0) if ahead else self.ring.overwritten(start=start, count=q_len)
        if not decode:
            self._forget_lists()
        decodes = decode or (q_len == 1 and self.selection is None)  # what is sparse in a prompt is longer
        self.start.fill_(start)
        self._step = Step(start, end, decodes, slots, self.ring.data[:, :, :, slots].clone(), ahead)
        self.pool.grow(end // self.layout.block_size)

    def commit(self) -> None:
        """Make the appended tokens part of the context."""
        step = self._step
        assert step is not None
        if step.ahead:
            self._accept(step)
            self._ahead = step
        self.pool.settle(self.num_tokens // self.layout.block_size)
        self.num_tokens = step.end
        self._step = None

    def advance(self) -> None:
        """Make the next token that the last step computed ahead part of the context."""
        step = self._ahead
        assert self._step is None and self.looks_ahead and step is not None
        self.start.fill_(self.num_tokens)
        self.pool.grow((self.num_tokens + 1) // self.layout.block_size)
        self._accept(step)
        self.pool.settle(self.num_tokens // self.layout.block_size)
        self.num_tokens += 1

    def _accept(self, step: Step) -> None:
        assert isinstance(self.backend, CompiledBackend)
        self.backend.accept(step, self.num_tokens - step.start)

    def rollback(self) -> None:
        """Forget the open transaction; the cache is as it was before `begin`."""
        assert self._step is not None
        self.ring.data[:, :, :, self._step.slots] = self._step.saved
        self.pool.shrink(self.num_tokens // self.layout.block_size)
        self._forget_lists()
        self._step = None

    def append(self, layer: int, k: Tensor, v: Tensor, rotation: Rotation | None = None) -> None:
        """Take the keys and values of the new tokens in one layer.

        k, v: [q_len, num_kv_heads, head_dim] in the compute dtype. RoPE has been applied to k, or, where the cache
        `rotates`, its angles are given.
        """
        step = self._step
        assert step is not None, "append outside begin and commit"
        wanted = (step.end - step.start + step.ahead, self.plan.num_kv_heads, self.layout.head_dim)
        assert tuple(k.shape) == tuple(v.shape) == wanted, (k.shape, v.shape, wanted)
        assert (rotation is not None) == self.traits.rotates
        self.backend.append(layer, step, k, v)

    def attend(self, layer: int, q: Tensor, positions: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Attend from the new tokens to all that each may see.

        q: [q_len, num_heads, head_dim]; positions: int64 [q_len], the absolute positions of the tokens just
        appended; rotation: as in append. Returns [q_len, num_heads, head_dim] in q's dtype.
        """
        step = self._step
        assert step is not None, "attend outside begin and commit"
        assert (rotation is not None) == self.traits.rotates
        return self.backend.attend(layer, step, q, positions, rotation)

    def snapshot(self) -> Snapshot:
        """Copy what `restore` needs; constant size."""
        assert self._step is None
        snapshot = Snapshot(self.num_tokens, self.ring.data.clone())
        self._restorable.add(snapshot)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Return to an earlier moment of this context, prefilling nothing.

        The snapshot must lie on the way that led here: once the cache was cut below it, it is void.
        """
        assert self._step is None
        assert snapshot in self._restorable, "snapshot of an abandoned context"
        self.ring.data.copy_(snapshot.ring)
        self._cut(snapshot.num_tokens)

    def read_ring(self) -> Tensor:
        """Copy the sink and recent tokens of all heads to host memory."""
        assert self._step is None
        return self.ring.data.to("cpu", copy=True)

    def resume(
        self,
        ring: Tensor,
        *,
        num_tokens: int,
        first_block: int,
        columns: Iterable[Tensor] = (),
    ) -> None:
        """Become a context of `num_tokens` tokens that was computed before, computing nothing.

        Blocks before `first_block` stay; `columns` are the others, in order, as the pool's `read` returned them, in
        pieces of any length; `ring`: what `read_ring` returned after those tokens. Where reading `columns` raises, call
        `reset` before anything else.
        """
        assert self._step is None
        num_blocks = num_tokens // self.layout.block_size
        assert 0 <= num_tokens <= self.context and first_block <= min(num_blocks, self.pool.num_blocks)
        assert ring.shape == self.ring.data.shape and ring.dtype == self.dtype, (ring.shape, ring.dtype)
        self._cut(first_block * self.layout.block_size)
        self.pool.grow(num_blocks)
        at = first_block
        for piece in columns:
            self.pool.write(at, piece)
            at += piece.shape[0]
        assert at == num_blocks, (at, num_blocks)
        self.pool.settle(first_block)
        self.make_digests(first_block)
        self.ring.data.copy_(ring)
        self.num_tokens = num_tokens

    def make_digests(self, first_block: int) -> None:
        """Make the digests of the blocks from `first_block` on, which were written without a prefill."""
        if self.selection is not None:
            for layer in range(self.plan.num_layers):
                self.backend.digest(layer, first_block, self.pool.num_blocks)

    def reset(self) -> None:
        """Forget everything."""
        assert self._step is None
        self._cut(0)

    def _cut(self, num_tokens: int) -> None:
        """Forget all but the first tokens; what the ring holds is the caller's business."""
        assert num_tokens <= self.num_tokens, (num_tokens, self.num_tokens)
        self.pool.shrink(num_tokens // self.layout.block_size)
        self._forget_lists()
        self._ahead = None
        self.num_tokens = num_tokens
        self._restorable = WeakSet(each for each in self._restorable if each.num_tokens <= num_tokens)

    def _forget_lists(self) -> None:
        if self.selection is not None:
            self.selection.forget()

    def memory(self) -> CacheMemory:
        """Return the bytes really allocated, by head class."""
        num_heads = self.plan.num_layers * self.plan.num_kv_heads
        ring_per_head = self.ring.nbytes // num_heads
        retrieval = self.plan.num_retrieval
        return CacheMemory(
            retrieval_blocks=self.pool.nbytes,
            retrieval_windows=ring_per_head * retrieval,
            streaming_windows=ring_per_head * (num_heads - retrieval),
            outer_blocks=self.pool.outer_bytes,
            digests=0 if self.selection is None else self.selection.nbytes,
        )


def _backend(state: CacheState, kernels: Kernels | None) -> CacheBackend:
    if kernels is None or isinstance(kernels, TorchKernels):
        return TorchBackend(state)
    if isinstance(kernels, CpuKernels):
        return CompiledBackend(state, kernels)
    from duolocal.cache.gpu_backend import GpuBackend  # imports triton, which only a machine with a GPU need have

    return GpuBackend(state)


def exact_recent_size(plan: HeadPlan) -> int:
    """Return how many recent tokens retrieval heads see as computed."""
    return max(plan.recent_size, MIN_EXACT_RECENT)
