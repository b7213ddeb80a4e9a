"""Real English text that is on every machine duolocal runs on, so that no measurement needs a download."""

import importlib.metadata
import pydoc_data.topics
from pathlib import Path

from duolocal.errors import DocumentError


def sample_text() -> str:
    """Return about half a megabyte of reference prose and code: the topics of Python's own help, by name."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def license_text() -> str:
    """Return some hundred kilobytes of plain prose: the licences that come with numpy and torch.

    Raises DocumentError where an installation left them out.
    """
    found = []
    for package in ("numpy", "torch"):
        for file in importlib.metadata.files(package) or ():
            path = Path(str(file.locate()))
            if path.name.upper() in ("LICENSE", "LICENSE.TXT", "NOTICE") and path.is_file():
                found.append(path.read_text(encoding="utf-8"))
    text = "\n\n".join(found)
    if len(text) < 20_000:
        raise DocumentError("the licences of numpy and torch are not installed here: give a text of your own (--text)")
    return text
