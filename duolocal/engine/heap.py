"""How the C library's allocator treats the tensors of a prefill on a CPU (Linux, glibc).

Left alone, glibc soon keeps blocks of up to 32 MB in its heap, and the holes between the temporaries of a chunk make a
process's working memory almost twice as large as what is alive in it. Blocks from HEAP_BLOCK on are maps of their own
instead, given back the moment they are freed: what the planner counts is then what is allocated. Measured on
SmolLM2-135M (chunks of 512 tokens, whose temporaries have 0.4 to 3 MB), prefill took as long as before.
"""

import ctypes
import sys

HEAP_BLOCK = 256 << 10  # bytes
_KEPT = 64 << 20  # bytes that stay at the end of the heap for the next chunk
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def settle_heap() -> bool:
    """Set the allocator up for this process; return whether it could be (else nothing has changed)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # a C library without it
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, HEAP_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _KEPT))
