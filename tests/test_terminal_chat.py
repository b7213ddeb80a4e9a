"""The chat's commands over a session without a model."""

import base64
import re
import signal
from pathlib import Path

import pytest

from duolocal.documents import Document
from duolocal.engine.session import Finished
from duolocal.engine.speculation import Counts, Speculation
from duolocal.errors import SettingsError
from duolocal.terminal import commands, views
from duolocal.terminal.docs_chat import add_documents
from tests.terminal_fakes import FACTS, FakeSession, Reason, make_chat


def shown(output) -> str:
    text = "\n".join(line.rstrip() for line in output.getvalue().splitlines())
    output.seek(0)
    output.truncate()
    return text


def test_a_question_is_answered_and_summed_up() -> None:
    chat, output = make_chat()
    chat.handle("What colour is it?")
    assert shown(output) == "It is green.\n3 tokens · 12.0 tokens/s · first after 0.5 s\n"
    assert chat.state.session.messages[-1].content == "It is **green**."


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("/help", ("help", "")),
        ("/LOAD a b ", ("load", "a b")),
        ("/system be\nkind", ("system", "be\nkind")),
        ("/?", ("?", "")),
        (" /help", None),
        ("/etc/passwd what is it", None),
        ("// a comment", None),
        ("/", None),
        ("what /help", None),
    ],
)
def test_what_is_a_command(text: str, command: tuple[str, str] | None) -> None:
    assert commands.parse(text) == command


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "/contxt",
            "unknown command /contxt: did you mean /context? (a space before the slash sends it as text)",
        ),
        ("/zzzz", "unknown command /zzzz: /help lists them (a space before the slash sends it as text)"),
        ("/load", "/load needs a path: /load FILE..."),
        ("/load 'a", 'a quote is not closed in "\'a": close it'),
        ("/undo", "there is nothing (more) to undo: /reset forgets the conversation, /reset all everything"),
        ("/undo 2", "there are not 2 turns to undo: /turns lists them"),
        ("/undo all", "/undo takes a number of turns, not 'all': /undo 2"),
        ("/goto", "/goto needs a turn or a line: /goto 3; /turns lists them"),
        ("/save book", "this chat keeps no sessions: start it with `duolocal chat`"),
        ("/open", "/open needs one name: /open NAME; `duolocal sessions list` shows what there is"),
        ("/copy", "there is no answer to copy yet"),
        ("/save", "/save needs one name: /save NAME keeps this chat, /save chat.md writes the transcript"),
        ("/set temprature 1", "unknown setting 'temprature': did you mean temperature?"),
        ("/set temperature warm", "temperature is 'warm': give 0 (greedy) or more, such as 0.7"),
        ("/set seed x", "seed is 'x': give a whole number from 0 to 2**63 - 1, or none"),
        ("/set max_tokens 0", "max_tokens is '0': give between 1 and 2,147,483,647 tokens"),
        (
            "/set context 64K",
            "context is fixed while the model is loaded; restart with: "
            "duolocal chat --model tiny --kv int8 --context 64K",
        ),
        (
            "/set kv 16",
            "kv is fixed while the model is loaded; restart with: duolocal chat --model tiny --kv 16",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(text: str, message: str) -> None:
    chat, _ = make_chat()
    with pytest.raises(SettingsError) as raised:
        chat.handle(text)
    assert str(raised.value) == message


def test_set_changes_the_next_answer() -> None:
    session = FakeSession()
    chat, output = make_chat(session)
    chat.handle("/set temperature 0.2")
    chat.handle("/set max-tokens=2K")
    chat.handle("/set stop END '\\n\\n'")
    assert shown(output) == "temperature = 0.2\nmax_tokens = 2048\nstop = END '\\n\\n'"
    chat.handle("hello")
    used = session.samplings[-1]
    assert (used.temperature, used.max_tokens, used.stop) == (0.2, 2048, ("END", "\n\n"))
    chat.handle("/set max_tokens none")
    chat.handle("/set stop none")
    assert (chat.state.sampling.max_tokens, chat.state.sampling.stop) == (None, ())
    shown(output)
    chat.handle("/set")
    listed = shown(output)
    assert "temperature         0.2" in listed
    assert "fixed until a restart: model, context" in listed


def test_load_docs_context_undo(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three four")
    (tmp_path / "b c.txt").write_bytes("naïve words".encode("cp1252"))
    chat, output = make_chat(columns=100)
    chat.handle(f"/load {tmp_path}/a.txt '{tmp_path}/b c.txt'")
    assert shown(output).splitlines() == [
        "b c.txt: not UTF-8: read as cp1252, a guess; look at its accents before you rely on it",
        "loaded a.txt: 4 tokens",
        "loaded b c.txt: 2 tokens",
        "994 tokens are free",
    ]
    chat.handle(f"/load {tmp_path}/a.txt")
    assert shown(output) == "a.txt is in the context already"
    chat.handle("/docs")
    assert "cp1252" in shown(output)
    chat.handle("/context")
    listed = shown(output)
    assert "document  a.txt" in listed
    assert listed.splitlines()[-1] == "6 tokens of 1,000 in the context (0.6%), 994 free"
    chat.handle("/undo")
    assert shown(output) == "undone: 2 tokens freed, 4 in the context"


def test_doc_is_another_name_of_load(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("the door is green")
    chat, output = make_chat()
    chat.handle(f"/doc {tmp_path / 'notes.txt'}")
    assert "loaded notes.txt" in shown(output)


def test_load_takes_patterns_folders_and_spaces(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.md", "a.md", "c.txt", "d e.txt", "sub/10.txt", "sub/9.txt", "sub/x.bin"):
        (tmp_path / name).write_bytes(b"\0\1\2\3" if name.endswith("bin") else b"x")
    chat, output = make_chat(columns=100)
    chat.handle(f"/load {tmp_path}/*.md")
    chat.handle(f"/load {tmp_path}/d e.txt")
    shown(output)
    chat.handle(f"/load {tmp_path}/sub")
    assert shown(output).splitlines()[0] == (
        "1 file or folder left out (a binary file ×1); `duolocal docs tokens PATH` lists them"
    )
    assert chat.state.session.documents == ["a.md", "b.md", "d e.txt", "sub/9.txt", "sub/10.txt"]
    shown(output)
    chat.handle(f"/load {tmp_path}/*.rst")
    assert "no file matches" in shown(output)


def test_what_is_good_is_loaded_and_every_failure_named(tmp_path: Path) -> None:
    for name in ("a.txt", "c.txt"):
        (tmp_path / name).write_text(f"one two {name}")
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.4 broken")
    chat, output = make_chat(columns=200)
    chat.handle(f"/load {tmp_path}/a.txt {tmp_path}/missing.txt {tmp_path}/b.pdf {tmp_path}/c.txt {tmp_path}/*.rst")
    said = shown(output)
    assert "missing.txt does not exist" in said and "b.pdf is" in said and "no file matches" in said
    assert chat.state.session.documents == ["a.txt", "c.txt"]
    chat.handle(f"/load {tmp_path}/missing.txt")
    assert "missing.txt does not exist" in shown(output)


def test_documents_that_do_not_fit_are_refused_together() -> None:
    chat, output = make_chat()
    huge = Document("huge.txt", Path("huge.txt"), "word " * 1001, "utf-8", 5005)
    small = Document("small.txt", Path("small.txt"), "word", "utf-8", 4)
    add_documents(chat, [small, huge])
    assert shown(output) == "1,002 tokens of documents do not fit"
    assert chat.state.session.engine.position == 0


def test_documents_of_the_same_name_are_told_apart() -> None:
    chat, _ = make_chat()
    for text in ("one", "two", "three"):
        add_documents(chat, [Document("a.md", Path(f"{text}/a.md"), text, "utf-8", 3)])
    add_documents(chat, [Document("a.md", Path("three/a.md"), "changed", "utf-8", 3)])
    assert chat.state.session.documents == ["a.md", "two/a.md", "three/a.md", "three/a.md (2)"]


def test_a_stopped_load_says_what_is_missing() -> None:
    class Stopped(FakeSession):
        def _append(self, kind, name, text):
            self.cancel()
            return super()._append(kind, name, text)

    chat, output = make_chat(Stopped())
    add_documents(chat, [Document(name, Path(name), "word", "utf-8", 4) for name in ("a", "b")])
    assert shown(output) == "loaded a: 1 token\nstopped: b is not in the context\n999 tokens are free"


def test_names_of_documents_cannot_steer_the_terminal() -> None:
    chat, output = make_chat()
    name = "evil\x1b[2J\n[red]x"
    add_documents(chat, [Document(name, Path(name), "word", "utf-8", 4)])
    chat.handle("/docs")
    chat.handle("/context")
    assert "\x1b" not in output.getvalue()
    assert "evil␛[2J␤[red]x" in output.getvalue()


def test_retry_reset_system() -> None:
    session = FakeSession()
    chat, output = make_chat(session)
    chat.handle("/system")
    assert shown(output) == "no system message; /system TEXT sets one"
    chat.handle("/system Be brief.")
    chat.handle("/system")
    assert shown(output).endswith("Be brief.")
    add_documents(chat, [Document("a", Path("a"), "word", "utf-8", 4)])
    chat.handle("question")
    session.answer = ["other"]
    chat.handle("/retry")
    assert [message.content for message in session.messages] == ["Be brief.", "question", "other"]
    assert list(chat.state.questions.values()) == ["question"]
    shown(output)
    chat.handle("/reset")
    assert shown(output) == "the conversation is forgotten; 1 document stays"
    assert (session.documents, chat.state.questions) == (["a"], {})
    chat.handle("/reset all")
    assert shown(output) == "the context is empty"
    chat.handle("/system none")
    assert session.system is None


def test_the_transcript_holds_what_was_typed_not_the_documents(tmp_path: Path) -> None:
    class Wrapping(FakeSession):
        def ask(self, text, sampling):
            yield from super().ask(f"<document>long</document>\n\n{text}", sampling)

    chat, _ = make_chat(Wrapping())
    chat.handle("first\n\nsecond paragraph")
    chat.handle(f"/save {tmp_path}/chat.md")
    text = (tmp_path / "chat.md").read_text()
    assert "## You\n\nfirst\n\nsecond paragraph\n\n## tiny" in text
    assert "document" not in text


def test_stopping_before_the_answer_takes_the_question_back() -> None:
    chat, output = make_chat(FakeSession(cancel_after=0))
    chat.handle("why?")
    assert shown(output).strip() == "stopped before the answer began; the question is not in the context"
    assert (chat.state.questions, chat.state.ends, chat.state.last_answer) == ({}, {}, None)


def test_stats_name_both_head_classes_and_the_dense_figure() -> None:
    chat, output = make_chat(columns=100)
    chat.handle("hello")
    shown(output)
    chat.state.session.engine.speculation = speculation = Speculation()
    speculation.counts = Counts(steps=3, tried=12, accepted=5)
    chat.handle("/stats")
    listed = shown(output)
    for text in (
        "45 of 90 KV heads retrieval (measured)",
        "64 sink + 256 recent",
        "4 MiB (blocks 3 MiB",
        "6 MiB; dense 16-bit 24 MiB (25%)",
        "int8",
        "RoPE scaling: yarn, factor 4",
        "1 token, 2.0 tokens/s",
        "looked ahead 3 times, 5 of 12 tokens right",
    ):
        assert text in listed
    chat.state.session.engine.speculation = None
    chat.handle("/stats")
    assert re.search(r"speculation +off", shown(output))


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (120, " 812/1,000 tokens · 12.0 tokens/s · KV 4 MiB retrieval + 2 MiB streaming · int8 · tiny "),
        (60, " 812/1,000 tokens · 12.0 tokens/s · int8 · tiny "),
        (40, " 812/1000 · 12.0 tokens/s · int8 · tiny "),
        (20, " 812/1000 · int8 "),
    ],
)
def test_the_status_line_fits(columns: int, line: str) -> None:
    memory = FakeSession().engine.memory()
    built = views.status_line(FACTS, 812, memory, Finished("stop", 5, 3, 0.5, 0.25), columns)
    assert built == line
    assert len(built) <= columns


def test_welcome_says_what_is_loaded_and_what_to_type() -> None:
    text = views.welcome(FACTS, 0).plain
    assert text == (
        "tiny (Q4_1), context 1,000 tokens, KV int8, 45 of 90 KV heads retrieval\n"
        "Ask a question; /load FILE adds a document, /help shows more, Ctrl-D leaves."
    )


def test_an_interrupt_stops_the_answer_and_keeps_the_session(tmp_path: Path) -> None:
    class Interrupted(FakeSession):
        def ask(self, text, sampling):
            for event in super().ask(text, sampling):
                yield event
                if getattr(event, "text", "") == "It is ":
                    signal.raise_signal(signal.SIGINT)

    session = Interrupted()
    chat, output = make_chat(session)
    before = signal.getsignal(signal.SIGINT)
    chat.handle("colour?")
    assert signal.getsignal(signal.SIGINT) is before
    assert "It is\n" in shown(output)
    assert chat.state.last_answer is not None
    assert chat.state.last_answer.reason == "cancelled"
    chat.handle(f"/save {tmp_path}/chat.md")
    assert (tmp_path / "chat.md").read_text() == (
        "# Chat with tiny\n\n## You\n\ncolour?\n\n## tiny\n\nIt is\n\n*(stopped)*\n"
    )
    chat.handle("/undo")
    assert session.messages == []
    assert chat.state.ends == {}


def test_a_third_interrupt_gets_out_of_what_hangs() -> None:
    class Hanging(FakeSession):
        def cancel(self) -> None:
            pass

        def ask(self, text, sampling):
            while True:
                yield from ()
                signal.raise_signal(signal.SIGINT)

    chat, _ = make_chat(Hanging())
    with pytest.raises(KeyboardInterrupt):
        chat.handle("colour?")


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("length", "cut off by max_tokens; /set max_tokens none lifts it"),
        ("context", "cut off: the context of 1,000 tokens is full; /undo or /reset makes room"),
        ("cancelled", "stopped by Ctrl-C; what is there stays in the context"),
    ],
)
def test_an_incomplete_answer_is_said_to_be_so(reason: Reason, line: str) -> None:
    chat, output = make_chat(FakeSession(reason=reason))
    chat.handle("go")
    assert shown(output).splitlines()[-1] == line


