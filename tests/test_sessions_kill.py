"""Reading that is stopped with kill -9, Ctrl-C or a full disk: what is kept is whole, and the same command goes on."""

import contextlib
import errno
import itertools
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from duolocal.engine.session import Reused
from duolocal.errors import SessionError
from duolocal.sessions import keeper as keeper_module
from duolocal.sessions.context import Origin
from duolocal.sessions.folder import ContextFolder, bytes_on_disk
from duolocal.sessions.keeper import ContextKeeper
from duolocal.sessions.names import MANIFEST, contexts_in
from duolocal.sessions.store import DocumentStore
from duolocal.terminal.sessions_chat import opened_line
from tests.session_models import DOCUMENT, GREEDY, finish, in_context, tiny_session, tiny_tokenizer

ROOT = Path(__file__).parents[1]
DOCUMENTS = [("a.txt", DOCUMENT * 2), ("b.txt", "Beta stood alone. " * 60)]
ORIGIN = Origin("tiny", ("--model", "tiny"))


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def work(folder: Path, *, named: bool, say: bool = False) -> tuple[int, list[int]]:
    """What the command does: open or begin, read what is not read, ask. Returns tokens taken up, and the context.

    say: print a line for every event, the first one with the tokens taken up.
    """
    store = None if named else DocumentStore(folder / "sessions")
    session = tiny_session(folder, chunk_size=16)
    keeper = session.keeper = ContextKeeper(
        folder / "sessions", ORIGIN, store=store, every_s=0.0, worth_s=0.0, share=1.0
    )
    taken = 0
    if named:
        if (folder / "sessions" / "book.duo").exists():
            keeper.open("book", session)
            taken = session.engine.position
        else:
            keeper.begin("book", session)
            keeper.save(session)
    for event in session.add_documents([pair for pair in DOCUMENTS if pair not in session.texts]):
        if isinstance(event, Reused):
            taken += event.num_tokens
        if say:
            sys.stdout.write(f"{taken}\n")
            sys.stdout.flush()
    if not any(turn.kind == "exchange" for turn in session.tree.current.way()):
        finish(session.ask("Where did it stand?", GREEDY))
    keeper.close()
    return taken, in_context(session)


@pytest.mark.parametrize("named", [True, False])
def test_after_kill_9_the_same_command_goes_on(named: bool, tmp_path: Path) -> None:
    rng = random.Random(7)
    wanted = work(tmp_path / "undisturbed", named=named)[1]
    tiny_tokenizer(tmp_path)  # its files are not what is to be killed half-written
    code = "import sys; from pathlib import Path; from tests.test_sessions_kill import work; "
    code += f"work(Path(sys.argv[1]), named={named}, say=True)"
    reached = [0]
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        reached.append(int(process.stdout.readline()))
        for _ in range(rng.randrange(3, 14)):
            process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.02))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        for path in contexts_in(tmp_path / "sessions") + contexts_in(tmp_path / "sessions" / "documents"):
            folder = ContextFolder.open(path)  # whatever moment it was, the context is whole
            for segments in folder.segments.values():
                for segment in segments:
                    folder.read(segment)
    taken, context = work(tmp_path, named=named)
    assert context == wanted
    reached.append(taken)
    assert all(before < after for before, after in itertools.pairwise(reached[1:])), reached


