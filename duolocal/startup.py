"""What makes a start quick without changing what it does. Loads nothing."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage inside, and leave what was made there out of later collections.

    Importing torch makes a quarter of a million objects that stay. Python looks through all of them again and again
    on the way, a tenth to a fifth of the import's time, and later at every full collection.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
