"""The engine: token ids in, token ids out.

Owns one model, one cache and the tokens in it: chunked prefill, the decode loop, cancelling, snapshots. It knows
nothing of text, templates or terminals; it yields, and its caller consumes.
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

from duolocal.cache import ON_DEVICE, CacheMemory, DuoCache, Placement, SelectionPolicy, Snapshot
from duolocal.engine.decoder import Decoder, GpuDecoder, HostDecoder
from duolocal.engine.head_choice import can_rank, published_for, rank_on_first_use, ranking_context
from duolocal.engine.kernels import arrangement, choose_kernels, undecoded_note
from duolocal.engine.kv_choice import choose_kv
from duolocal.engine.memory import available_bytes, dense_16bit_bytes, free_places, placement_for
from duolocal.engine.place import device_named, dtype_named, tier_note
from duolocal.engine.prefill_choice import prefill_note, prefill_policy
from duolocal.engine.select_choice import choose_channels, selection_budget, selection_note
from duolocal.errors import ContextOverflowError, SettingsError, TokenizerError
from duolocal.heads import HeadPlan, choose_heads
from duolocal.kernels.cpu.operations import CpuKernels
from duolocal.kernels.sparse import SparsePrefill
from duolocal.models.config import ModelConfig
from duolocal.models.loader import ModelSource, open_model
from duolocal.models.outer_weights import outer_note, quantize_outer
from duolocal.models.quantized import kept_dense_note, quantize_on_load
from duolocal.models.registry import resolve
from duolocal.models.rope import extended, parse_rope_scaling
from duolocal.models.transformer import Transformer
from duolocal.paths import cache_folder
from duolocal.plan.weights import weights_of
from duolocal.quant.kv import DEFAULT_BLOCK_SIZE, KV_FORMATS, kv_layout
from duolocal.sampling import Sampling

DEFAULT_CHUNK_SIZE = {"cpu": 512, "cuda": 4096}  # tokens
MIN_CONTEXT = 16  # tokens
WARM_UP_TOKENS = 32  # of a short chunk, such as a question

Result = TypeVar("Result")
FinishReason = Literal["stop", "length", "context"]


class Cancelled(Exception):
    """`Engine.cancel` was called; the cache holds whole chunks only and can be used on."""


@dataclass(frozen=True)
class EngineMemory:
    """Bytes really allocated, and what an ordinary 16-bit cache of the same context would take."""

    weights: int
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
    ) -> None:
        self.transformer = transformer
        self.cache = cache
        self.source = source
        self.kv = kv
        self.chunk_size = chunk_size
        self.notes = list(notes)
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._cancel = threading.Event()
        self._gpu_decoder: GpuDecoder | None = None

    @classmethod
    def load(
        cls,
        model: str | ModelSource,
        *,
        context: int | None = None,
        kv: str = "auto",
        heads: str | float = "auto",
        sink_size: int | None = None,
        recent_size: int | None = None,
        chunk_size: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        rope: str | None = None,
        threads: int | None = None,
        kernels: str = "auto",
        weights: str = "auto",
        outer_weights: str = "auto",
        kv_device_memory: int | None = None,
        select: str = "off",
        prefill: str = "exact",
        on_fetch: Callable[[int, int], None] | None = None,
        on_layer: Callable[[int, int], None] | None = None,
        on_measure: Callable[[int, int], None] | None = None,
        on_identify: Callable[[int, int], None] | None = None,
        on_build: Callable[[], None] | None = None,
        on_quantize: Callable[[int, int], None] | None = None,
        on_learn: Callable[[int, int], None] | None = None,
    ) -> "Engine":
        """Load a model by name, hub id or path (or an opened ModelSource) and reserve its whole context.

        context: tokens, None for what the model was trained for; kv: "auto" or a name of `KV_FORMATS`; heads:
        "auto", "all", a ratio, "published", or a pattern file or folder (`choose_heads`); sink_size, recent_size:
        tokens; chunk_size: tokens per prefill step; device: "auto", "cpu" or "cuda"; dtype: "auto" or a name of
        DTYPES; rope: a scaling that overrides the model's; threads: of the CPU, None for one per physical core;
        kernels: "auto", "compiled" or "torch"; weights: "auto" for the bits of the file, "nf4" or "int8" to quantize a
        16-bit model while it is loaded; outer_weights: "auto", "int8" or "int4" for lm_head and embedding
        (`quantize_outer`); kv_device_memory: bytes of the device that KV blocks may take, the others lying in host
        memory or, without a GPU, in a file; None: as many as fit; select: "off", or which blocks decode reads: "auto"
        or a number of tokens (`selection_budget`); prefill: "exact" or "sparse" (`prefill_policy`). The callbacks get
        (done, total): bytes fetched, layers loaded, tokens of a KV measurement, steps of ranking an unknown model's
        heads, rows of lm_head and embedding made smaller, tokens read to find the channels of digests; `on_build` is
        called with nothing before kernels are compiled, once per machine.
        Raises DuoLocalError with one line saying what to do, before any work is done in vain.
        """
        source = model if isinstance(model, ModelSource) else open_model(resolve(model, on_progress=on_fetch))
        source = quantize_on_load(source, weights)
        dense_note = kept_dense_note(source)
        source = quantize_outer(source, outer_weights, on_progress=on_quantize)
        where = device_named(device)
        compute = dtype_named(dtype, where)
        config = source.config
        context = config.max_positions if context is None else context
        chunk_size = DEFAULT_CHUNK_SIZE[where.type] if chunk_size is None else chunk_size
        if context < MIN_CONTEXT:
            raise SettingsError(f"context is {context}; it must be {MIN_CONTEXT} tokens or more")
        budget = selection_budget(select, context)
        sparse = prefill_policy(prefill, chunk_size=chunk_size)
        if chunk_size < 1:
            raise SettingsError(f"chunk_size is {chunk_size}; it must be 1 token or more")
        if config.sliding_window is not None and context > config.sliding_window:
            raise SettingsError(
                f"this model attends to {config.sliding_window:,} tokens at most (sliding window); "
                f"use --context {config.sliding_window} or less"
            )
        override = parse_rope_scaling(rope, config) if rope else None
        config, rope_note = extended(config, context, override=override)
        name = model if isinstance(model, str) else ""
        published = published_for(source, name)
        choice = choose_heads(
            heads,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            fingerprint=source.fingerprint,
            sink_size=sink_size,
            recent_size=recent_size,
            published=published,
            can_rank=can_rank(source, context),
        )
        plan, heads_note = choice.plan, choice.note
        chosen, kernels_note = choose_kernels(
            kernels, config, device=where, dtype=compute, num_threads=threads, on_build=on_build
        )
        place = partial(
            placement_for,
            config,
            weights=weights_of(source, kernels=chosen.name, dtype=compute, device=where.type),
            context=context,
            chunk_size=chunk_size,
            device=where,
            dtype=compute,
            kernels=chosen.name,
            free=free_places(where, cache_folder(), available=available_bytes(where)),
            folder=cache_folder() / "kv",
            threads=chosen.num_threads if isinstance(chosen, CpuKernels) else 1,
            kv_device_memory=kv_device_memory,
            select=budget,
            sparse=sparse is not None,
        )
        # The smallest format stands for "auto" until the weights that it is measured with are loaded.
        placement = place(plan, kv=KV_FORMATS[-1] if kv == "auto" else kv)
        loaded = source.load(device=where, dtype=compute, arrange=arrangement(chosen, compute), on_layer=on_layer)
        if choice.unranked:
            ranking = Transformer(
                source.config, loaded, context=ranking_context(source), device=where, dtype=compute, kernels=chosen
            )
            plan, heads_note = rank_on_first_use(
                choice,
                source,
                ranking,
                sink_size=sink_size,
                recent_size=recent_size,
                published=published,
                on_progress=on_identify,
            )
        kv_note = None
        if kv == "auto":
            kv, kv_note = choose_kv(
                source,
                loaded,
                device=where,
                dtype=compute,
                chunk_size=chunk_size,
                kernels=chosen,
                on_progress=on_measure,
            )
            placement = place(plan, kv=kv)
        transformer = Transformer(config, loaded, context=context, device=where, dtype=compute, kernels=chosen)
        slow_note = undecoded_note(chosen, loaded)
        found = (rope_note, heads_note, kv_note, kernels_note, slow_note, dense_note, outer_note(source))
        notes = [note for note in found if note]
        policy = None
        if budget is not None:
            policy = SelectionPolicy(budget, choose_channels(source, transformer, plan, on_progress=on_learn))
            notes.append(selection_note(budget))
        if sparse is not None:
            notes.append(prefill_note(sparse))
        engine = cls.build(
            transformer,
            plan,
            kv=kv,
            chunk_size=chunk_size,
            source=source,
            notes=notes,
            placement=placement,
            select=policy,
            prefill=sparse,
        )
        if engine.cache.pool.tiered:
            engine.notes.append(tier_note(engine.cache))
        if engine.cache.capturable:
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
        block_size: int = DEFAULT_BLOCK_SIZE,
        source: ModelSource | None = None,
        notes: Sequence[str] = (),
        placement: Placement = ON_DEVICE,
        select: SelectionPolicy | None = None,
        prefill: SparsePrefill | None = None,
    ) -> "Engine":
        """Give a Transformer a cache for its `context` under `plan` and KV format `kv`."""
        config = transformer.config
        layout = kv_layout(kv, head_dim=config.head_dim, dtype=transformer.dtype, block_size=block_size)
        cache = DuoCache(
            plan,
            layout,
            num_heads=config.num_heads,
            context=transformer.context,
            device=transformer.device,
            dtype=transformer.dtype,
            kernels=transformer.kernels,
            placement=placement,
            select=select,
            prefill=prefill,
        )
        return cls(transformer, cache, source=source, kv=kv, chunk_size=chunk_size, notes=notes)

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

    def prefill(self, token_ids: Sequence[int]) -> Iterator[int]:
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
        self, token_ids: Sequence[int], sampling: Sampling, *, eos_ids: frozenset[int] | None = None
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
            token = decoder.next(token)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Append tokens and return the logits after each: [num_tokens, vocab_size] float32.

        Teacher-forced through the very path that prefill and decode take. Raises ContextOverflowError.
        """
        return torch.cat(list(self.iter_logits(token_ids)))

    def iter_logits(self, token_ids: Sequence[int]) -> Iterator[Tensor]:
        """Append tokens, yielding the logits of each chunk: memory stays bounded by the chunk."""
        self._check_fits(token_ids)
        self._cancel.clear()
        for chunk in self._chunks(token_ids):
            yield self.transformer.logits(self.step(chunk))

    def step(self, token_ids: Sequence[int]) -> Tensor:
        """Append tokens that fit, in one piece, whole or not at all; return hidden states [q_len, hidden_size].

        What prefill and decode are made of; raises Cancelled between layers after `cancel`.
        """
        self._check_ids(token_ids)
        start, device = self.position, self.transformer.device
        return self.append(
            token_ids,
            lambda: self.transformer.hidden(
                torch.tensor(token_ids, dtype=torch.int64, device=device),
                torch.arange(start, start + len(token_ids), device=device),
                self.cache,
                before_layer=self.raise_if_cancelled,
            ),
        )

    @torch.inference_mode()
    def append(self, token_ids: Sequence[int], compute: Callable[[], Result]) -> Result:
        """Run `compute`, which appends these tokens to the cache; where it raises, none is appended."""
        self.cache.begin(len(token_ids))
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
            self.step([0] * min(count, self.context))
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

    def _decoder(self, sampling: Sampling) -> Decoder:
        if not self.cache.capturable:
            return HostDecoder(self, sampling)
        if self._gpu_decoder is None:
            self._gpu_decoder = GpuDecoder(self)  # kept: it holds the graphs
        return self._gpu_decoder.restart(sampling)