@pytest.mark.parametrize("named", [True, False])
def test_the_first_seconds_of_reading_are_kept_and_told_of(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second per chunk. Without a name, once it is plain that reading takes longer than ten seconds."""
    seconds = itertools.count()
    monkeypatch.setattr(keeper_module, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    folder = tmp_path / "sessions"
    session = tiny_session(tmp_path, chunk_size=32)
    keeper = session.keeper = ContextKeeper(folder, ORIGIN, store=None if named else DocumentStore(folder))
    if named:
        keeper.begin("book", session)
        keeper.save(session)
    events = session.add_documents([("a.txt", DOCUMENT * 2), ("b.txt", "Beta stood alone. " * 60)])
    for _ in range(5):
        next(events)
    (path,) = contexts_in(folder if named else folder / "documents")  # a kill here leaves this
    held = ContextFolder.open(path)
    assert 32 * 2 <= held.description["read_ahead"] == held.description["num_tokens"] <= session.engine.position
    keeper.close()
    if named:
        other = tiny_session(tmp_path)
        reopened = ContextKeeper(folder, ORIGIN)
        reopened.open("book", other)
        line = opened_line(reopened, other, 0.1)
        stopped = (
            f"0 tokens, 0 questions, and {held.description['num_tokens']} tokens of a reading that was stopped: load"
        )
        assert stopped in line and "nothing to read" not in line
        other.keeper = reopened
        finish(other.ask("Where?", GREEDY))
        assert reopened.notes == [
            f"the {held.description['num_tokens']} tokens of the reading that was stopped are not kept any more"
        ]


def test_a_reading_that_is_over_is_not_listed_as_stopped(tmp_path: Path) -> None:
    """The last checkpoint may hold all tokens before the document is a turn."""
    store = DocumentStore(tmp_path / "sessions")
    session = tiny_session(tmp_path, chunk_size=16)
    session.keeper = ContextKeeper(tmp_path / "sessions", ORIGIN, store=store, every_s=0.0, worth_s=0.0)
    finish(session.add_documents(DOCUMENTS))
    (path,) = contexts_in(store.place)
    held = ContextFolder.open(path).description
    assert held["read_ahead"] == 0 and [name for name, _ in held["documents"]] == ["a.txt", "b.txt"]


def test_what_a_killed_writer_left_goes_when_the_next_context_is_begun(tmp_path: Path) -> None:
    """Nobody would ever write to the name again: those of the store are made up."""
    code = """
        import os, signal, sys
        from pathlib import Path
        from duolocal.sessions.folder import KINDS, ContextFolder, NewSegment
        os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        folder = ContextFolder.create(Path(sys.argv[1]))
        folder.commit({}, dict.fromkeys(KINDS, ()) | {"tokens": [NewSegment(1, 4, lambda: bytes(4))]})
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "lost.duo")]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "lost.duo").iterdir())) == 2
    assert contexts_in(tmp_path) == []
    with contextlib.closing(ContextFolder.create(tmp_path / "alive.duo")):
        assert not (tmp_path / "lost.duo").exists()
        (tmp_path / "alive.duo").mkdir()
        ContextFolder.create(tmp_path / "next.duo").close()
        assert (tmp_path / "alive.duo").exists()  # its writer lives


