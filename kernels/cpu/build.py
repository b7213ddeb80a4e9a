"""Builds the C kernels for the CPU at hand, once, into the user's cache folder.

The compiler comes as a wheel (ziglang: clang with everything it needs), so that nobody has to install one. The file
name holds a hash of the sources, the flags, the compiler and the CPU: another CPU or version builds anew.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from duolocal.errors import KernelError
from duolocal.kernels.cpu.cpuinfo import cpu_lines
from duolocal.paths import cache_folder

SOURCE = Path(__file__).parent / "source"
FLAGS = (
    "-std=c11",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-fno-sanitize=all",
    "-shared",
    "-fPIC",
    "-nostdlib",
    "-g0",
)
_NEEDED = {"x86_64": ("avx2", "fma", "f16c")}  # instruction sets, as /proc/cpuinfo names them
_TIMEOUT_S = 600


def unsupported() -> str | None:
    """Return why compiled kernels cannot be built here, or None where they can."""
    if importlib.util.find_spec("ziglang") is None:
        return "the package ziglang is not installed"
    if not sys.platform.startswith("linux"):
        return f"they have been tried on Linux only, this is {platform.system()}"
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"they are written for x86_64 and aarch64, this is {platform.machine()}"
    missing = [name for name in _NEEDED.get(platform.machine(), ()) if name not in _cpu().split()]
    if missing:
        return f"this CPU lacks {', '.join(missing)}"
    return None


def library_path() -> Path:
    """Return where the library for this machine lies, or will."""
    digest = hashlib.sha256()
    for part in (*FLAGS, importlib.metadata.version("ziglang"), platform.machine(), _cpu()):
        digest.update(part.encode() + b"\0")
    for file in sorted(SOURCE.iterdir()):
        if file.suffix in (".c", ".h"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return cache_folder() / "kernels" / f"{digest.hexdigest()[:24]}.so"


def build(*, on_build: Callable[[], None] | None = None) -> Path:
    """Return the library, building it where it is missing; `on_build` is called before that (seconds).

    Raises KernelError where the compiler fails or the cache folder cannot be written.
    """
    path = library_path()
    if _intact(path):
        return path
    if on_build is not None:
        on_build()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as work:
            made = Path(work) / path.name
            compile_to(made, FLAGS)
            os.replace(made, path)  # of two processes that build at once, the last one wins; both files are equal
    except OSError as error:
        raise KernelError(
            f"{path.parent}: cannot be written ({error.strerror or error}); set DUOLOCAL_CACHE to a folder "
            "that can, or use --kernels torch"
        ) from error
    return path


def compile_to(path: Path, flags: tuple[str, ...]) -> None:
    """Compile the sources with `flags` into the shared library `path`; raise KernelError where that fails."""
    spec = importlib.util.find_spec("ziglang")
    assert spec is not None and spec.origin is not None
    compiler = Path(spec.origin).parent / "zig"
    scratch = str(path.parent)
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": scratch, "ZIG_LOCAL_CACHE_DIR": scratch}
    command = [str(compiler), "cc", *flags, "-o", str(path), str(SOURCE / "kernels.c")]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"the kernel compiler does not run ({error}); use --kernels torch") from error
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
        raise KernelError(f"the kernels do not compile on this machine ({reason.strip()}); use --kernels torch")
    with path.open("ab") as file:
        file.write(hashlib.sha256(path.read_bytes()).digest())  # what `_intact` looks for


@cache
def load(path: Path) -> ctypes.CDLL:
    """Open a built library; raise KernelError where it is damaged or this CPU lacks what it needs."""
    if not _intact(path):  # the system's loader crashes on a file that ends too early
        raise KernelError(f"{path}: the kernels are damaged; delete the file, or use --kernels torch")
    try:
        # Now, not lazily: a missing function must be an error here and not a crash later.
        return ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except OSError as error:
        raise KernelError(f"the kernels do not run on this CPU ({error}); use --kernels torch") from error


def _intact(path: Path) -> bool:
    """Return whether a library is there and whole: its last 32 bytes are the SHA-256 of all before them."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data[:-32]).digest() == data[-32:]


def _cpu() -> str:
    """Return what identifies the CPU: its name and its instruction sets."""
    return "\n".join(cpu_lines("model name", "flags", "Features", "CPU part")) or platform.processor()
