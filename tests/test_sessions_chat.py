"""The chat's commands over turns and saved contexts, and `duolocal sessions`, over a tiny real session."""

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from duolocal import cli
from duolocal.chat.kept import extra_of
from duolocal.chat.opening import origin_of, settings_of_session
from duolocal.commands.chat import Chat as ChatOptions
from duolocal.commands.sessions import KEEP, keep_bytes
from duolocal.documents import Document
from duolocal.errors import SessionError, SettingsError
from duolocal.heads import HeadPlan
from duolocal.sessions.context import Origin
from duolocal.sessions.keeper import ContextKeeper
from duolocal.sessions.names import contexts_in
from duolocal.sessions.store import DocumentStore
from duolocal.settings import FirstUse, LoadSettings, Sampling
from duolocal.terminal import chat_start
from duolocal.terminal.chat import Chat
from duolocal.terminal.chat_state import ChatState
from duolocal.terminal.docs_chat import add_documents
from duolocal.terminal.sessions_chat import begin_or_open
from duolocal.terminal.sessions_view import turns_view
from tests.session_models import DOCUMENT, PLAN, finish, in_context, tiny_session
from tests.terminal_fakes import FACTS, unwrapped

UNIFORM = HeadPlan(((True, True), (True, True)), sink_size=4, recent_size=64, source="test")
MILL = Document(
    "mill.txt", Path("far/mill.txt"), DOCUMENT, "cp1252", 1234, kind="text", notes=("guessed",), digest="ab"
)


def a_chat(folder: Path, kv: str = "int8") -> tuple[Chat, StringIO]:
    output = StringIO()
    console = Console(file=output, width=100, height=24, force_terminal=False, highlight=False)
    session = tiny_session(folder, kv=kv)
    settings = LoadSettings(model="tiny", kv=kv)
    keeper = ContextKeeper(folder / "sessions", Origin("tiny", tuple(settings.options())))
    session.keeper = keeper
    sampling = Sampling(temperature=0, max_tokens=4)
    chat = Chat(console, ChatState(session, FACTS, settings, sampling, keeper=keeper))
    keeper.extra = lambda: extra_of(chat.state.files)
    return chat, output


def said(output: StringIO) -> str:
    text = output.getvalue()
    output.seek(0)
    output.truncate()
    return text


def test_save_open_and_go_on(tmp_path: Path) -> None:
    chat, output = a_chat(tmp_path)
    add_documents(chat, [MILL])
    chat.handle("Where?")
    said(output)
    chat.handle("/save book")
    wanted = r"saving book: [\d.]+ \w+ to write saved book \(.*\) in \S+/sessions; from now on after every turn"
    assert re.fullmatch(wanted, unwrapped(said(output)))
    chat.handle("Why there?")
    context = in_context(chat.state.session)
    with pytest.raises(SettingsError, match="session book is the one that is open"):
        chat.handle("/open book")
    assert chat.state.keeper is not None
    chat.state.keeper.close()

    other, output = a_chat(tmp_path)
    other.handle("Something that is not saved")
    with pytest.raises(SettingsError, match="this chat is not saved: /save NAME first, or leave it behind with"):
        other.handle("/open book")
    other.handle("/open --force book")
    assert "opened session book: " in said(output)
    assert in_context(other.state.session) == context
    assert other.state.files == {"mill.txt": MILL}
    assert list(other.state.questions.values()) == ["Where?", "Why there?"]
    assert set(other.state.ends.values()) == {"length"}
    add_documents(other, [MILL])
    assert "mill.txt is in the context already" in said(output)
    other.handle("/undo 2")
    assert "undone: " in said(output)
    assert other.state.questions == {}
    assert other.state.session.documents == ["mill.txt"]
    third, _ = a_chat(tmp_path)
    with pytest.raises(SettingsError, match="there is a session book already"):
        third.handle("/save book")


