"""The input line, fed with the bytes that a terminal sends."""

from collections.abc import Callable
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from duolocal.terminal import commands
from duolocal.terminal.prompt import InputCompleter, InputLine, is_open, unwrap

CTRL_C, CTRL_D, ALT_ENTER, UP = "\x03", "\x04", "\x1b\r", "\x1b[A"


def read(typed: str, *, times: int = 1, history: Path | None = None) -> list[str]:
    """Return the inputs that the typed bytes amount to."""
    with create_pipe_input() as pipe:
        line = InputLine(
            history_file=history,
            completer=InputCompleter(commands.help_lines(), commands.words_after),
            status=lambda columns: "status",
            input=pipe,
            output=DummyOutput(),
        )
        pipe.send_text(typed)
        return [line.read() for _ in range(times)]


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("one\r", "one"),
        (f"one{ALT_ENTER}two\r", "one\ntwo"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("'''one\rtwo'''\r", "one\ntwo"),
        ("'''\rone\\\rtwo\r'''\r", "one\\\ntwo"),
        ("\x1b[200~one\ntwo\n\nthree\x1b[201~\r", "one\ntwo\n\nthree"),
        ("\x1b[200~'''Docstring\r\nof a module\n\x1b[201~\r", "'''Docstring\nof a module\n"),
        ("\x1b[200~'''a''' + '''b'''\x1b[201~\r", "'''a''' + '''b'''"),
        (f"\x1b[200~old\x1b[201~{CTRL_C}'''\rnew\r'''\r", "new"),
        (f"wrong{CTRL_C}right\r", "right"),
        (f"{CTRL_C}a{CTRL_C}b{CTRL_C}right\r", "right"),
    ],
)
def test_what_was_typed(typed: str, text: str) -> None:
    assert read(typed) == [text]


@pytest.mark.parametrize("typed", [CTRL_D, CTRL_C + CTRL_C, f"text{CTRL_C}{CTRL_C}"])
def test_ways_to_leave(typed: str) -> None:
    with pytest.raises(EOFError):
        read(typed)


def test_history_lasts_across_runs_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    read("first\rsecond\n", times=2, history=path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read(f"{UP}{UP} again\r", history=path) == ["first again"]


def test_a_history_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert read("one\r", history=tmp_path / "file" / "history") == ["one"]


@pytest.fixture
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    (tmp_path / "report.md").write_text("")
    (tmp_path / "reports").mkdir()
    monkeypatch.chdir(tmp_path)
    completer = InputCompleter(commands.help_lines(), commands.words_after)
    return lambda text: [item.text for item in completer.get_completions(Document(text, len(text)), CompleteEvent())]


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        ("/co", ["context", "copy"]),
        ("/set temp", ["temperature"]),
        ("/reset ", ["all"]),
        ("/load rep", ["ort.md", "orts"]),
        ("/load a.md rep", ["ort.md", "orts"]),
        ("/set temperature 0", []),
        ("hello", []),
        ("/usr/bin", []),
        ("one\n/co", []),
    ],
)
def test_completion(complete: Callable[[str], list[str]], text: str, offered: list[str]) -> None:
    assert complete(text) == offered


@pytest.mark.parametrize(
    ("text", "is_unfinished"),
    [
        ("one", False),
        ("one\\", True),
        ("'''", True),
        ("'''a", True),
        ("'''a'''", False),
        ("''''''", False),
        ("''", False),
    ],
)
def test_open_input(text: str, is_unfinished: bool) -> None:
    assert is_open(text) == is_unfinished


def test_quotes_come_off_only_in_pairs() -> None:
    assert unwrap("'''\none\n'''") == "one"
    assert unwrap("it's '''odd'''") == "it's '''odd'''"
