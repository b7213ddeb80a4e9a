"""A runner that computes nothing: it keeps count of its tokens, writes a log, and answers with the speeds it is told.

Run as a child: `python -m tests.fake_runner`, or with the argument `leaky` for one that speaks through the real
`serve_runner` and does not remove what it decoded.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from duolocal.bench.runners.serve import serve, serve_runner
from duolocal.errors import SettingsError


class Fake:
    """Speeds come from "load": tokens per second of prefill and decode."""

    def __init__(self) -> None:
        self.position = 0
        self.asked = 0

    def load(self, *, log: str, name: str, crash: str = "", refuse: str = "", leak: int = 0, **speeds: Any) -> Any:
        self.log, self.name, self.crash, self.leak, self.speeds = Path(log), name, crash, leak, speeds
        if refuse:
            raise SettingsError(refuse)
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        environment = {key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "OMP_PROC_BIND", "HF_HUB_OFFLINE")}
        sys.stdout.write("a library's idle talk on standard output\n")
        sys.stdout.flush()
        return {"info": {"cpus": cpus, "environment": environment, "pid": os.getpid()}, "imported_bytes": 5 << 20}

    def prefill(self, token_ids: Sequence[int], keep: bool) -> Any:
        self._write("prefill", len(token_ids), keep)
        if keep:
            self.position += len(token_ids)
        return {"elapsed_s": len(token_ids) / self.speeds["prefill"], "position": self.position}

    def decode(self, token_id: int, num_tokens: int) -> Any:
        self._write("decode", token_id, num_tokens)
        self.position += self.leak if self.asked else 0  # not yet while warming up
        greedy_ids = [token_id] * (num_tokens + 1)
        # Of three in a row one is much slower and one much faster, so that only the median is as told.
        self.asked += 1
        elapsed_s = (10, 0.2, 1)[self.asked % 3] * num_tokens / self.speeds["decode"]
        return {"elapsed_s": elapsed_s, "position": self.position, "greedy_ids": greedy_ids}

    def _write(self, *words: Any) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps([self.name, *words]) + "\n")
        if self.crash == words[0]:
            sys.stderr.write("warming up\nCUDA error: out of\tpaper\n\nassertion failed: tokens <= paper\n")
            sys.stderr.flush()
            os._exit(7)


class Leaky:
    """A Runner that forgets to remove tokens."""

    position = 0

    def load(self) -> dict[str, Any]:
        return {}

    def prefill(self, token_ids: Sequence[int]) -> None:
        self.position += len(token_ids)

    def greedy(self, token_id: int, num_tokens: int) -> Iterator[int]:
        for _ in range(num_tokens):
            self.position += 1
            yield token_id

    def mark(self) -> None:
        pass

    def rewind(self, mark: None) -> None:
        pass


if __name__ == "__main__":
    if sys.argv[1:] == ["leaky"]:
        serve_runner(Leaky())
    else:
        fake = Fake()
        serve({"load": fake.load, "prefill": fake.prefill, "decode": fake.decode})
