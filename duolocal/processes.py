"""Child processes and Ctrl-C: the one place that ends, limits and measures processes, and that handles SIGINT.

Owns no protocol: what is asked and answered belongs to who starts a child. Loads nothing that is not Python's.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, BinaryIO

INTERRUPTED = 128 + signal.SIGINT  # exit code


# --- seen from the parent -------------------------------------------------------------------------------------------


class LineProcess:
    """A child that answers JSON lines with JSON lines.

    It does not outlive us: it is ended by `close`, when this object is collected, and when Python leaves.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stderr: int | IO[Any] = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=env, cwd=cwd
        )
        assert self.popen.stdin is not None and self.popen.stdout is not None
        self._stdin, self.stdout = self.popen.stdin, self.popen.stdout
        self._end = weakref.finalize(self, end, self.popen)

    def send(self, request: Mapping[str, Any], data: bytes = b"") -> None:
        """Send a request, with bytes after it; one that has ended takes nothing, and will not answer."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._stdin.write(json.dumps(request).encode() + b"\n")
            self._stdin.write(data)
            self._stdin.flush()

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next answer; None where it has ended or closed its end."""
        line = self.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def close(self, *, grace_s: float = 0.0) -> None:
        """End it; with `grace_s`, give it so many seconds to do so by itself."""
        if grace_s:
            with suppress(BrokenPipeError):
                self._stdin.close()
            if self.popen.poll() is None:
                self.popen.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self.popen.wait(grace_s)
        self._end()


def end(process: "subprocess.Popen[Any]", *, group: bool = False) -> None:
    """Kill a child, wait for it and close its pipes; with `group`, what it started goes too."""
    if group:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # what was still to be sent to it
                pipe.close()


def how_ended(code: int) -> str:
    """Say how a child with this return code ended."""
    return f"ended by signal {-code}" if code < 0 else f"exit code {code}"


def output_of(*command: str) -> str | None:
    """Return what a short command writes, stripped; None where it cannot be run, fails or hangs."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# --- seen from the child --------------------------------------------------------------------------------------------


def answer_on_stdout() -> BinaryIO:
    """Return what this process answers its parent on; what a library prints goes to stderr, Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both, and the parent ends us
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def send(replies: BinaryIO, answer: Mapping[str, Any], data: bytes = b"") -> None:
    """Write an answer in one line, with bytes after it."""
    replies.write(json.dumps(answer).encode() + b"\n")
    replies.write(data)
    replies.flush()


def limit_memory(num_bytes: int, *, file_bytes: int | None = None) -> None:
    """Limit the address space of this process, and what it writes into any file; no core dumps.

    Windows has no such limits.
    """
    try:
        import resource
    except ImportError:
        return
    limits = {resource.RLIMIT_AS: num_bytes, resource.RLIMIT_CORE: 0}
    if file_bytes is not None:
        limits[resource.RLIMIT_FSIZE] = file_bytes
    for what, limit in limits.items():
        _, most = resource.getrlimit(what)
        if most != resource.RLIM_INFINITY:
            limit = min(limit, most)
        resource.setrlimit(what, (limit, limit))


def peak_bytes() -> int:
    """Return the most memory this process ever had resident, mapped files included."""
    peak = status_bytes("VmHWM")  # not ru_maxrss: on Linux a child's starts with its parent's
    if peak is not None:
        return peak
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Return the memory this process has resident now."""
    resident = status_bytes("VmRSS")
    if resident is None:
        import psutil

        resident = psutil.Process().memory_info().rss
    return resident


def status_bytes(field: str) -> int | None:
    """Return a size from this process's status; None where the system does not tell."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


@contextmanager
def cancel_on_interrupt(cancel: Callable[[], None], *, most: int) -> Iterator[Callable[[], None]]:
    """Turn Ctrl-C into a call of `cancel`; the `most`-th in a row raises KeyboardInterrupt, whatever hangs.

    Yields a function to call at every event: it repeats the cancel, which may have been missed between two steps of
    the work. Does nothing outside the main thread, where Python handles no signals.
    """
    presses = 0

    def insist() -> None:
        if presses:
            cancel()

    if threading.current_thread() is not threading.main_thread():
        yield insist
        return

    def handle(_signal: int, _frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses >= most:
            raise KeyboardInterrupt
        cancel()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield insist
    finally:
        signal.signal(signal.SIGINT, before)
