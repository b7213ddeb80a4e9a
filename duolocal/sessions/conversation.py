"""A conversation's turns as JSON and back. Every text is written once, however many messages hold it."""

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from duolocal.engine.session import ChatSession
from duolocal.engine.turns import ContextItem, State, Turn, TurnKind
from duolocal.sessions.fields import Fields
from duolocal.tokenizer import Message

_MOST = 1 << 31
_MAX_TURNS = 1_000_000
_MAX_CHARACTERS = 1 << 30  # of all texts: each document's content holds those before it
_ROLES = ("system", "user", "assistant")
_ITEMS = ("document", "user", "assistant")


class _Texts:
    """Texts by number. A text that begins with, or holds, one that is known is written as that and the rest."""

    def __init__(self) -> None:
        self.entries: list[list[str | int]] = []
        self._numbers: dict[str, int] = {}

    def add(self, text: str, *, begins: str | None = None, holds: str | None = None) -> int:
        """Return the number of a text, which may begin with `begins` and may hold `holds`."""
        if text in self._numbers:
            return self._numbers[text]
        parts: list[str | int] = []
        rest = text
        if begins and rest.startswith(begins):
            parts.append(self.add(begins))
            rest = rest[len(begins) :]
        if holds and (at := rest.find(holds)) >= 0:
            parts += [rest[:at], self.add(holds), rest[at + len(holds) :]]
        else:
            parts.append(rest)
        self.entries.append([part for part in parts if part != ""])
        self._numbers[text] = len(self.entries) - 1
        return self._numbers[text]


def conversation_to_json(session: ChatSession) -> tuple[dict[str, Any], list[int]]:
    """Return the turns for JSON, and the token ids of those that are not on the way to the current one, joined."""
    tree, texts = session.tree, _Texts()
    way = set(tree.current.way())
    branch_ids: list[int] = []
    turns = []
    for turn in tree.turns.values():
        before = State() if turn.parent is None else turn.parent.state
        state = turn.state
        document = texts.add(turn.text) if turn.text else None
        begins = before.open_content
        same_messages = _common(before.messages, state.messages)
        same_items = _common(before.items, state.items)
        entry: dict[str, Any] = {
            "number": turn.number,
            "parent": -1 if turn.parent is None else turn.parent.number,
            "kind": turn.kind,
            "tokens": len(turn.token_ids),
            "ids_at": -1 if turn in way else len(branch_ids),
            "name": texts.add(turn.name),
            "text": -1 if document is None else document,
            "reason": turn.reason,
            "same_messages": same_messages,
            "messages": [
                [_ROLES.index(message.role), texts.add(message.content, begins=begins, holds=turn.text)]
                for message in state.messages[same_messages:]
            ],
            "same_items": same_items,
            "items": [
                [_ITEMS.index(item.kind), texts.add(item.name), item.num_tokens] for item in state.items[same_items:]
            ],
            "open": -1 if state.open_content is None else texts.add(state.open_content, begins=begins, holds=turn.text),
            "unfed": list(state.unfed),
        }
        if turn not in way:
            branch_ids += turn.token_ids
        turns.append(entry)
    return {
        "system": session.system is not None,
        "texts": texts.entries,
        "turns": turns,
        "current": tree.current.number,
        "lines": {name: turn.number for name, turn in tree.lines.items()},
        "line": tree.line,
        "next_number": tree.next_number,
    }, branch_ids


def _common(before: Sequence[object], after: Sequence[object]) -> int:
    count = 0
    while count < min(len(before), len(after)) and before[count] == after[count]:
        count += 1
    return count


