"""`duolocal summarize`: bars for files and tokens, plain lines where there is no terminal, and how it ended.

All of it goes to stderr; stdout is left to `--out -` and to the table of a dry run.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from duolocal.chat.opening import CHARACTERS_PER_TOKEN
from duolocal.commands.summarize import STDOUT, Summarize
from duolocal.documents import Found, Skipped, gather
from duolocal.processes import INTERRUPTED, cancel_on_interrupt
from duolocal.settings import FirstUse, LoadSettings, Sampling
from duolocal.summarize import (
    Began,
    Ended,
    Estimate,
    Looked,
    Opened,
    Output,
    Planned,
    Progress,
    Record,
    Summarizer,
    estimate,
)
from duolocal.summarize.output import OutputFormat
from duolocal.summarize.prompts import make_prompt
from duolocal.terminal import figures
from duolocal.terminal.clean import clean, clean_line
from duolocal.terminal.consoles import new_console, progress_console, say
from duolocal.terminal.progress import Bar, bar, bars
from duolocal.terminal.start import start
from duolocal.terminal.tables import new_table

SOME_FAILED = 3
_NAMED = 3  # of what was left out


def summarize(options: Summarize, settings: LoadSettings, sampling: Sampling, first_use: FirstUse) -> int:
    """Summarise documents, or print what it would take; return the exit code. Raises DuoLocalError."""
    common: dict[str, Any] = {
        "prompt": make_prompt(options.prompt, length=options.length, system=options.system),
        "sampling": sampling,
        "part_tokens": options.part_tokens,
        "stop_repeats": not options.allow_repeats,
    }
    if options.dry_run:
        console = new_console()
        return estimate_files(
            settings, options.inputs, common, first_use=first_use, console=console, progress=progress_console()
        )
    return summarize_files(
        settings,
        options.inputs,
        common,
        first_use=first_use,
        out=None if options.out == STDOUT else options.out,
        format=options.written,
        resume=options.resume,
        progress=progress_console(),
    )


def summarize_files(
    settings: LoadSettings,
    paths: Sequence[str],
    options: Mapping[str, Any],
    *,
    first_use: FirstUse,
    out: Path | None,
    format: OutputFormat,
    resume: bool,
    progress: Console,
) -> int:
    """Summarise what `paths` name into `out` (None: stdout); return the exit code.

    options: of Summarizer. Raises DuoLocalError, for inputs and `out` before a model is loaded.
    """
    found = _gathered(paths)
    if out is None:
        return _run(settings, found, options, None, progress, first_use)
    with Output(out, format=format, resume=resume) as output:
        if output.cut_bytes:
            say(f"the last line of {out} was torn and is cut off ({output.cut_bytes:,} bytes)")
        return _run(settings, found, options, output, progress, first_use)


def estimate_files(
    settings: LoadSettings,
    paths: Sequence[str],
    options: Mapping[str, Any],
    *,
    first_use: FirstUse,
    console: Console,
    progress: Console,
) -> int:
    """Print what `paths` come to in tokens, parts and time; return the exit code. Writes nothing."""
    found = _gathered(paths)
    summarizer = _summarizer(settings, found, options, progress, first_use)
    result: Estimate | None = None
    with bar(progress, "measuring, then counting", "") as shown:
        for event in estimate(summarizer, found):
            if isinstance(event, Estimate):
                result = event
            else:
                shown.update(*event, unit="files")
    assert result is not None
    console.print(_estimate_table(result))
    failed = sum(file.error is not None for file in result.files)
    speed = result.speed
    about = f"{len(result.files):,} files, {result.tokens:,} tokens" + (
        f", {failed:,} cannot be read" if failed else ""
    )
    console.print(
        f"{about}: at most about {figures.duration(result.seconds)}. An estimate, by a short measurement now "
        f"({speed.prefill:,.0f} tokens/s read, {speed.decode:,.0f} written) and with every summary at its longest; "
        "long documents are read somewhat slower.",
        soft_wrap=True,
        markup=False,
    )
    return _exit_code(len(result.files) - failed, failed)


def _run(
    settings: LoadSettings,
    found: Sequence[Found | Skipped],
    options: Mapping[str, Any],
    output: Output | None,
    progress: Console,
    first_use: FirstUse,
) -> int:
    summarizer = _summarizer(settings, found, options, progress, first_use)
    ended: Ended | None = None
    records = summarizer.run(found, output=output)
    try:
        # The first Ctrl-C ends the job at its next step, the second gets out at once.
        with cancel_on_interrupt(summarizer.cancel, most=2), _Shown(progress) as shown:
            for event in records:
                if isinstance(event, Record) and output is None:
                    _write_line(event)
                shown.show(event)
                if isinstance(event, Ended):
                    ended = event
    except KeyboardInterrupt:
        records.close()  # brings the file up to date
        say(_go_on(output))
        raise
    assert ended is not None
    say(_result(ended, output))
    if ended.cancelled:
        say(_go_on(output))
        return INTERRUPTED
    return _exit_code(ended.summarized, ended.failed)


def _write_line(record: Record) -> None:
    line = record.to_line()
    if sys.stdout.isatty():
        sys.stdout.write(clean(line.decode("utf-8")))
        sys.stdout.flush()
    else:
        sys.stdout.buffer.write(line)  # UTF-8 whatever the locale
        sys.stdout.buffer.flush()


def _exit_code(summarized: int, failed: int) -> int:
    if not failed:
        return 0
    return SOME_FAILED if summarized else 1


def _gathered(paths: Sequence[str]) -> Sequence[Found | Skipped]:
    gathered = gather(paths)
    skipped = gathered.skipped
    if skipped:
        named = "; ".join(f"{item.name} ({item.reason})" for item in skipped[:_NAMED])
        more = f"; and {len(skipped) - _NAMED:,} more" if len(skipped) > _NAMED else ""
        say(f"left out: {named}{more}")
    return (*gathered.found, *skipped)


def _summarizer(
    settings: LoadSettings,
    found: Sequence[Found | Skipped],
    options: Mapping[str, Any],
    progress: Console,
    first_use: FirstUse,
) -> Summarizer:
    reading = sum(file.num_bytes for file in found if isinstance(file, Found)) // CHARACTERS_PER_TOKEN
    started = start(settings, system=None, progress=progress, first_use=first_use, reading=reading)
    session = started.session
    summarizer = Summarizer(session.engine, session.tokenizer, model=settings.model, **options)
    if summarizer.frame.note:
        say(summarizer.frame.note)
    return summarizer


class _Shown:
    """What is shown while the work goes on. A context manager."""

    def __init__(self, progress: Console) -> None:
        self._progress = progress
        self._bars = bars(progress, ("looking at the files", "files"), ("", "tokens"))
        self._files: Bar
        self._tokens: Bar
        self._total = 0
        self._done = 0
        self._fresh = 0  # done by this run
        self._began_s = time.monotonic()
        self._stage: tuple[object, ...] = ()
        self._stage_s = 0.0

    def __enter__(self) -> "_Shown":
        self._files, self._tokens = self._bars.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bars.__exit__(*error)

    def show(self, event: object) -> None:
        """Show one event of a job."""
        if isinstance(event, Looked):
            self._files.update(event.done, event.total)
        elif isinstance(event, Began):
            self._began(event)
        elif isinstance(event, Opened):
            self._tokens.describe(f"opening {clean_line(event.name)}")
            self._tokens.update(0, 0)
        elif isinstance(event, Planned):
            self._tokens.update(0, event.tokens)
        elif isinstance(event, Progress):
            self._step(event)
        elif isinstance(event, Record):
            self._record(event)

    def _began(self, event: Began) -> None:
        self._total, self._done = event.total, event.done
        self._began_s = time.monotonic()
        self._files.describe("summarising")
        self._files.update(self._done, self._total)
        found = [
            (event.done, "done already"),
            (event.failed, "failed and tried again"),
            (event.changed, "changed and done anew"),
            (event.others, "not among the inputs and kept"),
        ]
        words = [f"{count:,} {what}" for count, what in found if count]
        if words:
            say(f"going on: {', '.join(words)}; {event.total - event.done:,} of {event.total:,} to do")

    def _step(self, event: Progress) -> None:
        stage = (event.index, event.level, event.part, event.doing)
        if stage != self._stage:
            self._stage, self._stage_s = stage, time.monotonic()
            what = "reading" if event.doing == "reading" else "writing about"
            if event.level:
                what = "merging" if event.doing == "reading" else "writing the merged summary of"
            part = f", part {event.part} of {event.parts}" if event.parts > 1 else ""
            self._tokens.describe(f"{what} {clean_line(event.name)}{part}")
        self._tokens.update(event.done, event.total, time.monotonic() - self._stage_s)

    def _record(self, record: Record) -> None:
        if record.finish_reason == "skipped":
            return  # said before anything was loaded
        self._done += 1
        self._fresh += 1
        # What was done before took this run no time: scaled so that the time left is right.
        elapsed_s = (time.monotonic() - self._began_s) * self._done / self._fresh
        self._files.update(self._done, self._total, elapsed_s)
        name = clean_line(record.name)
        if record.error is not None:
            say(f"{self._done:,} of {self._total:,} {name}: failed: {record.error}")
        elif not self._progress.is_terminal:
            parts = f" in {record.parts} parts" if record.parts > 1 else ""
            took = figures.duration(record.timings.total_s)
            tokens = figures.tokens(record.tokens or 0)
            say(f"{self._done:,} of {self._total:,} {name}: {tokens}{parts}, {took}{_ending(record)}")


def _ending(record: Record) -> str:
    if record.cut_off:
        return ", cut off by max_tokens"
    if record.finish_reason == "near-empty":
        return ", near-empty: its text stands in place of a summary"
    return ", ended where it repeated itself" if record.finish_reason == "repeat" else ""


def _result(ended: Ended, output: Output | None) -> str:
    words = f"{ended.summarized:,} of {ended.total:,} summarised"
    if ended.failed:
        words += f", {ended.failed:,} failed"
    if ended.left:
        words += f", {ended.left:,} left"
    if ended.cut_off:
        words += f", {ended.cut_off:,} cut off by max_tokens"
    where = "" if output is None else f": {output.path}"
    return f"{words}, in {figures.duration(ended.elapsed_s)}{where}"


def _go_on(output: Output | None) -> str:
    if output is None:
        return "interrupted; stdout ends with a whole line"
    if not output.records:
        if len(output.parts):
            return f"interrupted; {len(output.parts):,} parts are kept: the same command with --resume goes on"
        return "interrupted before the first summary was done; nothing was written"
    return f"interrupted; {output.path} is whole: the same command with --resume goes on"


def _estimate_table(result: Estimate) -> Table:
    table = new_table("~file", ">tokens", ">parts", ">time at most")
    for file in result.files:
        name = Text(clean_line(file.name))
        if file.error is not None:
            table.add_row(name.append(f": {clean_line(file.error)}", "red"), "-", "-", "-")
        else:
            table.add_row(name, f"{file.tokens:,}", f"{file.parts:,}", figures.duration(file.seconds))
    return table
