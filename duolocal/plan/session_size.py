"""How large a saved context becomes (`duolocal.sessions`; a test compares).

It has one column of records per block, one ring per turn that can be gone back to at once, and ids and text as JSON.
"""

from duolocal.plan.memory import MemoryPlan
from duolocal.plan.request import Request

_TEXT_AND_ID_BYTES = 11  # of a token: some 4 letters of text; its id, a comma and a blank
_MANIFEST_BYTES = 8192


def session_bytes(request: Request, plan: MemoryPlan, *, rings: int = 1) -> int:
    """Return the bytes of a session with a full context and `rings` turns to go back to."""
    column = request.heads.num_retrieval * request.layout.record_bytes
    texts = request.context * _TEXT_AND_ID_BYTES + _MANIFEST_BYTES
    return column * request.max_blocks + rings * plan.device.windows + texts
