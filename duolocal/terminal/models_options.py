"""Options and dispatch of `duolocal models convert`. Light: the command line builds its parser with it for `--help`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from duolocal.errors import SettingsError
from duolocal.settings import OUTER_WEIGHTS, WEIGHTS, LoadSettings

if TYPE_CHECKING:
    from rich.console import Console

FORMS = ("native", "f16")
_MORE = """\
native: one file for the kernels of this machine (or of --device), loaded as a memory map without repacking; its values
are the source's, bit for bit, and what is known of the source (head pattern, KV format) holds for it. f16: 16-bit
safetensors as transformers writes them, for other tools and for `duolocal quantize`.
"""

_P = TypeVar("_P", bound=argparse.ArgumentParser)


def add_convert_parser(
    actions: "argparse._SubParsersAction[_P]", *, add_model: Callable[[argparse.ArgumentParser], None]
) -> _P:
    """Add `convert` to the actions of `models`; return its parser."""
    parser = actions.add_parser(
        "convert",
        help="write a model in the form that loads fastest, or as 16-bit safetensors",
        description="Write a model in another form.",
        epilog=_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write; new or empty")
    parser.add_argument("--to", default=FORMS[0], metavar="FORM", help=f"{' or '.join(FORMS)} (default: %(default)s)")
    parser.add_argument(
        "--device", default="auto", help="native: for the kernels of cpu or cuda (default: auto, this machine's)"
    )
    parser.add_argument(
        "--weights", default="auto", metavar="FORMAT", help=f"native: {', '.join(WEIGHTS)}, as in chat (default: auto)"
    )
    parser.add_argument(
        "--outer-weights",
        default="auto",
        metavar="FORMAT",
        help=f"native: lm_head and embedding in {', '.join(OUTER_WEIGHTS)}, as in chat (default: auto)",
    )
    return parser


def run_convert(options: argparse.Namespace, console: "Console", progress: "Console") -> int:
    """Write what `options` ask for; return the exit code. Raises DuoLocalError."""
    if options.to not in FORMS:
        raise SettingsError(f"--to is {options.to!r}: give {' or '.join(FORMS)}")
    if not options.out.strip():
        raise SettingsError("--out is empty: give the folder to write")
    settings = LoadSettings(
        model=options.model,
        device=options.device,
        weights=options.weights,
        outer_weights=options.outer_weights,
    )
    if options.to != "native":
        for option, value in (("--device", settings.device), ("--weights", settings.weights)):
            if value != "auto":
                raise SettingsError(f"{option} is for --to native: leave it out")
        if settings.outer_weights != "auto":
            raise SettingsError("--outer-weights is for --to native: leave it out")
    from duolocal.terminal.convert_view import convert_model

    return convert_model(settings, Path(options.out).expanduser(), to=options.to, console=console, progress=progress)
