"""Options and dispatch of `duolocal heads`. Light: the command line builds its parser with it for `--help`."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from duolocal.errors import SettingsError
from duolocal.settings import LoadSettings, parse_threads, parse_tokens

if TYPE_CHECKING:
    from rich.console import Console

# As in duolocal.identify, which is not imported for --help.
METHODS = ("drift", "attribution", "echo", "copy", "distill")
_FORMATS = ("json", "published")
_METHODS = """\
Methods: drift, how far a layer's result moves when a head sees its window only; attribution, that and the gradient of
what the model predicts: minutes, and the best so far (docs/quality.md); echo, repeated random tokens, the quickest;
copy, which heads look at a needle while it is copied; distill, trained gates (DuoAttention), the slowest: it can be
interrupted and goes on where it was. Drift, echo and copy are forward only.
Without --out the pattern is kept for this model, and --heads auto takes it from then on.
"""

_P = TypeVar("_P", bound=argparse.ArgumentParser)


def add_heads_parsers(
    what: "argparse._SubParsersAction[_P]",
    *,
    add_model: Callable[[argparse.ArgumentParser], None],
    add_machine: Callable[[argparse.ArgumentParser], None],
) -> dict[str, _P]:
    """Add what can be done with head patterns to the subparsers of `heads`; return the new parsers by name."""
    show = what.add_parser("show", help="which heads of a model or pattern are retrieval heads", allow_abbrev=False)
    show.add_argument(
        "pattern",
        nargs="?",
        metavar="PATTERN",
        help="a pattern file, a folder in the published layout, or published:NAME (default: the model's pattern)",
    )
    add_model(show)
    show.add_argument(
        "--heads", default="auto", metavar="SPLIT", help="as for a chat, such as 0.5 (default: the pattern's own ratio)"
    )
    show.add_argument("--png", metavar="FILE", help="draw the map into this file")

    identify = what.add_parser(
        "identify",
        help="find the retrieval heads of a model and write a pattern",
        epilog=_METHODS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model(identify)
    identify.add_argument(
        "--method", default=METHODS[0], metavar="METHOD", help=f"{', '.join(METHODS)} (default: %(default)s)"
    )
    identify.add_argument("--out", metavar="FILE", help="the pattern file; FOLDER/ writes the published layout")
    identify.add_argument("--format", metavar="FORMAT", help="json or published (default: by the name after --out)")
    identify.add_argument("--seed", default="0", metavar="N", help="the same seed gives the same pattern (default: 0)")
    identify.add_argument("--tokens", metavar="N", help="tokens per run (default: the method's)")
    identify.add_argument("--steps", metavar="N", help="training steps of distill (default: the method's)")
    identify.add_argument(
        "--text-share",
        metavar="R",
        help="share of distill's loss at ordinary text (default: a half; 0: at the answers alone, as published)",
    )
    identify.add_argument(
        "--pressure", metavar="R", help="what an open gate costs distill (default: 0.05; lower keeps more gates open)"
    )
    identify.add_argument("--sink-size", metavar="N", help="first tokens that a streaming head would keep")
    identify.add_argument("--recent-size", metavar="N", help="last tokens that a streaming head would keep")
    identify.add_argument(
        "--default-ratio",
        metavar="R",
        help="share of retrieval heads that the pattern is cut at where none is asked for (default: two thirds)",
    )
    identify.add_argument(
        "--compare", nargs="+", action="extend", default=[], metavar="PATTERN", help="patterns to compare with"
    )
    identify.add_argument(
        "--png", metavar="FILE", help="draw the map into this file (default: beside the pattern; none: no picture)"
    )
    add_machine(identify)

    listing = what.add_parser("list", help="models for which a pattern is published", allow_abbrev=False)
    return {"heads show": show, "heads identify": identify, "heads list": listing}


def run_heads(options: argparse.Namespace, console: "Console", progress: "Console") -> int:
    """Do what `options` ask for; return the exit code. Raises DuoLocalError."""
    if options.action == "list":
        from duolocal.terminal.heads_view import list_published

        return list_published(console)
    if options.action == "show":
        if options.pattern is not None and options.heads != "auto":
            _ratio(options.heads.removeprefix("ratio="), "--heads")
        from duolocal.terminal.heads_view import show_heads

        return show_heads(options.model, console=console, pattern=options.pattern, heads=options.heads, png=options.png)
    if options.method not in METHODS:
        raise SettingsError(f"--method is {options.method!r}: give one of {', '.join(METHODS)}")
    if options.format not in (None, *_FORMATS):
        raise SettingsError(f"--format is {options.format!r}: give one of {', '.join(_FORMATS)}")
    if options.format is not None and options.out is None:
        raise SettingsError("--format is for a file: give --out FILE too")
    for option, value in (
        ("--steps", options.steps),
        ("--text-share", options.text_share),
        ("--pressure", options.pressure),
    ):
        if value is not None and options.method != "distill":
            raise SettingsError(f"{option} is for --method distill; {options.method} has none: leave it out")
    settings = LoadSettings(
        model=options.model,
        sink_size=_count(options.sink_size, "--sink-size", least=0),
        recent_size=_count(options.recent_size, "--recent-size"),
        device=options.device,
        threads=None if options.threads is None else parse_threads(options.threads),
        kernels=options.kernels,
    )
    seed = _count(options.seed, "--seed", least=0)
    assert seed is not None
    num_tokens, steps = _count(options.tokens, "--tokens"), _count(options.steps, "--steps")
    ratio = None if options.default_ratio is None else _ratio(options.default_ratio, "--default-ratio")
    text_share = None if options.text_share is None else _ratio(options.text_share, "--text-share")
    pressure = None if options.pressure is None else _ratio(options.pressure, "--pressure")
    from duolocal.terminal.heads_identify_view import identify_heads

    return identify_heads(
        settings,
        options.method,
        out=options.out,
        published=None if options.format is None else options.format == "published",
        seed=seed,
        num_tokens=num_tokens,
        steps=steps,
        text_share=text_share,
        pressure=pressure,
        default_ratio=ratio,
        compare=options.compare,
        png=options.png,
        console=console,
        progress=progress,
    )


def _count(text: str | None, option: str, *, least: int = 1) -> int | None:
    if text is None:
        return None
    return 0 if least == 0 and text.strip() == "0" else parse_tokens(text, option)


def _ratio(text: str, option: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise SettingsError(f"{option} is {text!r}: give a ratio between 0 and 1")
    return ratio
