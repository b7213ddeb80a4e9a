"""A target whose reader does everything a reader must not: what the harness itself is tested with."""

import os
import random
import time
from pathlib import Path

from duolocal.errors import DuoLocalError
from tests.fuzz.base import Target

WAYS = (
    "fine",
    "refuses",
    "raises",
    "says two lines",
    "says escapes",
    "says too much",
    "runs a program",
    "writes a file",
    "takes memory",
    "hangs",
    "dies",
)


class _Raw(DuoLocalError):
    """A refusal whose message is not made printable."""

    def __init__(self, message: str) -> None:
        super().__init__("x")
        self.args = (message,)


def _damage(seeds: Path, out: Path, rng: random.Random) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "way"
    path.write_text(rng.choice(WAYS))
    return path


def _read(path: Path) -> None:
    way = path.read_text() if path.is_file() else "fine"
    if way == "refuses":
        raise DuoLocalError("no such thing")
    if way == "raises":
        raise KeyError("x")
    if way == "says two lines":
        raise _Raw("a\nb")
    if way == "says escapes":
        raise _Raw("a\x1b[31m")
    if way == "says too much":
        raise _Raw("a" * 5000)
    if way == "runs a program":
        os.system("true")
    if way == "writes a file":
        (path.parent.parent / f"{path.parent.name}-outside").touch()
    if way == "takes memory":
        bytearray(8 << 30)
    if way == "hangs":
        time.sleep(600)
    if way == "dies":
        os.abort()


MISBEHAVING = Target("misbehaving", "tokenizer", _damage, _read)
