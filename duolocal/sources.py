"""Sources: which passages of the documents the retrieval heads looked at while an answer was written.

The question and its answer are read once more against the cache as it is, which is left untouched, and the attention of
the retrieval heads is listened to. A passage's score is

    mean over the answer's tokens of  max over retrieval heads and the passage's tokens of  attention weight

so 1 means that at every token some head looked at one place of this passage and nowhere else. The maximum, not the sum:
what many heads spread thinly over a long context adds up to more than the one head that copies. Attention says where a
model looked, not why it said what it said; docs/sources.md has how often the right passage is among the first three.

Memory is bounded: one span of keys and one chunk of queries at a time, whatever the context.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from duolocal.cache import DuoCache
from duolocal.engine.engine import Engine
from duolocal.engine.session import ChatSession, document_content
from duolocal.engine.turns import Turn
from duolocal.errors import SettingsError
from duolocal.kernels.attention import KEY_SPAN, block_attention, merge, window_attention
from duolocal.kernels.blocks import decode_blocks, hadamard
from duolocal.models.observe import ObservedCache, layer_by_layer

PASSAGE_TOKENS = 64
STANDS_OUT = 0.4  # right answers with a needle scored 0.50 or more, answers without one 0.29 or less (docs/sources.md)
QUERY_CHUNK = 64  # tokens read again at a time


@dataclass(frozen=True)
class Passage:
    """Positions start … stop - 1 of the context, and how much was looked at them, 0 … 1."""

    start: int
    stop: int
    score: float


@dataclass(frozen=True)
class Source:
    """A passage of a document: characters start … stop - 1 of its text."""

    document: str
    text: str  # of the whole document
    start: int
    stop: int
    score: float

    @property
    def excerpt(self) -> str:
        """The passage as one line."""
        return " ".join(self.text[self.start : self.stop].split())

    @property
    def line(self) -> int:
        """The line of the document, from 1, that the passage begins in."""
        blank = len(self.text[self.start : self.stop]) - len(self.text[self.start : self.stop].lstrip())
        return self.text.count("\n", 0, self.start + blank) + 1


def find_sources(session: ChatSession, *, count: int = 3) -> list[Source]:
    """Return the `count` passages of the loaded documents that were looked at most for the last answer, best first.

    Reads question and answer again, and what came before them where no ring of that moment is kept. Raises
    SettingsError where there is no answer or an empty one, no document, or no retrieval head.
    """
    exchange, engine = session.tree.current, session.engine
    if exchange.kind != "exchange" or exchange.parent is None:
        raise SettingsError("there is no answer to look up: ask something first")
    documents = [turn for turn in exchange.way() if turn.kind == "document"]
    if not documents:
        raise SettingsError("there are no documents in the context: /load one, and ask about it")
    if not engine.plan.num_retrieval:
        raise SettingsError("no head of this setting sees the whole context: start with other --heads")
    produced = exchange.num_answered
    if not produced:
        raise SettingsError("the last answer is empty, so nothing was looked up for it: /retry, or ask again")
    before = exchange.parent
    while before.ring is None and before.parent is not None:
        before = before.parent
    first = exchange.end - produced + len(exchange.unfed) - 1  # its next token is the first of the answer
    found = attended(
        engine,
        engine.cache.ring.data if before.ring is None else before.ring,
        range(before.end, first + produced),
        [range(_text_start(session, turn), turn.end) for turn in documents],
        num_queries=produced,
    )
    return [_source(session, documents, passage) for passage in found[:count]]


def _source(session: ChatSession, documents: Sequence[Turn], passage: Passage) -> Source:
    turn = next(turn for turn in documents if turn.start <= passage.start < turn.end)
    start, stop = (min(len(_text_until(session, turn, at)), len(turn.text)) for at in (passage.start, passage.stop))
    return Source(turn.name, turn.text, start, stop, passage.score)


def _text_until(session: ChatSession, turn: Turn, position: int) -> str:
    """Return the text of a document up to `position`: without the template and the line that names it."""
    head = document_content(turn.name, "").partition("\n")[0] + "\n"
    ids = session.engine.token_ids[turn.start : position]
    return session.tokenizer.decode(ids, continues=turn.start > 0).partition(head)[2]


def _text_start(session: ChatSession, turn: Turn) -> int:
    """Return the position of the first token that says something of the document's text."""
    positions = range(turn.start, turn.end)
    return turn.start + bisect.bisect(positions, 0, key=lambda at: len(_text_until(session, turn, at + 1)))


def passages(spans: Sequence[range], *, size: int = PASSAGE_TOKENS) -> list[range]:
    """Cut spans of positions into passages of `size` tokens; the last of a span may be shorter."""
    return [range(at, min(at + size, span.stop)) for span in spans for at in range(span.start, span.stop, size)]