def test_save_does_not_overwrite_unasked(tmp_path: Path) -> None:
    path = tmp_path / "chat.md"
    path.write_text("precious")
    chat, _ = make_chat()
    chat.handle("go")
    with pytest.raises(SettingsError) as raised:
        chat.handle(f"/save {path}")
    assert str(raised.value) == f"{path} exists: choose another name, or /save --force {path}"
    assert path.read_text() == "precious"
    chat.handle(f"/save --force {path}")
    assert path.read_text().startswith("# Chat with tiny")
    with pytest.raises(SettingsError, match="cannot be written: No such file or directory"):
        chat.handle(f"/save {tmp_path}/nowhere/chat.md")


def test_copy_uses_osc_52_and_says_when_it_is_too_long() -> None:
    session = FakeSession()
    chat, output = make_chat(session)
    chat.handle("go")
    shown(output)
    chat.handle("/copy")
    encoded = base64.b64encode(b"It is **green**.").decode()
    assert output.getvalue().startswith(f"\x1b]52;c;{encoded}\x07")
    session.answer = ["x" * 60_000]
    chat.handle("more")
    with pytest.raises(SettingsError, match="the text has 60,000 bytes and terminals take 56,244: use /save FILE"):
        chat.handle("/copy")


@pytest.mark.parametrize("columns", [40, 80])
def test_help_lists_every_command_and_fits(columns: int) -> None:
    chat, output = make_chat(columns=columns)
    chat.handle("/help")
    lines = shown(output).splitlines()
    for name in commands.COMMANDS:
        assert any(line.startswith(f"/{name}") for line in lines)
    assert max(map(len, lines)) <= columns


@pytest.mark.parametrize("word", ["/quit", "/exit", "/q"])
def test_quit(word: str) -> None:
    chat, _ = make_chat()
    chat.handle(word)
    assert chat.state.leaving


def test_a_path_longer_than_a_line_can_be_copied(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 40) / "chat.md"
    path.parent.mkdir()
    chat, output = make_chat(columns=50)
    chat.handle("What colour is it?")
    shown(output)
    chat.handle(f"/save {path}")
    assert shown(output).splitlines() == ["saved", str(path)]
    chat.complain(f"{path} is not what was expected here, so it is left as it is")
    assert shown(output).splitlines() == [str(path), "is not what was expected here, so it is left as it", "is"]
