"""A conversation's turns as JSON and back. Every text is written once: with the turn that added it."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from duolocal.engine.session import ChatSession
from duolocal.engine.turns import Turn, TurnKind, TurnTree
from duolocal.sessions.fields import Fields

_MOST = 1 << 31
_ANY_LENGTH = 1 << 40


def turns_to_json(turns: Iterable[Turn]) -> bytes:
    """Return the records of turns, which never change once a turn is there."""
    records = [
        {
            "number": turn.number,
            "parent": -1 if turn.parent is None else turn.parent.number,
            "kind": turn.kind,
            "name": turn.name,
            "text": turn.text,
            "reason": turn.reason,
            "ids": list(turn.token_ids),
            "unfed": list(turn.unfed),
            "answered": turn.num_answered,
        }
        for turn in turns
    ]
    return json.dumps(records).encode()


def tree_to_json(tree: TurnTree) -> dict[str, Any]:
    """Return what is to be known of a tree beside its turns."""
    return {
        "current": tree.current.number,
        "lines": {name: turn.number for name, turn in tree.lines.items()},
        "line": tree.line,
        "next_number": tree.next_number,
    }


class Conversation:
    """Turns read from a saved context, checked to fit together; `install` makes them a session's."""

    def __init__(self, raw: Fields, records: Iterable[bytes], *, vocab_size: int) -> None:
        self._raw, self._vocab_size = raw, vocab_size
        self.turns: dict[int, Turn] = {}
        for record in self._records(records):  # a parent is older, so it comes first
            turn = self._turn(record)
            self.turns[turn.number] = turn
        current = raw.integer("current", most=_MOST)
        lines = raw.inner("lines")
        names = raw.raw("lines")
        assert isinstance(names, dict)
        self.lines = {str(name): lines.integer(name, most=_MOST) for name in names}
        self.line = raw.text("line")
        self.next_number = raw.integer("next_number", most=_MOST)
        if self.line not in self.lines or not {current, *self.lines.values()} <= self.turns.keys():
            raise raw.wrong("lines", "names of turns")
        if self.next_number <= max(self.turns):
            raise raw.wrong("next_number", "above all turns")
        self.current = self.turns[current]

    def install(self, session: ChatSession) -> None:
        """Make these the turns of `session`, whose engine is at the end of `current`."""
        session.system = self.turns[0].text or None
        session.tree.take_over(
            self.turns, current=self.current.number, lines=self.lines, line=self.line, next_number=self.next_number
        )

    def _records(self, parts: Iterable[bytes]) -> Iterator[Fields]:
        for part in parts:
            try:
                records = json.loads(part)
            except (ValueError, RecursionError):
                records = None
            if not isinstance(records, list):
                raise self._raw.wrong("turns", "a list of turns")
            for record in records:
                yield self._raw.of(record, f"turn {len(self.turns)}")

    def _turn(self, record: Fields) -> Turn:
        number = record.integer("number", most=_MOST)
        above = record.integer("parent", most=_MOST, least=-1)
        is_start = not self.turns
        if number in self.turns or (number == 0) != is_start or (above not in self.turns and not is_start):
            raise record.wrong("turns", "a tree")
        parent = None if is_start else self.turns[above]
        kind = record.text("kind")
        if kind not in get_args(TurnKind) or (kind == "start") != is_start:
            raise record.wrong("kind", "the kind of a turn")
        turn = Turn(
            number,
            parent,
            kind,  # type: ignore[arg-type]
            tuple(self._ids(record, "ids")),
            record.text("name", longest=_ANY_LENGTH),
            record.text("text", longest=_ANY_LENGTH),
            record.text("reason"),
            tuple(self._ids(record, "unfed")),
            record.integer("answered", most=_MOST),
        )
        if (is_start and turn.token_ids) or any(item.num_tokens < 0 for item in turn.items()):
            raise record.wrong("ids", "as many as the turn has")
        return turn

    def _ids(self, record: Fields, name: str) -> Sequence[int]:
        return record.integers(name, most=self._vocab_size - 1, longest=_MOST)