def test_a_document_that_changed_since_it_was_read_is_said(tmp_path: Path) -> None:
    chat, output = a_chat(tmp_path)
    add_documents(chat, [MILL])
    chat.handle("/save book")
    assert chat.state.keeper is not None
    chat.state.keeper.close()
    other, output = a_chat(tmp_path)
    other.handle("/open book")
    said(output)
    changed, elsewhere = (
        replace(MILL, text="The mill burnt down."),
        replace(MILL, path=Path("b/mill.txt"), text="Other."),
    )
    add_documents(other, [changed])
    wanted = "mill.txt has changed since: it is read as mill.txt (2), and the earlier text stays as well"
    assert wanted in unwrapped(said(output))
    add_documents(other, [MILL, changed, elsewhere])
    shown = unwrapped(said(output))
    assert shown.count("mill.txt is in the context already") == 2
    assert "another mill.txt is in the context: this one is b/mill.txt" in shown
    assert other.state.session.texts == [
        ("mill.txt", DOCUMENT),
        ("mill.txt (2)", "The mill burnt down."),
        ("b/mill.txt", "Other."),
    ]


def test_a_session_of_another_start_is_opened_by_one(tmp_path: Path) -> None:
    """The chat leaves for it; whoever runs the chat starts with what the session was saved with."""
    chat, _ = a_chat(tmp_path)
    chat.handle("/save book")
    assert chat.state.keeper is not None
    chat.state.keeper.close()
    other, output = a_chat(tmp_path, kv="int4")
    other.handle("/open book")
    assert (other.state.reopen, other.state.leaving) == ("book", True)
    assert "session book was saved with another model or other settings: starting with its own" in said(output)


def test_the_chat_comes_back_where_a_session_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat, _ = a_chat(tmp_path)
    chat.handle("/save mine")
    asked: list[tuple[str | None, LoadSettings]] = []

    def start(options: ChatOptions, settings: LoadSettings, *_: object) -> ChatState:
        asked.append((options.session, settings))
        if options.session == "book":
            raise SessionError("model other is not here")
        return a_chat(tmp_path)[0].state

    def run(conversation: Chat, documents: object, **_: object) -> int:
        if not asked:
            conversation.state.reopen = "book"
        return 0

    monkeypatch.setattr(chat_start, "_start", start)
    monkeypatch.setattr(Chat, "run", run)
    settings = LoadSettings(model="tiny", kv="int8", threads=2)
    code = chat_start._talk(chat.state, [], None, ChatOptions(), settings, FirstUse(), Console(file=StringIO()))
    assert code == 0
    assert asked == [("book", LoadSettings(threads=2)), ("mine", settings)]
    assert "model other is not here" in capsys.readouterr().err


def test_turns_fork_goto(tmp_path: Path) -> None:
    chat, output = a_chat(tmp_path)
    add_documents(chat, [MILL])
    chat.handle("Where?")
    chat.handle("/fork sharper")
    assert "line sharper begins here, after turn 2; /goto main goes back" in said(output)
    chat.handle("Why?")
    chat.handle("/goto main")
    assert "at turn 2 of line main: " in said(output)
    assert list(chat.state.questions.values()) == ["Where?"]
    chat.handle("And when?")
    said(output)
    chat.handle("/turns")
    shown = said(output)
    assert [line.split()[:4] for line in shown.splitlines()[1:6]] == [
        ["0", "start", "0"],
        ["1", "0", "document", "mill.txt"],
        ["2", "1", "exchange", "Where?"],
        ["3", "2", "exchange", "Why?"],
        ["4", "2", "exchange", "And"],
    ]
    assert "sharper" in shown.splitlines()[4] and "<- here main" in shown.splitlines()[5]
    chat.handle("/goto sharper")
    assert "at turn 3 of line sharper" in said(output)
    with pytest.raises(SettingsError, match="there is no turn '9': give a number from /turns, or a line"):
        chat.handle("/goto 9")
    for turn in chat.state.session.tree.turns.values():
        if turn is not chat.state.session.tree.current:
            turn.ring = turn.columns = None
    chat.handle("/goto 4")
    assert "on the way there are not kept any more and are read again" in said(output)


