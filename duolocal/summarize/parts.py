"""Answers about parts of long documents, kept until their document is done: what --resume goes on from inside one."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from duolocal.summarize.reader import Answer


class KeptParts:
    """A file of one JSON line per answer, found by what it depends on: the settings and the text that was read.

    A torn line is passed over, so the file is usable however the process ended.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        """Take up what `path` holds, or remove it where `resume` is not asked for. Raises OSError."""
        self.path = path
        self._answers: dict[str, Answer] = {}
        if not resume:
            self.remove()
        elif path.exists():
            for line in path.read_bytes().splitlines():
                try:
                    key, answer = json.loads(line)
                    self._answers[key] = Answer(**answer)
                except (ValueError, TypeError):
                    continue

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        """Return the answer that is kept for a key of `part_key`."""
        return self._answers.get(key)

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer, on the disk when this returns. Raises OSError."""
        line = json.dumps([key, asdict(answer)]).encode()
        with self.path.open("ab") as file:
            file.write(b"\n" + line)  # before it: the line there may be torn
            file.flush()
            os.fsync(file.fileno())
        self._answers[key] = answer

    def remove(self) -> None:
        """Forget all. Raises OSError."""
        self._answers.clear()
        self.path.unlink(missing_ok=True)


def part_key(settings_digest: str, max_tokens: int | None, text: str) -> str:
    """Return what an answer depends on, as 32 hex digits."""
    words = f"{settings_digest} {max_tokens} {text}"
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()[:32]
