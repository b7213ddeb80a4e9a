"""Which KV heads of a model are retrieval heads: `identify` and what it yields.

    for event in identify(source, load, method="echo", device=device):
        ...  # IdentifyProgress, then one IdentifyResult

Owns five methods (`drift`, `attribution`, `echo`, `copying`, `distill`), each a module of its own, and the agreement
of their rankings. It does not write files: a pattern file is `duolocal.heads`' business.
"""

from duolocal.identify.results import METHODS, IdentifyProgress, IdentifyResult, Method
from duolocal.identify.run import LoadTransformer, identify
from duolocal.identify.scores import Agreement, agreement

__all__ = [
    "METHODS",
    "Agreement",
    "IdentifyProgress",
    "IdentifyResult",
    "LoadTransformer",
    "Method",
    "agreement",
    "identify",
]