def test_a_session_by_option_begins_then_opens(tmp_path: Path) -> None:
    chat, _ = a_chat(tmp_path)
    assert chat.state.keeper is not None
    assert begin_or_open(chat.state.keeper, chat.state.session, "book", system=None) == {}
    assert "session book is new; it is saved after every turn in" in chat.state.keeper.notes[-1]
    add_documents(chat, [MILL])
    chat.state.keeper.close()
    other, _ = a_chat(tmp_path)
    assert other.state.keeper is not None
    assert begin_or_open(other.state.keeper, other.state.session, "book", system=None) == {"mill.txt": MILL}
    assert other.state.keeper.notes[-1].startswith("opened session book: ")
    assert "0 questions, nothing to read" in other.state.keeper.notes[-1]
    other.state.keeper.close()
    begin_or_open(other.state.keeper, other.state.session, "bok", system=None)
    assert "session bok is new (there is also book); it is saved" in other.state.keeper.notes[-1]
    other.state.keeper.close()
    third, _ = a_chat(tmp_path)
    assert third.state.keeper is not None
    with pytest.raises(SettingsError, match="session book has another system message: leave --system out"):
        begin_or_open(third.state.keeper, third.state.session, "book", system="Be brief.")


def test_what_was_not_asked_is_taken_from_the_session(tmp_path: Path) -> None:
    chat, _ = a_chat(tmp_path)
    assert chat.state.keeper is not None
    begin_or_open(chat.state.keeper, chat.state.session, "book", system=None)
    chat.state.keeper.close()
    options = ChatOptions(session="book", sessions_folder=str(tmp_path / "sessions"))
    settings, line = settings_of_session(options, LoadSettings(model="tiny"))
    assert (settings.kv, line) == ("int8", "as session book was saved: --kv int8")
    asked = LoadSettings(model="tiny", kv="int4")
    assert settings_of_session(options, asked) == (asked, None)
    settings, line = settings_of_session(options, LoadSettings())  # its own model, whatever the default is by now
    assert (settings.model, line) == ("tiny", "as session book was saved: --model tiny --kv int8")


@pytest.mark.parametrize(
    ("plan", "heads"),
    [(PLAN, "--heads 0.5"), (UNIFORM, "--heads all --sink-size 4 --recent-size 64")],
)
def test_what_was_chosen_unasked_is_saved_with_a_session(plan: HeadPlan, heads: str, tmp_path: Path) -> None:
    """What `auto` stands for may be another by tomorrow: after a measurement, or with less memory."""
    engine = tiny_session(tmp_path, plan=plan, kv="int4", context=1024).engine
    saved = origin_of(LoadSettings(model="tiny", threads=2), engine).options
    assert " ".join(saved) == f"--model tiny --context 1K --kv int4 {heads} --dtype float32 --threads 2"
    asked = LoadSettings(model="tiny", heads="mine.json", context=512)
    assert "--heads mine.json" in " ".join(origin_of(asked, engine).options)


