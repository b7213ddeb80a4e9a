"""Options and dispatch of `duolocal summarize`. Light: the command line builds its parser with it for `--help`."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from duolocal.errors import SettingsError
from duolocal.settings import LoadSettings, parse_tokens

if TYPE_CHECKING:
    from rich.console import Console

# As in duolocal.summarize, which is not imported for --help.
PRESETS = {
    "summary": "a summary with the key facts, names and numbers",
    "bullets": "the main points as a list",
    "facts": "names, dates, numbers and what is said of them, one per line",
    "minutes": "what was discussed, decided, and who does what by when",
}
FORMATS = ("jsonl", "md", "csv")
SAMPLING = {
    "temperature": ("T", "0 always takes the likeliest token (default: 0)"),
    "top_k": ("N", "choose among the N likeliest tokens; 0: all"),
    "top_p": ("P", "choose among the likeliest tokens that hold P of the probability (default: 0.9)"),
    "min_p": ("P", "leave out tokens less likely than P times the likeliest"),
    "repetition_penalty": ("R", "above 1 makes repetition less likely (default: 1.05)"),
    "seed": ("N", "of the choice of tokens where the temperature is above 0 (default: 0)"),
    "max_tokens": ("N", "end a summary after N tokens (default: by --length: 160, 320, 1024, or 3 per word)"),
}
_PRESET_LINES = "\n".join(f"  {name:9} {about}" for name, about in PRESETS.items())
_MORE = f"""\
  duolocal summarize reports/ --out summaries.jsonl
  duolocal summarize *.pdf notes.zip --out summaries.md --prompt bullets --resume
Prompts:
{_PRESET_LINES}
  FILE      your own words, with {{document}} where the document goes
A document that does not fit into the context is read in parts, whose summaries are merged. Every summary is on the disk
when it is done: whatever happens, --resume goes on and does nothing twice (docs/summarize.md).
Exit codes: 0 all summarised; 1 none; 2 wrong usage; 3 some failed; 130 interrupted.
"""

_P = TypeVar("_P", bound=argparse.ArgumentParser)
_Add = Callable[[argparse.ArgumentParser], None]


def add_summarize_parser(
    commands: "argparse._SubParsersAction[_P]", *, add_model_options: _Add, add_compute_options: _Add
) -> _P:
    """Add `summarize` to the commands; return its parser."""
    parser = commands.add_parser(
        "summarize",
        help="summarise hundreds of documents, resumable",
        description="Summarise documents, one record each: files, folders, patterns and zip archives.",
        epilog=_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders, patterns, zip archives")
    parser.add_argument("--out", metavar="FILE", help="the file for the summaries; -: JSON lines to stdout")
    parser.add_argument(
        "--format", metavar="FORMAT", help=f"{', '.join(FORMATS)} (default: by the ending of --out, else jsonl)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with --out where it exists")
    parser.add_argument(
        "--dry-run", action="store_true", help="print tokens, parts and an estimated time; write nothing"
    )
    group = parser.add_argument_group("what is asked")
    group.add_argument("--prompt", default="summary", metavar="NAME", help="a preset or a file (default: %(default)s)")
    group.add_argument("--length", metavar="LENGTH", help="short, medium, long, or '200 words' (default: medium)")
    group.add_argument("--system", metavar="TEXT", help="a system message")
    group.add_argument(
        "--part-tokens", metavar="N", help="read at most N tokens of a document at once (default: what fits)"
    )
    group.add_argument(
        "--allow-repeats",
        action="store_true",
        help="let a summary go round in circles (default: end it where it begins to)",
    )
    add_model_options(parser)
    add_compute_options(parser)
    sampling = parser.add_argument_group("sampling")
    for name, (metavar, text) in SAMPLING.items():
        sampling.add_argument("--" + name.replace("_", "-"), dest=name, metavar=metavar, help=text)
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end a summary before TEXT; may be repeated")
    return parser


def run_summarize(
    options: argparse.Namespace,
    settings: LoadSettings,
    console: "Console",
    progress: "Console",
    *,
    starting: AbstractContextManager[Any],
) -> int:
    """Do what `options` ask for; return the exit code. `starting` is shown while torch loads. Raises DuoLocalError."""
    out = _out(options)
    format = _format(options, out)
    part_tokens = None if options.part_tokens is None else parse_tokens(options.part_tokens, "--part-tokens")
    from duolocal.startup import without_collection

    with starting, without_collection():
        from duolocal.summarize.job import SUMMARY_SAMPLING
        from duolocal.summarize.prompts import make_prompt
        from duolocal.terminal.sampling_options import change
        from duolocal.terminal.summarize_view import estimate_files, summarize_files

        sampling = SUMMARY_SAMPLING
        for name in SAMPLING:
            text = getattr(options, name)
            if text is not None:
                sampling = change(sampling, name, text, shown="--" + name.replace("_", "-"))
        if options.stop:
            from dataclasses import replace

            sampling = replace(sampling, stop=tuple(options.stop))
        prompt = make_prompt(options.prompt, length=options.length, system=options.system)
    common: dict[str, Any] = {
        "prompt": prompt,
        "sampling": sampling,
        "part_tokens": part_tokens,
        "stop_repeats": not options.allow_repeats,
    }
    if options.dry_run:
        return estimate_files(settings, options.inputs, common, console=console, progress=progress)
    assert out is not None
    return summarize_files(
        settings,
        options.inputs,
        common,
        out=None if out == Path("-") else out,
        format=format,
        resume=options.resume,
        progress=progress,
    )


def _out(options: argparse.Namespace) -> Path | None:
    if options.out is None:
        if options.dry_run:
            return None
        raise SettingsError("--out is missing: give the file for the summaries, or - for JSON lines on stdout")
    if not options.out.strip():
        raise SettingsError("--out is empty: give the file for the summaries, or - for JSON lines on stdout")
    if options.out == "-" and options.resume:
        raise SettingsError("--resume needs a file to go on with: give --out a name instead of -")
    return Path(options.out).expanduser()


def _format(options: argparse.Namespace, out: Path | None) -> Any:
    wanted = options.format
    if wanted is None:
        ending = "" if out is None else out.suffix.lower().removeprefix(".")
        return {"markdown": "md"}.get(ending, ending if ending in FORMATS else FORMATS[0])
    if wanted not in FORMATS:
        raise SettingsError(f"--format is {wanted!r}: give one of {', '.join(FORMATS)}")
    if out == Path("-") and wanted != "jsonl":
        raise SettingsError(f"--out - writes JSON lines, not {wanted}: leave --format out, or name a file")
    return wanted
