"""The names of split GGUF files, NAME-00001-of-00003.gguf: of what is one model only the first part is named."""

import re
from collections.abc import Iterable
from pathlib import Path

_PART = re.compile(r"-(\d{5})-of-(\d{5})(\.gguf)$", re.IGNORECASE)


def part_of(name: str) -> tuple[int, int]:
    """Return which part a file of this name is and of how many, (1, 1) for one that is whole."""
    found = _PART.search(name)
    return (1, 1) if found is None else (int(found[1]), int(found[2]))


def parts_of(name: str) -> list[str]:
    """Return the names of all parts of the file that `name` is a part of."""
    count = part_of(name)[1]
    if count <= 1:
        return [name]
    return [_PART.sub(rf"-{number:05}-of-{count:05}\3", name) for number in range(1, count + 1)]


def without_parts(names: Iterable[str]) -> list[str]:
    """Return the names that stand for a model each: of the parts of a split file only the first."""
    return sorted({parts_of(name)[0] for name in names})


def gguf_files(folder: Path) -> list[Path]:
    """Return the .gguf files in a folder, in whatever case, of a split one the first part, by name."""
    names = (path.name for path in folder.iterdir() if path.suffix.lower() == ".gguf" and path.is_file())
    return [folder / name for name in without_parts(names)]
