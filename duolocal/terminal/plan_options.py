"""Options and dispatch of `duolocal plan`. Light: the command line builds its parser with it for `--help`."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from duolocal.errors import SettingsError
from duolocal.settings import LoadSettings, parse_bytes

if TYPE_CHECKING:
    from rich.console import Console

CARDS = "rtx3090, rtx4090, rtx5090, a100, h100 …"  # as in duolocal.plan.cards, which is not imported for --help
_MORE = """\
  duolocal plan --model llama3-8b-awq --context 1M --memory 24GiB --card rtx4090
  duolocal plan --model ./model.gguf --context 128K --heads 0.5
Nothing is loaded and nothing fetched: a name, a config.json or the header of a .gguf is enough. Bytes are exact where
the file is here; speeds are measured on this machine (some seconds, once per model), or computed for a card from what
its maker publishes (docs/plan.md).
Exit codes: 0 it fits; 1 it does not, and the settings nearest to it that do are listed; 2 wrong usage.
"""

_P = TypeVar("_P", bound=argparse.ArgumentParser)
_Add = Callable[[argparse.ArgumentParser], None]


def add_plan_parser(
    commands: "argparse._SubParsersAction[_P]", *, add_model_options: _Add, add_compute_options: _Add
) -> _P:
    """Add `plan` to the commands; return its parser."""
    parser = commands.add_parser(
        "plan",
        help="what a model and a context take in memory and time, before anything is loaded",
        description="Plan memory and time: weights, KV cache by head class, working memory, file size, speeds.",
        epilog=_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("what there is")
    group.add_argument(
        "--memory", metavar="SIZE", help="memory that may be used where it computes: 24GiB (default: what is free)"
    )
    group.add_argument("--host-memory", metavar="SIZE", help="beside a GPU, for blocks (default: what is free here)")
    group.add_argument("--disk", metavar="SIZE", help="for a file of blocks (default: what is free here)")
    group.add_argument("--card", metavar="NAME", help=f"plan for this GPU instead of this machine: {CARDS}")
    group = parser.add_argument_group("what is said")
    group.add_argument("--measure", action="store_true", help="measure this machine's speed anew")
    group.add_argument("--no-measure", action="store_true", help="measure nothing; speeds only where they are known")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    add_compute_options(parser)
    return parser


def run_plan(
    options: argparse.Namespace,
    settings: LoadSettings,
    console: "Console",
    progress: "Console",
    *,
    starting: AbstractContextManager[Any],
) -> int:
    """Do what `options` ask for; return the exit code. `starting` is shown while torch loads. Raises DuoLocalError."""
    if options.measure and options.no_measure:
        raise SettingsError("--measure and --no-measure were both given: leave one of them out")
    limits = {name: _bytes(options, name) for name in ("memory", "host_memory", "disk")}
    from duolocal.startup import without_collection

    with starting, without_collection():
        from duolocal.engine.planning import plan_settings
        from duolocal.terminal.plan_view import plan_json, print_plan, rates_for

    planned = plan_settings(settings, card=options.card, **limits)
    rates = rates_for(planned, settings, progress, measure=None if options.no_measure else options.measure)
    if options.json:
        plan_json(planned, rates)
    else:
        print_plan(planned, rates, console)
    return 0 if planned.fits else 1


def _bytes(options: argparse.Namespace, name: str) -> int | None:
    text = getattr(options, name)
    if text is None:
        return None
    option = "--" + name.replace("_", "-")
    size = parse_bytes(text, option)
    if name == "memory" and size < 1:
        raise SettingsError(f"{option} is {text!r}: give a size such as 24GiB")
    return size
