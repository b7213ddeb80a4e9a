"""The options of `duolocal quantize`."""

from dataclasses import dataclass
from pathlib import Path

from duolocal.commands.models import OUT_FOLDER, TEXT
from duolocal.commands.parsing import Command, Taken
from duolocal.errors import SettingsError
from duolocal.options import REQUIRED, TOKENS, Kind, choice, counted, like, option
from duolocal.settings import LoadSettings

# As in duolocal.quantize, which is not imported for --help.
METHODS = ("awq", "rtn")
GROUP_SIZES = (128, 64, 32)
SAMPLES, TOKENS_PER_SAMPLE = 128, 512
_SIZES = ", ".join(map(str, GROUP_SIZES))
_MORE = """\
Methods: awq, scales and clipping searched on calibration text (arXiv 2306.00978); rtn, plain rounding, which needs no
text. The folder is in AutoAWQ's GEMM layout, with config and tokenizer: give it to --model, or to another runtime.
It can be interrupted: the same command goes on after the last finished layer.
"""


@dataclass(frozen=True)
class Quantize:
    """What is quantized, how and where to."""

    model: str = like(
        LoadSettings,
        "model",
        default=REQUIRED,
        help="a folder of safetensors, a .gguf file, a name from `duolocal models` or a hub id",
        group=None,
    )
    out: Path = option(OUT_FOLDER, "the folder to write; new, or left unfinished", default=REQUIRED, metavar="DIR")
    method: str = option(choice(*METHODS), " or ".join(METHODS), default=METHODS[0], metavar="METHOD")
    group_size: int | None = option(
        Kind(lambda text, name: int(text), f"give one of {_SIZES}", lambda size: size in GROUP_SIZES, metavar="N"),
        f"weights per scale: {_SIZES}",
        default_help="the first that fits the model",
    )
    text: tuple[str, str] | None = option(
        TEXT, "calibration text", metavar="FILE", default_help="prose that comes with Python"
    )
    samples: int | None = option(TOKENS, "windows of calibration text", default_help=str(SAMPLES))
    tokens: int | None = option(TOKENS, "tokens per window", default_help=str(TOKENS_PER_SAMPLE))
    seed: int = option(counted(0), "of the windows' places", default=0)

    def __post_init__(self) -> None:
        for name, value in (("--text", self.text), ("--samples", self.samples), ("--tokens", self.tokens)):
            if value is not None and self.method == "rtn":
                raise SettingsError(f"{name} is for --method awq; rtn reads no text: leave it out")


def _refuse(options: Quantize, machine: LoadSettings) -> None:
    if machine.kernels != "auto":
        raise SettingsError("--kernels is not for quantize, which computes in plain torch: leave it out")


COMMANDS = (
    Command(
        "quantize",
        "write a 16-bit model in 4 bits",
        "quantize_view:quantize_model",
        (Quantize, Taken(LoadSettings, ("device", "threads", "kernels"))),
        _refuse,
        "Write a 16-bit model in 4 bits per weight.",
        _MORE,
    ),
)
