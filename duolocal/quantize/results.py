"""What a quantization is asked for, and what it yields: how far it is, and in the end the figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Method = Literal["awq", "rtn"]
METHODS: tuple[Method, ...] = ("awq", "rtn")
GROUP_SIZES = (128, 64, 32)  # the first that fits a model is its default
DEFAULT_SAMPLES = 128
DEFAULT_TOKENS = 512  # per sample


@dataclass(frozen=True)
class QuantizeSettings:
    """What a checkpoint depends on beside the model and the calibration text; equal settings give equal bits."""

    method: str = "awq"
    group_size: int | None = None  # input features per scale; None: the largest of GROUP_SIZES that fits
    num_samples: int = DEFAULT_SAMPLES  # windows of calibration text; awq
    num_tokens: int = DEFAULT_TOKENS  # per window; awq
    seed: int = 0  # where in the text the windows begin, which rows are kept of wide inputs; awq


@dataclass(frozen=True)
class LayerLosses:
    """Relative squared errors of one layer, by linear group ("qkv", "o", "gate_up", "down"); lower is better.

    awq: of the outputs, on the calibration text, and what plain rounding would lose there; rtn: of the weights.
    """

    losses: Mapping[str, float]
    plain: Mapping[str, float]  # the same as `losses` for rtn
    alphas: Mapping[str, float]  # the α found; {} for rtn

    @property
    def mean(self) -> float:
        return sum(self.losses.values()) / len(self.losses)

    @property
    def plain_mean(self) -> float:
        return sum(self.plain.values()) / len(self.plain)


@dataclass(frozen=True)
class QuantizeProgress:
    """How far it is. Layers that an earlier run finished count as done."""

    done: int  # layers
    total: int
    doing: str  # for people: "layer 3 of 30: searching scales of gate_up"
    fresh: int = 0  # layers done by this run
    elapsed_s: float = 0.0  # that those took
    losses: LayerLosses | None = None  # of the layer that has just been finished


@dataclass(frozen=True)
class QuantizeResult:
    """A finished checkpoint."""

    out: Path
    method: str
    group_size: int
    layers: tuple[LayerLosses, ...]
    num_linear_weights: int  # quantized
    linear_bytes: int  # that they take, scales and zero points included
    num_weights: int  # of the whole model
    bytes_before: int  # of the source's tensors on disk
    bytes_after: int
    num_tokens: int  # of calibration text; 0 for rtn
    resumed: int  # layers that an earlier run had finished
    elapsed_s: float  # of this run

    @property
    def linear_bits(self) -> float:
        """Bits per quantized weight, scales and zero points included."""
        return 8 * self.linear_bytes / self.num_linear_weights

    @property
    def bits(self) -> float:
        """Bits per weight of the whole model, 16-bit embedding, output matrix and norms included."""
        return 8 * self.bytes_after / self.num_weights
