"""How large everything in the suite is: the real sizes, and tiny ones with which tests run the same code on a CPU.

Loads no torch.
"""

from dataclasses import dataclass

from duolocal.models.config import ModelConfig
from duolocal.models.names import LLAMA_3_8B

K = 1024
M = K * K


@dataclass(frozen=True)
class Sizes:
    """Shapes, lengths and how often to measure; lengths in tokens."""

    config: ModelConfig
    group_size: int  # of the 4-bit weights
    copy_bytes: int
    matmul: int  # n of the n × n product
    rotate_bytes: int  # inputs of a timed call are rotated among copies that take so many bytes together
    most_copies: int
    repeats: int
    linear_rows: tuple[int, ...]  # rows of x in the products; the first is 1
    kernel_contexts: tuple[int, ...]
    kernel_formats: tuple[str, ...]
    kernel_retrieval: tuple[int, ...]  # retrieval heads of a layer
    checked_context: int  # results of attention are compared with the torch reference up to here
    chunk_sizes: tuple[int, ...]
    chunk_start: int  # where a chunk of the prefill kernels begins
    pointwise_rows: tuple[int, ...]
    sink_size: int
    recent_size: int
    small_contexts: tuple[int, ...]  # decode in a cache reserved for the last of them
    large_contexts: tuple[int, ...]
    dense_context: int
    largest_step: int  # the largest context is a multiple of it
    decode_tokens: int  # timed per context
    profiled_contexts: tuple[int, ...]
    profiled_tokens: int
    prefill_contexts: tuple[int, ...]
    long_prefill: int  # beyond `prefill_contexts`, by sampled chunks if it does not fit
    sampled_chunks: int
    whole_prefill_s: float  # what is predicted to take longer is sampled
    capped_context: int
    cap_bytes: int
    long_capped_context: int
    long_cap_bytes: int
    sweep_context: int
    selected_contexts: tuple[int, ...]  # in a cache reserved for the last of them
    selected_budget: int
    selected_device_bytes: int  # for blocks, where the others are in host memory


FULL = Sizes(
    config=LLAMA_3_8B,
    group_size=128,
    copy_bytes=4 << 30,
    matmul=8192,
    rotate_bytes=256 << 20,
    most_copies=64,
    repeats=20,
    linear_rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    kernel_contexts=(8 * K, 128 * K, 320 * K, M),
    kernel_formats=("int4", "k8v4", "fp8", "16"),
    kernel_retrieval=(4, 8),
    checked_context=8 * K,
    chunk_sizes=(4 * K, 16 * K, 64 * K),
    chunk_start=128 * K,
    pointwise_rows=(1, 16 * K),
    sink_size=64,
    recent_size=256,
    small_contexts=(0, K, 8 * K),
    large_contexts=(0, 128 * K, 320 * K, M),
    dense_context=128 * K,
    largest_step=64 * K,
    decode_tokens=24,
    profiled_contexts=(0, 128 * K),
    profiled_tokens=5,
    prefill_contexts=(32 * K, 128 * K, 320 * K),
    long_prefill=M,
    sampled_chunks=3,
    whole_prefill_s=8.0,
    capped_context=M,
    cap_bytes=24 << 30,
    long_capped_context=4_000_000,
    long_cap_bytes=80 * 10**9,
    sweep_context=128 * K,
    selected_contexts=(128 * K, M),
    selected_budget=2048,
    selected_device_bytes=1 << 30,
)

TINY = Sizes(
    config=ModelConfig(
        architecture="llama",
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        hidden_size=32,
        intermediate_size=32,
        vocab_size=96,
        max_positions=8192,
        rope_theta=500000.0,
    ),
    group_size=32,
    copy_bytes=1 << 16,
    matmul=64,
    rotate_bytes=1,
    most_copies=2,
    repeats=1,
    linear_rows=(1, 3),
    kernel_contexts=(270,),
    kernel_formats=("int4", "16"),
    kernel_retrieval=(1,),
    checked_context=270,
    chunk_sizes=(12,),
    chunk_start=310,
    pointwise_rows=(3,),
    sink_size=4,
    recent_size=16,
    small_contexts=(0,),
    large_contexts=(200,),
    dense_context=200,
    largest_step=64,
    decode_tokens=1,
    profiled_contexts=(0,),
    profiled_tokens=1,
    prefill_contexts=(20,),
    long_prefill=36,
    sampled_chunks=2,
    whole_prefill_s=0.0,
    capped_context=200,
    cap_bytes=1 << 30,
    long_capped_context=128,
    long_cap_bytes=2 << 30,
    sweep_context=200,
    selected_contexts=(300,),
    selected_budget=64,
    selected_device_bytes=3200,
)

SIZES = {"full": FULL, "tiny": TINY}
