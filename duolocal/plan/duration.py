"""How long a prefill and a decode step take: work counted from shapes, over rates measured or published.

Work of a prefill of n tokens: 2 FLOP per element of the layers' matrices and token; 4 · head_dim FLOP per query head
and visible token, which for a query of a retrieval head are all before it and for one of a streaming head its window.
Work of a decode step: every matrix but the embedding and every block is read once.
"""

from dataclasses import dataclass

from duolocal.cache.cache import exact_recent_size
from duolocal.cache.selection import REUSE
from duolocal.kernels.digest import CANDIDATES
from duolocal.plan.memory import MemoryPlan, bytes_per_token
from duolocal.plan.request import Request

# Neither measured nor published: blocks that lie in a file are read at the speed of an ordinary solid-state disk.
DISK_BYTES_PER_S = 1e9


@dataclass(frozen=True)
class Rates:
    """What a machine does per second.

    products, attention: FLOP/s of a prefill chunk. weights (of the layers), output (lm_head), blocks: bytes/s of a
    decode step. step_s: seconds of a decode step beside these. link: bytes/s between device and host, None where there
    is none (or it was not measured).
    """

    products: float
    attention: float
    weights: float
    blocks: float
    output: float
    step_s: float
    link: float | None
    source: str  # for people: measured where, or computed from what
    measured: bool


@dataclass(frozen=True)
class Work:
    """What is to be done: FLOP of a prefill, bytes read by a decode step at full context."""

    product_flop: float
    attention_flop: float
    layer_bytes: int
    output_bytes: int
    block_bytes: int  # on the device
    moved_bytes: int  # read from beyond the device


@dataclass(frozen=True)
class Duration:
    """Expected seconds."""

    prefill_s: float
    decode_s: float  # per token, at full context
    floor_s: float  # of a decode step that only read its bytes, at the rates' bandwidth


def work_of(request: Request, plan: MemoryPlan) -> Work:
    """Count the work of filling the context and of one decode step then."""
    config, heads, n = request.config, request.heads, request.context
    group = config.num_heads // config.num_kv_heads
    per_pair = 4 * config.head_dim * group
    recent = heads.sink_size + exact_recent_size(heads)
    window = _pairs(n, heads.sink_size + heads.recent_size)
    pairs = heads.num_retrieval * n * (n + 1) / 2 + heads.num_streaming * window
    read = float(n)
    if request.select is not None and request.select + recent < n:
        looked_at = min(n, CANDIDATES * request.select) / REUSE  # of which only the keys
        read = request.select + recent + looked_at * request.layout.key_bytes / request.layout.record_bytes
    blocks = int(read * bytes_per_token(request))
    moved = 0
    if plan.offloaded and plan.max_blocks:
        moved = int(blocks * (1 - plan.slots / plan.max_blocks))
    return Work(
        product_flop=2.0 * request.weights.layer_elements * n,
        attention_flop=per_pair * pairs,
        layer_bytes=request.weights.layer_bytes,
        output_bytes=request.weights.output_bytes,
        block_bytes=blocks - moved + plan.device.digests // REUSE + plan.device.windows,
        moved_bytes=moved,
    )


def duration_of(request: Request, plan: MemoryPlan, rates: Rates) -> Duration:
    """Return how long `request` takes at `rates`."""
    work = work_of(request, plan)
    read_s = work.layer_bytes / rates.weights + work.output_bytes / rates.output
    read_s += (work.block_bytes + work.moved_bytes) / rates.blocks
    link = DISK_BYTES_PER_S if plan.disk_blocks else rates.link or DISK_BYTES_PER_S
    moved_s = work.moved_bytes / link
    return Duration(
        prefill_s=work.product_flop / rates.products + work.attention_flop / rates.attention,
        decode_s=max(read_s, moved_s) + rates.step_s,
        floor_s=read_s,
    )


def _pairs(n: int, window: int) -> float:
    """Return how many (query, key) pairs a window of so many tokens has over n tokens."""
    full = max(0, n - window)
    ramp = min(n, window)
    return ramp * (ramp + 1) / 2 + full * window
