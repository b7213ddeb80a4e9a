"""Which kernels an engine computes with: chosen once from what is asked for and what the machine and model allow."""

from collections.abc import Callable

import torch

from duolocal.errors import SettingsError
from duolocal.kernels.cpu import attention, build, threads
from duolocal.kernels.cpu.operations import CpuKernels
from duolocal.kernels.cpu.structs import MAX_THREADS
from duolocal.kernels.interface import Kernels
from duolocal.kernels.torch_kernels import TorchKernels
from duolocal.models.config import ModelConfig
from duolocal.quant.kv import kv_layout


def choose_kernels(
    name: str,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_threads: int | None = None,
    on_build: Callable[[], None] | None = None,
) -> tuple[Kernels, str | None]:
    """Return the kernels `name` ("auto", "compiled" or "torch") stands for, and a line when auto had to take torch.

    num_threads: None for one per physical core. `on_build` is called before kernels are compiled, which takes
    seconds and happens once per machine. torch's own threads are set to what does not compete with ours. Raises
    SettingsError where compiled kernels are asked for and cannot be had, KernelError where building them fails.
    """
    if name not in ("auto", "compiled", "torch"):
        raise SettingsError(f"kernels {name!r} are unknown: use auto, compiled or torch")
    if num_threads is not None and not 1 <= num_threads <= MAX_THREADS:
        raise SettingsError(f"threads is {num_threads}: give 1 to {MAX_THREADS}")
    reason = _unsupported(config, device, dtype)
    if name == "compiled" and reason is not None:
        raise SettingsError(f"compiled kernels cannot be used: {reason}; use --kernels torch")
    if name == "torch" or reason is not None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        fell_back = name == "auto" and device.type == "cpu"
        return TorchKernels(dtype), f"the slow torch kernels compute here: {reason}" if fell_back else None
    build.build(on_build=on_build)
    # All heavy work is in our threads; torch's would compete with them for the same cores.
    torch.set_num_threads(1)
    return CpuKernels(num_threads or threads.default_threads()), None


def _unsupported(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"they are for the CPU, the device is {device.type}"
    if dtype != torch.float32:
        return f"they compute in float32, --dtype is {str(dtype).removeprefix('torch.')}"
    layout = kv_layout("32", head_dim=config.head_dim, dtype=dtype)
    return build.unsupported() or attention.unsupported(layout, config.num_heads // config.num_kv_heads)
