"""Settings of a chat, and the sizes people type: `32K`, `1M`, `131072`, `24GiB`.

Owns the spelling of sizes and the checks that need no model. Sampling is `duolocal.sampling`; whether the
settings suit a model or fit into memory is the engine's to say.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from duolocal.errors import SettingsError

_NUMBER = re.compile(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_TOKEN_UNITS = {"": 1, "k": 2**10, "m": 2**20}
_BYTE_UNITS = {"": 1, "b": 1} | {
    spelling: factor
    for letter, power in (("k", 1), ("m", 2), ("g", 3), ("t", 4))
    for spelling, factor in (
        (letter, 1024**power),
        (letter + "ib", 1024**power),
        (letter + "b", 1000**power),
    )
}
_MAX_TOKENS = 2**31 - 1  # positions are 32-bit numbers in the block tables

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
MAX_THREADS = 256  # of one pool
KERNELS = ("auto", "compiled", "torch")
WEIGHTS = ("auto", "nf4", "int8")
OUTER_WEIGHTS = ("auto", "int8", "int4")
PREFILLS = ("exact", "sparse")


def _parse(text: str, units: dict[str, int], option: str, wanted: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    factor = units.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise SettingsError(f"{option} is {text!r}: give {wanted}")
    value = Fraction(match[1].replace("_", "").replace(",", "")) * factor
    if value.denominator != 1:
        raise SettingsError(f"{option} is {text!r}, which is no whole number: give {wanted}")
    return int(value)


def parse_tokens(text: str, option: str = "--context") -> int:
    """Read a number of tokens: `131072`, `32K` (32 x 1024), `1M` (1024 x 1024); raises SettingsError."""
    value = _parse(text, _TOKEN_UNITS, option, "a number of tokens such as 131072, 32K or 1M")
    if not 1 <= value <= _MAX_TOKENS:
        raise SettingsError(f"{option} is {text!r}: give between 1 and {_MAX_TOKENS:,} tokens")
    return value


def parse_bytes(text: str, option: str) -> int:
    """Read a number of bytes: `24GiB` and `24G` are x 1024^3, `24GB` is x 1000^3; raises SettingsError."""
    return _parse(text, _BYTE_UNITS, option, "a size such as 24GiB, 500MB or 1073741824")


def parse_threads(text: str) -> int:
    """Read a number of CPU threads; raises SettingsError."""
    count = int(text) if text.strip().isascii() and text.strip().isdigit() else 0
    if not 1 <= count <= MAX_THREADS:
        raise SettingsError(f"--threads is {text!r}: give a number from 1 to {MAX_THREADS}")
    return count


def format_tokens(count: int) -> str:
    """Write a number of tokens the way people type it: 32768 is `32K`, 1000 stays `1000`."""
    for letter, factor in (("M", 2**20), ("K", 2**10)):
        if count >= factor and count % factor == 0:
            return f"{count // factor}{letter}"
    return str(count)


@dataclass(frozen=True)
class LoadSettings:
    """What has to be known before a model is loaded; None leaves the choice to the engine."""

    model: str
    context: int | None = None  # tokens
    kv: str = "auto"
    heads: str = "auto"
    sink_size: int | None = None
    recent_size: int | None = None
    chunk_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    rope: str | None = None
    threads: int | None = None
    kernels: str = "auto"
    weights: str = "auto"
    outer_weights: str = "auto"  # of lm_head and embedding
    kv_device_memory: int | None = None  # bytes
    select: str = "off"  # off, auto, or a number of tokens
    prefill: str = "exact"

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise SettingsError("--model is empty: give a name from `duolocal models`, or a path")
        for option, value, least in (
            ("--context", self.context, 1),
            ("--sink-size", self.sink_size, 0),
            ("--recent-size", self.recent_size, 1),
            ("--chunk-size", self.chunk_size, 1),
            ("--threads", self.threads, 1),
            ("--kv-device-memory", self.kv_device_memory, 0),
        ):
            if value is not None and value < least:
                raise SettingsError(f"{option} is {value}: give {least} or more")
        if self.kernels not in KERNELS:
            raise SettingsError(f"--kernels is {self.kernels!r}: give one of {', '.join(KERNELS)}")
        if self.weights not in WEIGHTS:
            raise SettingsError(f"--weights is {self.weights!r}: give one of {', '.join(WEIGHTS)}")
        if self.outer_weights not in OUTER_WEIGHTS:
            raise SettingsError(f"--outer-weights is {self.outer_weights!r}: give one of {', '.join(OUTER_WEIGHTS)}")
        if self.prefill not in PREFILLS:
            raise SettingsError(f"--prefill is {self.prefill!r}: give one of {', '.join(PREFILLS)}")
        if self.dtype not in DTYPES:
            raise SettingsError(f"--dtype is {self.dtype!r}: give one of {', '.join(DTYPES)}")
        for option, text in (("--kv", self.kv), ("--heads", self.heads), ("--device", self.device)):
            if not text.strip():
                raise SettingsError(f"{option} is empty: leave it out or give auto")

    def options(self) -> list[str]:
        """List the command-line options that ask for these settings, without those that are defaults."""
        words = ["--model", self.model]
        if self.context is not None:
            words += ["--context", format_tokens(self.context)]
        for option, value, default in (
            ("--kv", self.kv, "auto"),
            ("--heads", self.heads, "auto"),
            ("--sink-size", self.sink_size, None),
            ("--recent-size", self.recent_size, None),
            ("--chunk-size", self.chunk_size, None),
            ("--device", self.device, "auto"),
            ("--dtype", self.dtype, "auto"),
            ("--rope", self.rope, None),
            ("--threads", self.threads, None),
            ("--kernels", self.kernels, "auto"),
            ("--weights", self.weights, "auto"),
            ("--outer-weights", self.outer_weights, "auto"),
            ("--kv-device-memory", self.kv_device_memory, None),
            ("--select", self.select, "off"),
            ("--prefill", self.prefill, "exact"),
        ):
            if value != default:
                words += [option, str(value)]
        return words
