"""What a context needs in memory beside what there is, and the refusal when the first exceeds the second.

Owns the words of a refusal. What is free is `duolocal.plan.free`'s. The arithmetic is `duolocal.plan`'s, the same that
`duolocal plan` shows; what is really allocated is counted by `DuoCache.memory` and the weights.
"""

from duolocal.errors import MemoryLimitError
from duolocal.plan.fitting import Free, Freedom, nearest, place
from duolocal.plan.memory import plan_memory
from duolocal.plan.request import Request

GIB = 2**30


def choose_placement(request: Request, free: Free, freedom: Freedom) -> Request:
    """Return `request` with its blocks where they have room: on the device, else with a cache there (`place`).

    freedom: what a suggestion may vary; where it does not `offload`, all blocks must fit on the device. Raises
    MemoryLimitError, before anything is allocated, naming the numbers and the nearest settings that fit.
    """
    if freedom.offload or request.kv_device_memory is not None:
        placed = place(request, free)
    else:
        placed = request if plan_memory(request).total <= free.device else None
    if placed is None:
        raise refusal(request, free, freedom)
    return placed


def refusal(request: Request, free: Free, freedom: Freedom) -> MemoryLimitError:
    """Return the error for a request that has no room: one line with the numbers and up to three settings that fit."""
    plan = plan_memory(request)
    device = plan.device
    found = nearest(request, free, freedom)
    if found:
        advice = f"this fits: {' or '.join(setting.words for setting in found)}"
    else:
        advice = "use a smaller model, or a machine with more memory"
    if request.heads.num_streaming == 0:
        advice += "; streaming heads would need less (--heads with a pattern file)"
    beyond = ""
    for where, needed, there in (("host", plan.host_blocks, free.host), ("disk", plan.disk_blocks, free.disk)):
        if needed > there:
            beyond = f" and {needed / GIB:.1f} GiB on the {where}, where {there / GIB:.1f} GiB are free"
    return MemoryLimitError(
        f"context {request.context:,} needs {plan.total / GIB:.1f} GiB on {request.device} "
        f"(weights {device.weights / GIB:.1f}, KV blocks {(device.blocks + device.digests) / GIB:.1f}, "
        f"windows {device.windows / GIB:.1f}, working {device.transient / GIB:.1f}){beyond}, "
        f"and {free.device / GIB:.1f} GiB are free; {advice}"
    )
