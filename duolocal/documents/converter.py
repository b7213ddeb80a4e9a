"""The process that converts formats, seen from this side: start it, ask it, end it.

A file of a stranger may make a library loop, recurse or fill the memory. So libraries never run in our process: the
other one has a limit of memory, is ended when it falls silent, and holds nothing that could be lost. One process
serves many files; after a failure the next file gets a new one.
"""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duolocal.documents.converted import ConversionError, Converted
from duolocal.documents.model import Part
from duolocal.processes import LineProcess

SILENCE_S = 60.0  # without a further page
LIMIT_S = 600.0  # for one file
SPENT_BYTES = 512 * 2**20  # a process that has held more than this is not used again

# Before what is installed (another duolocal might be), after Python's own modules.
_START = """\
import sys
at = next((at for at, path in enumerate(sys.path) if path.endswith("-packages")), len(sys.path))
sys.path.insert(at, sys.argv[1])
from duolocal.documents.child import main
main()
"""
_ROOT = Path(__file__).parents[2]

Progress = Callable[[int, int], None]  # pages done, of how many


class Converter:
    """Converts files one after the other; a context manager. The process starts with the first file."""

    def __init__(self, *, silence_s: float = SILENCE_S, limit_s: float = LIMIT_S) -> None:
        self._silence_s = silence_s
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._process: LineProcess | None = None

    def __enter__(self) -> "Converter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def convert(self, data: bytes, kind: str, *, on_progress: Progress | None = None) -> Converted:
        """Convert the bytes of one file of a kind in `formats.CONVERTED`; raises ConversionError."""
        with self._lock:
            try:
                answer, text = self._ask(data, kind, on_progress or (lambda done, total: None))
            except BaseException:
                self.close()
                raise
            if answer["peak_bytes"] > SPENT_BYTES:
                self.close()
        if "error" in answer:
            raise ConversionError(answer["error"])
        parts = tuple(Part(label, start) for label, start in answer["parts"])
        return Converted(text, parts, tuple(answer["notes"]), answer["encoding"], answer["num_replaced"])

    def close(self) -> None:
        """End the process; a further file starts another."""
        if self._process is not None:
            self._process.close()
        self._process = None

    def _started(self) -> LineProcess:
        if self._process is None or self._process.popen.poll() is not None:
            self.close()
            # -P: a module in the folder we were started in must not stand in for one of Python's.
            self._process = LineProcess([sys.executable, "-P", "-c", _START, str(_ROOT)])
        return self._process

    def _ask(self, data: bytes, kind: str, on_progress: Progress) -> tuple[dict[str, Any], str]:
        process = self._started()
        with _Watch(process, silence_s=self._silence_s, limit_s=self._limit_s) as watch:
            process.send({"kind": kind, "num_bytes": len(data)}, data)
            while (answer := process.receive()) is not None:
                watch.heard()
                if "done" in answer:
                    on_progress(answer["done"], answer["total"])
                    continue
                text = process.stdout.read(answer["text_bytes"])
                if len(text) == answer["text_bytes"]:
                    return answer, text.decode()
                break  # it has died within its answer
            code = process.popen.wait()  # still watched: it may have closed its end and go on
            if watch.expired_s is not None:
                raise ConversionError(
                    f"took longer than {watch.expired_s:.0f} s to convert and was given up: it may be damaged or made "
                    "to harm; convert it elsewhere and load the text"
                )
        raise ConversionError(
            f"ended the process that converts it (exit code {code}): it may be damaged or made to harm; convert it "
            "elsewhere and load the text"
        )


class _Watch:
    """Kills a process that says nothing for too long, or is not done in time."""

    def __init__(self, process: LineProcess, *, silence_s: float, limit_s: float) -> None:
        self._process = process
        self._silence_s = silence_s
        self._limit_s = limit_s
        self._began_s = self._heard_s = time.monotonic()
        self._over = threading.Event()
        self.expired_s: float | None = None  # the limit that was passed
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def heard(self) -> None:
        self._heard_s = time.monotonic()

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            until_s = min(self._heard_s + self._silence_s, self._began_s + self._limit_s)
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                silent = time.monotonic() >= self._heard_s + self._silence_s
                self.expired_s = self._silence_s if silent else self._limit_s
                self._process.popen.kill()
                return
            if self._over.wait(left_s):
                return
