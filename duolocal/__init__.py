"""duolocal: local inference for very long contexts on one GPU or a plain CPU.

Importing the package loads neither torch nor a model; what it exports is imported on first use (docs/python.md).
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Chat", "Document", "DuoLocalError", "Engine", "LoadSettings", "Sampling", "__version__"]

if TYPE_CHECKING:
    from duolocal.chat.chat import Chat
    from duolocal.documents import Document
    from duolocal.engine.engine import Engine
    from duolocal.errors import DuoLocalError
    from duolocal.settings import LoadSettings, Sampling

_MODULES = {
    "Chat": "duolocal.chat.chat",
    "Document": "duolocal.documents",
    "DuoLocalError": "duolocal.errors",
    "Engine": "duolocal.engine.engine",
    "LoadSettings": "duolocal.settings",
    "Sampling": "duolocal.settings",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'duolocal' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
