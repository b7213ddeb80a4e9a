"""A 16-bit model to a 4-bit checkpoint in AutoAWQ's GEMM layout: `quantize` and what it yields.

    for event in quantize(open_model(path), Path("out"), QuantizeSettings(method="awq")):
        ...  # QuantizeProgress, then one QuantizeResult

Owns the job: layer after layer with bounded memory, what is folded into what, the work area that makes it resumable,
and the files of the folder. The arithmetic is `duolocal.quant`'s.
"""

from duolocal.quantize.results import (
    GROUP_SIZES,
    METHODS,
    LayerLosses,
    Method,
    QuantizeProgress,
    QuantizeResult,
    QuantizeSettings,
)
from duolocal.quantize.run import quantize

__all__ = [
    "GROUP_SIZES",
    "METHODS",
    "LayerLosses",
    "Method",
    "QuantizeProgress",
    "QuantizeResult",
    "QuantizeSettings",
    "quantize",
]
