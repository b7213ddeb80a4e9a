"""What a model, a context and their settings take in memory, part by part and place by place, before any load.

Owns the arithmetic; `duolocal plan` shows it and `Engine.load` refuses by it. Three places: the device that computes
(a GPU's memory, or the host's on a CPU), the host beside a GPU, and the disk. What is really allocated is counted by
`DuoCache.memory` and the weights.
"""

from dataclasses import dataclass, fields

from duolocal.cache.cache import exact_recent_size
from duolocal.cache.home import Placement
from duolocal.cache.pool import TABLE_BYTES, slots_per_row
from duolocal.kernels.blocks import BlockLayout
from duolocal.kernels.digest import digest_bytes, digest_channels
from duolocal.models.config import ModelConfig
from duolocal.plan.request import Request
from duolocal.plan.transient import HEAP_HOLES, Working, working_bytes

GIB = 2**30
TOKEN_ID_BYTES = 40  # of a Python int in a list

# Of a process with torch loaded before it has a model, in host memory: measured by benchmarks of this project
# (docs/performance.md). A CUDA context lies on the device and is outside of torch's allocator; not measured here yet.
PROCESS_BYTES = 231 << 20
CUDA_CONTEXT_BYTES = 600 << 20
# cuBLAS keeps 32 MB per stream on sm_90 and 8 MB before; graphs keep what one decode step allocates, twice.
CUBLAS_BYTES = 32 << 20


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device that computes; on a CPU that is host memory."""

    weights: int  # in their file's bits; on a CPU pages of the file, which the system may drop and read again
    copies: int  # vectors, and rows that are put into another order
    blocks: int  # records of retrieval heads and the table that finds them
    digests: int  # of selected decode
    retrieval_windows: int
    streaming_windows: int
    working: int  # temporaries of a prefill chunk or a decode step
    workspace: int  # of libraries, and what graphs keep; only on a GPU
    tokens: int  # the ids in the context; only on a CPU

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def windows(self) -> int:
        return self.retrieval_windows + self.streaming_windows

    @property
    def cache(self) -> int:
        """Bytes of the KV cache."""
        return self.blocks + self.digests + self.windows

    @property
    def transient(self) -> int:
        """Bytes that are neither weights in their file's bits nor cache."""
        return self.copies + self.working + self.workspace + self.tokens


@dataclass(frozen=True)
class MemoryPlan:
    """What a request takes, place by place. `process` is what a process takes before it has a model."""

    device: DeviceMemory
    host_blocks: int  # beside a GPU: pinned
    host_weights: int  # beside a GPU: the embedding, pages of the file, which the system may drop and read again
    disk_blocks: int
    slots: int  # records per retrieval head on the device
    max_blocks: int  # of each retrieval head
    process: int  # on the device
    live: Working  # of which `device.working` is made

    @property
    def offloaded(self) -> bool:
        """Whether blocks have their home beyond the device."""
        return self.slots < self.max_blocks

    @property
    def total(self) -> int:
        """Bytes on the device, the process's own aside."""
        return self.device.total

    @property
    def with_process(self) -> int:
        """Bytes on the device, all together."""
        return self.device.total + self.process


def selection_bytes(layout: BlockLayout, *, rows: int, max_blocks: int, budget: int) -> int:
    """Return what selected decode keeps beside the blocks (`duolocal.cache.selection`): digests of all, lists of some.

    rows: retrieval heads; budget: tokens that each reads. The scores of one layer at a time are not in it.
    """
    channels = digest_channels(layout.head_dim)
    digests = max_blocks * digest_bytes(layout.block_size, channels)
    lists = (max(1, budget // layout.block_size) + 1) * 4 + 8
    return rows * (digests + lists + channels * (4 + 4))


def plan_memory(request: Request) -> MemoryPlan:
    """Return what `request` takes."""
    config, heads, layout = request.config, request.heads, request.layout
    rows, max_blocks = heads.num_retrieval, request.max_blocks
    placement = Placement(device_bytes=request.kv_device_memory, outer=request.outer)
    slots = slots_per_row(layout, num_rows=rows, max_blocks=max_blocks, placement=placement)
    tiered = rows > 0 and slots < max_blocks
    blocks = rows * (slots * layout.record_bytes + max_blocks * TABLE_BYTES)
    home = 0
    if tiered:
        blocks += rows * slots * TABLE_BYTES  # which block has its copy in a slot
        home = (rows * max_blocks + 1) * layout.record_bytes
    ring = 2 * (heads.sink_size + exact_recent_size(heads)) * config.head_dim * request.dtype.itemsize
    live = working_bytes(request)
    on_gpu = request.device == "cuda"
    working = live.most + (0 if on_gpu else HEAP_HOLES)
    return MemoryPlan(
        device=DeviceMemory(
            weights=request.weights.nbytes,
            copies=request.weights.copies,
            blocks=blocks,
            digests=0
            if request.select is None
            else selection_bytes(layout, rows=rows, max_blocks=max_blocks, budget=request.select),
            retrieval_windows=ring * rows,
            streaming_windows=ring * heads.num_streaming,
            working=working,
            workspace=CUBLAS_BYTES + 2 * config.vocab_size * 8 * 8 if on_gpu else 0,
            tokens=0 if on_gpu else request.context * TOKEN_ID_BYTES,
        ),
        host_blocks=home if request.outer == "memory" else 0,
        host_weights=request.weights.host_bytes,
        disk_blocks=home if request.outer == "disk" else 0,
        slots=slots,
        max_blocks=max_blocks,
        process=CUDA_CONTEXT_BYTES if on_gpu else PROCESS_BYTES,
        live=live,
    )


def bytes_per_token(request: Request) -> float:
    """Return what each further token takes, wherever it lies: the blocks of the retrieval heads."""
    return request.heads.num_retrieval * request.layout.bytes_per_token


def dense_16bit_bytes(config: ModelConfig, context: int) -> int:
    """Return the bytes of an ordinary 16-bit KV cache for `context` tokens."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2 * context
