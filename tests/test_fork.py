"""Turns as a tree: wherever one goes, the context is the one of the way that leads there, undisturbed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duolocal.engine.engine import Engine
from duolocal.engine.session import ChatSession, Finished, Prefilled
from duolocal.engine.turns import Turn
from duolocal.errors import SettingsError
from duolocal.kernels.cpu import build
from duolocal.settings import Sampling
from tests.compiled import compiled
from tests.session_models import DOCUMENT, finish, in_context, tiny_session

SHORT = Sampling(temperature=0, max_tokens=3)
DOCUMENTS = [("a.txt", "Alpha. " * 30), ("b.txt", "Beta. " * 90), ("mill.txt", DOCUMENT)]
QUESTIONS = ("Why?", "Where did it stand, and who remembered it? " * 6, "And then?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fork")


def repeated(folder: Path, turn: Turn, **options: Any) -> ChatSession:
    """A fresh session in which nothing was done but what leads to `turn`."""
    session = tiny_session(folder, **options)
    for step in turn.way()[1:]:
        if step.kind == "document":
            finish(session.add_document(step.name, step.text))
        else:
            finish(session.ask(step.name, SHORT))
    return session


def same(session: ChatSession, other: ChatSession) -> None:
    assert in_context(session) == in_context(other)
    assert session.engine.token_ids == [token for turn in session.tree.current.way() for token in turn.token_ids]
    assert (session.messages, session.context_items()) == (other.messages, other.context_items())
    assert session.texts == other.texts
    mine, theirs = session.engine.cache, other.engine.cache
    blocks = mine.pool.num_blocks
    assert blocks == theirs.pool.num_blocks == session.engine.position // 64
    # One chunk size and the same cuts: not a bit may differ.
    assert torch.equal(mine.pool.read(0, blocks), theirs.pool.read(0, blocks))
    held = mine.ring.positions(mine.num_tokens) >= 0
    assert torch.equal(mine.ring.data[:, :, :, held], theirs.ring.data[:, :, :, held])
    assert len(set(mine.pool.stamps)) == blocks


steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from(QUESTIONS)),
        st.tuples(st.just("document"), st.sampled_from(DOCUMENTS)),
        st.tuples(st.just("undo"), st.integers(1, 3)),
        st.tuples(st.just("goto"), st.integers(0, 30)),
        st.tuples(st.just("retry"), st.none()),
        st.tuples(st.just("fork"), st.none()),
        st.tuples(st.just("cancel"), st.integers(0, 3)),
        st.tuples(st.just("forget"), st.none()),
    ),
    min_size=3,
    max_size=12,
)


def walk(session: ChatSession, done: list[tuple[str, Any]]) -> None:
    tree = session.tree
    for what, value in done:
        if what == "ask":
            finish(session.ask(value, SHORT))
        elif what == "document":
            finish(session.add_document(*value))
        elif what == "undo":
            session.undo(min(value, max(1, len(tree.current.way()) - 1)))
        elif what == "goto":
            wanted = list(tree.turns.values())[value % len(tree.turns)]
            finish(session.go_to(wanted))
            assert tree.current is wanted
        elif what == "retry" and tree.current.kind == "exchange":
            finish(session.retry(SHORT))
        elif what == "fork":
            session.tree.fork(None)
        elif what == "cancel":
            events = session.add_document("mill.txt", DOCUMENT)
            for count, event in enumerate(events):
                if count == value and not isinstance(event, Finished):
                    session.cancel()
        elif what == "forget":
            session.forget_conversation()


@given(done=steps, kv=st.sampled_from(["int8", "int4", "16"]))
@settings(max_examples=25)
def test_a_walk_ends_where_the_straight_way_ends(done: list[tuple[str, Any]], kv: str, folder: Path) -> None:
    session = tiny_session(folder, kv=kv, context=4096)
    session.engine.cache.pool.records.fill_(0xFF)
    walk(session, done)
    same(session, repeated(folder, session.tree.current, kv=kv, context=4096))


@given(done=steps, limit=st.sampled_from([0, 50_000, 120_000, 300_000]))
@settings(max_examples=25)
def test_with_little_memory_the_same_is_read_again(done: list[tuple[str, Any]], limit: int, folder: Path) -> None:
    session = tiny_session(folder, context=4096)
    session.tree._max_kept_bytes = limit
    walk(session, done)
    assert session.tree.kept_bytes() <= max(limit, 2 * session.engine.cache.ring.nbytes)
    # The first turn that is read again may be cut otherwise than it was, so here bits may differ, the answers not.
    other = repeated(folder, session.tree.current, context=4096)
    assert in_context(session) == in_context(other)
    assert session.messages == other.messages
    for one in (session, other):
        finish(one.ask("What was the last word?", SHORT))
    assert in_context(session) == in_context(other)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    step = Engine.step

    def counting(self: Engine, token_ids: Any) -> torch.Tensor:
        counts.append(len(token_ids))
        return step(self, token_ids)

    monkeypatch.setattr(Engine, "step", counting)
    return counts


def test_going_anywhere_computes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = tiny_session(folder)
    finish(session.add_document("mill.txt", DOCUMENT))
    for question in QUESTIONS:
        finish(session.ask(question, SHORT))
    assert session.tree.fork("other") == "other"
    session.undo(2)
    finish(session.ask("Something else?", SHORT))
    counts = counted(monkeypatch)
    for place in ("main", "other", "2", "0", "5", "main", "1"):
        assert session.tree.needs_reading(session.tree.find(place)) == 0
        events = list(session.go_to(session.tree.find(place)))
        assert not any(isinstance(event, Prefilled) for event in events)
    assert counts == []
    monkeypatch.undo()
    same(session, repeated(folder, session.tree.current))


def test_lines(folder: Path) -> None:
    session = tiny_session(folder)
    tree = session.tree
    finish(session.ask("One?", SHORT))
    assert (tree.fork(None), tree.line) == ("line-2", "line-2")
    finish(session.ask("Two?", SHORT))
    finish(session.go_to(tree.find("main"), line="main"))
    assert (tree.current.number, tree.line) == (1, "main")
    finish(session.ask("Three?", SHORT))
    assert {name: turn.number for name, turn in tree.lines.items()} == {"main": 3, "line-2": 2}
    finish(session.go_to(tree.find("2")))
    assert tree.line == "line-2"  # its end: one is on it
    assert [turn.number for turn in tree.turns.values() if turn.parent is tree.turns[1]] == [2, 3]
    for name in ("main", "7", "", "two words", "a" * 41):
        with pytest.raises(SettingsError):
            tree.fork(name)
    for place in ("9", "nowhere", "-1", "١"):
        with pytest.raises(SettingsError, match="there is no turn"):
            tree.find(place)


def test_reading_again_can_be_stopped(folder: Path) -> None:
    session = tiny_session(folder, chunk_size=16)
    finish(session.add_documents(DOCUMENTS))
    finish(session.ask("Where?", SHORT))
    end = session.tree.current
    session.undo(4)
    for turn in session.tree.turns.values():
        turn.ring = turn.columns = None  # as if given up
    assert session.tree.needs_reading(end) == end.end
    events = session.go_to(end)
    for event in events:
        if isinstance(event, Prefilled) and event.done > session.tree.turns[2].end + 20:
            session.cancel()
    assert isinstance(event, Finished) and event.reason == "cancelled"
    assert session.tree.current.number == 2
    same(session, repeated(folder, session.tree.current, chunk_size=16))
    finish(session.go_to(end))
    assert in_context(session) == in_context(repeated(folder, end, chunk_size=16))


def test_a_reading_that_was_stopped_leaves_no_hole(folder: Path) -> None:
    session = tiny_session(folder, chunk_size=16)
    finish(session.add_documents(DOCUMENTS[1:]))
    finish(session.ask("Where?", SHORT))
    first, second, end = (session.tree.turns[number] for number in (1, 2, 3))
    first.ring = second.ring = None  # as if given up
    events = session.go_to(second)
    next(events)
    session.cancel()
    assert finish(events).reason == "cancelled"
    assert session.tree.current.number == 0
    assert end.ring is not None and end.columns is not None  # but what lies before it is gone
    finish(session.go_to(end))
    assert in_context(session) == in_context(repeated(folder, end, chunk_size=16))


@pytest.mark.skipif(build.unsupported() is not None, reason=f"compiled kernels: {build.unsupported()}")
def test_compiled_kernels_take_the_same_ways(folder: Path) -> None:
    session = tiny_session(folder, kernels=compiled(1))
    finish(session.add_document("mill.txt", DOCUMENT))
    walk(session, [("ask", "Why?"), ("ask", "Where?"), ("undo", 2), ("ask", "How?"), ("goto", 3), ("ask", "And?")])
    same(session, repeated(folder, session.tree.current, kernels=compiled(1)))
