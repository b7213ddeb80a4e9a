"""Options and dispatch of `duolocal quantize`. Light: the command line builds its parser with it for `--help`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from duolocal.errors import SettingsError
from duolocal.settings import LoadSettings, parse_threads, parse_tokens

if TYPE_CHECKING:
    from rich.console import Console

# As in duolocal.quantize, which is not imported for --help.
METHODS = ("awq", "rtn")
GROUP_SIZES = (128, 64, 32)
_SAMPLES, _TOKENS = 128, 512
_MORE = """\
Methods: awq, scales and clipping searched on calibration text (arXiv 2306.00978); rtn, plain rounding, which needs no
text. The folder is in AutoAWQ's GEMM layout, with config and tokenizer: give it to --model, or to another runtime.
It can be interrupted: the same command goes on after the last finished layer.
"""

_P = TypeVar("_P", bound=argparse.ArgumentParser)


def add_quantize_parser(
    commands: "argparse._SubParsersAction[_P]", *, add_machine: Callable[[argparse.ArgumentParser], None]
) -> _P:
    """Add `quantize` to the commands; return its parser."""
    parser = commands.add_parser(
        "quantize",
        help="write a 16-bit model in 4 bits",
        description="Write a 16-bit model in 4 bits per weight.",
        epilog=_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a folder of safetensors, a .gguf file, a name from `duolocal models` or a hub id",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write; new, or left unfinished")
    parser.add_argument("--method", default=METHODS[0], help=f"{' or '.join(METHODS)} (default: %(default)s)")
    parser.add_argument(
        "--group-size",
        metavar="N",
        help=f"weights per scale: {', '.join(map(str, GROUP_SIZES))} (default: the first that fits the model)",
    )
    parser.add_argument("--text", metavar="FILE", help="calibration text (default: prose that comes with Python)")
    parser.add_argument("--samples", metavar="N", help=f"windows of calibration text (default: {_SAMPLES})")
    parser.add_argument("--tokens", metavar="N", help=f"tokens per window (default: {_TOKENS})")
    parser.add_argument("--seed", default="0", metavar="N", help="of the windows' places (default: %(default)s)")
    add_machine(parser)
    return parser


def run_quantize(options: argparse.Namespace, console: "Console", progress: "Console") -> int:
    """Do what `options` ask for; return the exit code. Raises DuoLocalError."""
    if options.method not in METHODS:
        raise SettingsError(f"--method is {options.method!r}: give {' or '.join(METHODS)}")
    if options.kernels != "auto":
        raise SettingsError("--kernels is not for quantize, which computes in plain torch: leave it out")
    for option, value in (("--text", options.text), ("--samples", options.samples), ("--tokens", options.tokens)):
        if value is not None and options.method == "rtn":
            raise SettingsError(f"{option} is for --method awq; rtn reads no text: leave it out")
    if not options.out.strip():
        raise SettingsError("--out is empty: give the folder to write")
    group_size = None if options.group_size is None else _group_size(options.group_size)
    settings = LoadSettings(
        model=options.model,
        device=options.device,
        threads=None if options.threads is None else parse_threads(options.threads),
    )
    num_samples = _SAMPLES if options.samples is None else parse_tokens(options.samples, "--samples")
    num_tokens = _TOKENS if options.tokens is None else parse_tokens(options.tokens, "--tokens")
    seed = 0 if options.seed.strip() == "0" else parse_tokens(options.seed, "--seed")
    text = None
    if options.text is not None:
        from duolocal.documents import load_document

        text = load_document(options.text).text
    from duolocal.quantize import QuantizeSettings
    from duolocal.terminal.quantize_view import quantize_model

    return quantize_model(
        settings,
        Path(options.out).expanduser(),
        QuantizeSettings(
            method=options.method,
            group_size=group_size,
            num_samples=num_samples,
            num_tokens=num_tokens,
            seed=seed,
        ),
        text=text,
        console=console,
        progress=progress,
    )


def _group_size(text: str) -> int:
    if text not in {str(size) for size in GROUP_SIZES}:
        raise SettingsError(f"--group-size is {text!r}: give one of {', '.join(map(str, GROUP_SIZES))}")
    return int(text)
