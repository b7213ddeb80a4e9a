"""`duolocal.Chat`, and the examples of docs/python.md."""

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import duolocal
from duolocal.chat.chat import Answer, Chat
from duolocal.errors import ContextOverflowError, DocumentError, DuoLocalError, SettingsError
from duolocal.settings import CHAT_SAMPLING, LoadSettings

PAGE = Path(__file__).parent.parent / "docs/python.md"
REPORT = "# Report\n\nThe board decides on Friday. Until then nothing is bought.\n"


@pytest.fixture(autouse=True)
def own_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUOLOCAL_SESSIONS", str(tmp_path / "sessions"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.md").write_text(REPORT)


@pytest.fixture
def chat(smollm2_path: Path) -> Chat:
    return Chat(smollm2_path, context=1024, heads="all", temperature=0, max_tokens=6, keep=0)


def test_the_page_runs(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(example, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert "['report.md']" in said and "('report.md', " in said
    assert "no setting is called 'contxt': did you mean context?" in said
    assert "Paris" in said


def test_importing_is_light_and_dir_shows_what_there_is() -> None:
    code = "import sys, duolocal; print('torch' in sys.modules, {'Chat', 'Engine'} <= set(dir(duolocal)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    for name in duolocal.__all__:
        assert getattr(duolocal, name) is not None
    with pytest.raises(AttributeError, match="module 'duolocal' has no attribute 'Chatt'"):
        _ = duolocal.Chatt


def test_an_answer_is_the_same_whole_and_streamed(chat: Chat) -> None:
    whole = chat.add("report.md").ask("Who decides?")
    assert isinstance(whole, Answer) and whole.finished.reason == "length" and whole.finished.completion_tokens == 6
    assert chat.notes[-1] == "the answer was cut off: max_tokens was reached"
    assert "".join(chat.undo().ask("Who decides?", stream=True)) == whole
    assert [message.role for message in chat.session.messages] == ["user", "assistant"]
    assert REPORT in chat.session.messages[0].content


def test_an_answer_that_is_left_stays_as_far_as_it_came(chat: Chat) -> None:
    stream = chat.add_text(REPORT, "note").ask("Who decides?", stream=True)
    first = next(stream)
    chat.ask("When?")
    assert list(stream) == []
    answers = [message.content for message in chat.session.messages if message.role == "assistant"]
    assert answers[0] == first and len(answers) == 2


def test_defaults_are_the_chats(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(smollm2_path, LoadSettings(context=512), keep=0)
    assert asdict(chat.sampling) == asdict(CHAT_SAMPLING) and chat.engine.context == 512


def test_a_session_goes_on_and_prefills_nothing(chat: Chat) -> None:
    chat.add("report.md").ask("Who decides?")
    ids, source = list(chat.engine.token_ids), chat.engine.source
    assert source is not None
    chat.save("audit").close()
    other = Chat(source, session="audit")
    other.engine.step = None  # type: ignore[assignment,method-assign]  # nothing may be computed
    assert other.engine.token_ids == ids and other.documents == ["report.md"] and other.engine.context == 1024
    assert other.add("report.md").notes[-1] == "report.md is in the context already"
    other.close()
    assert chat.undo(2).documents == []
    assert chat.open("audit").documents == ["report.md"]


def test_a_reader_reads_what_does_not_fit(smollm2_path: Path) -> None:
    with Chat(smollm2_path, context=2114, heads="all", reader="retrieve", passages=128, keep=0, max_tokens=4) as chat:
        heard: list[object] = []
        chat._on_event = heard.append
        chat.add_text("The sky is blue. " * 200 + REPORT, "long")
        assert chat.ask("Who decides on Friday?").finished.completion_tokens and chat.documents == ["long"]
        assert "Picked" in {type(event).__name__ for event in heard}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda chat: chat.ask(None), "the question is None: give a text"),
        (lambda chat: chat.ask(" "), "the question is empty: type one"),
        (lambda chat: chat.ask("a", temprature=1), "no setting is called 'temprature': did you mean temperature?"),
        (lambda chat: chat.ask("a", temperature="hot"), "temperature is 'hot': give 0 (greedy) or more, such as 0.7"),
        (lambda chat: chat.add(5), "5 is no document: give a path, or a text with add_text(text, name)"),
        (lambda chat: chat.add("no.md"), "no.md does not exist"),
        (lambda chat: chat.add_text("", "x"), "x: the text is '': give one that is not empty"),
        (lambda chat: chat.undo(), "there are fewer than 1 questions and documents to take back"),
        (lambda chat: chat.open("none"), "there is no session none"),
        (lambda chat: chat.__class__(5), "the model is 5: give a name, a path, or what open_model returns"),
        (lambda chat: Chat("m", passages=5), "--passages is for --reader retrieve"),
        (lambda chat: Chat("smollm-135m"), "no model is called 'smollm-135m'"),
    ],
)
def test_what_is_wrong_is_said_in_words(chat: Chat, call: Any, message: str) -> None:
    with pytest.raises((DocumentError, SettingsError, DuoLocalError), match=re.escape(message)):
        call(chat)


def test_documents_that_do_not_fit_leave_the_chat_as_it_was(chat: Chat) -> None:
    chat.add("report.md")
    with pytest.raises(ContextOverflowError, match="1,024"):
        chat.add_text("one two three " * 1000, "long")
    assert chat.documents == ["report.md"] and chat.ask("Who decides?")
