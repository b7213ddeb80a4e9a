"""Which operations are run, with which shapes and formats: what people meet."""

import importlib
import pkgutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime import JITFunction

import duolocal.kernels.gpu
from duolocal.kernels.digest import CANDIDATES, digest_bytes, digest_channels
from duolocal.kernels.gpu.layer_cache import LayerCache, LayerSelection
from duolocal.kernels.interface import Norm, Rotation
from duolocal.kernels.matrix import GroupedMatrix
from duolocal.quant.grouped import GroupedWeight
from duolocal.quant.kv import KV_FORMATS, kv_layout
from duolocal.quant.weight import DenseWeight, Linear, Weight
from tests.aot.record import ARCHITECTURES

# Registers per thread that a kernel may use where fewer than 255 are wanted: products of one token want ten
# warps on a multiprocessor, and what only moves data wants many.
REGISTER_LIMITS = {
    "linear_vector_kernel": 192,
    "linear_rows_kernel": 208,
    "merge_splits_kernel": 128,
    "merge_blocks_kernel": 128,
    "score_blocks_kernel": 128,
    "weigh_blocks_kernel": 128,
    "fetch_blocks_kernel": 64,
    "write_ring_kernel": 128,
    "decode_span_kernel": 96,
    "dequantize_kernel": 96,
    "rms_norm_kernel": 96,
    "rotate_kernel": 64,
    "silu_mul_kernel": 64,
}


SINK, RECENT = 64, 512  # slots of a ring: tokens that every head may read
# Tokens of a prefill chunk and where it starts: a whole one, an odd one, a tiny one that closes a block.
CHUNKS = ((2048, 4096), (1000, 0), (2, 3007))


TOKENS = (1, 2, 1000)  # in a product: each another kernel


@dataclass(frozen=True)
class Model:
    """The sizes of a model that kernels see."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int


LLAMA = Model("llama-3-8b", 32, 8, 128, 4096, 14336, 128256)
SMOLLM2 = Model("smollm2-135m", 9, 3, 64, 576, 1536, 49152)
PHI = Model("phi-3-mini", 32, 32, 96, 3072, 8192, 32064)
GEMMA = Model("gemma-7b", 16, 16, 256, 3072, 24576, 256000)
STABLELM = Model("stablelm-3b", 32, 32, 80, 2560, 6912, 50304)
QWEN = Model("qwen2-7b", 28, 4, 128, 3584, 18944, 152064)
MODELS = (LLAMA, SMOLLM2, PHI, GEMMA, STABLELM, QWEN)
WEIGHTS = ("awq-g128", "awq-g32", "Q4_0", "Q4_1", "Q8_0", "dense")


@dataclass(frozen=True)
class Case:
    """One operation with its arguments, and the architectures to compile what it launches for."""

    name: str
    run: Callable[[], object]
    architectures: tuple[int, ...] = ARCHITECTURES


def kernels() -> tuple[set[str], dict[str, str]]:
    """Return "module.kernel" of every kernel of `duolocal.kernels.gpu`, and the modules that cannot be imported."""
    found, failed = set(), {}
    for info in pkgutil.iter_modules(duolocal.kernels.gpu.__path__, "duolocal.kernels.gpu."):
        try:
            module = importlib.import_module(info.name)
        except Exception as error:  # noqa: BLE001 - one broken module must not hide the others
            failed[info.name] = failure(error)
            continue
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and value.module == info.name and name.endswith("_kernel"):
                found.add(f"{info.name}.{name}")
    return found, failed


def failure(error: Exception) -> str:
    """Return an exception in one line, with the place it came from."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


def all_cases(matrix: str) -> Iterator[Case]:
    """Yield the cases of a matrix: "few" is for every change, "usual" for changes of kernels, "all" for by hand."""
    yield from {"few": few_cases, "usual": usual_cases, "all": every_case}[matrix]()


def every_case() -> Iterator[Case]:
    """Yield every shape and format on every architecture: many minutes."""
    for model in MODELS:
        for dtype in (torch.bfloat16, torch.float16):
            yield from attention_cases(model, KV_FORMATS, dtype=dtype)
            for weights in WEIGHTS:
                for biased in (False, True):
                    yield from layer_cases(model, weights, dtype=dtype, biased=biased, tokens=(1, 2, 20, 64, 1000))


