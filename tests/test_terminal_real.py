"""The chat with the real default model in a pseudo-terminal, as a user drives it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect", reason="pexpect is not installed (no pseudo-terminals on Windows)")

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("smollm2_path")]

ROOT = Path(__file__).parents[1]
CHAT = [str(ROOT / "chat.py"), "--kv", "int8", "--heads", "all", "--context", "1K"]
PROMPT = r"\x1b\[\?2004h"  # bracketed paste is switched on: the prompt waits for input
PROMPT_LEFT = r"\x1b\[\?2004l"
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\r")


class Terminal:
    """A chat in a pseudo-terminal of 24 lines."""

    def __init__(self, history: Path, smollm2_path: Path) -> None:
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"}
        # The history goes to a folder of its own; the model is given by path, as the cache moves with it.
        environment |= {"DUOLOCAL_CACHE": str(history), "PROMPT_TOOLKIT_NO_CPR": "1"}
        words = [*CHAT, "--model", str(smollm2_path), "--temperature", "0", "--max-tokens", "12"]
        self.child = pexpect.spawn(
            sys.executable,
            words,
            cwd=str(ROOT),
            env=environment,
            encoding="utf-8",
            dimensions=(24, 80),
            timeout=60,
        )

    def expect(self, pattern: str) -> str:
        """Wait for a pattern; return what came up to its end, without escape sequences."""
        self.child.expect(pattern)
        return CONTROLS.sub("", self.child.before + self.child.after)

    def enter(self, text: str) -> None:
        self.child.send(text + "\r")


@pytest.fixture
def terminal(tmp_path: Path, smollm2_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path, smollm2_path)
    yield terminal
    terminal.child.close(force=True)


def test_a_chat_from_the_first_question_to_quit(terminal: Terminal, tmp_path: Path) -> None:
    document = tmp_path / "colour.txt"
    document.write_text("The door of the house is green.\n")
    terminal.expect("Ctrl-D")
    terminal.expect(PROMPT)
    terminal.enter("What is the capital of France?")
    assert "Paris" in terminal.expect(r"first after")

    terminal.enter(f"/load {document}")
    terminal.expect(r"loaded colour\.txt: \d+ tokens")
    terminal.enter("/context")
    assert "colour.txt" in terminal.expect("in the context")

    terminal.enter("/contxt")
    terminal.expect(r"did you mean[\s\S]*/context\?")

    terminal.enter("/set max_tokens none")
    terminal.expect("max_tokens = none")
    terminal.enter("Write a long story about the sea.")
    terminal.expect(PROMPT_LEFT)
    terminal.expect("[a-z]+ [a-z]+ [a-z]+ [a-z]+ ")  # the answer has begun
    terminal.child.sendintr()
    terminal.expect("stopped by Ctrl-C")

    terminal.enter("/undo")
    terminal.expect("undone: ")
    terminal.enter("/docs")
    terminal.expect("colour\\.txt: [\\s\\S]*utf-8")
    terminal.enter("/quit")
    terminal.child.expect(pexpect.EOF)
    terminal.child.close()
    assert terminal.child.exitstatus == 0
    assert "What is the capital of France?" in (tmp_path / "history").read_text()


def test_one_answer_over_a_piped_document(smollm2_path: Path) -> None:
    options = ["--model", str(smollm2_path), "--json", "--temperature", "0", "--max-tokens", "5"]
    result = subprocess.run(
        [sys.executable, *CHAT, *options, "--prompt", "Which colour has the door? Answer with one sentence."],
        input=b"The door of the house is green.\n",
        capture_output=True,
        timeout=120,
    )
    assert result.stderr.decode().splitlines() == [
        "duolocal: 32 bytes of standard input are read as a document (`< /dev/null` keeps it out)",
        "duolocal: the answer was cut off by max_tokens: raise --max-tokens",
    ]
    report = json.loads(result.stdout)
    assert result.returncode == 3
    assert (report["finish_reason"], report["tokens"]["completion"]) == ("length", 5)
    assert [document["name"] for document in report["documents"]] == ["stdin"]
    assert report["kv"]["format"] == "int8"
    assert report["text"].strip()
