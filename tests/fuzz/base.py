"""What a target is, and what all of them need."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from duolocal.errors import DuoLocalError

LONGEST = 1000  # characters of a message


class Wrong(AssertionError):
    """What was read is not what a reader may return."""


@dataclass(frozen=True)
class Target:
    """A kind of file. `damage` writes a damaged copy of a seed below a folder, `read` reads it whole.

    `read` raises DuoLocalError for a refusal, and Wrong where what it got cannot be.
    """

    name: str
    seeds: str  # folder below that of all seeds
    damage: Callable[[Path, Path, random.Random], Path]
    read: Callable[[Path], None]
    least_refused: float = 0.25  # share of the damaged files; a reader that takes nearly anything says so here


def check_refusal(error: DuoLocalError) -> str:
    """Return the message of a refusal; raise Wrong unless it is one short line that any terminal can show."""
    message = str(error)
    if not message.strip() or not message.isprintable() or len(message) > LONGEST:
        raise Wrong(f"a refusal of {len(message)} characters that is no printable line: {message[:200]!r}")
    return message


def pick(seeds: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in seeds.iterdir()))


def copy_seed(seed: Path, out: Path) -> Path:
    """Copy a file or a folder below `out`, which is emptied."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    place = out / seed.name
    if seed.is_dir():
        shutil.copytree(seed, place)
    else:
        shutil.copyfile(seed, place)
    return place
