"""The compiled operations on tensors: checked, float32, run at once or recorded to be run again.

Each allocates its result, fills in the arguments of its C function and hands both to the pool. Inside `record` it is
also remembered, with its tensors: `Recording.run` repeats the whole list in one call, on whatever the same input
buffers then hold. That is the decode step: nothing is allocated and Python is entered once per token.
"""

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.kernels.cpu.pool import ThreadPool, program, thread_pool
from duolocal.kernels.cpu.structs import (
    MAX_MATRICES,
    CodesOfX,
    EmbedArgs,
    LinearArgs,
    Matrix,
    QuantizeArgs,
    RmsNormArgs,
    RopeArgs,
    SiluArgs,
)
from duolocal.kernels.interface import HasKernels, Norm, Rotation
from duolocal.kernels.matrix import Affine
from duolocal.kernels.matrix import Matrix as AnyMatrix


class Recording:
    """A list of operations and everything they point to."""

    def __init__(self, pool: ThreadPool) -> None:
        self._pool = pool
        self.calls: list[tuple[str, ctypes.Structure]] = []
        self.scratch: dict[str, Tensor] = {}
        self._kept: list[object] = []
        self._ops: ctypes.Array | None = None

    def add(self, name: str, args: ctypes.Structure, kept: Sequence[object]) -> None:
        self.calls.append((name, args))
        self._kept.extend(kept)
        self._ops = None

    def run(self) -> None:
        """Run all operations once more, in order."""
        self._pool.run(self._program(), len(self.calls))

    def timed(self) -> Sequence[int]:
        """Run them and return the ticks before the first and after each."""
        return self._pool.timed(self._program(), len(self.calls))

    def _program(self) -> ctypes.Array:
        if self._ops is None:
            self._ops = program(self._pool, self.calls)
        return self._ops


# A group gets a second code where its largest value is beyond this many root mean squares of its token: always, or
# where the error of the first would be the largest of the token's (docs/quality.md).
FINE_FROM = {"int16": 0.0, "int8": 5.0}
# What has integer codes, which products with activations of 8 bits need (AWQ: in groups of a multiple of 32).
INTEGER_PACKINGS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "AWQ", "INT8")
# Those whose products with few tokens are made token by token.
SAME_BITS = tuple(packing for packing in INTEGER_PACKINGS if packing != "AWQ")


