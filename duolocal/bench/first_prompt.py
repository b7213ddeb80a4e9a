"""From the command line to the chat's first prompt, in a terminal of its own: what a person waits for."""

import importlib.util
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from duolocal.bench.child import child_environment
from duolocal.errors import DuoLocalError
from duolocal.kernels.cpu.threads import unbound
from duolocal.processes import end

_READY = b"\x1b[?2004h"  # "bracketed paste on": the input line has begun to read
_TIMEOUT_S = 600
_TAIL_CHARACTERS = 400


def can_measure() -> bool:
    """Return whether this system has terminals that a program can make."""
    return importlib.util.find_spec("pty") is not None and os.name == "posix"


def first_prompt_s(words: Sequence[str], *, threads: int | None = None) -> float:
    """Return the seconds from starting `duolocal chat WORDS` to its first prompt; the chat is ended there.

    Raises DuoLocalError where it ends before, or says nothing for ten minutes.
    """
    import pty

    ours, theirs = pty.openpty()
    began_s = time.perf_counter()
    try:
        with unbound():
            process = subprocess.Popen(
                [sys.executable, "-m", "duolocal", "chat", *words],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                env={**child_environment(threads), "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
                start_new_session=True,
            )
    finally:
        os.close(theirs)
    said = b""
    try:
        while _READY not in said:
            readable, _, _ = select.select([ours], [], [], _TIMEOUT_S)
            piece = b""
            with suppress(OSError):  # Linux says so where the other end has closed
                piece = os.read(ours, 65536) if readable else b""
            if not piece:
                tail = " ".join(said.decode(errors="replace").split())[-_TAIL_CHARACTERS:]
                raise DuoLocalError(f"the chat ended before its first prompt: {tail or 'it said nothing'}")
            said += piece
        return time.perf_counter() - began_s
    finally:
        end(process)  # it has nothing to lose
        os.close(ours)
