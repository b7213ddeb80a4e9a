"""The file of summaries: opened once, appended to, put in order; valid whenever the process dies.

The truth is a file of JSON lines. Every record is one write at its end, followed by fsync, so that at worst the last
line is torn; it is found and cut when the file is opened again. That file is OUT itself for jsonl. For csv and md it
lies beside (OUT.jsonl), and OUT is made from it and replaced in one move: a table or a text that was only appended to
could end in half a row that nobody can tell from a whole one, and could not be resumed from, since it leaves out the
settings.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from duolocal.errors import SettingsError, SummaryFileError
from duolocal.files import Lock, sync_folder, write_file
from duolocal.paths import cache_folder, user_path
from duolocal.summarize.parts import KeptParts
from duolocal.summarize.reader import Answer
from duolocal.summarize.records import LINE_START, Record, parse_line
from duolocal.summarize.render import RENDERERS

OutputFormat = Literal["jsonl", "md", "csv"]
FORMATS: tuple[str, ...] = get_args(OutputFormat)
# Of a long job at most this fraction of the time goes into making csv or md anew.
_RENDER_SHARE = 0.05


class Output:
    """Records on disk; one process at a time. A context manager.

    Invariant: `records` are the lines of the journal, in its order.
    """

    def __init__(self, path: str | Path, *, format: OutputFormat = "jsonl", resume: bool = False) -> None:
        """Open or make the file. Raises SettingsError where it exists and `resume` was not asked for, or is in use,
        and SummaryFileError where it is damaged or of something else."""
        self.path = user_path(path)
        if format not in FORMATS:
            raise SettingsError(f"--format is {format!r}: give one of {', '.join(FORMATS)}")
        self._render = RENDERERS.get(format)
        self.journal = self.path if self._render is None else self.path.with_name(self.path.name + ".jsonl")
        self._parts_path = self.journal.with_name(self.journal.name + ".parts")
        self.records: list[Record] = []
        self.cut_bytes = 0  # of a torn last line
        self._rendered_s, self._render_took_s = 0.0, 0.0
        self._file = -1
        self._check_place()
        self._new = not self.journal.exists() or self.journal.stat().st_size == 0
        self._lock = _lock(self.journal)
        try:
            self._open(resume=resume)
        except OSError as error:
            self.close()
            raise self._unwritable(error) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, record: Record) -> None:
        """Add a record and see it onto the disk. Raises SummaryFileError, with the file as it was before."""
        size = os.fstat(self._file).st_size
        line = record.to_line()
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise self._unwritable(error) from error
        self.records.append(record)
        if time.monotonic() - self._rendered_s >= self._render_took_s / _RENDER_SHARE:
            self._show()

    def rewrite(self, records: Sequence[Record]) -> None:
        """Put other records in the place of all, in one move. Raises SummaryFileError, with the file as it was."""
        if list(records) == self.records:
            return
        try:
            os.close(self._file)  # an open file cannot be replaced everywhere
            self._file = -1
            try:
                write_file(self.journal, b"".join(record.to_line() for record in records), durable=True, locked=True)
            finally:
                self._file = self._appending()
        except OSError as error:
            raise self._unwritable(error) from error
        self.records = list(records)

    def keep_part(self, key: str, answer: Answer) -> None:
        """Keep an answer about a part until `finish`. Raises SummaryFileError."""
        try:
            self.parts.add(key, answer)
        except OSError as error:
            raise self._unwritable(error) from error

    def finish(self, *, done: bool = True) -> None:
        """Bring csv or md up to date; where all is done, remove what was kept of parts. Raises SummaryFileError."""
        self._show()
        if done:
            self.parts.remove()

    def close(self) -> None:
        """Let other processes in. A file that was made for nothing is removed: it would be in the way of the next."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            if self._new and not self.records:
                for path in {self.journal, self.path}:
                    path.unlink(missing_ok=True)
        self._lock.release()

    @property
    def files(self) -> tuple[Path, ...]:
        """All that is written: none of it is an input."""
        return self.path, self.journal, self._parts_path

    # --- opening ---------------------------------------------------------------------------------------------------

    def _check_place(self) -> None:
        folder = self.path.absolute().parent
        if not folder.is_dir():
            raise SettingsError(f"--out {self.path}: there is no folder {folder}: make it, or name another")
        for path in (self.path, self.journal):
            if path.exists() and not path.is_file():
                raise SettingsError(f"--out {path} is not a file: name another")

    def _open(self, *, resume: bool) -> None:
        for path in {self.journal, self.path}:
            if not resume and path.exists() and path.stat().st_size:
                raise SettingsError(f"--out {path} exists: add --resume to go on with it, or name another")
        if resume and self._render is not None and self.path.exists() and not self.journal.exists():
            raise SettingsError(
                f"--out {self.path} exists without the {self.journal.name} that a resume needs: name another"
            )
        self.parts = KeptParts(self._parts_path, resume=resume)
        data = self.journal.read_bytes() if self.journal.exists() else b""
        whole = self._read(data)
        self._file = self._appending()
        if whole < len(data):
            self.cut_bytes = len(data) - whole
            os.ftruncate(self._file, whole)
        elif data and not data.endswith(b"\n"):
            os.write(self._file, b"\n")  # the line was whole but for its end
        os.fsync(self._file)
        sync_folder(self.journal.absolute().parent)
        self._show()

    def _appending(self) -> int:
        return os.open(self.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)

    def _read(self, data: bytes) -> int:
        """Take the records of `data`; return how many of its bytes are whole lines."""
        lines = data.split(b"\n")
        if lines[-1] == b"":
            lines.pop()
        position = 0
        for number, line in enumerate(lines, start=1):
            record = parse_line(line)
            if record is None and number == len(lines) and _torn(line):
                return position
            if record is None:
                raise SummaryFileError(
                    f"--out {self.journal}: line {number:,} is no record of `duolocal summarize`: name another --out, "
                    "or remove the line"
                )
            self.records.append(record)
            position += len(line) + 1
        return min(position, len(data))

    # --- csv and md ------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        if self._render is None:
            return
        began_s = time.monotonic()
        try:
            write_file(self.path, self._render(self.records), durable=True, locked=True)
        except OSError as error:
            raise self._unwritable(error) from error
        self._rendered_s = time.monotonic()
        self._render_took_s = self._rendered_s - began_s

    def _unwritable(self, error: OSError) -> SummaryFileError:
        kept = f"the {len(self.records):,} records in it are kept; " if self.records else ""
        return SummaryFileError(
            f"--out {self.path} cannot be written ({error.strerror or error}): {kept}make room or name another place; "
            "with --resume the same command goes on"
        )


def _torn(line: bytes) -> bool:
    """Tell whether a line that is no record may be the beginning of one, or what a power cut leaves of it."""
    line = line.rstrip(b"\0")
    return line.startswith(LINE_START) or LINE_START.startswith(line)


def _lock(path: Path) -> Lock:
    """Return a held lock for `path`. It lies in the cache folder: nothing is left beside the user's file."""
    folder = cache_folder() / "locks"
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    try:
        return Lock(folder / f"{name}.lock")
    except TimeoutError:
        raise SettingsError(f"--out {path}: another process is writing to it: wait for it, or name another") from None
    except OSError as error:
        raise SettingsError(f"{folder} cannot be written ({error.strerror or error}): set DUOLOCAL_CACHE") from error
