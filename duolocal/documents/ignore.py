"""What .gitignore files say about the paths below a folder.

The patterns are pathspec's, which follows git. Of git's other sources only .git/info/exclude is read, not the
settings of a user: what is loaded must depend on the folder alone.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

_MAX_BYTES = 1 << 20
_MAX_ANY_FOLDERS = 3  # `**` in one pattern; matching one with more takes time that grows with their power
_ONE_CHARACTER = re.compile(r"\\.|\[\^?\]?[^\]]*\]")  # an escaped one, or one of a class
_STAR = "[^/]*"  # as pathspec writes it


@dataclass(frozen=True)
class Ignored:
    """The .gitignore files that hold in a folder, the outermost first: (folder, patterns)."""

    specs: tuple[tuple[Path, GitIgnoreSpec], ...] = ()

    def inside(self, folder: Path) -> "Ignored":
        """Return what holds one folder further in."""
        spec = _spec(folder / ".gitignore")
        return self if spec is None else Ignored((*self.specs, (folder, spec)))

    def __contains__(self, path: Path) -> bool:
        """Tell whether a file is ignored; the deepest .gitignore that speaks of it decides."""
        return self.hides(path, is_folder=False)

    def hides(self, path: Path, *, is_folder: bool) -> bool:
        """Tell whether a path below these folders is ignored."""
        for folder, spec in reversed(self.specs):
            relative = path.relative_to(folder).as_posix() + ("/" if is_folder else "")
            include = spec.check_file(relative).include
            if include is not None:
                return include
        return False


def ignored_above(folder: Path) -> Ignored:
    """Return what the folders above say, up to the one that holds .git; nothing where there is none.

    Nothing, too, where they ignore the folder itself: who names it wants what is in it.
    """
    for top in (folder, *folder.parents):
        if (top / ".git").exists():
            break
    else:
        return Ignored()
    exclude = _spec(top / ".git" / "info" / "exclude")
    ignored = Ignored() if exclude is None else Ignored(((top, exclude),))
    for parent in (*(parent for parent in reversed(folder.parents) if parent.is_relative_to(top)), folder):
        if parent != top and ignored.hides(parent, is_folder=True):
            return Ignored()
        if parent != folder:
            ignored = ignored.inside(parent)
    return ignored


def without_backtracking(pattern: str) -> str:
    """Rewrite a regex of pathspec so that many stars in it take linear time.

    Between two stars stands a text of fixed length, and its first occurrence is as good as any other: nothing before it
    has to be tried again.
    """
    first, *rest = pattern.split(_STAR)
    if not rest:
        return pattern
    *middle, last = rest
    pieces = [f"(?>{_STAR}?{text})" if _is_fixed(text) else _STAR + text for text in middle]
    return first + "".join(pieces) + _STAR + last


def _is_fixed(text: str) -> bool:
    """Tell whether all that a piece of regex matches has one length."""
    return not set(_ONE_CHARACTER.sub("", text)) & set("(*+?|")


def _spec(path: Path) -> GitIgnoreSpec | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
    except OSError:
        return None  # there is none, or git could not read it either
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about odd sets of characters, which are git's to define
        patterns = _patterns(data.decode("utf-8-sig", "replace").splitlines())
    return GitIgnoreSpec(patterns) if patterns else None


def _patterns(lines: Sequence[str]) -> list[GitIgnoreSpecPattern]:
    patterns = []
    for line in lines:
        try:
            pattern = GitIgnoreSpecPattern(line)
        except ValueError:
            continue  # git passes over a pattern that it cannot read, too
        if pattern.include is None or line.count("**") > _MAX_ANY_FOLDERS:  # None: blank, or a comment
            continue
        assert pattern.regex is not None
        pattern.regex = re.compile(without_backtracking(pattern.regex.pattern))
        patterns.append(pattern)
    return patterns