@pytest.mark.parametrize(("text", "wanted"), [("off", 0), ("0", 0), ("2GiB", 2 << 30), (None, 8 << 30)])
def test_keep(text: str | None, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DUOLOCAL_KEEP", raising=False)
    typed = None if text is None else KEEP.read(text, "--keep")
    assert keep_bytes(typed) == wanted
    monkeypatch.setenv("DUOLOCAL_KEEP", "off")
    assert keep_bytes(typed) == (0 if text is None else wanted)
    monkeypatch.setenv("DUOLOCAL_KEEP", "much")
    with pytest.raises(SettingsError, match=r"^\$DUOLOCAL_KEEP is 'much'"):
        keep_bytes(None)
    with pytest.raises(SettingsError, match="--keep is 'much'"):
        KEEP.read("much", "--keep")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["sessions", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_list_info_rm(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUOLOCAL_SESSIONS", str(tmp_path / "sessions"))
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(capsys, "list")
    assert code == 0 and unwrapped(out).startswith(f"nothing is saved in {tmp_path}/sessions; ")
    chat, _ = a_chat(tmp_path)
    add_documents(chat, [MILL])
    chat.handle("Where?")
    chat.handle("/save book")
    assert chat.state.keeper is not None
    chat.state.keeper.close()
    (tmp_path / "sessions" / "bad\x1b[2J.duo").write_bytes(b"nothing")
    code, out, _ = run(capsys, "list")
    assert code == 0 and "tiny: mill.txt" in out and "is no saved context of duolocal" in out
    assert "\x1b[2J" not in out
    code, out, _ = run(capsys, "list", "--json")
    listed = json.loads(out)
    entry = next(item for item in listed["sessions"] if item["name"] == "book")
    assert (entry["tokens"], entry["turns"]) == (chat.state.session.engine.position, 1)
    assert entry["documents"][0]["name"] == "mill.txt"
    code, out, _ = run(capsys, "info", "book")
    assert code == 0 and "--model tiny --kv int8" in out
    assert json.loads(run(capsys, "info", "book", "--json")[1])["kv"] == "int8"
    assert run(capsys, "info", "other")[0] == 1
    assert run(capsys, "info", "../book") == (2, "", run(capsys, "info", "../book")[2])
    assert run(capsys, "rm")[0] == 2
    assert run(capsys, "rm", "book", "other")[0] == 1
    assert (tmp_path / "sessions" / "book.duo").exists()  # all or none
    store = DocumentStore(tmp_path / "sessions")
    reading = tiny_session(tmp_path)
    keeper = ContextKeeper(tmp_path / "sessions", Origin("tiny"), store=store, every_s=0.0, worth_s=0.0)
    reading.keeper = keeper
    finish(reading.add_document("mill.txt", DOCUMENT))
    keeper.close()
    (kept,) = contexts_in(store.place)
    code, out, _ = run(capsys, "list")
    assert f"documents/{kept.stem}" in out and "stopped" not in out
    code, out, _ = run(capsys, "info", f"documents/{kept.stem}")
    assert re.search(r"keys and values [\d.]+ KiB, recent tokens at 1 place to go on from", unwrapped(out))
    code, _, err = run(capsys, "rm", "bok")
    assert (code, "did you mean book?" in err) == (1, True)
    assert run(capsys, "rm", f"documents/{kept.stem}")[0] == 0
    assert not kept.exists() and (tmp_path / "sessions" / "book.duo").exists()
    code, out, _ = run(capsys, "rm", "book")
    assert code == 0 and out.startswith("removed 1 saved context, ")
    assert sorted(path.name for path in (tmp_path / "sessions").glob("*book*")) == []


@pytest.mark.parametrize("columns", [50, 80, 160])
def test_numbers_and_marks_of_turns_are_never_shortened(columns: int) -> None:
    rows = [
        (0, None, "start", "", 0, "", True, False),
        (1234, 0, "document", "reports/a very long name of a report.txt", 1_206_389, "", True, False),
        (1235, 1234, "exchange", "Who is the owner of all this, and since when?", 64, "main, sharper", True, True),
        (1236, 1234, "exchange", "And?", 64, "another-line-with-a-long-name", False, False),
    ]
    output = StringIO()
    Console(file=output, width=columns).print(turns_view(rows, columns=columns))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    shown = "".join(output.getvalue().split())
    numbers = ("12340document", "1,206,389", "12351234exchange", "12361234exchange")
    for wanted in (*numbers, "<-heremain,sharper", "another-line-with-a-long-name", "reports"):
        assert wanted in shown
    assert columns < 160 or "Who is the owner of all this, and since when?" in output.getvalue()


def test_a_file_of_an_older_duolocal_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat, _ = a_chat(tmp_path)
    assert chat.state.keeper is not None
    path = tmp_path / "sessions" / "old.duo"
    path.parent.mkdir()
    path.write_bytes(b"\x89duolocal\r\n\x1a\n\0\0\0\x01\0\0\0 and more")
    before = path.read_bytes()
    refused = r"old\.duo was saved by an older duolocal: open it with that one, or remove it \(`duolocal sessions rm`\)"
    with pytest.raises(SessionError, match=refused):
        chat.handle("/open --force old")
    with pytest.raises(SessionError, match=refused):
        begin_or_open(chat.state.keeper, chat.state.session, "old", system=None)
    with pytest.raises(SettingsError, match="session old was saved by an older duolocal: choose another name"):
        chat.handle("/save --force old")
    assert path.read_bytes() == before
    folder = str(tmp_path / "sessions")
    assert "was saved by an older duolocal" in unwrapped(run(capsys, "list", "--sessions-folder", folder)[1])
    assert run(capsys, "rm", "old", "--sessions-folder", folder)[0] == 0
    assert not path.exists()
