"""The turns of a conversation as a tree, and the way from one to another over one engine.

Owns what a turn is (what it added, and the state after it) and what is kept so that its end can be taken up again:
the ring (constant size) of a turn, and the blocks of turns that are left, both in host memory and bounded. What was
given up for the bound is read again from the token ids, which are always kept; that gives the same context up to
rounding, and only takes longer. Knows nothing of templates, texts or sampling.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from duolocal.engine.engine import Engine
from duolocal.errors import SettingsError
from duolocal.plan.free import available_bytes

# Rings and blocks that are kept in host memory: a ring takes 15 MB for SmolLM2-135M and 42 MB for a Llama-3-8B.
MAX_KEPT_BYTES = 1 << 30
FIRST_LINE = "main"

TurnKind = Literal["start", "document", "exchange"]


@dataclass(frozen=True)
class ContextItem:
    """Something that is in context, with its tokens and those of the template (and system prompt) before it."""

    kind: Literal["document", "user", "assistant"]
    name: str
    num_tokens: int


@dataclass(eq=False)
class Turn:
    """One document or exchange: what it added alone, each text once; and how to take up the context at its end.

    Invariant: on the way to the current turn the blocks are in the cache, and `columns` is None; elsewhere they are in
    `columns`, or given up.
    """

    number: int  # 0 is the start; the others in the order in which they were made
    parent: "Turn | None"
    kind: TurnKind
    token_ids: Sequence[int] = ()  # that it added to the cache
    name: str = ""  # a document's name, or the question
    text: str = ""  # of a document; the answer; the system message of the start
    reason: str = ""  # how an answer ended
    unfed: tuple[int, ...] = ()  # generated ids that are not in the cache yet: the last of an answer
    num_answered: int = 0  # ids of the answer, in the cache or not
    ring: Tensor | None = None  # after it; None: not kept
    columns: Tensor | None = None  # the blocks that it completed: uint8 [num_blocks, num_retrieval, record_bytes]
    left_at: int = 0  # when it was last on the current way
    start: int = field(init=False)  # tokens in the cache before it

    def __post_init__(self) -> None:
        self.start = 0 if self.parent is None else self.parent.end

    @property
    def end(self) -> int:
        """Tokens in the cache after it."""
        return self.start + len(self.token_ids)

    def items(self) -> list[ContextItem]:
        """Return what it added to the context; ids left over from the answer before are counted there."""
        if self.parent is None:
            return []
        added = len(self.token_ids) + len(self.unfed) - len(self.parent.unfed)
        if self.kind == "document":
            return [ContextItem("document", self.name, added)]
        return [
            ContextItem("user", self.name, added - self.num_answered),
            ContextItem("assistant", self.text, self.num_answered),
        ]

    def way(self) -> list["Turn"]:
        """Return the turns from the start to this one."""
        turns = [self]
        while turns[-1].parent is not None:
            turns.append(turns[-1].parent)
        return turns[::-1]


class TurnTree:
    """All turns since the conversation began, and which of them the engine's context ends with.

    Lines are names of turns that move on as turns are added to the line one is on.
    """

    def __init__(self, engine: Engine, text: str = "") -> None:
        self._engine = engine
        self._max_kept_bytes = min(MAX_KEPT_BYTES, available_bytes(torch.device("cpu")) // 8)
        self._clock = 0
        self.begin(text)

    def begin(self, text: str = "") -> None:
        """Forget all turns; the engine's context is empty. text: of the start."""
        self.turns: dict[int, Turn] = {0: Turn(0, None, "start", text=text)}
        self.current = self.turns[0]
        self.lines = {FIRST_LINE: self.current}
        self.line = FIRST_LINE
        self._next_number = 1

    def take_over(
        self, turns: Mapping[int, Turn], *, current: int, lines: Mapping[str, int], line: str, next_number: int
    ) -> None:
        """Become a tree that was saved; the engine's context is the one at the end of `current`."""
        self.turns = dict(turns)
        self.current = self.turns[current]
        self.lines = {name: self.turns[number] for name, number in lines.items()}
        self.line = line
        self._next_number = next_number

    @property
    def next_number(self) -> int:
        return self._next_number

    def add(
        self,
        kind: TurnKind,
        *,
        num_tokens: int,
        ring: Tensor | None = None,
        **fields: Any,
    ) -> Turn:
        """Add a turn after the current one and go there; `fields` as of Turn.

        num_tokens: of the engine's context at its end; ring: at that end, where the engine stands further on.
        """
        start, position = self.current.end, self._engine.position
        assert start <= num_tokens <= position
        if num_tokens == position:
            ring = self._engine.cache.read_ring()
        turn = Turn(
            self._next_number,
            self.current,
            kind,
            tuple(self._engine.token_ids[start:num_tokens]),
            ring=ring,
            **fields,
        )
        self.turns[turn.number] = turn
        self._next_number += 1
        self.current = self.lines[self.line] = turn
        self._give_up()
        return turn

    def find(self, wanted: str) -> Turn:
        """Return the turn of this number, or at the end of the line of this name; raises SettingsError."""
        if wanted in self.lines:
            return self.lines[wanted]
        if wanted.isascii() and wanted.isdigit() and int(wanted[:9]) in self.turns and len(wanted) < 10:
            return self.turns[int(wanted)]
        lines = ", ".join(self.lines)
        raise SettingsError(f"there is no turn {wanted!r}: give a number from /turns, or a line ({lines})")

    def fork(self, name: str | None) -> str:
        """Begin a line at the current turn and go on in it; returns its name. Raises SettingsError."""
        if name is None:
            name = next(f"line-{n}" for n in range(2, len(self.lines) + 3) if f"line-{n}" not in self.lines)
        if not (0 < len(name) <= 40 and name.isprintable() and not name.isdigit() and " " not in name):
            raise SettingsError(f"{name!r} cannot name a line: give up to 40 characters, no spaces, not only digits")
        if name in self.lines:
            raise SettingsError(f"there is a line {name} already: choose another name, or go there with /goto {name}")
        self.lines[name] = self.current
        self.line = name
        return name

    def take_up(self) -> None:
        """Bring the engine back to the end of the current turn, whatever was added since; nothing is prefilled."""
        turn = self.current
        if turn.end == self._engine.position:
            return
        if not turn.end:
            self._engine.reset()
            return
        assert turn.ring is not None  # the current turn's is never given up
        self._engine.resume(turn.ring, keep=turn.end)

    def go_to(self, target: Turn, *, line: str | None = None) -> Iterator[tuple[int, int]]:
        """Make `target` the current turn, yielding (done, total) of the tokens that have to be read again.

        line: that to be in afterwards; None: one that ends at `target`, or else the one we are in. What is left is kept
        in host memory. Where reading again is stopped (Cancelled), the current turn is the last one that is whole.
        """
        if line is None and self.lines[self.line] is not target:
            line = next((name for name, end in self.lines.items() if end is target), None)
        way = target.way()
        here = set(self.current.way())
        shared = next(turn for turn in reversed(way) if turn in here)
        stand = self._last_kept(way, shared)
        self._leave(shared)
        self._enter(stand, shared)
        again = way[way.index(stand) + 1 :]
        done, total = 0, sum(len(turn.token_ids) for turn in again)
        for turn in again:
            try:
                for count in self._engine.iter_prefill(turn.token_ids):
                    yield done + count, total
            finally:
                if self._engine.position == turn.end:
                    turn.ring, turn.columns = self._engine.cache.read_ring(), None
                    self.current = turn
                else:
                    self.take_up()
            done += len(turn.token_ids)
        if line is not None:
            self.line = line
        self._give_up()

    def needs_reading(self, target: Turn) -> int:
        """Return how many tokens going to `target` reads again."""
        way = target.way()
        here = set(self.current.way())
        shared = next(turn for turn in reversed(way) if turn in here)
        return target.end - self._last_kept(way, shared).end

    def prune(self, keep: Turn) -> None:
        """Forget every turn that is not on the way to `keep`, which is the current one."""
        assert keep is self.current
        self.turns = {turn.number: turn for turn in keep.way()}
        self.lines, self.line = {FIRST_LINE: keep}, FIRST_LINE

    def kept_bytes(self) -> int:
        """Return the host memory that rings and left blocks take."""
        return sum(_nbytes(turn.ring) + _nbytes(turn.columns) for turn in self.turns.values())

    def _last_kept(self, way: Sequence[Turn], shared: Turn) -> Turn:
        """Return the last turn of `way` that can be taken up without reading; `shared` is on the current way."""
        stand, block_size = way[0], self._engine.cache.layout.block_size
        for turn in way[1:]:
            if turn.end > shared.end and turn.columns is None and turn.end // block_size > turn.start // block_size:
                break
            if turn.ring is not None or turn.end == 0:
                stand = turn
        return stand

    def _leave(self, shared: Turn) -> None:
        """Keep the blocks of the turns between `shared` and the current one."""
        cache, block_size = self._engine.cache, self._engine.cache.layout.block_size
        turn = self.current
        self._clock += 1
        while turn is not shared:
            turn.left_at = self._clock
            first, last = turn.start // block_size, turn.end // block_size
            turn.columns = cache.pool.read(first, last)
            assert turn.parent is not None
            turn = turn.parent
        self.current = shared

    def _enter(self, stand: Turn, shared: Turn) -> None:
        """Bring the engine to the end of `stand`, a turn whose ring is kept (or the start), and make it current."""
        engine = self._engine
        if stand.end <= shared.end:
            left = shared
            while left is not stand:  # on the way, but to be read again with other bytes
                assert left.parent is not None
                left.columns, left.ring, left = None, None, left.parent
            if stand.end:
                assert stand.ring is not None
                engine.resume(stand.ring, keep=stand.end)
            else:
                engine.reset()
        else:
            way = stand.way()
            taken = way[way.index(shared) + 1 :]
            assert stand.ring is not None
            # A block that is not whole at the end of `shared` is whole in the columns of a turn after it.
            columns = [turn.columns for turn in taken if turn.columns is not None]
            engine.resume(
                stand.ring,
                keep=shared.end,
                token_ids=[token for turn in taken for token in turn.token_ids],
                columns=columns,
            )
            for turn in taken:
                turn.columns = None
        self.current = stand

    def _give_up(self) -> None:
        """Keep to the bound: blocks and rings of what was left longest ago go first, then old rings of this way."""
        excess = self.kept_bytes() - self._max_kept_bytes
        if excess <= 0:
            return
        way = self.current.way()
        exchange = next((turn for turn in way if turn.kind == "exchange"), None)
        # The end of the documents is where /reset returns to.
        sacred = {self.current, exchange.parent if exchange is not None else self.current}
        left = [turn for turn in self.turns.values() if turn not in way]
        left.sort(key=lambda turn: (turn.left_at, -turn.number))
        for turn in (*left, *(turn for turn in way if turn not in sacred)):
            if excess <= 0:
                return
            excess -= _nbytes(turn.ring) + _nbytes(turn.columns)
            turn.ring = turn.columns = None


def _nbytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes
