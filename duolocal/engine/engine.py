"""The engine: token ids in, token ids out.

Owns one model, one cache and the tokens in it: chunked prefill, the decode loop, cancelling, snapshots. It knows
nothing of text, templates or terminals; it yields, and its caller consumes.

A token of an answer passes through eight files: `engine.py` opens a step of the cache (`generate`, `append`), and
`decoder.py` runs it; `cache/cache.py` says what is special about the step (`begin`, `traits`); `models/transformer.py`
has the order of operations, `kernels/cpu/operations.py` the operations, which record the step and repeat it;
`cache/compiled_backend.py` stores and attends, with `kernels/cpu/attention.py`; `sampling.py` draws the next one. On a
GPU they are `kernels/gpu/operations.py`, `cache/gpu_backend.py`, `kernels/gpu/decode.py` and `device_sampling.py`.
Beside them stand parts with an interface of one line: the angles of RoPE, ring and pool, packed weights, threads.
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from duolocal.cache import ON_DEVICE, CacheMemory, DuoCache, Placement, SelectionPolicy, Snapshot
from duolocal.engine.automatic import choose
from duolocal.engine.decoder import Decoder, GpuDecoder, HostDecoder
from duolocal.engine.events import QUIET, LoadEvents
from duolocal.engine.first_use import settle_first_use
from duolocal.engine.known_model import OpenedModel
from duolocal.engine.loading import decide, load_notes, load_weights, selection_policy
from duolocal.engine.place import tier_note
from duolocal.engine.resolve import resolve, settings_with
from duolocal.engine.speculation import Speculation
from duolocal.errors import ContextOverflowError, TokenizerError
from duolocal.heads import HeadPlan
from duolocal.kernels.cpu.operations import CpuKernels
from duolocal.kernels.sparse import SparsePrefill
from duolocal.models import registry
from duolocal.models.config import ModelConfig
from duolocal.models.loader import ModelSource, open_model
from duolocal.models.transformer import Transformer
from duolocal.paths import cache_folder
from duolocal.plan.free import free_places, settled_model
from duolocal.plan.memory import dense_16bit_bytes
from duolocal.quant.kv import DEFAULT_BLOCK_SIZE, kv_layout
from duolocal.settings import AUTO_MODEL, CHAT_SAMPLING, FirstUse, LoadSettings, Sampling

WARM_UP_TOKENS = 32  # of a short chunk, such as a question

Result = TypeVar("Result")
FinishReason = Literal["stop", "length", "context"]


class Cancelled(Exception):
    """`Engine.cancel` was called; the cache holds whole chunks only and can be used on."""


@dataclass(frozen=True)
class EngineMemory:
    """Bytes really allocated, and what an ordinary 16-bit cache of the same context would take."""

    weights: int  # an embedding in the host memory beside a GPU included
    cache: CacheMemory
    dense_16bit: int


class Engine:
    """A loaded model with one context.

    Invariant: `token_ids` are exactly the tokens whose keys and values are in the cache.
    """

    def __init__(
        self,
        transformer: Transformer,
        cache: DuoCache,
        *,
        source: ModelSource | None = None,
        kv: str,
        chunk_size: int,
        notes: Sequence[str] = (),
        speculate: bool = True,
    ) -> None:
        self.transformer = transformer
        self.cache = cache
        self.source = source
        self.kv = kv
        self.chunk_size = chunk_size
        self.notes = list(notes)
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.speculation = Speculation() if speculate and self._decodes_exactly() else None
        self._cancel = threading.Event()
        self._gpu_decoder: GpuDecoder | None = None

    @classmethod
    def load(
        cls,
        model: str | Path | ModelSource = AUTO_MODEL,
        settings: LoadSettings | None = None,
        *,
        events: LoadEvents = QUIET,
        first_use: FirstUse = FirstUse(),  # noqa: B008  frozen
        reading: int = 0,
        **changes: Any,
    ) -> "Engine":
        """Load a model by name, hub id or path (or an opened ModelSource) and reserve its whole context.

        model: where it is left out that of `settings`, else the chat's default. settings: what to load with, None for
        the defaults; changes: fields of LoadSettings in place of theirs, as in
        `Engine.load("smollm2-135m", context=4096, kv="int8")`. events: told of what takes time. first_use, reading
        (tokens of the documents that follow): how an unknown model is begun with (`duolocal.engine.first_use`).
        Raises DuoLocalError with one line saying what to do, before any work is done in vain.
        """
        settings = settings_with(model, settings, changes)
        if not isinstance(model, ModelSource):
            settings, reason = settled_model(settings)
            if reason is not None:
                events.announce(reason)
            model = open_model(registry.resolve(settings.model, on_progress=events.fetching))
        resolved = resolve(settings, OpenedModel(model, settings.model, events))
        free = free_places(resolved.device, cache_folder())
        chosen = choose(resolved, free)
        transformer = load_weights(chosen.resolved, events)
        if resolved.undecided:
            settled = settle_first_use(
                resolved, chosen.resolved, transformer, free, first_use, reading=reading, events=events
            )
            if settled.undecided:
                chosen = choose(decide(settled, transformer, events), free, loaded=chosen.resolved)
        resolved, placed = chosen.resolved, chosen.request
        engine = cls.build(
            transformer,
            resolved.heads.plan,
            kv=resolved.kv,
            chunk_size=resolved.chunk_size,
            source=resolved.model.source,
            notes=load_notes(resolved, transformer),
            placement=Placement(placed.kv_device_memory, placed.outer, cache_folder() / "kv"),
            select=selection_policy(resolved, transformer, events),
            prefill=resolved.sparse,
            speculate=resolved.settings.speculate == "auto",
        )
        if engine.cache.pool.tiered:
            engine.notes.append(tier_note(engine.cache))
        if transformer.kernels.capturable:
            engine.warm_up()
        return engine

    @classmethod
    def build(
        cls,
        transformer: Transformer,
        plan: HeadPlan,
        *,
        kv: str,
        chunk_size: int,
        context: int | None = None,
        block_size: int = DEFAULT_BLOCK_SIZE,
        source: ModelSource | None = None,
        notes: Sequence[str] = (),
        placement: Placement = ON_DEVICE,
        select: SelectionPolicy | None = None,
        prefill: SparsePrefill | None = None,
        speculate: bool = True,
    ) -> "Engine":
        """Give a Transformer a cache under `plan` and KV format `kv`, for `context` tokens or all it was made for."""
        config = transformer.config
        layout = kv_layout(kv, head_dim=config.head_dim, dtype=transformer.dtype, block_size=block_size)
        cache = DuoCache(
            plan,
            layout,
            num_heads=config.num_heads,
            context=transformer.context if context is None else context,
            device=transformer.device,
            dtype=transformer.dtype,
            kernels=transformer.kernels,
            placement=placement,
            select=select,
            prefill=prefill,
        )
        return cls(transformer, cache, source=source, kv=kv, chunk_size=chunk_size, notes=notes, speculate=speculate)

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    @property
    def plan(self) -> HeadPlan:
        return self.cache.plan

    @property
    def context(self) -> int:
        """The most tokens that fit."""
        return self.cache.context

    @property
    def position(self) -> int:
        """Tokens in the cache."""
        return self.cache.num_tokens

    def memory(self) -> EngineMemory:
        """Return the bytes really allocated."""
        return EngineMemory(
            weights=sum(matrix.nbytes for matrix in self.transformer.weights.matrices()),
            cache=self.cache.memory(),
            dense_16bit=dense_16bit_bytes(self.config, self.context),
        )

    def prefill(self, token_ids: Sequence[int]) -> list[int]:
        """Append tokens chunk by chunk; return how many of them were in the cache after each.

        The work is done when this returns; `iter_prefill` yields on the way. Raises as that does.
        """
        return list(self.iter_prefill(token_ids))

    def iter_prefill(self, token_ids: Sequence[int]) -> Iterator[int]:
        """Append tokens chunk by chunk, yielding after each how many of them are in the cache.

        Raises ContextOverflowError before any work when they do not fit, and Cancelled, with every finished chunk
        kept, after `cancel`.
        """
        self._check_fits(token_ids)
        self._cancel.clear()
        done = 0
        for chunk in self._chunks(token_ids):
            self.step(chunk)
            done += len(chunk)
            yield done

    def generate(
        self, token_ids: Sequence[int], sampling: Sampling = CHAT_SAMPLING, *, eos_ids: frozenset[int] | None = None
    ) -> Iterator[int]:
        """Append tokens (at least one), then yield sampled ids until an end token, `max_tokens` or a full context.

        eos_ids: the model's own when None. An end token is not yielded and not appended, and the last yielded id is
        appended only when a further one is asked for. `finish_reason` says why it ended. Raises
        ContextOverflowError before any work, and Cancelled after `cancel`.
        """
        if not token_ids:
            raise ValueError("generate needs at least one token to go on from")
        eos_ids = frozenset(self.config.eos_ids) if eos_ids is None else eos_ids
        self._check_fits(token_ids)
        self._cancel.clear()
        self.finish_reason = None
        decoder = self._decoder(sampling)
        hidden = None
        for chunk in self._chunks(token_ids):
            hidden = self.step(chunk)
        assert hidden is not None
        token = decoder.first(hidden[-1:])
        for count in itertools.count(1):
            if token in eos_ids:
                self.finish_reason = "stop"
                return
            if count == sampling.max_tokens:
                self.finish_reason = "length"
            elif self.position == self.context:
                self.finish_reason = "context"
            yield token
            if self.finish_reason is not None:
                return
            token = self._decode(decoder, token)

    def logits(self, token_ids: Sequence[int], *, decode: bool = False) -> Tensor:
        """Append tokens and return the logits after each: [num_tokens, vocab_size] float32.

        Teacher-forced through the very path that prefill takes, or, with `decode`, that an answer takes. Raises
        ContextOverflowError.
        """
        return torch.cat(list(self.iter_logits(token_ids, decode=decode)))

    def iter_logits(self, token_ids: Sequence[int], *, decode: bool = False) -> Iterator[Tensor]:
        """Append tokens, yielding the logits of each chunk: memory stays bounded by the chunk."""
        self._check_fits(token_ids)
        self._cancel.clear()
        for chunk in ([token] for token in token_ids) if decode else self._chunks(token_ids):
            yield self.transformer.logits(self.step(chunk, decode=decode))

    def step(self, token_ids: Sequence[int], *, decode: bool = False) -> Tensor:
        """Append tokens that fit, in one piece, whole or not at all; return hidden states [q_len, hidden_size].

        decode: it is one token of an answer, not of a prompt (`DuoCache.begin`). Raises Cancelled between layers after
        `cancel`.
        """
        self._check_ids(token_ids)
        start, device = self.position, self.transformer.device
        return self.append(
            token_ids,
            lambda: self.transformer.hidden(
                torch.tensor(token_ids, dtype=torch.int64),
                torch.arange(start, start + len(token_ids), device=device),
                self.cache,
                before_layer=self.raise_if_cancelled,
            ),
            decode=decode,
        )

    @torch.inference_mode()
    def append(
        self, token_ids: Sequence[int], compute: Callable[[], Result], *, decode: bool = False, ahead: int = 0
    ) -> Result:
        """Run `compute`, which appends these tokens to the cache; where it raises, none is appended.

        ahead: it looks as many tokens ahead (`DuoCache.begin`).
        """
        self.cache.begin(len(token_ids), decode=decode, ahead=ahead)
        try:
            result = compute()
        except BaseException:
            self.cache.rollback()
            raise
        self.cache.commit()
        self.token_ids.extend(token_ids)
        return result

    def raise_if_cancelled(self, _layer: int = 0) -> None:
        """Raise Cancelled after `cancel`."""
        if self._cancel.is_set():
            raise Cancelled

    def warm_up(self) -> None:
        """Run a chunk, a short one and a decode step on an empty context, so that all kernels are compiled."""
        assert self.position == 0
        for count in (self.chunk_size, WARM_UP_TOKENS, 1):
            self.step([0] * min(count, self.context), decode=count == 1)
            self.reset()

    def cancel(self) -> None:
        """Stop the prefill or generation that is running (safe from a signal handler or another thread)."""
        self._cancel.set()

    def snapshot(self) -> Snapshot:
        """Remember this moment; constant size."""
        return self.cache.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Return to an earlier moment of this context, prefilling nothing."""
        self.cache.restore(snapshot)
        del self.token_ids[snapshot.num_tokens :]

    def resume(
        self,
        ring: Tensor,
        *,
        keep: int,
        token_ids: Sequence[int] = (),
        columns: Iterable[Tensor] = (),
    ) -> None:
        """Keep the first `keep` tokens and take `token_ids` after them as computed before: nothing is prefilled.

        ring, columns: as in `DuoCache.resume`, of the blocks from that on which holds token number `keep`.
        Raises ContextOverflowError or TokenizerError with nothing changed; where reading `columns` raises, the context
        is empty afterwards.
        """
        assert keep <= self.position
        self._check_ids(token_ids)
        if keep + len(token_ids) > self.context:
            raise ContextOverflowError(
                f"{keep + len(token_ids):,} tokens do not fit into the context of {self.context:,}; "
                f"a context of {keep + len(token_ids):,} or more is needed"
            )
        num_tokens = keep + len(token_ids)
        first_block = keep // self.cache.layout.block_size
        try:
            self.cache.resume(ring, num_tokens=num_tokens, first_block=first_block, columns=columns)
        except BaseException:
            self.reset()
            raise
        del self.token_ids[keep:]
        self.token_ids.extend(token_ids)

    def reset(self) -> None:
        """Forget all tokens."""
        self.cache.reset()
        self.token_ids.clear()

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        # A kernel would read past the embedding.
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.config.vocab_size:
            wrong = next(token for token in token_ids if not 0 <= token < self.config.vocab_size)
            raise TokenizerError(
                f"token {wrong} is not one of the model's {self.config.vocab_size:,}: its tokenizer belongs to another "
                "model; download the whole model again"
            )

    def _check_fits(self, token_ids: Sequence[int]) -> None:
        self._check_ids(token_ids)
        if self.position + len(token_ids) > self.context:
            raise ContextOverflowError(
                f"{len(token_ids):,} tokens do not fit: {self.position:,} of {self.context:,} are in use, "
                f"{self.context - self.position:,} are free; a context of "
                f"{self.position + len(token_ids):,} or more is needed"
            )

    def _chunks(self, token_ids: Sequence[int]) -> Iterator[Sequence[int]]:
        size, start = self.chunk_size, 0
        first = size
        if self.cache.prefill is not None:  # a tile that a chunk cuts through is not sparse
            size = self.cache.prefill.whole(size)
            first = size - self.position % size
        stop = first
        while start < len(token_ids):
            yield token_ids[start:stop]
            start, stop = stop, stop + size

    def _decodes_exactly(self) -> bool:
        """Whether a step that looks ahead computes, bit by bit, what steps of one token do."""
        weights, kernels = self.transformer.weights, self.transformer.kernels
        if not isinstance(kernels, CpuKernels) or not self.cache.most_ahead:
            return False
        looked_up = None if weights.lm_head is weights.embedding else weights.embedding
        return all(matrix is looked_up or kernels.same_bits(matrix) for matrix in weights.matrices())

    def _decoder(self, sampling: Sampling) -> Decoder:
        if not self.transformer.kernels.capturable:
            return HostDecoder(
                self.transformer, self.cache, sampling, context=self.token_ids, speculation=self.speculation
            )
        if self._gpu_decoder is None:
            self._gpu_decoder = GpuDecoder(self.transformer, self.cache)  # kept: it holds the graphs
        return self._gpu_decoder.restart(sampling)

    def _decode(self, decoder: Decoder, token: int) -> int:
        """Append an id that was sampled, and return the next one."""
        if self.cache.looks_ahead and decoder.take_ahead(token):
            self.raise_if_cancelled()
            self.cache.advance()
            self.token_ids.append(token)
        else:
            ahead = decoder.look_ahead(token, self.context - self.position - 1)
            self.append([token], lambda: decoder.step(token, self.raise_if_cancelled), decode=True, ahead=ahead)
        return decoder.sample()
