"""Section: products with 4-bit weights in Llama shapes, beside the library's 16-bit ones of the same shape."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear as library_linear

from duolocal.bench.gpu.measure import Bench, changed
from duolocal.kernels.gpu import linear
from duolocal.kernels.gpu.operations import TritonKernels
from duolocal.kernels.interface import Norm
from duolocal.quant.weight import DenseWeight, Linear

# Sums of some thousand products in float32, rounded once to 16 bits; gated products pass twice.
TOLERANCE = 1e-2
_MOST_FUSED = 128  # rows up to which the fused kernel is tried, wherever the crossover is set


def run(bench: Bench) -> None:
    """Measure one row (bandwidth) for every matrix of a layer, then many rows (arithmetic) for one shape."""
    config = bench.sizes.config
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "qkv": ((q_size, kv_size, kv_size), hidden),
        "o": ((hidden,), q_size),
        "gate_up": ((ffn, ffn), hidden),
        "down": ((hidden,), ffn),
    }
    for name, (outs, ins) in shapes.items():
        with bench.item("gemv", name=name):
            _one_row(bench, name, outs, ins)
    with bench.item("gemv", name="lm_head"):
        _lm_head(bench)
    for rows in bench.sizes.linear_rows[1:]:
        if bench.fits(3, "gemm", rows=rows):
            with bench.item("gemm", rows=rows):
                _many_rows(bench, rows, ffn, hidden)


def _one_row(bench: Bench, name: str, outs: tuple[int, ...], ins: int) -> None:
    kernels = TritonKernels(bench.dtype)
    weight_bytes = 0
    first = [Linear(bench.int4(out, ins)) for out in outs]
    weight_bytes = sum(layer.weight.nbytes for layer in first)
    layers = [first] + [[Linear(bench.int4(out, ins)) for out in outs] for _ in range(bench.copies(weight_bytes) - 1)]
    x, residual = bench.randn(1, ins), bench.randn(1, outs[0])
    norm = Norm(bench.randn(ins).abs_().add_(0.5), 1e-5)

    def product(some: list[Linear]) -> Tensor:
        if name == "gate_up":
            return kernels.gated_linear(x, some[0], some[1], norm=norm)
        if name == "qkv":
            return torch.cat(kernels.linear(x, some, norm=norm), dim=1)
        return kernels.linear(x, some, residual=residual)[0]

    def call(some: list[Linear]) -> object:  # as the model does it: without the cat of the check
        return kernels.linear(x, some, norm=norm) if name == "qkv" else product(some)

    error = bench.check(lambda: product(first), _reference(name, x, first, norm, residual), tolerance=TOLERANCE)
    timing = bench.time([partial(call, some) for some in layers])
    bench.record(
        "gemv",
        name=name,
        out=sum(outs),
        **{"in": ins},
        bytes=weight_bytes,
        **timing.report(),
        **bench.of_copy(weight_bytes, timing.median),
        relative_error=error,
        library=_library_one_row(bench, sum(outs), ins),
    )


def _reference(name: str, x: Tensor, layers: list[Linear], norm: Norm, residual: Tensor) -> Tensor:
    x = x.float()
    if name in ("qkv", "gate_up"):
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm.eps) * norm.weight.float()
    results = [x @ layer.weight.dequantize(torch.float32).T for layer in layers]
    if name == "gate_up":
        return torch.nn.functional.silu(results[0]) * results[1]
    return torch.cat(results, dim=1) + (0 if name == "qkv" else residual.float())


def _library_one_row(bench: Bench, out: int, ins: int) -> dict[str, float]:
    """Return the 16-bit product of the library for the same shape."""
    num_bytes = 2 * out * ins
    weights = [bench.randn(out, ins, std=0.02) for _ in range(bench.copies(num_bytes))]
    x = bench.randn(1, ins)
    timing = bench.time([partial(library_linear, x, weight) for weight in weights])
    return {"us": timing.report()["us"], **bench.of_copy(num_bytes, timing.median)}


def _lm_head(bench: Bench) -> None:
    kernels, config = TritonKernels(bench.dtype), bench.sizes.config
    weights = [DenseWeight(bench.randn(config.vocab_size, config.hidden_size, std=0.02))]
    weights *= bench.copies(weights[0].nbytes)  # a real one is far larger than the cache
    x = bench.randn(1, config.hidden_size)
    wanted = x.float() @ weights[0].tensor.float().T
    error = bench.check(lambda: kernels.logits(x, weights[0]), wanted, tolerance=TOLERANCE)
    timing = bench.time([partial(kernels.logits, x, weight) for weight in weights])
    bench.record(
        "gemv",
        name="lm_head",
        out=config.vocab_size,
        **{"in": config.hidden_size},
        bytes=weights[0].nbytes,
        **timing.report(),
        **bench.of_copy(weights[0].nbytes, timing.median),
        relative_error=error,
    )


def _many_rows(bench: Bench, rows: int, out: int, ins: int) -> None:
    """Record our product by both routes, and the library's alone: the crossover shows."""
    kernels = TritonKernels(bench.dtype)
    weight = bench.int4(out, ins)
    copies = bench.copies(weight.nbytes) if rows <= 64 else 1
    layers = [Linear(weight)] + [Linear(bench.int4(out, ins)) for _ in range(copies - 1)]
    x = bench.randn(rows, ins)
    dense = weight.dequantize(bench.dtype)
    wanted = x[:256].float() @ dense.float().T
    error = bench.check(lambda: kernels.linear(x, layers[:1])[0][:256], wanted, tolerance=TOLERANCE)
    graph = rows <= 512
    calls = [partial(kernels.linear, x, (layer,)) for layer in layers]
    ours = bench.time(calls, graph=graph)
    routes: dict[str, float] = {}
    for name, most_rows in (("fused_us", rows if rows <= _MOST_FUSED else None), ("dequantized_us", 0)):
        if most_rows is not None:
            with bench.item("gemm", rows=rows, route=name), changed(linear, {"FUSED_ROWS": most_rows}):
                routes[name] = bench.time(calls, graph=graph).report()["us"]
    denses = [dense] + [bench.randn(out, ins, std=0.02) for _ in range(copies - 1)]
    library = bench.time([partial(library_linear, x, matrix) for matrix in denses], graph=graph)
    flop = 2 * rows * out * ins
    bench.record(
        "gemm",
        rows=rows,
        out=out,
        **{"in": ins},
        **ours.report(),
        **bench.of_matmul(flop, ours.median),
        relative_error=error,
        **routes,
        library={"us": library.report()["us"], **bench.of_matmul(flop, library.median)},
    )