@contextlib.contextmanager
def every_state(folder: Path, states: Path) -> Iterator[None]:
    """Copy `folder` whenever something reaches the disk or is removed, and as if the last file were half there."""
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def copy() -> Path:
        place = states / f"state{len(os.listdir(states))}.duo"
        shutil.copytree(folder, place)
        return place

    def synced(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            torn = copy()
            newest = max(torn.iterdir(), key=lambda path: path.stat().st_mtime_ns)
            os.truncate(newest, newest.stat().st_size // 2)
        fsync(descriptor)
        copy()

    def replaced(source: Path, path: Path) -> None:
        replace(source, path)
        copy()

    def unlinked(path: Path, **options: Any) -> None:
        unlink(path, **options)
        if path.parent == folder:
            copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "replace", replaced)
        patch.setattr(Path, "unlink", unlinked)
        yield


def test_every_state_on_the_disk_during_a_save_opens(tmp_path: Path) -> None:
    """A copy at every step is what a kill or a power cut would have left."""
    folder, states = tmp_path / "sessions", tmp_path / "states"
    states.mkdir()
    session = tiny_session(tmp_path)
    keeper = session.keeper = ContextKeeper(folder, ORIGIN)
    keeper.begin("book", session)
    keeper.save(session)
    contexts = {tuple(in_context(session))}
    with every_state(folder / "book.duo", states):
        finish(session.add_document("a.txt", DOCUMENT))
        contexts.add(tuple(in_context(session)))
        finish(session.ask("Where?", GREEDY))
        contexts.add(tuple(in_context(session)))
        session.undo()
        finish(session.ask("Why did it stand there?", GREEDY))
        contexts.add(tuple(in_context(session)))
    assert keeper.notes == []
    names = {path.stem for path in contexts_in(states)}
    assert len(names) == len(os.listdir(states)) > 30
    seen = set()
    for name in sorted(names):
        other = tiny_session(tmp_path)
        opened = ContextKeeper(states, ORIGIN)
        opened.open(name, other)
        opened.close()
        assert tuple(in_context(other)) in contexts
        seen.add(tuple(in_context(other)))
        held = ContextFolder.open(states / f"{name}.duo")
        assert bytes_on_disk(held.path) == held.nbytes  # what it does not name is gone
    assert seen == contexts


@pytest.mark.parametrize("named", [True, False])
def test_a_cancelled_reading_goes_on_where_it_was(named: bool, tmp_path: Path) -> None:
    store = None if named else DocumentStore(tmp_path / "sessions")
    session = tiny_session(tmp_path, chunk_size=16)
    keeper = session.keeper = ContextKeeper(tmp_path / "sessions", ORIGIN, store=store, every_s=0.0, worth_s=0.0)
    if named:
        keeper.begin("book", session)
        keeper.save(session)
    events = session.add_documents(DOCUMENTS)
    for count, _ in enumerate(events):
        if count == 60:
            session.cancel()
    assert session.documents == ["a.txt"]
    assert any("are kept: the same command goes on from there" in note for note in keeper.notes)
    whole, position = session.tree.current.end, int(keeper.notes[-1].split()[0].replace(",", ""))
    assert whole < position
    keeper.close()
    taken, context = work(tmp_path, named=named)
    assert taken == position
    assert context == work(tmp_path / "undisturbed", named=named)[1]


def test_a_reading_that_is_changed_keeps_what_is_the_same(tmp_path: Path) -> None:
    store = DocumentStore(tmp_path / "sessions")
    first = tiny_session(tmp_path)
    first.keeper = ContextKeeper(tmp_path / "sessions", ORIGIN, store=store, every_s=0.0, worth_s=0.0)
    finish(first.add_documents(DOCUMENTS))
    second = tiny_session(tmp_path)
    second.keeper = ContextKeeper(tmp_path / "sessions", ORIGIN, store=store, every_s=0.0, worth_s=0.0)
    changed = [DOCUMENTS[0], ("b.txt", DOCUMENTS[1][1] + "And more.")]
    events = list(second.add_documents(changed))
    assert [event.num_tokens for event in events if isinstance(event, Reused)] == [first.tree.turns[1].end]
    fresh = tiny_session(tmp_path)
    finish(fresh.add_documents(changed))
    for session in (second, fresh):
        finish(session.ask("Where?", GREEDY))
    assert in_context(second) == in_context(fresh)


def test_the_store_keeps_to_its_limit_and_the_oldest_go(tmp_path: Path) -> None:
    store = DocumentStore(tmp_path / "sessions", limit=10**9)

    def read(text: str) -> list[Any]:
        session = tiny_session(tmp_path)
        session.keeper = ContextKeeper(tmp_path / "sessions", ORIGIN, store=store, every_s=0.0, worth_s=0.0)
        events = list(session.add_document("a.txt", text))
        session.keeper.close()
        return [event for event in events if isinstance(event, Reused)]

    texts = [f"Chapter {number}. {DOCUMENT}" for number in range(4)]
    for number, text in enumerate(texts[:3]):
        assert not read(text)
        for path in store.place.glob("*.duo"):
            if (path / MANIFEST).stat().st_mtime > 1000:
                os.utime(path / MANIFEST, (number + 1, number + 1))
    sizes = [bytes_on_disk(path) for path in contexts_in(store.place)]
    assert len(sizes) == 3
    whole = {path: contents(path) for path in contexts_in(store.place)}
    assert read(texts[0])  # used: now the youngest
    assert {path: contents(path) for path in contexts_in(store.place)} == whole  # and nothing was written
    store.limit = sum(sizes) + max(sizes) // 2
    assert not read(texts[3])
    assert sum(map(bytes_on_disk, contexts_in(store.place))) <= store.limit
    assert not read(texts[1])  # the oldest went
    assert read(texts[0])
    store.limit = 1000
    session = tiny_session(tmp_path)
    keeper = session.keeper = ContextKeeper(tmp_path / "sessions", ORIGIN, store=store, every_s=0.0, worth_s=0.0)
    finish(session.add_document("a.txt", "Other. " * 90))
    assert "too much for the store" in keeper.notes[-1]


def test_what_is_read_quickly_is_not_stored(tmp_path: Path) -> None:
    store = DocumentStore(tmp_path / "sessions")
    session = tiny_session(tmp_path)
    session.keeper = ContextKeeper(tmp_path / "sessions", ORIGIN, store=store)
    finish(session.add_document("a.txt", DOCUMENT))
    assert not store.place.exists()


@contextlib.contextmanager
def files_up_to(nbytes: int) -> Iterator[None]:
    """Let no file grow beyond this: writing more fails as on a full disk, in the middle of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "sessions"
    session = tiny_session(tmp_path)
    finish(session.add_document("a.txt", DOCUMENT))
    keeper = ContextKeeper(folder, ORIGIN)
    keeper.begin("book", session)
    with files_up_to(1000), pytest.raises(SessionError, match=r"cannot be written .*: make room on the disk"):
        keeper.save(session)
    assert [name for name in os.listdir(folder) if not name.endswith(".lock")] == []
    keeper.begin("book", session)
    keeper.save(session)
    before, held = in_context(session), contents(folder / "book.duo")
    session.keeper = keeper
    with files_up_to(1000):
        finish(session.ask("Where did it stand, and why? " * 20, GREEDY))
    assert keeper.notes and "not saved: " in keeper.notes[0] and keeper.notes[0].isprintable()
    assert contents(folder / "book.duo") == held
    shutil.copytree(folder / "book.duo", folder / "copy.duo")
    other = tiny_session(tmp_path)
    ContextKeeper(folder, ORIGIN).open("copy", other)
    assert in_context(other) == before
    keeper.save(session)  # and there is room again
    shutil.copytree(folder / "book.duo", folder / "copy2.duo")
    ContextKeeper(folder, ORIGIN).open("copy2", other)
    assert in_context(other) == in_context(session)


def test_room_is_checked_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = tiny_session(tmp_path)
    finish(session.add_document("a.txt", DOCUMENT))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(SessionError, match=r"book.duo needs \d+ MB and 1 MB are free"):
        ContextKeeper(tmp_path / "sessions", ORIGIN).begin("book", session)
    assert not list((tmp_path / "sessions").glob("*.duo"))


def test_an_error_of_the_disk_at_any_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sessions"
    session = tiny_session(tmp_path)
    keeper = session.keeper = ContextKeeper(folder, ORIGIN)
    keeper.begin("book", session)
    keeper.save(session)
    finish(session.add_document("a.txt", DOCUMENT))
    fsync, context = os.fsync, in_context(session)
    for failing in range(12):
        calls = 0

        def broken(descriptor: int, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise OSError(errno.EIO, "Input/output error")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", broken)
        finish(session.ask(f"Question {failing}?", GREEDY))
        monkeypatch.setattr(os, "fsync", fsync)
        copy = folder / f"copy{failing}.duo"
        shutil.copytree(folder / "book.duo", copy)
        other = tiny_session(tmp_path)
        ContextKeeper(folder, ORIGIN).open(copy.stem, other)
        assert in_context(other) in (context, in_context(session))
        keeper.notes.clear()
        keeper.save(session)
        context = in_context(session)
    assert calls < 12  # every one of them failed once
