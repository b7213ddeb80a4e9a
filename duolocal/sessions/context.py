"""Between an engine and a saved context: what is written of it, and taking it up again without computing."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duolocal.engine.engine import Engine
from duolocal.engine.session import ChatSession
from duolocal.engine.turns import Turn
from duolocal.errors import ContextOverflowError, SessionError
from duolocal.sessions.conversation import Conversation, tree_to_json, turns_to_json
from duolocal.sessions.folder import ContextFolder, NewSegment, Segment, Segments
from duolocal.sessions.identity import check_identity, identify
from duolocal.sizes import format_tokens

# Rings that are saved: one takes 15 MB for SmolLM2-135M and 42 MB for a Llama-3-8B. A turn without one can still be
# gone to, by reading again what was read since the last that has one.
MIN_RINGS = 3  # at this turn, at the one before, and at the end of the documents
MAX_RINGS = 9  # as long as they take no more than the blocks do
_SEGMENT_BYTES = 32 << 20  # of blocks, at most
_SMALL_BYTES = 1 << 20  # a last segment below this is written anew with what follows it


@dataclass(frozen=True)
class Origin:
    """What a start is called and was asked for: for lists and refusals, not compared."""

    model: str = ""
    options: tuple[str, ...] = ()  # as `LoadSettings.options`


@dataclass(frozen=True)
class Plan:
    """What a folder shall hold, and the rings among it, as in its segments."""

    description: Mapping[str, Any]
    segments: Segments
    rings: Sequence[Tensor] = field(repr=False)


class ContextWriter:
    """Keeps one folder up to date with one engine: writes each block, text and ring once."""

    def __init__(self, folder: ContextFolder, origin: Origin) -> None:
        self.folder = folder
        self.token_ids: Sequence[int] = ()  # of the context that is in the folder
        self.num_ahead = 0  # of them, those of a reading that was stopped
        self._origin = origin
        self._identity: dict[str, Any] = {}
        self._stamps: list[int] = []  # of the columns that are in the folder
        self._turns: list[Turn] = []  # that are in the folder
        self._rings: dict[int, tuple[Tensor, Segment]] = {}  # by id; holding the tensor keeps the id its own

    def adopt(self, engine: Engine, num_columns: int) -> None:
        """Note that the engine's first blocks are the folder's, as after taking them up."""
        self._stamps = engine.cache.pool.stamps[:num_columns]

    def adopt_conversation(self, conversation: Conversation, token_ids: Sequence[int]) -> None:
        """Note that the folder has these turns, and these ids in its context."""
        self._turns, self.token_ids = list(conversation.turns.values()), token_ids
        self.num_ahead = len(token_ids) - conversation.current.end

    def adopt_ring(self, tensor: Tensor, ring: Segment) -> None:
        """Note that a ring is in the folder."""
        self._rings[id(tensor)] = (tensor, ring)

    def plan(self, session: ChatSession, *, kind: str, extra: Mapping[str, Any] | None = None) -> Plan:
        """Return what the folder shall hold, with what is further on in the engine than the current turn.

        kind: "session", or "documents" for a context that is found by its ids, without texts.
        """
        engine, tree, named = session.engine, session.tree, kind == "session"
        self._identity = self._identity or identify(engine, session.tokenizer)
        blocks = self._blocks(engine)
        affordable = sum(part.nbytes for part in blocks) // engine.cache.ring.nbytes
        rings = {turn.end: turn.ring for turn in ring_turns(tree.current, affordable) if turn.ring is not None}
        if engine.position > tree.current.end:
            rings[engine.position] = engine.cache.read_ring()
        held = [(position, rings[position]) for position in sorted(rings)]
        way = tree.current.way()
        description = {
            "kind": kind,
            "model": self._origin.model,
            "options": list(self._origin.options),
            "context": engine.context,
            "identity": self._identity,
            "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "num_tokens": engine.position,
            "documents": [[turn.name, len(turn.token_ids)] for turn in way if turn.kind == "document"],
            "num_turns": sum(turn.kind == "exchange" for turn in tree.turns.values()),
            "read_ahead": engine.position - tree.current.end,
            "tree": tree_to_json(tree) if named else None,
            "extra": dict(extra or {}),
        }
        segments: Segments = {
            "blocks": blocks,
            "turns": self._turn_segments(list(tree.turns.values())) if named else (),
            "rings": [self._ring(position, ring) for position, ring in held],
            "tokens": _token_segments(engine.token_ids[tree.current.end if named else 0 :]),
        }
        return Plan(description, segments, [ring for _, ring in held])

    def commit(self, session: ChatSession, plan: Plan) -> None:
        """Write what `plan` returned; the engine has not moved since. Raises SessionError."""
        self.folder.commit(plan.description, plan.segments)
        self.token_ids = list(session.engine.token_ids)
        self.num_ahead = session.engine.position - session.tree.current.end
        self._stamps = list(session.engine.cache.pool.stamps)
        self._turns = list(session.tree.turns.values())
        written = zip(plan.rings, self.folder.segments["rings"], strict=True)
        self._rings = {id(tensor): (tensor, ring) for tensor, ring in written}

    def _blocks(self, engine: Engine) -> list[Segment | NewSegment]:
        pool, column_bytes = engine.cache.pool, engine.plan.num_retrieval * engine.cache.layout.record_bytes
        parts = _kept(self.folder.segments["blocks"], _num_same(self._stamps, pool.stamps), pool.num_blocks)
        first, count = sum(part.count for part in parts), max(1, _SEGMENT_BYTES // max(1, column_bytes))
        for at in range(first, pool.num_blocks, count):
            end = min(at + count, pool.num_blocks)
            parts.append(NewSegment(end - at, (end - at) * column_bytes, partial(_columns_bytes, engine, at, end)))
        return parts

    def _turn_segments(self, turns: list[Turn]) -> list[Segment | NewSegment]:
        parts = _kept(self.folder.segments["turns"], _num_same(self._turns, turns), len(turns))
        new = turns[sum(part.count for part in parts) :]
        return [*parts, _from_bytes(len(new), turns_to_json(new))] if new else parts

    def _ring(self, position: int, ring: Tensor) -> Segment | NewSegment:
        if id(ring) in self._rings:
            return self._rings[id(ring)][1]
        held = _held(ring, position)
        return NewSegment(position, held.nbytes, partial(_bytes, held))

    def close(self) -> None:
        """Let go of the folder."""
        self.folder.close()


def _num_same(before: Sequence[object], now: Sequence[object]) -> int:
    pairs = zip(before, now, strict=False)
    return next((at for at, (then, here) in enumerate(pairs) if then != here), min(len(before), len(now)))


def _kept(segments: Sequence[Segment], num_same: int, num_wanted: int) -> list[Segment | NewSegment]:
    """Return the first segments of a sequence that stay; every segment stays whole or not at all."""
    kept: list[Segment] = []
    count = 0
    for segment in segments:
        if count + segment.count > num_same:
            break
        kept.append(segment)
        count += segment.count
    if count < num_wanted and kept and kept[-1].nbytes < _SMALL_BYTES:
        kept.pop()
    return [*kept]


def _held(ring: Tensor, num_tokens: int) -> Tensor:
    """Return the part of a ring [2, layers, heads, slots, head_dim] that holds tokens: slots are filled in order."""
    return ring[..., :num_tokens, :]


def _columns_bytes(engine: Engine, first: int, last: int) -> np.ndarray:
    return _bytes(engine.cache.pool.read(first, last))


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _from_bytes(count: int, data: bytes) -> NewSegment:
    return NewSegment(count, len(data), lambda: data)


def _token_segments(token_ids: Sequence[int]) -> list[NewSegment]:
    return [_from_bytes(len(token_ids), np.array(token_ids, "<i4").tobytes())] if token_ids else []


def ring_turns(current: Turn, num_affordable: int) -> list[Turn]:
    """Return the turns whose rings are saved: this one, the end of the documents (where /reset returns to), the last.

    After them the exchanges, the last ones first; without any, documents all over the context, of which a reading that
    differs further on goes on. num_affordable: rings that take as much as the blocks; MIN_RINGS are saved in any case.
    """
    count = max(MIN_RINGS, min(MAX_RINGS, num_affordable))
    way = [turn for turn in current.way() if turn.end and turn.ring is not None]
    exchanges = [turn for turn in way if turn.kind == "exchange"]
    stride = 1
    while len(way) // stride > count - 2:
        stride *= 2  # so that most stay chosen while more is read
    documents = [turn for turn in way if exchanges and turn is exchanges[0].parent]
    further = exchanges[::-1] if exchanges else way[stride - 1 :: stride]
    return list(dict.fromkeys([*way[-1:], *documents, *way[-2:-1], *further]))[:count]


@dataclass
class TakenUp:
    """A part of a saved context that may be taken up: the first `num_tokens`, computed before."""

    folder: ContextFolder
    num_tokens: int
    ring: Segment | None  # None for an empty context
    token_ids: Sequence[int] = field(repr=False)  # of the context

    def check(self, engine: Engine, first_block: int = 0) -> None:
        """Read all that will be taken up, so that damage is found while the engine still has what it had."""
        for _ in self._columns(engine, first_block):
            pass

    def into(self, engine: Engine, *, keep: int = 0, ring: Tensor | None = None) -> None:
        """Bring the engine, whose first `keep` tokens are the folder's, to `num_tokens`.

        ring: the one there, where it is loaded already. Raises SessionError for damage, and then the engine is empty.
        """
        if self.ring is None:
            engine.reset()
            return
        engine.resume(
            load_ring(self.folder, self.ring, engine) if ring is None else ring,
            keep=keep,
            token_ids=list(self.token_ids[keep : self.num_tokens]),
            columns=self._columns(engine, keep // engine.cache.layout.block_size),
        )

    def _columns(self, engine: Engine, first: int) -> Iterator[Tensor]:
        last, at = self.num_tokens // engine.cache.layout.block_size, 0
        for segment in self.folder.segments["blocks"]:
            begin, end = max(first - at, 0), min(last - at, segment.count)
            at += segment.count
            if begin < end:
                shape = (segment.count, engine.plan.num_retrieval, engine.cache.layout.record_bytes)
                yield torch.from_numpy(self.folder.read(segment)).view(shape)[begin:end]


def check_shapes(folder: ContextFolder, engine: Engine) -> None:
    """Raise SessionError where the segments of a folder whose identity fits are not as long as it says."""
    description, layout = folder.fields(), engine.cache.layout
    column_bytes = engine.plan.num_retrieval * layout.record_bytes
    num_tokens = description.integer("num_tokens", most=1 << 40)
    blocks, rings = folder.segments["blocks"], folder.segments["rings"]
    fits = sum(part.count for part in blocks) == num_tokens // layout.block_size
    fits &= all(part.nbytes == part.count * column_bytes for part in blocks)
    fits &= all(ring.nbytes == _held(engine.cache.ring.data, ring.count).nbytes for ring in rings)
    fits &= all(part.nbytes == 4 * part.count for part in folder.segments["tokens"])
    positions = [ring.count for ring in rings]
    if not fits or positions != sorted(set(positions)) or max(positions, default=0) > num_tokens:
        raise description.wrong("the context", "as long as it says")


def stored_tokens(folder: ContextFolder, engine: Engine) -> list[int]:
    """Return the ids in a folder that belong to no turn; raises SessionError."""
    parts = [folder.read(part).view("<i4") for part in folder.segments["tokens"]]
    if any(part.min() < 0 or part.max() >= engine.config.vocab_size for part in parts if part.size):
        raise folder.fields().wrong("tokens", "ids of the vocabulary")
    return [token for part in parts for token in part.tolist()]


def load_ring(folder: ContextFolder, ring: Segment, engine: Engine) -> Tensor:
    """Return a ring of a folder as a tensor of its own, in host memory."""
    loaded = torch.zeros(engine.cache.ring.data.shape, dtype=engine.transformer.dtype)
    held = _held(loaded, ring.count)
    held.copy_(torch.from_numpy(folder.read(ring)).view(loaded.dtype).view(held.shape))
    return loaded


def open_session(folder: ContextFolder, session: ChatSession, *, name: str, origin: Origin) -> ContextWriter:
    """Make a saved session the one that runs, computing nothing; returns what keeps the folder up to date.

    Raises SessionError or ContextOverflowError, with nothing changed, where the session does not belong to this start,
    is damaged or does not fit.
    """
    engine = session.engine
    description = folder.fields()
    what = f"session {name}"
    if description.text("kind") != "session":
        raise SessionError(f"{folder.path}: is no session: name one from `duolocal sessions list`")
    check_identity(description, identify(engine, session.tokenizer), what=what, options=origin.options)
    check_shapes(folder, engine)
    records = (folder.read(part).tobytes() for part in folder.segments["turns"])
    conversation = Conversation(description.inner("tree"), records, vocab_size=engine.config.vocab_size)
    end = conversation.current.end
    if end > engine.context:
        raise ContextOverflowError(
            f"{what} holds {end:,} tokens and the context is {engine.context:,}: start with --context "
            f"{format_tokens(description.integer('context', most=1 << 31))}"
        )
    way = conversation.current.way()
    token_ids = [token for turn in way for token in turn.token_ids] + stored_tokens(folder, engine)
    rings = {ring.count: ring for ring in folder.segments["rings"]}
    if (end and end not in rings) or len(token_ids) != description.integer("num_tokens", most=1 << 40):
        raise description.wrong("the context", "complete")
    taken = TakenUp(folder, end, rings.get(end), token_ids)
    if engine.position:
        taken.check(engine)  # what is there now must not be lost for a damaged segment
    held = {position: load_ring(folder, ring, engine) for position, ring in rings.items() if position <= end}
    writer = ContextWriter(folder, origin)
    try:
        taken.into(engine, ring=held.get(end))
        for turn in way:
            turn.ring = held.get(turn.end)
            if turn.ring is not None:
                writer.adopt_ring(turn.ring, rings[turn.end])
        conversation.install(session)
    except BaseException:
        session.reset()
        raise
    writer.adopt(engine, end // engine.cache.layout.block_size)
    writer.adopt_conversation(conversation, token_ids)
    return writer


def usable(
    folder: ContextFolder,
    stored: Sequence[int],
    before: Sequence[int],
    token_ids: Sequence[int],
    ends: Sequence[int],
) -> TakenUp | None:
    """Return how far a folder leads into `before` and then `token_ids`: to a ring, past `before`; None for nowhere.

    stored: the ids of its context. Of the last of `ends` that is passed there is a ring as well.
    """
    rings = folder.segments["rings"]
    positions = {ring.count for ring in rings}
    if not rings or rings[-1].count <= len(before):
        return None
    same = _num_same(stored, [*before, *token_ids])
    for ring in reversed(rings):
        passed = max((end for end in ends if end <= ring.count), default=None)
        if len(before) < ring.count <= same and (passed is None or passed in positions):
            return TakenUp(folder, ring.count, ring, stored)
    return None
