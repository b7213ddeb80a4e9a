"""Contexts on disk: saved and opened they are the same context, and opening one computes nothing."""

import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from duolocal.engine.session import ChatSession, Reused
from duolocal.errors import ContextOverflowError, SessionError, SettingsError
from duolocal.kernels.cpu import build
from duolocal.models.transformer import Transformer
from duolocal.quant.kv import KV_FORMATS
from duolocal.sessions import context as context_module
from duolocal.sessions.context import Origin, ring_turns, usable
from duolocal.sessions.folder import ContextFolder, bytes_on_disk
from duolocal.sessions.keeper import ContextKeeper
from duolocal.sessions.store import DocumentStore
from tests.compiled import compiled
from tests.session_models import DOCUMENT, GREEDY, finish, in_context, tiny_session

ORIGIN = Origin("tiny", ("--model", "tiny"))


def keeper_for(folder: Path, **options: Any) -> ContextKeeper:
    return ContextKeeper(folder / "sessions", ORIGIN, **options)


def saved(folder: Path, session: ChatSession, name: str = "book") -> Path:
    keeper = keeper_for(folder)
    keeper.begin(name, session)
    keeper.save(session)
    keeper.close()
    return folder / "sessions" / f"{name}.duo"


def opened(folder: Path, session: ChatSession, name: str = "book") -> ContextKeeper:
    keeper = keeper_for(folder)
    keeper.open(name, session)
    return keeper


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of every call of a Transformer."""
    counts: list[int] = []
    hidden = Transformer.hidden

    def counting(self: Transformer, token_ids: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        counts.append(len(token_ids))
        return hidden(self, token_ids, *arguments, **options)

    monkeypatch.setattr(Transformer, "hidden", counting)
    return counts


def a_talk(folder: Path, **options: Any) -> ChatSession:
    session = tiny_session(folder, **options)
    finish(session.add_document("mill.txt", DOCUMENT))
    finish(session.ask("Where did it stand?", GREEDY))
    return session


@pytest.mark.parametrize("kv", KV_FORMATS)
def test_opened_it_is_the_same_context_and_nothing_was_computed(kv: str, tmp_path: Path, computed: list[int]) -> None:
    first = a_talk(tmp_path, kv=kv)
    path = saved(tmp_path, first)
    computed.clear()
    second = tiny_session(tmp_path, kv=kv, context=1000, chunk_size=17)
    opened(tmp_path, second)
    assert computed == []
    assert in_context(second) == in_context(first)
    assert (second.messages, second.context_items()) == (first.messages, first.context_items())
    assert torch.equal(second.engine.cache.read_ring(), first.engine.cache.read_ring())
    blocks = first.engine.cache.pool.num_blocks
    assert blocks > 3
    pools = [session.engine.cache.pool for session in (first, second)]
    assert torch.equal(pools[0].read(0, blocks), pools[1].read(0, blocks))
    for session in (first, second):
        finish(session.ask("And why there?", GREEDY))
    assert in_context(second) == in_context(first)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (path, path.parent)} == {0o700}
    assert sorted(os.listdir(path.parent)) == [".book.duo.lock", "book.duo"]


def test_undo_and_goto_work_after_opening(tmp_path: Path, computed: list[int]) -> None:
    first = a_talk(tmp_path)
    states = [in_context(first)]
    for question in ("Who built it?", "When was that?"):
        finish(first.ask(question, GREEDY))
        states.append(in_context(first))
    first.undo()
    finish(first.ask("Another question?", GREEDY))
    branch = in_context(first)
    saved(tmp_path, first)
    second = tiny_session(tmp_path)
    opened(tmp_path, second)
    computed.clear()
    assert second.undo()
    assert in_context(second) == states[1]
    assert computed == []
    assert second.undo()
    assert in_context(second) == states[0]
    assert sum(computed) == len(second.tree.turns[2].token_ids)  # a place of its own would take more than its blocks
    computed.clear()
    finish(second.go_to(second.tree.find("5")))
    assert in_context(second) == branch
    assert computed == []
    finish(second.go_to(second.tree.find("4")))
    assert in_context(second) == states[2]
    assert sum(computed) == len(second.tree.turns[4].token_ids)  # the branch was left: only it is read again
    assert second.texts == first.texts


def test_a_session_that_is_kept_is_on_disk_after_every_turn(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    keeper = session.keeper = keeper_for(tmp_path)
    keeper.begin("book", session)
    keeper.save(session)
    steps = (
        lambda: finish(session.add_documents([("a.txt", DOCUMENT), ("b.txt", "Beta. " * 70)])),
        lambda: finish(session.ask("Where " * 90, GREEDY)),
        lambda: finish(session.retry(GREEDY)),
        lambda: session.undo(),
        lambda: finish(session.ask("Why " * 90, GREEDY)),
        lambda: finish(session.go_to(session.tree.find("3"))),
        lambda: session.forget_conversation(),
        lambda: finish(session.ask("Hello?", GREEDY)),
    )
    for step in steps:
        step()
        assert keeper.notes == []
        copy = tmp_path / "sessions" / "copy.duo"
        shutil.copytree(tmp_path / "sessions" / "book.duo", copy, dirs_exist_ok=True)
        other = tiny_session(tmp_path)
        opened(tmp_path, other, "copy").close()
        assert in_context(other) == in_context(session)
        assert other.messages == session.messages
        assert other.tree.turns.keys() == session.tree.turns.keys()
        pool = session.engine.cache.pool
        assert torch.equal(pool.read(0, pool.num_blocks), other.engine.cache.pool.read(0, pool.num_blocks))
    before = contents(tmp_path / "sessions" / "book.duo")
    session.reset()
    assert keeper.notes == ["session book stays as it was saved; this chat has no name now"]
    finish(session.ask("Hello?", GREEDY))
    other = tiny_session(tmp_path)
    opened(tmp_path, other)
    assert other.documents == ["a.txt", "b.txt"]
    assert contents(tmp_path / "sessions" / "book.duo") == before


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_what_is_forgotten_is_gone_and_nothing_else_is_there(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    keeper = session.keeper = keeper_for(tmp_path)
    keeper.begin("book", session)
    keeper.save(session)
    finish(session.add_document("mill.txt", DOCUMENT))
    path = tmp_path / "sessions" / "book.duo"
    before = bytes_on_disk(path)
    for turn in range(20):
        finish(session.ask(f"A marked question {turn}?", GREEDY))
    assert keeper.notes == []
    assert bytes_on_disk(path) == ContextFolder.open(path).nbytes
    assert b"A marked question 7" in b"".join(contents(path).values())
    session.forget_conversation()
    keeper.save(session)
    assert bytes_on_disk(path) < 1.1 * before
    assert b"marked" not in b"".join(contents(path).values())


def test_only_what_is_new_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_module, "_SMALL_BYTES", 0)
    session = tiny_session(tmp_path)
    keeper = session.keeper = keeper_for(tmp_path)
    keeper.begin("book", session)
    keeper.save(session)
    path = tmp_path / "sessions" / "book.duo"
    finish(session.add_document("mill.txt", DOCUMENT))
    before = ContextFolder.open(path).segments
    finish(session.ask("Where " * 90, GREEDY))
    folder = ContextFolder.open(path)
    assert len(before["blocks"]) == 1 and before["blocks"][0].count > 3
    assert folder.segments["blocks"][:1] == before["blocks"]
    assert folder.segments["turns"][: len(before["turns"])] == before["turns"]
    assert set(before["rings"]) < set(folder.segments["rings"])
    session.undo()
    session.forget_conversation()
    assert ContextFolder.open(path).segments == before  # and what was written for the question is not there any more
    assert len(list(path.iterdir())) == 1 + sum(map(len, before.values()))


def test_small_segments_at_the_end_are_written_anew_with_what_follows(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    keeper = session.keeper = keeper_for(tmp_path)
    keeper.begin("book", session)
    keeper.save(session)
    for turn in range(12):
        finish(session.ask(f"Where {turn} " * 20, GREEDY))
    segments = ContextFolder.open(tmp_path / "sessions" / "book.duo").segments
    assert (len(segments["blocks"]), len(segments["turns"])) == (1, 1)


@pytest.mark.parametrize("ring_bytes", [1, 1 << 40])
def test_places_to_go_on_from_take_no_more_than_the_context_or_are_three(ring_bytes: int, tmp_path: Path) -> None:
    session = a_talk(tmp_path)
    for turn in range(12):
        finish(session.ask(f"Where {turn}?", GREEDY))
    way = session.tree.current.way()
    turns = ring_turns(session.tree.current, (1 << 30) // ring_bytes)
    assert turns[:3] == [way[-1], way[1], way[-2]]
    assert len(turns) == (9 if ring_bytes == 1 else 3)
    assert all(turn.kind == "exchange" for turn in turns[2:])


def test_of_a_short_context_no_more_than_its_tokens_is_saved(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    finish(session.ask("Hi?", GREEDY))
    (ring,) = ContextFolder.open(saved(tmp_path, session)).segments["rings"]
    cache = session.engine.cache
    assert ring.count == session.engine.position < cache.ring.num_slots
    assert ring.nbytes == cache.ring.nbytes // cache.ring.num_slots * ring.count
    other = tiny_session(tmp_path)
    opened(tmp_path, other)
    assert torch.equal(other.engine.cache.read_ring(), cache.read_ring())
    for each in (session, other):
        finish(each.ask("And now?", GREEDY))
    assert in_context(other) == in_context(session)


def test_of_many_documents_places_all_over_are_kept(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    finish(session.add_documents([(f"{at}.txt", f"Note {at}.") for at in range(1, 41)]))
    assert [turn.number for turn in ring_turns(session.tree.current, 9)] == [40, 39, 8, 16, 24, 32]
    assert [turn.number for turn in ring_turns(session.tree.turns[35], 9)] == [35, 34, 8, 16, 24, 32]


def test_a_context_that_is_too_small_is_named(tmp_path: Path) -> None:
    saved(tmp_path, a_talk(tmp_path, context=2048))
    small = tiny_session(tmp_path, context=128)
    with pytest.raises(ContextOverflowError, match="and the context is 128: start with --context 2K"):
        opened(tmp_path, small)
    assert in_context(small) == []


@pytest.mark.parametrize("name", ["../book", "a/b", "", ".", "..", ".hidden", "con", "a" * 81, "a\nb", "a\0b", "x."])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    with pytest.raises(SettingsError, match="cannot name a session"):
        keeper_for(tmp_path).begin(name, session)
    with pytest.raises(SettingsError, match="cannot name a session"):
        keeper_for(tmp_path).open(name, session)


def test_a_name_that_is_taken_and_one_that_is_not_there(tmp_path: Path) -> None:
    session = a_talk(tmp_path)
    saved(tmp_path, session)
    keeper = keeper_for(tmp_path)
    with pytest.raises(SettingsError, match="there is a session book already"):
        keeper.begin("book", session)
    keeper.begin("book", session, overwrite=True)
    keeper.save(session)
    with pytest.raises(SessionError, match="there is no session other"):
        keeper.open("other", session)
    with pytest.raises(SessionError, match="is in use by another duolocal"):
        opened(tmp_path, tiny_session(tmp_path))


def test_a_document_is_found_again_by_its_content(tmp_path: Path, computed: list[int]) -> None:
    store = DocumentStore(tmp_path / "sessions")
    documents = [("a.txt", DOCUMENT), ("b.txt", "Beta. " * 70), ("c.txt", "Gamma. " * 40)]
    first = tiny_session(tmp_path)
    first.keeper = keeper_for(tmp_path, store=store, every_s=0.0, worth_s=0.0)
    finish(first.add_documents(documents[:2]))
    wanted = tiny_session(tmp_path)
    finish(wanted.add_documents(documents))
    computed.clear()
    second = tiny_session(tmp_path, chunk_size=50)
    second.keeper = keeper_for(tmp_path, store=store, every_s=0.0, worth_s=0.0)
    events = list(second.add_documents(documents))
    assert [event.num_tokens for event in events if isinstance(event, Reused)] == [first.engine.position]
    assert sum(computed) == wanted.engine.position - first.engine.position
    assert in_context(second) == in_context(wanted)
    assert second.undo() and second.undo()
    assert second.documents == ["a.txt"]
    assert sum(computed) == wanted.engine.position - first.engine.position  # the rings at the ends were there
    finish(second.ask("Where?", GREEDY))
    finish(wanted.go_to(wanted.tree.find("1")))
    finish(wanted.ask("Where?", GREEDY))
    assert in_context(second) == in_context(wanted)
    assert len(list(store.place.glob("*.duo"))) == 1  # what was read after it went into the same file


def test_nothing_is_taken_up_past_an_end_that_has_no_ring(tmp_path: Path) -> None:
    session = a_talk(tmp_path)
    folder = ContextFolder.open(saved(tmp_path, session))
    ids = [*session.engine.token_ids, 5]
    end = session.tree.turns[1].end
    for ends, position in (([], session.engine.position), ([end], session.engine.position), ([end - 1], None)):
        taken = usable(folder, session.engine.token_ids, [], ids, ends)
        assert (None if taken is None else taken.num_tokens) == position
    changed = [*ids[:end], *(token ^ 1 for token in ids[end:])]
    taken = usable(folder, session.engine.token_ids, [], changed, [])
    assert taken is not None and taken.num_tokens == end
    assert usable(folder, session.engine.token_ids, ids, [5], []) is None


@pytest.mark.skipif(build.unsupported() is not None, reason=f"compiled kernels: {build.unsupported()}")
def test_kernels_take_over_from_each_other(tmp_path: Path, computed: list[int]) -> None:
    first = a_talk(tmp_path, kernels=compiled(2))
    saved(tmp_path, first)
    computed.clear()
    same, other = tiny_session(tmp_path, kernels=compiled(1), chunk_size=33), tiny_session(tmp_path)
    for session in (same, other):
        keeper = opened(tmp_path, session)
        keeper.close()
    assert computed == []
    for session in (first, same, other):
        finish(session.ask("And why there?", GREEDY))
        assert in_context(session) == in_context(first)
    assert torch.equal(same.engine.cache.read_ring(), first.engine.cache.read_ring())
