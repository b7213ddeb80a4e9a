"""Sections: decode and a prefill while torch may take no more of the device's memory than a smaller GPU has.

The cap is torch's (`set_per_process_memory_fraction`), so the driver's own share of the process, some hundred MB, is
not in it.
"""

import torch

from duolocal.bench.gpu.decode import measure
from duolocal.bench.gpu.engines import bench_weights
from duolocal.bench.gpu.measure import Bench
from duolocal.bench.gpu.prefill import one


def run(bench: Bench) -> None:
    """Measure decode and sampled prefill of `capped_context` tokens under `cap_bytes`."""
    sizes = bench.sizes
    _cap(bench, sizes.cap_bytes)
    weights = bench_weights(bench)
    fields = {"cap_bytes": sizes.cap_bytes}
    measure(bench, weights, "50%", (sizes.capped_context,), "capped decode", **fields)
    context, chunk = sizes.capped_context, sizes.chunk_sizes[0]
    # In the cache that is reserved for the whole context; some chunks of it are enough to see that they fit.
    if bench.fits(15, "capped prefill", chunk=chunk, context=context):
        with bench.item("capped prefill", chunk=chunk, context=context):
            one(bench, weights, "50%", context, chunk, sampled=True, what="capped prefill", **fields)


def run_long(bench: Bench) -> None:
    """Measure decode of `long_capped_context` tokens under `long_cap_bytes`."""
    sizes = bench.sizes
    if bench.on_gpu and torch.cuda.get_device_properties(bench.device).total_memory < sizes.long_cap_bytes:
        fields = {"context": sizes.long_capped_context, "cap_bytes": sizes.long_cap_bytes}
        bench.record("capped decode", **fields, skipped="this device has less memory than the cap")
        return
    _cap(bench, sizes.long_cap_bytes)
    weights = bench_weights(bench)
    measure(bench, weights, "50%", (sizes.long_capped_context,), "capped decode", cap_bytes=sizes.long_cap_bytes)


def _cap(bench: Bench, cap_bytes: int) -> None:
    if bench.on_gpu:
        total = torch.cuda.get_device_properties(bench.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total))