class Conversation:
    """Turns read from a file, checked to fit together; `install` makes them a session's."""

    def __init__(self, raw: Fields, tokens: np.ndarray, num_tokens: int) -> None:
        self._raw = raw
        self._tokens, self._num_tokens = tokens, num_tokens
        self._texts = self._read_texts()
        self.turns: dict[int, Turn] = {}
        entries = {entry.integer("number", most=_MOST): entry for entry in raw.inners("turns", longest=_MAX_TURNS)}
        current = raw.integer("current", most=_MOST)
        on_way = self._way(entries, current)
        for number, entry in entries.items():  # a parent is older, so it comes first
            self.turns[number] = self._turn(number, entry, number in on_way)
        self.current = self.turns[current]
        if self.current.end > num_tokens:
            raise raw.wrong("turns", "as long as the context")
        lines = raw.inner("lines")
        names = raw.raw("lines")
        assert isinstance(names, dict)
        self.lines = {str(name): lines.integer(name, most=_MOST) for name in names}
        self.line = raw.text("line")
        self.next_number = raw.integer("next_number", most=_MOST)
        if self.line not in self.lines or not set(self.lines.values()) <= set(self.turns):
            raise raw.wrong("lines", "names of turns")
        if self.next_number <= max(self.turns):
            raise raw.wrong("next_number", "above all turns")
        self._with_system = raw.flag("system")

    def install(self, session: ChatSession) -> None:
        """Make these the turns of `session`, whose engine is at the end of `current`."""
        first = self.turns[0].state.messages
        session.system = first[0].content if self._with_system and first else None
        session.tree.take_over(
            self.turns, current=self.current.number, lines=self.lines, line=self.line, next_number=self.next_number
        )

    def _read_texts(self) -> list[str]:
        texts: list[str] = []
        total = 0
        for entry in self._raw.array("texts", longest=_MOST):
            if not isinstance(entry, list):
                raise self._raw.wrong("texts", "a list of lists")
            parts = []
            for part in entry:
                if type(part) is int and 0 <= part < len(texts):
                    part = texts[part]
                if not isinstance(part, str):
                    raise self._raw.wrong("texts", "texts and numbers of texts before")
                parts.append(part)
            total += sum(map(len, parts))
            if total > _MAX_CHARACTERS:
                raise self._raw.wrong("texts", f"shorter than {_MAX_CHARACTERS:,} characters together")
            texts.append("".join(parts))
        return texts

    def _way(self, entries: dict[int, Fields], current: int) -> set[int]:
        way, number = set(), current
        while number >= 0:
            if number in way or number not in entries:
                raise self._raw.wrong("turns", "a tree")
            way.add(number)
            number = entries[number].integer("parent", most=_MOST, least=-1)
        return way

    def _turn(self, number: int, entry: Fields, on_way: bool) -> Turn:
        above = entry.integer("parent", most=_MOST, least=-1)
        if (above < 0) != (number == 0) or (above >= 0 and above not in self.turns):
            raise self._raw.wrong("turns", "a tree")
        parent = self.turns.get(above)
        kind = entry.text("kind")
        if kind not in get_args(TurnKind) or (kind == "start") != (parent is None):
            raise entry.wrong("kind", "the kind of a turn")
        count = entry.integer("tokens", most=len(self._tokens))
        start = 0 if parent is None else parent.end
        at = start if on_way else self._num_tokens + entry.integer("ids_at", most=len(self._tokens))
        if at + count > (self._num_tokens if on_way else len(self._tokens)) or (parent is None and count):
            raise entry.wrong("tokens", "as many as the file has")
        state = self._state(entry, State() if parent is None else parent.state)
        if sum(item.num_tokens for item in state.items) != start + count + len(state.unfed):
            raise entry.wrong("items", "as long as the turn")
        return Turn(
            number,
            parent,
            kind,  # type: ignore[arg-type]
            state,
            tuple(self._tokens[at : at + count].tolist()),
            self._text(entry, "name") or "",
            self._text(entry, "text") or "",
            entry.text("reason"),
        )

    def _state(self, entry: Fields, before: State) -> State:
        messages = list(before.messages[: entry.integer("same_messages", most=len(before.messages))])
        for role, text in self._tuples(entry, "messages", 2):
            if role >= len(_ROLES):
                raise entry.wrong("messages", "messages")
            messages.append(Message(_ROLES[role], self._texts[text]))  # type: ignore[arg-type]
        items = list(before.items[: entry.integer("same_items", most=len(before.items))])
        for kind, name, num_tokens in self._tuples(entry, "items", 3):
            if kind >= len(_ITEMS):
                raise entry.wrong("items", "items")
            items.append(ContextItem(_ITEMS[kind], self._texts[name], num_tokens))  # type: ignore[arg-type]
        return State(
            tuple(messages),
            tuple(items),
            self._text(entry, "open"),
            tuple(entry.integers("unfed", most=_MOST, longest=_MOST)),
        )

    def _tuples(self, entry: Fields, name: str, length: int) -> list[list[int]]:
        values = entry.array(name, longest=_MAX_TURNS)
        for value in values:
            fits = isinstance(value, list) and len(value) == length and all(type(x) is int and x >= 0 for x in value)
            if not fits or value[1] >= len(self._texts):
                raise entry.wrong(name, f"a list of {length} numbers each")
        return values

    def _text(self, entry: Fields, name: str) -> str | None:
        number = entry.integer(name, most=len(self._texts) - 1, least=-1)
        return None if number < 0 else self._texts[number]
