"""The options of `duolocal summarize`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from duolocal.commands.parsing import Command, Taken
from duolocal.errors import SettingsError
from duolocal.options import ANY, REQUIRED, TOKENS, choice, flagged, option, path, repeated
from duolocal.settings import SUMMARY_SAMPLING, FirstUse, LoadSettings, Sampling

# As in duolocal.summarize, which is not imported for --help.
PRESETS = {
    "summary": "a summary with the key facts, names and numbers",
    "bullets": "the main points as a list",
    "facts": "names, dates, numbers and what is said of them, one per line",
    "minutes": "what was discussed, decided, and who does what by when",
}
FORMATS = ("jsonl", "md", "csv")
_ENDINGS = {"": "jsonl", ".jsonl": "jsonl", ".ndjson": "jsonl", ".md": "md", ".markdown": "md", ".csv": "csv"}
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
STDOUT = Path("-")
_asked = partial(option, group="what is asked")


@dataclass(frozen=True)
class Summarize:
    """What is summarised, how and where to."""

    inputs: tuple[str, ...] = option(
        repeated(ANY), "files, folders, patterns, zip archives", default=REQUIRED, metavar="INPUT", positional=True
    )
    out: Path | None = option(
        path("give the file for the summaries, or - for JSON lines on stdout"),
        "the file for the summaries; -: JSON lines to stdout",
        metavar="FILE",
    )
    format: str | None = option(
        choice(*FORMATS), ", ".join(FORMATS), metavar="FORMAT", default_help="by the ending of --out, else jsonl"
    )
    resume: bool = flagged("go on with --out where it exists")
    dry_run: bool = flagged("print tokens, parts and an estimated time; write nothing")
    prompt: str = _asked(ANY, "a preset or a file", default="summary", metavar="NAME")
    length: str | None = _asked(
        ANY,
        "short, medium, long, or '200 words'; without --max-tokens also the most tokens: 160, 320, 1024, or 3 per word",
        metavar="LENGTH",
        default_help="medium",
    )
    system: str | None = _asked(ANY, "a system message", metavar="TEXT")
    part_tokens: int | None = _asked(TOKENS, "read at most N tokens of a document at once", default_help="what fits")
    allow_repeats: bool = flagged(
        "let a summary go round in circles (default: end it where it begins to)", group="what is asked"
    )

    def __post_init__(self) -> None:
        if self.out is None and not self.dry_run:
            raise SettingsError("--out is missing: give the file for the summaries, or - for JSON lines on stdout")
        if self.out == STDOUT and self.resume:
            raise SettingsError("--resume needs a file to go on with: give --out a name instead of -")
        if self.out == STDOUT and self.format not in (None, "jsonl"):
            raise SettingsError(f"--out - writes JSON lines, not {self.format}: leave --format out, or name a file")

        ending = "" if self.out is None else self.out.suffix.lower()
        if self.format is None and ending not in _ENDINGS:
            raise SettingsError(
                f"--out {self.out}: {ending} tells no format: end it in .jsonl, .md or .csv, or give --format"
            )

    @property
    def written(self) -> Any:
        """The format of `out`."""
        return self.format or _ENDINGS["" if self.out is None else self.out.suffix.lower()]


COMMANDS = (
    Command(
        "summarize",
        "summarise hundreds of documents, resumable",
        "summarize_view:summarize",
        (Summarize, LoadSettings, Taken(Sampling, base=SUMMARY_SAMPLING), FirstUse),
        description="Summarise documents, one record each: files, folders, patterns and zip archives.",
        epilog=_MORE,
    ),
)