class CpuKernels:
    """The compiled kernels on a number of threads.

    activations: "float32", or a key of FINE_FROM: what meets a matrix of integer codes is quantized, token by token, in
    groups of 32 features, and the products are of integers (source/integer.h).
    """

    name = "compiled"
    capturable = False
    angle_dtype = torch.float32

    def __init__(self, num_threads: int, *, activations: str = "float32") -> None:
        assert activations == "float32" or activations in FINE_FROM
        self.pool = thread_pool(num_threads)
        self.activations = activations
        self._recording: Recording | None = None
        self._kept: dict[str, Tensor] = {}

    @property
    def num_threads(self) -> int:
        return self.pool.num_threads

    def same_bits(self, weight: AnyMatrix) -> bool:
        """Whether products of up to MOST_AHEAD tokens with a matrix have the bits that each token's alone has."""
        packed = weight.packed()
        return self.activations in FINE_FROM and packed.packing in SAME_BITS and packed.in_features % 32 == 0

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Run and remember the operations inside."""
        assert self._recording is None, "already recording"
        self._recording = Recording(self.pool)
        try:
            yield self._recording
        finally:
            self._recording = None

    def run(self, name: str, args: ctypes.Structure, *kept: object) -> None:
        """Run one operation; `kept` are the objects whose memory it uses."""
        if self._recording is not None:
            self._recording.add(name, args, kept)
        self.pool.run(program(self.pool, [(name, args)]), 1)

    def embed(self, weight: AnyMatrix, ids: Tensor) -> Tensor:
        """Return rows `ids` [n] int64 of a matrix as [n, in_features] float32; the ids have been checked."""
        packed = weight.packed()
        assert packed.packing != "AWQ" and ids.dtype == torch.int64 and ids.is_contiguous()
        out = torch.empty(ids.shape[0], packed.in_features)
        args = EmbedArgs(Matrix.of(packed), ids.data_ptr(), out.data_ptr(), ids.shape[0])
        self.run("embed", args, weight, ids, out)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        """Scale every vector of x [..., n] to root mean square 1, then by weight [n]. As `pointwise.rms_norm`."""
        if weight.ndim != 1 or x.ndim < 1 or x.shape[-1] != weight.shape[0]:
            raise ValueError(f"rms_norm: x {tuple(x.shape)}, weight {tuple(weight.shape)}: wanted [..., n] and [n]")
        x, weight = _checked("rms_norm", x, weight)
        out = torch.empty_like(x)
        cols = x.shape[-1]
        args = RmsNormArgs(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // cols, cols, eps)
        self.run("rms_norm", args, x, weight, out)
        return out

    def linear(
        self,
        x: Tensor,
        layers: Sequence[Affine],
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        scratch: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return x Wᵀ + b for each of up to four layers that read the same x.

        x [n, in_features] -> [n, out_features] each. `norm` is applied to x first; `residual` [n, out_features] is
        added to the result of a single layer. scratch: the results last until the next such call only.
        """
        assert 1 <= len(layers) <= MAX_MATRICES and (residual is None or len(layers) == 1)
        if norm is not None:
            x = self.rms_norm(x, norm.weight, eps=norm.eps)
        (x,) = _checked("linear", x)
        args = LinearArgs(x=x.data_ptr(), num_rows=x.shape[0], count=len(layers))
        kept: list[object] = [x, residual]
        results = []
        for i, layer in enumerate(layers):
            packed = layer.weight.packed()
            if x.ndim != 2 or x.shape[1] != packed.in_features:
                raise ValueError(f"linear: x {tuple(x.shape)}: wanted [n, in_features {packed.in_features}]")
            if scratch:
                out = self._scratch(f"linear {i}", x.shape[0] * packed.out_features).view(x.shape[0], -1)
            else:
                out = torch.empty(x.shape[0], packed.out_features)
            args.w[i], args.y[i] = Matrix.of(packed), out.data_ptr()
            if layer.bias is not None:
                (bias,) = _checked("linear", layer.bias)
                if bias.shape != (packed.out_features,):
                    raise ValueError(f"linear: bias {tuple(bias.shape)}: wanted [out_features {packed.out_features}]")
                args.bias[i] = bias.data_ptr()
                kept.append(bias)
            kept += (layer.weight, packed, out)
            results.append(out)
        if residual is not None:
            (residual,) = _checked("linear", residual)
            if residual.shape != results[0].shape:
                raise ValueError(f"linear: residual {tuple(residual.shape)}: wanted {tuple(results[0].shape)}")
            args.residual = residual.data_ptr()
            kept.append(residual)
        if x.shape[0]:
            packings = {layer.weight.packed().packing for layer in layers}
            if self.activations in FINE_FROM and not packings.isdisjoint(INTEGER_PACKINGS) and x.shape[1] % 32 == 0:
                args.codes, codes = self._quantized(x, values="AWQ" in packings and x.shape[0] == 1)
                kept.append(codes)
            self.run("linear", args, *kept)
        return tuple(results)

    def _scratch(self, name: str, floats: int) -> Tensor:
        """Return memory [floats] that lasts until the next call for `name`; of a recording inside of one.

        Fresh memory costs more than what is computed in it: the system clears it page by page.
        """
        kept = self._kept if self._recording is None else self._recording.scratch
        if name not in kept or kept[name].shape[0] < floats:
            kept.pop(name, None)
            kept[name] = torch.empty(floats)
        return kept[name][:floats]

    def _quantized(self, x: Tensor, *, values: bool) -> tuple[CodesOfX, Tensor]:
        """Quantize x [n, in_features] token by token; return where its codes are and the memory of it all.

        values: x as the codes have it is wanted too.
        """
        num_rows, cols = x.shape
        units = -(-cols // 32 // 8) * 8  # as `padded_units`
        sizes = [cols, cols, 4 * units, 4 * units, 8 * units, units // 8, 4]  # bytes of a token: the fields of CodesOfX
        sizes += [4 * cols] if values else []
        ends = list(itertools.accumulate(-(-num_rows * size // 64) * 64 for size in sizes))
        buffer = self._scratch("codes", ends[-1] // 4)
        at = [buffer.data_ptr() + start for start in (0, *ends[:-1])]
        codes = CodesOfX(*at)
        args = QuantizeArgs(x.data_ptr(), codes, num_rows, cols, FINE_FROM[self.activations])
        self.run("quantize_rows", args, x, buffer)
        return codes, buffer

    def gated_linear(self, x: Tensor, gate: Affine, up: Affine, *, norm: Norm | None = None) -> Tensor:
        """Return silu(gate(x)) * up(x) [n, out_features]."""
        return self.silu_mul(*self.linear(x, (gate, up), norm=norm, scratch=True))

    def rotate(self, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Rotate q and k, each [num_tokens, heads, head_dim]."""
        return self.rotary_embedding(q, *rotation), self.rotary_embedding(k, *rotation)

    def rotary_embedding(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the pairs (d, d + head_dim/2) of x [num_tokens, heads, head_dim]. As `pointwise.rotary_embedding`."""
        if x.ndim != 3 or x.shape[-1] % 2 or cos.shape != (x.shape[0], x.shape[-1] // 2) or sin.shape != cos.shape:
            raise ValueError(
                f"rotary_embedding: x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}: wanted "
                "[num_tokens, heads, head_dim] and [num_tokens, head_dim/2]"
            )
        x, cos, sin = _checked("rotary_embedding", x, cos, sin)
        out = torch.empty_like(x)
        args = RopeArgs(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), *x.shape)
        self.run("rope", args, x, cos, sin, out)
        return out

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up. As `pointwise.silu_mul`."""
        if gate.shape != up.shape:
            raise ValueError(f"silu_mul: gate {tuple(gate.shape)}, up {tuple(up.shape)}: wanted one shape")
        gate, up = _checked("silu_mul", gate, up)
        out = torch.empty_like(gate)
        args = SiluArgs(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel())
        self.run("silu_mul", args, gate, up, out)
        return out

    def logits(self, hidden: Tensor, weight: AnyMatrix) -> Tensor:
        """Return hidden [n, in_features] times the output matrix: float32 [n, out_features]."""
        return self.linear(hidden, (_Plain(weight),))[0]


class StepRecorder:
    """The decode steps of one cache: recorded at a model's first of so many tokens, repeated in one call at the others.

    What it holds of the cache is its memory, so that it is dropped with the cache.
    """

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels
        self._model: HasKernels | None = None
        self.recordings: dict[int, Recording] = {}  # by the number of tokens
        self._buffers: dict[int, tuple[list[Tensor], Tensor]] = {}  # what each reads, and its result

    def __call__(self, compute: Callable[..., Tensor], *inputs: Tensor, model: HasKernels) -> Tensor:
        """Return `compute(*inputs)`; see `Repeat`."""
        assert model.kernels is self._kernels
        if self._model is not model:
            self.recordings, self._buffers, self._model = {}, {}, model
        count = inputs[0].shape[0]
        if count not in self.recordings:
            with torch.inference_mode(False):  # later steps write into these, in whatever mode
                kept = [x.clone() for x in inputs]
            with self._kernels.record() as recording:
                result = compute(*kept)
            self.recordings[count], self._buffers[count] = recording, (kept, result)
        else:
            kept, result = self._buffers[count]
            for x, new in zip(kept, inputs, strict=True):
                x.copy_(new)
            self.recordings[count].run()
        return result.clone()


@dataclass(frozen=True)
class _Plain:
    """A matrix as a layer without a bias."""

    weight: AnyMatrix
    bias: None = None


def _checked(operation: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(
                f"{operation}: {tensor.dtype} on {tensor.device}: compiled kernels want float32 on the CPU"
            )
    return tuple(tensor.contiguous() for tensor in tensors)
