"""Which kernels an engine computes with: chosen once from what is asked for and what the machine and model allow."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch

from duolocal.engine.heap import settle_heap
from duolocal.errors import SettingsError
from duolocal.kernels.cpu import attention, build, threads
from duolocal.kernels.cpu.operations import CpuKernels
from duolocal.kernels.cpu.structs import MAX_THREADS
from duolocal.kernels.interface import Kernels
from duolocal.kernels.torch_kernels import TorchKernels
from duolocal.models.config import ModelConfig
from duolocal.models.weights import ModelWeights
from duolocal.paths import cache_folder
from duolocal.quant.awq import AWQWeight
from duolocal.quant.bitsandbytes import Int8Weight, NF4Weight, in_rows
from duolocal.quant.gguf import GGUFWeight
from duolocal.quant.grouped import group, ungroup
from duolocal.quant.kv import kv_layout
from duolocal.quant.weight import DenseWeight, Weight

_UNGROUPED = GGUFWeight | AWQWeight | NF4Weight | Int8Weight  # what no Triton kernel decodes
INT8_FROM = 1024  # hidden_size of models whose activations may be quantized to 8 bits
MIN_CAPABILITY = (8, 0)  # Ampere: the oldest GPU whose kernels are compiled and checked in CI


def kernels_named(
    name: str,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_threads: int | None = None,
    here: bool = True,
) -> tuple[str, str | None]:
    """Return which kernels "auto", "compiled" or "torch" stands for, and a line when auto had to take torch.

    "compiled" are C kernels on a CPU, "triton" those on a GPU, "torch" needs neither. here: whether `device` is this
    machine's; of a GPU that is elsewhere only the model is checked. Builds nothing. Raises SettingsError where compiled
    kernels are asked for and cannot be had.
    """
    if name not in ("auto", "compiled", "torch"):
        raise SettingsError(f"kernels {name!r} are unknown: use auto, compiled or torch")
    if num_threads is not None and not 1 <= num_threads <= MAX_THREADS:
        raise SettingsError(f"threads is {num_threads}: give 1 to {MAX_THREADS}")
    if device.type == "cpu":
        reason = unsupported_cpu(config, dtype)
    else:
        reason = _unsupported_gpu(config, dtype) or (_missing_gpu(device) if here else None)
    if name == "compiled" and reason is not None:
        raise SettingsError(f"compiled kernels cannot be used: {reason}; use --kernels torch")
    if name == "torch" or reason is not None:
        return "torch", f"the slow torch kernels compute here: {reason}" if name == "auto" else None
    return "triton" if device.type == "cuda" else "compiled", None


def activations_named(name: str, kernels: str, config: ModelConfig) -> str:
    """Return "float32", "int16" or "int8", which "auto" stands for with the kernels of `kernels_named`.

    The KL from float32 is below 0.001 nats per token: of int8 for a model of 1.5B parameters, not for one of 135M,
    which gets int16 (docs/quality.md). Raises SettingsError where integers are asked for and the kernels have none.
    """
    if kernels == "compiled":
        return ("int16" if config.hidden_size < INT8_FROM else "int8") if name == "auto" else name
    if name not in ("auto", "float32"):
        raise SettingsError(f"--activations {name} is for compiled CPU kernels, these are {kernels}: leave it out")
    return "float32"


def make_kernels(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_threads: int | None = None,
    activations: str = "float32",
    on_build: Callable[[], None] | None = None,
) -> Kernels:
    """Build the kernels that `kernels_named` named, and set torch's own threads to what does not compete with them.

    num_threads: None for one per physical core. activations: as `activations_named` says. `on_build` is called before
    kernels are compiled, which takes seconds and happens once per machine (a GPU's are compiled when they first run:
    `Engine.warm_up`). Raises KernelError where building fails.
    """
    if device.type == "cpu":
        settle_heap()
    if name == "torch":
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        return TorchKernels(dtype)
    if name == "triton":
        folder = Path(os.environ.setdefault("TRITON_CACHE_DIR", str(cache_folder() / "triton")))
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a newer triton's default would not be what is tested
        if on_build is not None and not (folder.is_dir() and any(folder.iterdir())):
            on_build()
        from duolocal.kernels.gpu.operations import TritonKernels  # imports triton

        return TritonKernels(dtype)
    build.build(on_build=on_build)
    # All heavy work is in our threads; torch's would compete with them for the same cores.
    torch.set_num_threads(1)
    return CpuKernels(num_threads or threads.default_threads(), activations=activations)


def arrange_rows(weight: Weight) -> Weight:
    """Return a matrix as the compiled CPU kernels read it, no value changed."""
    return in_rows(ungroup(weight))


def arrangement(kernels: Kernels, dtype: torch.dtype) -> Callable[[Weight], Weight] | None:
    """Return what `kernels` want done to every matrix when it is loaded; None: nothing."""
    if kernels.name == "compiled":
        return arrange_rows
    if kernels.name != "triton":
        return None

    def arrange(weight: Weight) -> Weight:
        if isinstance(weight, DenseWeight):
            return DenseWeight(weight.tensor.to(dtype))  # once, not at every product
        return group(weight)

    return arrange


def undecoded_note(kernels: Kernels, weights: ModelWeights) -> str | None:
    """Return a line naming the formats of matrices that `kernels` cannot decode on the way, or None."""
    if kernels.name != "triton":
        return None
    formats = sorted({matrix.format for matrix in weights.matrices() if isinstance(matrix, _UNGROUPED)})
    if not formats:
        return None
    return (
        f"weights in {', '.join(formats)} are decoded anew at every step on a GPU, which is slow: "
        "an AWQ model, or a file in Q4_0, Q4_1 or Q8_0, is faster"
    )


def unsupported_cpu(config: ModelConfig, dtype: torch.dtype) -> str | None:
    """Return why the compiled CPU kernels cannot compute this model here, or None where they can; builds nothing."""
    if dtype != torch.float32:
        return f"they compute in float32, --dtype is {str(dtype).removeprefix('torch.')}"
    layout = kv_layout("32", head_dim=config.head_dim, dtype=dtype)
    return build.unsupported() or attention.unsupported(layout, config.num_heads // config.num_kv_heads)


def _unsupported_gpu(config: ModelConfig, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"they compute in 16 bits, --dtype is {str(dtype).removeprefix('torch.')}"
    group_size = config.num_heads // config.num_kv_heads
    if config.head_dim % 16 or config.head_dim > 256 or group_size > 16:
        return (
            "they take a head_dim that is a multiple of 16 up to 256 and up to 16 query heads per KV head, "
            f"this model has {config.head_dim} and {group_size}"
        )
    return None


def _missing_gpu(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return "they need compute capability {}.{}, this GPU has {}.{}".format(*MIN_CAPABILITY, *capability)
    return None
