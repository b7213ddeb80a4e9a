"""What a context needs in memory, what there is, and the refusal when the first exceeds the second.

Owns the arithmetic before a load. What is really allocated is counted by `DuoCache.memory` and the weights.
"""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from duolocal.cache.cache import exact_recent_size
from duolocal.cache.pool import TABLE_BYTES
from duolocal.errors import MemoryLimitError
from duolocal.heads import HeadPlan
from duolocal.kernels.attention import KEY_SPAN, QUERY_TILE
from duolocal.kernels.blocks import BlockLayout
from duolocal.kernels.torch_kernels import VOCAB_TILE
from duolocal.models.config import ModelConfig
from duolocal.quant.kv import KV_FORMATS, kv_layout

# Dequantizing a matrix holds its codes, a partial result and the result at once.
DEQUANTIZE_COPIES = 3
GPU_SPAN = 32768  # tokens of blocks decoded at a time: SPAN of kernels/gpu/library_attention.py, which imports triton
GIB = 2**30


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that a load and its longest prefill will hold."""

    weights: int
    blocks: int
    windows: int
    transient: int

    @property
    def total(self) -> int:
        return self.weights + self.blocks + self.windows + self.transient


def memory_needs(
    config: ModelConfig,
    plan: HeadPlan,
    layout: BlockLayout,
    *,
    weight_bytes: int,
    context: int,
    chunk_size: int,
    dtype: torch.dtype,
    kernels: str,
) -> MemoryNeeds:
    """Return the bytes that `context` tokens need, prefilled `chunk_size` at a time by the kernels of that name."""
    num_blocks = plan.num_retrieval * (context // layout.block_size)

    slots = plan.sink_size + exact_recent_size(plan)
    windows = 2 * config.num_layers * config.num_kv_heads * slots * config.head_dim * dtype.itemsize
    return MemoryNeeds(
        weights=weight_bytes,
        blocks=num_blocks * (layout.record_bytes + TABLE_BYTES),
        windows=windows,
        transient=_transient(config, plan, chunk_size=chunk_size, context=context, dtype=dtype, kernels=kernels),
    )


def _transient(
    config: ModelConfig, plan: HeadPlan, *, chunk_size: int, context: int, dtype: torch.dtype, kernels: str
) -> int:
    """Return the most bytes that a prefill chunk holds beside weights and cache."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    logits = config.vocab_size * 8 * 8  # of one token; sampling copies them in float64 a few times
    if kernels == "triton":
        group = config.num_heads // config.num_kv_heads
        retrieval = max(map(sum, plan.retrieval)) * config.head_dim  # of the layer that has most
        # q, k, v before and after RoPE; the window's result; see library_attention.py for what blocks take.
        attention = chunk_size * (4 * (q_size + kv_size) + 8 * q_size + retrieval * (24 * group + 4))
        attention += 4 * retrieval * min(GPU_SPAN, context)
        mlp = chunk_size * inner * 6 + hidden * inner * 2  # gate, up and their product; a matrix decoded
        return max(attention, mlp) + chunk_size * hidden * 8 + logits
    activations = chunk_size * (6 * hidden + 3 * inner + 6 * q_size) * 4 + logits
    if kernels == "compiled":  # decode weights and keys in the cache of the processor
        return activations
    matrix = hidden * max(inner, VOCAB_TILE) * dtype.itemsize * DEQUANTIZE_COPIES
    span = config.num_kv_heads * min(KEY_SPAN, context) * config.head_dim * 4 * 6
    scores = config.num_heads * min(QUERY_TILE, chunk_size) * min(KEY_SPAN, context) * 4 * 2
    return activations + matrix + span + scores


def dense_16bit_bytes(config: ModelConfig, context: int) -> int:
    """Return the bytes of an ordinary 16-bit KV cache for `context` tokens."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2 * context


def available_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated on `device` now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    available = psutil.virtual_memory().available
    limit = _cgroup_available()
    return available if limit is None else min(available, limit)


def check_memory(
    config: ModelConfig,
    plan: HeadPlan,
    *,
    kv: str,
    weight_bytes: int,
    context: int,
    chunk_size: int,
    device: torch.device,
    dtype: torch.dtype,
    kernels: str,
    available: int,
) -> None:
    """Refuse a context that would not fit, naming the numbers and the nearest settings that do.

    Raises MemoryLimitError before anything is allocated.
    """

    def needs(format_name: str, tokens: int) -> MemoryNeeds:
        layout = kv_layout(format_name, head_dim=config.head_dim, dtype=dtype)
        return memory_needs(
            config,
            plan,
            layout,
            weight_bytes=weight_bytes,
            context=tokens,
            chunk_size=chunk_size,
            dtype=dtype,
            kernels=kernels,
        )

    needed = needs(kv, context)
    if needed.total <= available:
        return
    fitting = [name for name in KV_FORMATS[KV_FORMATS.index(kv) + 1 :] if needs(name, context).total <= available]
    choices = [f"--kv {name}" for name in fitting[:1]]
    fixed = needed.total - needed.blocks
    if fixed < available and needed.blocks:
        tokens = int((available - fixed) * context / needed.blocks) // 1024 * 1024
        if tokens:
            choices.append(f"--context {tokens // 1024}K")
    advice = f"this fits: {' or '.join(choices)}" if choices else "use a smaller model, or a machine with more memory"
    if plan.num_streaming == 0:
        advice += "; streaming heads would need less (--heads with a pattern file)"
    raise MemoryLimitError(
        f"context {context:,} needs {needed.total / GIB:.1f} GiB on {device.type} "
        f"(weights {needed.weights / GIB:.1f}, KV blocks {needed.blocks / GIB:.1f}, "
        f"windows {needed.windows / GIB:.1f}, working {needed.transient / GIB:.1f}), "
        f"and {available / GIB:.1f} GiB are free; {advice}"
    )


def _cgroup_available() -> int | None:
    """Return what a container's memory limit leaves, or None where there is none (Linux, cgroup 2)."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        statistics = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return int(limit) - used + int(statistics.get("inactive_file", 0))  # cached files are given back when needed
