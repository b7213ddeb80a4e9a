"""What `--prefill` stands for."""

from duolocal.errors import SettingsError
from duolocal.kernels.sparse import SparsePrefill
from duolocal.settings import PREFILLS


def prefill_policy(prefill: str, *, chunk_size: int) -> SparsePrefill | None:
    """Return how blocks are chosen for "sparse", None for "exact", which reads all; raises SettingsError."""
    if prefill not in PREFILLS:
        raise SettingsError(f"--prefill is {prefill!r}: give one of {', '.join(PREFILLS)}")
    if prefill == "exact":
        return None
    policy = SparsePrefill()
    if chunk_size < policy.tile:
        raise SettingsError(
            f"--chunk-size is {chunk_size}: --prefill sparse chooses for {policy.tile} tokens at a time, so give "
            f"{policy.tile} or more"
        )
    return policy


def prefill_note(policy: SparsePrefill) -> str:
    """Say what sparse prefill means for what is read."""
    return (
        f"a prompt is read sparsely: retrieval heads keep about {policy.mass:.0%} of their attention; --prefill exact "
        "keeps all"
    )
