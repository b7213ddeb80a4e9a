"""What the system refuses is one line, for every command, and paths that name no user are paths like others."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from duolocal import cli
from duolocal.documents import load_document
from duolocal.errors import DuoLocalError, refusal
from duolocal.models.registry import resolve
from duolocal.paths import user_path
from duolocal.terminal.consoles import telling_after
from tests.terminal_fakes import make_chat

ROOT = Path(__file__).parents[1]
LOCK_FILE = "~$report.docx"  # as Word leaves them beside an open document


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.jsonl"), "a.jsonl: No space left on device: free some"),
        (OSError(errno.EACCES, "Permission denied", b"dir"), "dir: Permission denied: look at the permissions"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "File name too long: use a shorter name"),
        (OSError("odd"), "odd"),
        (MemoryError(), "the memory of this machine is used up"),
    ],
)
def test_a_command_that_the_system_stops_says_one_line(
    error: OSError, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "run", stopped)
    assert cli.main(["models"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"duolocal: {line}") and told.count("\n") == 1
    assert refusal(error).startswith(line)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("words", [["models"], ["chat", "--help"], ["--version"]])
def test_an_output_that_takes_no_more(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "duolocal", *words], stdout=full, stderr=subprocess.PIPE, cwd=ROOT, text=True
        )
    assert (done.returncode, done.stderr) == (1, "duolocal: No space left on device: free some space\n")


def test_a_name_that_no_user_has_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert user_path(LOCK_FILE) == Path(LOCK_FILE)
    assert user_path("~") == Path.home()
    Path(LOCK_FILE).write_text("text")
    chat, _ = make_chat()
    chat.handle("/save ~nobody-of-this-name.md")
    assert (tmp_path / "~nobody-of-this-name.md").is_file()
    for refused in (lambda: load_document("~$other.docx"), lambda: resolve("~$model.gguf")):
        with pytest.raises(DuoLocalError, match=r"~\$"):
            refused()


def test_what_takes_long_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with telling_after(60, "slow"):
        pass
    assert capsys.readouterr().err == ""
    with telling_after(0, "slow") as _:
        import time

        time.sleep(0.05)
    assert capsys.readouterr().err == "duolocal: slow\n"


def test_the_nearest_of_version_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 2
    assert "did you mean --version?" in capsys.readouterr().err
