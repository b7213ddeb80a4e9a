"""`duolocal quantize`: write a 16-bit model in 4 bits."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from duolocal.commands.models import OUT_FOLDER
from duolocal.commands.parsing import Fields, command
from duolocal.errors import SettingsError
from duolocal.options import ANY, REQUIRED, TOKENS, Kind, choice, counted, like, option
from duolocal.settings import LoadSettings
from duolocal.terminal.consoles import new_console, progress_console

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
    text: str | None = option(ANY, "calibration text", metavar="FILE", default_help="prose that comes with Python")
    samples: int | None = option(TOKENS, "windows of calibration text", default_help=str(SAMPLES))
    tokens: int | None = option(TOKENS, "tokens per window", default_help=str(TOKENS_PER_SAMPLE))
    seed: int = option(counted(0), "of the windows' places", default=0)

    def __post_init__(self) -> None:
        for name, value in (("--text", self.text), ("--samples", self.samples), ("--tokens", self.tokens)):
            if value is not None and self.method == "rtn":
                raise SettingsError(f"{name} is for --method awq; rtn reads no text: leave it out")


@command(
    "quantize", "write a 16-bit model in 4 bits", description="Write a 16-bit model in 4 bits per weight.", epilog=_MORE
)
def quantize(options: Quantize, machine: Annotated[LoadSettings, Fields(("device", "threads", "kernels"))]) -> int:
    """Quantize a model."""
    if machine.kernels != "auto":
        raise SettingsError("--kernels is not for quantize, which computes in plain torch: leave it out")
    text = None
    if options.text is not None:
        from duolocal.documents import load_document

        text = load_document(options.text).text
    from duolocal.quantize import QuantizeSettings
    from duolocal.terminal.quantize_view import quantize_model

    return quantize_model(
        replace(machine, model=options.model),
        options.out,
        QuantizeSettings(
            method=options.method,
            group_size=options.group_size,
            num_samples=options.samples or SAMPLES,
            num_tokens=options.tokens or TOKENS_PER_SAMPLE,
            seed=options.seed,
        ),
        text=text,
        console=new_console(),
        progress=progress_console(),
    )
