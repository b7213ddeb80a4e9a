"""Record a real chat for the README: type into `python chat.py` in tmux and keep what the screen shows.

python scripts/record_chat.py            (needs tmux; writes docs/chat.svg, prints the screen as text)
"""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
COLUMNS, LINES = 92, 60
INPUTS = ("What is this project for?", "/context", "/stats", "/quit")
TMUX = ("tmux", "-L", "duolocal-record")


def tmux(*words: str) -> str:
    return subprocess.run([*TMUX, *words], check=True, capture_output=True, text=True).stdout


def wait_for_prompt() -> None:
    """Wait until the prompt has been standing still for a moment."""
    before, still = "", 0
    while still < 3:
        time.sleep(1)
        screen = tmux("capture-pane", "-p").rstrip()
        written = [line.strip() for line in screen.splitlines() if line.strip()]
        waiting = ">" in written[-3:]  # the status line comes after it
        still = still + 1 if waiting and screen == before else 0
        before = screen


def main() -> None:
    chat = shlex.join([sys.executable, "chat.py", "--doc", "README.md", "--temperature", "0", "--max-tokens", "60"])
    tmux("new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES), "-c", str(ROOT), f"{chat}; sleep 2")
    try:
        for text in INPUTS:
            wait_for_prompt()
            screen = tmux("capture-pane", "-p", "-e")  # the last one is before /quit
            tmux("send-keys", "-l", text)
            time.sleep(0.5)
            tmux("send-keys", "Enter")
    finally:
        subprocess.run([*TMUX, "kill-server"], check=False, capture_output=True)
    # The screen is empty between the prompt and the status line at its foot.
    lines = re.sub(r"\n{3,}", "\n\n", screen.rstrip()).splitlines()
    console = Console(record=True, width=COLUMNS, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(Text.from_ansi("\n".join(lines)), soft_wrap=True)
    # Without the web fonts that Rich's template names: a picture of ours loads nothing from elsewhere.
    template = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    console.save_svg(str(ROOT / "docs" / "chat.svg"), title="python chat.py --doc README.md", code_format=template)
    print("\n".join(Text.from_ansi(line).plain for line in lines))


if __name__ == "__main__":
    main()
