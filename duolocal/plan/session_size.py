"""How large the file of a saved context becomes (`duolocal.sessions`, whose layout this follows and a test compares).

A file has its header, one column of records per block, the token ids, one ring per turn that can be gone back to, and a
description: the conversation, and a number per column.
"""

from duolocal.plan.memory import MemoryPlan
from duolocal.plan.request import Request

ALIGNMENT = 4096  # bytes: of every array, as in sessions/layout.py
MAX_RINGS = 9  # the last 8 turns and the end of the documents, as in sessions/context.py
_CHECKSUM_BYTES = 12  # of a column, as JSON: ten digits, a comma, a blank
_TEXT_BYTES_PER_TOKEN = 4  # of what was read, which is in the description


def session_bytes(request: Request, plan: MemoryPlan, *, rings: int = 1) -> int:
    """Return the bytes of a file with a full context and `rings` turns to go back to."""
    layout, blocks = request.layout, request.max_blocks
    column = request.heads.num_retrieval * layout.record_bytes
    ring = plan.device.windows
    description = blocks * _CHECKSUM_BYTES + request.context * _TEXT_BYTES_PER_TOKEN + 2048
    arrays = (column * blocks, 4 * request.context, description, *(ring for _ in range(rings)))
    return ALIGNMENT + sum(-(-size // ALIGNMENT) * ALIGNMENT for size in arrays)