def usual_cases() -> Iterator[Case]:
    """Yield all that the most common shapes meet, everywhere; of others, what is compiled differently for them."""
    bf16, f16, ends = torch.bfloat16, torch.float16, (80, 90)
    yield from attention_cases(LLAMA, KV_FORMATS, dtype=bf16, chunks=CHUNKS[:1])
    yield from attention_cases(LLAMA, ("int4",), dtype=bf16, chunks=CHUNKS[1:], architectures=ends)
    yield from layer_cases(LLAMA, "awq-g128", dtype=bf16, tokens=(*TOKENS, 64))
    yield from attention_cases(SMOLLM2, ("k8v4",), dtype=bf16, architectures=ends)
    yield from layer_cases(SMOLLM2, "Q4_1", dtype=bf16, architectures=ends)
    yield from layer_cases(SMOLLM2, "Q8_0", dtype=f16, architectures=ends)
    yield from layer_cases(QWEN, "Q4_0", dtype=bf16, biased=True, operations=("qkv",), architectures=ends)
    for model in (PHI, GEMMA):
        yield from attention_cases(model, ("int4", "16"), dtype=bf16, chunks=CHUNKS[:1], architectures=ends)


def few_cases() -> Iterator[Case]:
    """Yield one model with every KV format where registers are scarcest, and on the newest what CI's GPU users run."""
    bf16, old, new = torch.bfloat16, (80,), (90,)
    yield from attention_cases(LLAMA, KV_FORMATS, dtype=bf16, chunks=CHUNKS[:1], contexts=(2048,), architectures=old)
    yield from attention_cases(LLAMA, ("int4",), dtype=bf16, chunks=CHUNKS[:1], contexts=(2048,), architectures=new)
    yield from layer_cases(LLAMA, "awq-g128", dtype=bf16, architectures=(80, 90))
    yield from layer_cases(SMOLLM2, "Q4_1", dtype=bf16, operations=("qkv",), architectures=old)
    yield from layer_cases(SMOLLM2, "Q8_0", dtype=torch.float16, operations=("qkv",), architectures=old)
    yield from attention_cases(GEMMA, ("int4",), dtype=bf16, chunks=CHUNKS[:1], contexts=(2048,), architectures=old)


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device="cuda")


