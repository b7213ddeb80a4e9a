"""Between an engine and a context file: what is written of it, and taking it up again without computing."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duolocal.engine.engine import Engine
from duolocal.engine.session import ChatSession
from duolocal.engine.turns import Turn
from duolocal.errors import ContextOverflowError, SessionError
from duolocal.sessions.conversation import Conversation, conversation_to_json
from duolocal.sessions.file import ContextFile, Wanted
from duolocal.sessions.identity import check_identity, identify
from duolocal.sessions.layout import StoredRing
from duolocal.sizes import format_tokens

# Rings in a file: one takes 15 MB for SmolLM2-135M and 42 MB for a Llama-3-8B. A turn without one can still be gone
# to, by reading again what was read since the last that has one.
MAX_RINGS = 8


@dataclass(frozen=True)
class Origin:
    """What a start is called and was asked for: for lists and refusals, not compared."""

    model: str = ""
    options: tuple[str, ...] = ()  # as `LoadSettings.options`


class ContextWriter:
    """Keeps one file up to date with one engine: writes each block once, and what is small anew."""

    def __init__(self, file: ContextFile, origin: Origin) -> None:
        self.file = file
        self._origin = origin
        self._identity: dict[str, Any] = {}
        self._pending: list[Tensor] = []  # the rings of the last plan
        self._stamps: list[int] = []  # of the columns that are in the file
        self._rings: dict[int, tuple[Tensor, StoredRing]] = {}  # by id; holding the tensor keeps the id its own

    def adopt(self, engine: Engine, num_columns: int) -> None:
        """Note that the engine's first blocks are the file's, as after taking them up."""
        self._stamps = engine.cache.pool.stamps[:num_columns]

    def adopt_ring(self, tensor: Tensor, ring: StoredRing) -> None:
        """Note that a ring is in the file."""
        self._rings[id(tensor)] = (tensor, ring)

    def plan(self, session: ChatSession, *, kind: str, extra: Mapping[str, Any] | None = None) -> Wanted:
        """Return what the file shall hold, with what is further on in the engine than the current turn."""
        engine, tree = session.engine, session.tree
        self._identity = self._identity or identify(engine, session.tokenizer)
        pool, row_bytes = engine.cache.pool, engine.plan.num_retrieval * engine.cache.layout.record_bytes
        kept = 0
        while kept < min(len(self._stamps), len(pool.stamps)) and self._stamps[kept] == pool.stamps[kept]:
            kept += 1
        rings = {turn.end: turn.ring for turn in ring_turns(tree.current)}
        if engine.position > tree.current.end:
            rings[engine.position] = engine.cache.read_ring()
        held: list[tuple[int, np.ndarray | StoredRing]] = []
        self._pending = []
        for position in sorted(rings):
            tensor = rings[position]
            assert tensor is not None
            known = self._rings.get(id(tensor))
            held.append((position, _bytes(tensor) if known is None else known[1]))
            self._pending.append(tensor)
        # Documents of the store are found by their ids: names and texts would only be there to be read by others.
        chat, branch_ids = conversation_to_json(session) if kind == "session" else (None, [])
        return Wanted(
            description={
                "kind": kind,
                "model": self._origin.model,
                "options": list(self._origin.options),
                "context": engine.context,
                "identity": self._identity,
                "kernels": engine.transformer.kernels.name,
                "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "documents": [
                    [turn.name, len(turn.token_ids)] for turn in tree.current.way() if turn.kind == "document"
                ],
                "num_turns": sum(turn.kind == "exchange" for turn in tree.turns.values()),
                "read_ahead": engine.position - tree.current.end,
                "chat": chat,
                "extra": dict(extra or {}),
            },
            num_tokens=engine.position,
            tokens=np.array([*engine.token_ids, *branch_ids], "<i4"),
            num_columns=pool.num_blocks,
            column_bytes=row_bytes,
            kept_columns=kept,
            read_columns=lambda first, last: pool.read(first, last).view(last - first, row_bytes).numpy(),
            rings=held,
        )

    def commit(self, engine: Engine, wanted: Wanted) -> None:
        """Write what `plan` returned; the engine has not moved since. Raises SessionError."""
        self.file.commit(wanted)
        assert self.file.opened is not None
        self._stamps = list(engine.cache.pool.stamps)
        rings = self.file.opened.index.rings
        self._rings = {id(tensor): (tensor, ring) for tensor, ring in zip(self._pending, rings, strict=True)}

    def close(self) -> None:
        """Let go of the file."""
        self.file.close()


def ring_turns(current: Turn) -> list[Turn]:
    """Return the turns whose rings are saved: the last ones, and the end of the documents, where /reset returns to."""
    way = [turn for turn in current.way() if turn.end]
    chosen = way[-MAX_RINGS:]
    exchange = next((at for at, turn in enumerate(way) if turn.kind == "exchange"), 0)
    if exchange and way[exchange - 1] not in chosen:
        chosen.insert(0, way[exchange - 1])
    return [turn for turn in chosen if turn.ring is not None]


def _bytes(ring: Tensor) -> np.ndarray:
    return ring.contiguous().view(-1).view(torch.uint8).numpy()


@dataclass
class TakenUp:
    """A part of a context file that may be taken up: the first `num_tokens`, computed before."""

    file: ContextFile
    num_tokens: int
    ring: StoredRing | None  # None for an empty context
    tokens: np.ndarray = field(repr=False)  # int32, of the context

    def check(self, engine: Engine, first_block: int = 0) -> None:
        """Read all that will be taken up, so that damage is found while the engine still has what it had."""
        for _ in self._columns(engine, first_block):
            pass

    def into(self, engine: Engine, *, keep: int = 0, ring: Tensor | None = None) -> None:
        """Bring the engine, whose first `keep` tokens are the file's, to `num_tokens`.

        ring: the one there, where it is loaded already. Raises SessionError for damage, and then the engine is empty.
        """
        if self.ring is None:
            engine.reset()
            return
        engine.resume(
            load_ring(self.file, self.ring, engine) if ring is None else ring,
            keep=keep,
            token_ids=self.tokens[keep : self.num_tokens].tolist(),
            columns=self._columns(engine, keep // engine.cache.layout.block_size),
        )

    def _columns(self, engine: Engine, first: int) -> Iterator[Tensor]:
        last = self.num_tokens // engine.cache.layout.block_size
        shape = (engine.plan.num_retrieval, engine.cache.layout.record_bytes)
        for piece in self.file.arrays().columns(first, last):
            yield torch.from_numpy(piece).view(-1, *shape)


def check_shapes(file: ContextFile, engine: Engine) -> None:
    """Raise SessionError where the arrays of a file whose identity fits are not as long as it says."""
    assert file.opened is not None
    index, layout = file.opened.index, engine.cache.layout
    row_bytes = engine.plan.num_retrieval * layout.record_bytes
    fits = len(index.columns) == index.num_tokens // layout.block_size
    fits &= all(column.nbytes == row_bytes for column in index.columns)
    fits &= all(ring.extent.nbytes == engine.cache.ring.nbytes for ring in index.rings)
    if not fits:
        raise file.opened.fields().wrong("the index", "that of a context of its length")


def load_ring(file: ContextFile, ring: StoredRing, engine: Engine) -> Tensor:
    """Return a ring of a file as a tensor of its own, in host memory."""
    data = file.arrays().ring(ring)
    return torch.from_numpy(data).view(engine.transformer.dtype).view(engine.cache.ring.data.shape)


def open_session(file: ContextFile, session: ChatSession, *, name: str, origin: Origin) -> ContextWriter:
    """Make a saved session the one that runs, computing nothing; returns what keeps the file up to date.

    Raises SessionError or ContextOverflowError, with nothing changed, where the file does not belong to this start, is
    damaged or does not fit.
    """
    engine = session.engine
    assert file.opened is not None
    description = file.opened.fields()
    what = f"session {name}"
    if description.text("kind") != "session":
        raise SessionError(f"{file.path}: is no session: name one from `duolocal sessions list`")
    check_identity(description, identify(engine, session.tokenizer), what=what, options=origin.options)
    check_shapes(file, engine)
    index = file.opened.index
    tokens = file.arrays().tokens()
    conversation = Conversation(description.inner("chat"), tokens, index.num_tokens)
    end = conversation.current.end
    if end > engine.context:
        raise ContextOverflowError(
            f"{what} holds {end:,} tokens and the context is {engine.context:,}: start with --context "
            f"{format_tokens(description.integer('context', most=1 << 31))}"
        )
    rings = {ring.position: ring for ring in index.rings}
    if end and end not in rings:
        raise description.wrong("rings", "complete")
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < engine.config.vocab_size:
        raise description.wrong("tokens", "ids of the vocabulary")
    taken = TakenUp(file, end, rings.get(end), tokens)
    if engine.position:
        taken.check(engine)  # what is there now must not be lost for a damaged file
    held = {ring.position: load_ring(file, ring, engine) for ring in index.rings if ring.position <= end}
    writer = ContextWriter(file, origin)
    try:
        taken.into(engine, ring=held.get(end))
        for turn in conversation.current.way():
            turn.ring = held.get(turn.end)
            if turn.ring is not None:
                writer.adopt_ring(turn.ring, rings[turn.end])
        conversation.install(session)
    except BaseException:
        session.reset()
        raise
    writer.adopt(engine, end // engine.cache.layout.block_size)
    return writer


def usable(file: ContextFile, before: Sequence[int], token_ids: Sequence[int], ends: Sequence[int]) -> TakenUp | None:
    """Return how far a file leads into `before` and then `token_ids`: to a ring, past `before`; None for nowhere.

    Of the last of `ends` that is passed there is a ring as well.
    """
    assert file.opened is not None
    index = file.opened.index
    positions = [ring.position for ring in index.rings]
    if not positions or positions[-1] <= len(before):
        return None
    tokens = file.arrays().tokens()[: index.num_tokens]
    wanted = np.array([*before, *token_ids], "<i4")
    count = min(len(tokens), len(wanted))
    differing = np.flatnonzero(tokens[:count] != wanted[:count])
    same = int(differing[0]) if len(differing) else count
    for ring in reversed(index.rings):
        passed = max((end for end in ends if end <= ring.position), default=None)
        if len(before) < ring.position <= same and (passed is None or passed in positions):
            return TakenUp(file, ring.position, ring, tokens)
    return None
