"""A long real English text that is on every machine duolocal runs on: documentation, none of it twice.

The topics of Python's help, then the docstrings of the standard library, then those of numpy, of torch and of packages
that come with it. Which versions are installed decides what exactly it is, so `Haystack` says what it is made of.
"""

import ast
import hashlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from duolocal.errors import SettingsError
from duolocal.sample_text import sample_text

PACKAGES = (
    "numpy",
    "torch",
    "sympy",
    "networkx",
    "jinja2",
    "huggingface_hub",
    "rich",
    "pip",
    "setuptools",
    "transformers",
)
MIN_DOCSTRING = 200  # characters: shorter ones are hardly prose
MIN_PARAGRAPH = 80  # characters: shorter ones, such as headings, may come again
_NO_PROSE = {"test", "tests", "site-packages", "idlelib", "__pycache__", "_vendor"}


@dataclass(frozen=True)
class Haystack:
    """A text, and how many characters of it are from where."""

    text: str
    sources: dict[str, int]


def documentation(characters: int) -> Haystack:
    """Return about `characters` characters of it, from the beginning. Raises SettingsError where there is less."""
    pieces: list[str] = []
    sources: dict[str, int] = {}
    size = 0
    seen: set[bytes] = set()
    for source, piece in _pieces():
        piece = _unseen(piece, seen)[: characters - size]
        if len(piece) < MIN_DOCSTRING:
            continue
        pieces.append(piece)
        sources[source] = sources.get(source, 0) + len(piece)
        size += len(piece) + 2
        if size > characters - MIN_DOCSTRING:
            return Haystack("\n\n".join(pieces), sources)
    raise SettingsError(
        f"the documentation installed here has {size:,} characters, and {characters:,} are needed: ask for fewer "
        "tokens, or give a text of your own (--text)"
    )


def _unseen(text: str, seen: set[bytes]) -> str:
    """Return the paragraphs of `text` that are not among `seen`, and add them there."""
    kept = []
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        digest = hashlib.sha256(words.encode("utf-8", "replace")).digest()
        if len(words) < MIN_PARAGRAPH or digest not in seen:
            kept.append(paragraph)
            seen.add(digest)
    return "\n\n".join(kept)


def _pieces() -> Iterator[tuple[str, str]]:
    for topic in sample_text().split("\n\n\n"):
        yield "Python's help", topic
    standard = Path(sysconfig.get_paths()["stdlib"])
    for docstring in _docstrings(standard):
        yield "docstrings of the standard library", docstring
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)  # finds the folder, imports nothing
        for folder in spec.submodule_search_locations or () if spec is not None else ():
            for docstring in _docstrings(Path(folder)):
                yield f"docstrings of {name}", docstring


def _docstrings(root: Path) -> Iterator[str]:
    """Yield the longer docstrings of all modules below a folder, in the order of their paths."""
    for path in sorted(root.rglob("*.py")):
        if _NO_PROSE & set(path.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other people's escapes
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a template, or another encoding than it says
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring is not None and len(docstring) >= MIN_DOCSTRING:
                    yield docstring
