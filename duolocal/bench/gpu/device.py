"""Section: what this machine is, and what its device can do at best."""

import importlib.metadata

import torch

from duolocal.bench.gpu.floors import datasheet
from duolocal.bench.gpu.measure import Bench
from duolocal.bench.machine import machine_facts
from duolocal.processes import output_of

_QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def run(bench: Bench) -> None:
    """Record versions and properties, then the measured copy bandwidth and matmul rate."""
    facts = dict(machine_facts(device=str(bench.device)))
    facts["triton"] = importlib.metadata.version("triton")
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvidia_smi": _nvidia_smi(),
        }
        sheet = datasheet(properties.name)
        if sheet is not None:
            facts["datasheet"] = {"gb_per_s": sheet.bytes_per_s / 1e9, "bf16_tflop_per_s": sheet.bf16_flop_per_s / 1e12}
    bench.record("machine", **facts)
    assert bench.ceilings.copy_bytes_per_s > 0


def _nvidia_smi() -> dict[str, str] | None:
    """Return what nvidia-smi tells, which changes nothing; None where it cannot be run."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    said = output_of(*command)
    if said is None:
        return None
    values = said.splitlines()[0].split(",") if said else []
    return dict(zip(_QUERY.split(","), map(str.strip, values), strict=False))