def matrix(weights: str, out_features: int, in_features: int, dtype: torch.dtype) -> Weight:
    """Return a matrix as `duolocal.quant.grouped` arranges the format, or a dense one."""
    if weights == "dense":
        return DenseWeight(zeros(out_features, in_features, dtype=dtype))
    bits = 8 if weights == "Q8_0" else 4
    groups = out_features, in_features // (128 if weights == "awq-g128" else 32)
    grouped = GroupedMatrix(
        codes=zeros(out_features, in_features * bits // 8, dtype=torch.uint8),
        scales=zeros(*groups, dtype=torch.float16),
        bits=bits,
        zero={"Q4_0": 8, "Q8_0": 128}.get(weights, 0),
        zeros=zeros(*groups, dtype=torch.uint8) if weights.startswith("awq") else None,
        minima=zeros(*groups, dtype=torch.float16) if weights == "Q4_1" else None,
    )
    return GroupedWeight(grouped, weights)


def layer_cases(
    model: Model,
    weights: str,
    *,
    dtype: torch.dtype,
    biased: bool = False,
    tokens: Sequence[int] = TOKENS,
    operations: Sequence[str] = ("qkv", "output", "mlp", "logits"),
    architectures: tuple[int, ...] = ARCHITECTURES,
) -> Iterator[Case]:
    """Yield what `Transformer` asks of its kernels beside attention, for one token and for chunks."""
    name = f"{model.name} {str(dtype).removeprefix('torch.')} {weights}{' bias' if biased else ''}"
    for n in tokens:
        for what in operations:
            yield Case(f"{name} {what} of {n}", partial(LAYER[what], model, weights, dtype, biased, n), architectures)


def affine(model: Model, weights: str, out_features: int, in_features: int, dtype: torch.dtype, biased: bool) -> Linear:
    bias = zeros(out_features, dtype=dtype) if biased else None
    return Linear(matrix(weights, out_features, in_features, dtype), bias)


def layer_qkv(model: Model, weights: str, dtype: torch.dtype, biased: bool, n: int) -> None:
    from duolocal.kernels.gpu.operations import TritonKernels

    hidden, dim = model.hidden_size, model.head_dim
    counts = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    layers = [affine(model, weights, count * dim, hidden, dtype, biased) for count in counts]
    norm = Norm(zeros(hidden, dtype=dtype), 1e-5)
    kernels = TritonKernels(dtype)
    q, k, _ = kernels.linear(zeros(n, hidden, dtype=dtype), layers, norm=norm)
    q, k = q.unflatten(-1, (-1, dim)), k.unflatten(-1, (-1, dim))
    if biased:  # Qwen2 has biases, Qwen3 norms of heads
        head_norm = zeros(dim, dtype=dtype)
        q, k = kernels.rms_norm(q, head_norm, eps=1e-6), kernels.rms_norm(k, head_norm, eps=1e-6)
    if n > 1:
        kernels.rotate(q, k, Rotation(*angles(model, n)))


def layer_out(model: Model, weights: str, dtype: torch.dtype, biased: bool, n: int) -> None:
    from duolocal.kernels.gpu.operations import TritonKernels

    x, hidden = zeros(n, model.num_heads * model.head_dim, dtype=dtype), model.hidden_size
    layer = affine(model, weights, hidden, x.shape[1], dtype, False)
    TritonKernels(dtype).linear(x, (layer,), residual=zeros(n, hidden, dtype=dtype))


def layer_mlp(model: Model, weights: str, dtype: torch.dtype, biased: bool, n: int) -> None:
    from duolocal.kernels.gpu.operations import TritonKernels

    hidden, inner, kernels = model.hidden_size, model.intermediate_size, TritonKernels(dtype)
    x = zeros(n, hidden, dtype=dtype)
    gate, up = (affine(model, weights, inner, hidden, dtype, False) for _ in range(2))
    gated = kernels.gated_linear(x, gate, up, norm=Norm(zeros(hidden, dtype=dtype), 1e-5))
    kernels.linear(gated, (affine(model, weights, hidden, inner, dtype, False),), residual=x)
    kernels.rms_norm(x, zeros(hidden, dtype=dtype), eps=1e-5)


def layer_logits(model: Model, weights: str, dtype: torch.dtype, biased: bool, n: int) -> None:
    from duolocal.kernels.gpu.operations import TritonKernels

    hidden = model.hidden_size
    # The output matrix of an AWQ checkpoint is dense, that of a GGUF file is like the rest.
    head = matrix("dense" if weights.startswith("awq") else weights, model.vocab_size, hidden, dtype)
    TritonKernels(dtype).logits(zeros(n, hidden, dtype=dtype), head)


LAYER = {"qkv": layer_qkv, "output": layer_out, "mlp": layer_mlp, "logits": layer_logits}


def layer_cache(model: Model, kv: str, *, dtype: torch.dtype, max_blocks: int = 2048) -> LayerCache:
    """Return one layer's cache, half of its heads retrieval heads."""
    ring = zeros(2, model.num_kv_heads, SINK + RECENT, model.head_dim, dtype=dtype)
    layout = kv_layout(kv, head_dim=model.head_dim, dtype=dtype)
    num_retrieval = (model.num_kv_heads + 1) // 2
    return LayerCache(
        ring_k=ring[0],
        ring_v=ring[1],
        records=zeros(128, layout.record_bytes, dtype=torch.uint8),
        table=zeros(num_retrieval, max_blocks, dtype=torch.int64),
        retrieval_heads=zeros(num_retrieval, dtype=torch.int32),
        rows=zeros(model.num_kv_heads, dtype=torch.int32),
        widths=zeros(model.num_kv_heads, dtype=torch.int32),
        start=zeros(1, dtype=torch.int64),
        layout=layout,
        query_group=model.num_heads // model.num_kv_heads,
        sink_size=SINK,
        recent_size=RECENT,
    )


BUDGET = 32  # blocks that decode reads
SELECTED_FORMATS = ("int4", "k8v4", "16")  # the other loops differ less from those that read everything
SELECTED_BLOCKS = (2048, 16384, 65536)  # of a context of 128K, 1M, 4M


def selecting(cache: LayerCache) -> LayerCache:
    """Return the cache with a selection, and with copies of blocks that have their homes elsewhere."""
    rows, blocks = cache.table.shape
    count = digest_channels(cache.head_dim)
    selection = LayerSelection(
        digests=zeros(rows, blocks, digest_bytes(cache.layout.block_size, count), dtype=torch.uint8),
        lists=zeros(rows, BUDGET + 1, dtype=torch.int32),
        made_at=zeros(rows, dtype=torch.int64),
        channels=zeros(rows, count, dtype=torch.int32),
        centre=zeros(rows, count, dtype=torch.float32),
        scores=zeros(rows, blocks, dtype=torch.float32),
        candidates=zeros(rows, CANDIDATES * BUDGET, dtype=torch.int32),
        weights=zeros(rows, cache.query_group, CANDIDATES * BUDGET, dtype=torch.float32),
        reuse=4,
        tags=zeros(rows, 2 * BUDGET, dtype=torch.int64),
        first_home=12345,
    )
    return replace(cache, selection=selection)


def attention_cases(
    model: Model,
    formats: Sequence[str],
    *,
    dtype: torch.dtype,
    chunks: Sequence[tuple[int, int]] = CHUNKS,
    contexts: Sequence[int] = SELECTED_BLOCKS,
    architectures: tuple[int, ...] = ARCHITECTURES,
) -> Iterator[Case]:
    """Yield what `duolocal.cache.gpu_backend` does: one token, and chunks of a prompt, in every KV format given."""
    for kv in formats:
        name = f"{model.name} {str(dtype).removeprefix('torch.')} {kv}"
        yield Case(f"{name} decode", partial(decode, model, kv, dtype), architectures)
        for max_blocks in contexts if kv in SELECTED_FORMATS else ():
            run = partial(decode_selected, model, kv, dtype, max_blocks)
            yield Case(f"{name} selected decode of {max_blocks} blocks", run, architectures)
        for n, start in chunks:
            for what, operation in PREFILL.items():
                run = partial(operation, model, kv, dtype, n, start)
                yield Case(f"{name} {what} of {n}", run, architectures)


def heads(model: Model, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of n tokens as products leave them."""
    counts = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    q, k, v = (zeros(n, count * model.head_dim, dtype=dtype) for count in counts)
    dim = model.head_dim
    return q.unflatten(1, (-1, dim)), k.unflatten(1, (-1, dim)), v.unflatten(1, (-1, dim))


def angles(model: Model, n: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin."""
    shape = n, model.head_dim // 2
    return zeros(*shape, dtype=torch.float32), zeros(*shape, dtype=torch.float32)


def decode(model: Model, kv: str, dtype: torch.dtype) -> None:
    from duolocal.kernels.gpu.append import append_token
    from duolocal.kernels.gpu.decode import decode_attention

    cache = layer_cache(model, kv, dtype=dtype)
    q, q_blocks = append_token(cache, *heads(model, 1, dtype), *angles(model, 1))
    decode_attention(cache, q, q_blocks)


def decode_selected(model: Model, kv: str, dtype: torch.dtype, max_blocks: int) -> None:
    from duolocal.kernels.gpu.append import append_token
    from duolocal.kernels.gpu.decode import decode_attention
    from duolocal.kernels.gpu.digest import digest_blocks
    from duolocal.kernels.gpu.select import select_blocks

    cache = selecting(layer_cache(model, kv, dtype=dtype, max_blocks=max_blocks))
    digest_blocks(cache, 0, 2048)
    q, q_blocks = append_token(cache, *heads(model, 1, dtype), *angles(model, 1))
    select_blocks(cache, q, q_blocks)
    decode_attention(cache, q, q_blocks)


def prefill_store(model: Model, kv: str, dtype: torch.dtype, n: int, start: int) -> None:
    from duolocal.kernels.gpu.store import close_blocks, write_ring

    cache = layer_cache(model, kv, dtype=dtype)
    _, k, v = heads(model, n, dtype)
    close_blocks(cache, k, v, start)
    write_ring(cache, k, v, start)


def prefill_attention(model: Model, kv: str, dtype: torch.dtype, n: int, start: int) -> None:
    from duolocal.kernels.gpu import prefill

    cache = layer_cache(model, kv, dtype=dtype)
    for route in ("library", "fused"):
        prefill.prefill_attention(cache, *heads(model, n, dtype), start, route=route)


def sparse_prefill(model: Model, kv: str, dtype: torch.dtype, n: int, start: int) -> None:
    from duolocal.kernels.gpu.sparse_attention import sparse_blocks_attention
    from duolocal.kernels.sparse import SparsePrefill

    cache = layer_cache(model, kv, dtype=dtype)
    q, _, _ = heads(model, n, dtype)
    band_lse = zeros(n, model.num_heads, dtype=torch.float32)
    sparse_blocks_attention(cache, q, start, band_lse, SparsePrefill())


PREFILL = {"store": prefill_store, "prefill": prefill_attention, "sparse prefill": sparse_prefill}
