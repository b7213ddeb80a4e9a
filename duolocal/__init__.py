"""duolocal: local inference for very long contexts on one GPU or a plain CPU.

Importing the package loads neither torch nor a model; `duolocal.Engine` does on first use.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]

if TYPE_CHECKING:
    from duolocal.engine.engine import Engine


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from duolocal.engine.engine import Engine

        return Engine
    raise AttributeError(f"module 'duolocal' has no attribute {name!r}")
