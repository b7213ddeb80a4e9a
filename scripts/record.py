"""Record real runs of the three jobs for the README: type into a shell in tmux and keep what the screen shows.

    .venv/bin/python scripts/record.py [chat] [reopen] [summarize]

Writes docs/NAME.svg for each and prints the screens as text; needs tmux.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
COLUMNS, LINES = 92, 60
TMUX = ("tmux", "-L", "duolocal-record")
SHELL_PROMPT, CHAT_PROMPT = "$", ">"


@dataclass(frozen=True)
class Scene:
    """What is typed, line by line; the screen at the end is kept, so `clear` ends a preparation."""

    title: str
    lines: Sequence[str]


SCENES = {
    "chat": Scene(
        "python chat.py --doc docs/summarize.md",
        (
            "python chat.py --doc docs/summarize.md --temperature 0 --keep off",
            "What happens when a run is killed half-way?",
            "/context",
            "/sources",
            "/quit",
        ),
    ),
    "reopen": Scene(
        "python chat.py --session guide",
        (
            "python chat.py --model smollm2-135m --doc LICENSE README.md docs/sessions.md --session guide",
            "/quit",
            "clear",
            "python chat.py --session guide --temperature 0 --max-tokens 60",
            "/docs",
            "What is AWQ?",
            "/quit",
        ),
    ),
    "summarize": Scene(
        "duolocal summarize docs LICENSE --out summaries.jsonl",
        (
            "duolocal summarize docs LICENSE --out summaries.jsonl --model smollm2-135m",
            "head -c 700 summaries.jsonl; echo",
        ),
    ),
}


def tmux(*words: str) -> str:
    return subprocess.run([*TMUX, *words], check=True, capture_output=True, text=True).stdout


def wait_for_prompt() -> None:
    """Wait until a prompt of the shell or the chat has been standing still for a moment."""
    before, still = "", 0
    while still < 3:
        time.sleep(1)
        screen = tmux("capture-pane", "-p").rstrip()
        written = [line.strip() for line in screen.splitlines() if line.strip()]
        # In the chat a status line comes after the prompt.
        waiting = written[-1:] == [SHELL_PROMPT] or CHAT_PROMPT in written[-3:]
        still = still + 1 if waiting and screen == before else 0
        before = screen


def play(scene: Scene, folder: Path) -> list[str]:
    """Return the lines of the screen at the end of a scene, with their colours."""
    environment = {
        "PS1": f"{SHELL_PROMPT} ",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DUOLOCAL_SESSIONS": str(folder / "sessions"),
    }
    words = [f"{name}={value}" for name, value in environment.items()]
    size = ("-x", str(COLUMNS), "-y", str(LINES))
    tmux("new-session", "-d", *size, "-c", str(ROOT), "env", *words, "bash", "--norc", "--noprofile")
    try:
        for line in scene.lines:
            wait_for_prompt()
            if line == "/quit":
                screen = tmux("capture-pane", "-p", "-e")
            tmux("send-keys", "-l", line)
            time.sleep(0.5)
            tmux("send-keys", "Enter")
        if scene.lines[-1] != "/quit":
            wait_for_prompt()
            screen = tmux("capture-pane", "-p", "-e")
    finally:
        subprocess.run([*TMUX, "kill-server"], check=False, capture_output=True)
    # The screen is empty between the prompt and the status line at its foot.
    return re.sub(r"\n{3,}", "\n\n", screen.rstrip()).splitlines()


def main() -> None:
    # Without the web fonts that Rich's template names: a picture of ours loads nothing from elsewhere.
    template = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    for name in sys.argv[1:] or SCENES:
        with tempfile.TemporaryDirectory() as folder:
            lines = play(SCENES[name], Path(folder))
        (ROOT / "summaries.jsonl").unlink(missing_ok=True)
        console = Console(record=True, width=COLUMNS, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(Text.from_ansi("\n".join(lines)), soft_wrap=True)
        console.save_svg(str(ROOT / "docs" / f"{name}.svg"), title=SCENES[name].title, code_format=template)
        print("\n".join(Text.from_ansi(line).plain for line in lines), end="\n\n")


if __name__ == "__main__":
    main()