@torch.inference_mode()
def attended(engine: Engine, ring: Tensor, again: range, spans: Sequence[range], *, num_queries: int) -> list[Passage]:
    """Return the passages of `spans` by score, the highest first.

    again: positions of the context to read again, at least `num_queries`; the queries of the last `num_queries` of them
    are listened to, one for each token of an answer. ring: the cache's after `again.start` tokens, of any content where
    that is 0. Nothing in the engine changes.
    """
    first = again.stop - num_queries
    assert again.start <= first < again.stop <= engine.position, (again, num_queries, engine.position)
    cut = passages(spans)
    if not cut:
        return []
    listening = _Listening(engine.cache, ring, again.start, cut, queries=range(first, again.stop))
    device = engine.transformer.device
    layers = layer_by_layer(
        engine.transformer,
        torch.tensor(engine.token_ids[again.start : again.stop], dtype=torch.int64, device=device),
        lambda layer: ObservedCache(partial(listening.attend, layer)),
        positions=torch.arange(again.start, again.stop, device=device),
        chunk_size=QUERY_CHUNK,
    )
    for _ in layers:
        pass
    scores = listening.best.mean(0).tolist()
    found = [Passage(each.start, each.stop, score) for each, score in zip(cut, scores, strict=True)]
    return sorted(found, key=lambda passage: -passage.score)


class _Listening:
    """Attention of tokens that are read again, to a cache as it stands and to themselves; notes what was looked at.

    The blocks of the cache hold the same tokens, quantized, that are appended here once more: what a query sees, and in
    which precision, is what it saw the first time.
    """

    def __init__(self, cache: DuoCache, ring: Tensor, start: int, cut: Sequence[range], *, queries: range) -> None:
        self._cache = cache
        self._start = start
        self._first = queries.start
        self._ring = ring.to(cache.device)
        held, order = cache.ring.positions(start).sort()
        self._held, self._slots = held[held >= 0], order[held >= 0]  # positions, ascending
        self.best = torch.zeros(len(queries), len(cut), device=cache.device)
        # Passage of each position; len(cut) for positions in none.
        self._passage = torch.full((cache.num_tokens,), len(cut), dtype=torch.int64, device=cache.device)
        for index, each in enumerate(cut):
            self._passage[each.start : each.stop] = index

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Attend as the cache does, and note the weights of the answer's queries."""
        cache, plan = self._cache, self._cache.plan
        heads = list(plan.retrieval_heads[layer])
        window = {"q_positions": positions, "sink_size": plan.sink_size, "scale": cache.layout.head_dim**-0.5}
        recent = [cache.exact_recent if retrieval else plan.recent_size for retrieval in plan.retrieval[layer]]
        own = torch.arange(self._start, self._start + k.shape[1], device=q.device)
        held_k, held_v = self._ring[:, layer].index_select(2, self._slots)
        keys, key_positions = torch.cat((held_k, k), dim=1), torch.cat((self._held, own))
        out, lse = window_attention(
            q,
            keys,
            torch.cat((held_v, v), dim=1),
            k_positions=key_positions,
            recent_sizes=torch.tensor(recent, device=q.device),
            **window,
        )
        if not heads:
            return out
        table = cache.pool.table[plan.rows[layer], : cache.pool.num_blocks]
        block_out, block_lse = block_attention(
            q[heads], cache.pool.take, table, cache.layout, recent_size=cache.exact_recent, **window
        )
        out[heads] = merge(out[heads], lse[heads], block_out, block_lse)
        asked = positions >= self._first
        if bool(asked.any()):
            whole = torch.logaddexp(lse[heads], block_lse)[:, :, asked].float()
            spans = self._keys(table, keys[heads], key_positions, last=int(positions[-1]))
            self._note(q[heads][:, :, asked].float(), whole, positions[asked], spans)
        return out

    def _keys(
        self, table: Tensor, window: Tensor, window_positions: Tensor, *, last: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield keys [heads, n, head_dim] float32 and their positions [n], each position up to `last` once."""
        layout, take = self._cache.layout, self._cache.pool.take
        yield window.float(), window_positions
        missing = torch.ones(last + 1, dtype=torch.bool, device=window.device)
        missing[window_positions] = False
        step = max(1, KEY_SPAN // layout.block_size)
        for block in range(0, table.shape[1], step):
            span = table[:, block : block + step]
            start, stop = block * layout.block_size, min((block + span.shape[1]) * layout.block_size, last + 1)
            kept = start + missing[start:stop].nonzero()[:, 0]
            if len(kept):
                keys = decode_blocks(take(span.reshape(-1)), layout, "key", dtype=torch.float32)
                keys = (hadamard(keys) if layout.key.rotate else keys).view(len(table), -1, layout.head_dim)
                yield keys[:, kept - start], kept

    def _note(self, q: Tensor, lse: Tensor, positions: Tensor, spans: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Note the weights of q [heads, group, n, head_dim] with log-sum-exps [heads, group, n] at `positions` [n]."""
        rows = positions - self._first
        nowhere = self.best.new_zeros(len(rows), 1)
        for keys, key_positions in spans:
            scores = torch.einsum("hgqd,hkd->hgqk", q, keys) * self._cache.layout.head_dim**-0.5
            weights = (scores - lse[..., None]).exp_().amax((0, 1))  # [n, keys]
            weights.masked_fill_(key_positions > positions[:, None], 0.0)
            index = self._passage[key_positions].expand_as(weights)
            best = torch.cat((self.best[rows], nowhere), dim=1).scatter_reduce(1, index, weights, "amax")
            self.best[rows] = best[:, :-1]
