"""Building and loading the compiled kernels: once per machine, and one line where that cannot be."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from duolocal.engine.kernels import kernels_named, make_kernels
from duolocal.errors import DuoLocalError, KernelError, SettingsError
from duolocal.kernels.cpu import build
from duolocal.kernels.cpu.operations import CpuKernels
from duolocal.kernels.torch_kernels import TorchKernels
from tests.compiled import compiled_kernels
from tests.tiny import tiny_config

pytestmark = compiled_kernels

CPU = torch.device("cpu")
# Where only the building is looked at: the compiler is ten times faster without optimizing.
QUICK = tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and quick builds."""
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "FLAGS", QUICK)
    return tmp_path / "cache"


def error_of(run: Callable[[], object], kind: type[DuoLocalError] = KernelError) -> str:
    """Return the one line of the error that `run` raises."""
    with pytest.raises(kind) as raised:
        run()
    message = str(raised.value)
    assert message and "\n" not in message
    return message


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_library_is_built_once(folder: Path) -> None:
    built: list[str] = []
    path = build.build(on_build=lambda: built.append("now"))
    assert built == ["now"]
    assert files(folder) == ["kernels", f"kernels/{path.name}"]  # and nothing of the compiler's is left
    made = path.stat().st_mtime_ns
    assert build.build(on_build=lambda: built.append("again")) == path == build.library_path()
    assert built == ["now"]
    assert path.stat().st_mtime_ns == made
    assert build.load(path).duo_lanes() in (8, 16)


def test_another_machine_or_version_builds_anew(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home folder that two machines share, and an update of sources, flags or compiler."""
    source = tmp_path / "source"
    shutil.copytree(build.SOURCE, source)
    monkeypatch.setattr(build, "SOURCE", source)
    paths = [build.library_path()]
    header = source / "simd.h"
    header.write_text(header.read_text() + "// changed\n")
    paths.append(build.library_path())
    header.rename(source / "simd2.h")
    paths.append(build.library_path())
    (source / "notes.txt").write_text("no source")
    assert build.library_path() == paths[-1]
    for target, name, value in (
        (build, "_cpu", lambda: "another CPU"),
        (build, "FLAGS", (*QUICK, "-DX")),
        (build.importlib.metadata, "version", lambda _: "0.0.1"),
        (build.platform, "machine", lambda: "aarch64"),
    ):
        monkeypatch.setattr(target, name, value)
        paths.append(build.library_path())
    assert len(set(paths)) == len(paths)
    assert {path.parent for path in paths} == {folder / "kernels"}


def test_the_cpu_is_told_by_name_and_instruction_sets() -> None:
    text = build._cpu()
    assert text
    assert len(text.splitlines()) <= 8  # once, not once per core
    if Path("/proc/cpuinfo").exists() and platform.machine() == "x86_64":
        assert "model name" in text and " avx" in text
    assert "MHz" not in text  # changes from moment to moment


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "file" / "cache"))
    message = error_of(build.build)
    assert str(tmp_path / "file" / "cache") in message
    assert "DUOLOCAL_CACHE" in message and "--kernels torch" in message


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels").chmod(0o500)
    message = error_of(build.build)
    assert str(folder) in message and "DUOLOCAL_CACHE" in message and "--kernels torch" in message


def test_sources_that_do_not_compile(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(build.SOURCE, tmp_path / "source")
    monkeypatch.setattr(build, "SOURCE", tmp_path / "source")
    with (tmp_path / "source" / "kernels.c").open("a") as file:
        file.write("this is no C;\n")
    message = error_of(build.build)
    assert "do not compile" in message and "kernels.c" in message and "--kernels torch" in message
    assert files(folder) == ["kernels"]


def test_a_compiler_that_does_not_start(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide_ziglang(monkeypatch, found=SimpleNamespace(origin=str(tmp_path / "ziglang" / "__init__.py")))
    message = error_of(build.build)
    assert "does not run" in message and "--kernels torch" in message
    assert files(folder) == ["kernels"]


def test_a_compiler_that_never_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_TIMEOUT_S", 0.001)
    assert "does not run" in error_of(build.build)
    assert files(folder) == ["kernels"]


def test_a_library_that_lacks_a_function(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Refused when it is opened: a lazy binding would end the process at the first call."""
    shutil.copytree(build.SOURCE, tmp_path / "source")
    monkeypatch.setattr(build, "SOURCE", tmp_path / "source")
    with (tmp_path / "source" / "kernels.c").open("a") as file:
        file.write("int duo_missing(int); int duo_calls_it(int x) { return duo_missing(x); }\n")
    path = build.build()
    message = error_of(lambda: build.load(path))
    assert "duo_missing" in message and "--kernels torch" in message


LOADER = """
import sys
from pathlib import Path
from duolocal.errors import KernelError
from duolocal.kernels.cpu.build import load
try:
    load(Path(sys.argv[1]))
except KernelError as error:
    print(error)
"""


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98])
def test_a_truncated_library(folder: Path, kept: float) -> None:
    """Refused when it is opened, and built again. In a process of its own: the system's loader crashes on some."""
    path = build.build()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    done = subprocess.run([sys.executable, "-c", LOADER, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-500:]}"
    (line,) = done.stdout.splitlines()
    assert str(path) in line and "--kernels torch" in line
    built: list[str] = []
    assert build.build(on_build=lambda: built.append("now")) == path
    assert built == ["now"]
    assert build.load(path).duo_lanes() in (8, 16)


def test_a_library_with_a_flipped_bit(folder: Path) -> None:
    path = build.build()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    message = error_of(lambda: build.load(path))
    assert str(path) in message and "--kernels torch" in message


BUILDER = """
import sys
from duolocal.kernels.cpu import build
build.FLAGS = tuple(sys.argv[1:])
print("ready", flush=True)
input()
path = build.build(on_build=lambda: print("building", flush=True))
build.load(path)
print(path, flush=True)
"""


def test_two_processes_that_build_at_once_both_succeed(folder: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", BUILDER, *QUICK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    outputs = [child.communicate(timeout=120)[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    path = build.library_path()
    assert outputs == [["building", str(path)]] * 2
    assert files(folder) == ["kernels", f"kernels/{path.name}"]


# ---- which kernels an engine takes ----


def hide_ziglang(monkeypatch: pytest.MonkeyPatch, *, found: object = None) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found if name == "ziglang" else real(name, *rest)
    )


def choose(
    name: str, *, dtype: torch.dtype = torch.float32, device: torch.device = CPU, threads: int | None = 2, **config: Any
) -> tuple[object, str | None]:
    found, note = kernels_named(name, tiny_config(**config), device=device, dtype=dtype, num_threads=threads)
    return make_kernels(found, device=device, dtype=dtype, num_threads=threads), note


def test_compiled_kernels_are_the_first_choice() -> None:
    for name in ("auto", "compiled"):
        kernels, note = choose(name)
        assert isinstance(kernels, CpuKernels) and kernels.num_threads == 2
        assert note is None
        assert torch.get_num_threads() == 1
    kernels, _ = choose("auto", threads=None)
    assert isinstance(kernels, CpuKernels) and kernels.num_threads >= 1


def test_torch_when_asked_for() -> None:
    kernels, note = choose("torch")
    assert isinstance(kernels, TorchKernels)
    assert note is None


def refuses(reason: str, **settings: Any) -> None:
    """auto falls back and says so; compiled is refused with the same reason."""
    kernels, note = choose("auto", **settings)
    assert isinstance(kernels, TorchKernels)
    assert note is not None and reason in note and "\n" not in note
    message = error_of(lambda: choose("compiled", **settings), SettingsError)
    assert reason in message and "--kernels torch" in message


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_ziglang(monkeypatch)
    assert build.unsupported() == "the package ziglang is not installed"
    refuses("ziglang is not installed")


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_on_another_system(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    monkeypatch.setattr(build, "sys", SimpleNamespace(platform=system))
    refuses("Linux only")


def test_on_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    refuses("riscv64")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_compute_type(dtype: torch.dtype) -> None:
    refuses(f"--dtype is {str(dtype).removeprefix('torch.')}", dtype=dtype)


def test_shapes_beyond_the_compiled_attention() -> None:
    refuses("head_dim up to 256, this model has 512", head_dim=512)
    refuses("up to 32 query heads per KV head, this model has 64", num_heads=64, num_kv_heads=1)
    kernels, _ = choose("compiled", head_dim=256, num_heads=32, num_kv_heads=1)
    assert isinstance(kernels, CpuKernels)


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_a_number_of_threads_that_cannot_be(threads: int) -> None:
    assert str(threads) in error_of(lambda: choose("auto", threads=threads), SettingsError)


def test_an_unknown_name() -> None:
    assert "'fast'" in error_of(lambda: choose("fast"), SettingsError)


def test_a_build_that_fails_is_an_error_and_no_slower_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Falling back on an error would hide it, and compute many times slower without a word."""
    monkeypatch.setattr(build, "FLAGS", (*QUICK, "-no-such-flag"))
    for name in ("auto", "compiled"):
        assert "--kernels torch" in error_of(lambda name=name: choose(name))  # type: ignore[misc]


# ---- the code on other grounds ----

X86 = platform.machine() == "x86_64"
SANITIZED = (
    *(flag for flag in QUICK if flag != "-fno-sanitize=all"),
    "-fsanitize=undefined,float-cast-overflow",
    "-fsanitize-trap=all",
)
VARIANTS = {"undefined": SANITIZED}
if X86 and " avx512f" in build._cpu():
    # Vectors of 8 floats, as on a CPU without AVX-512.
    VARIANTS["undefined-avx2"] = tuple("-march=x86_64_v3" if flag == "-march=native" else flag for flag in SANITIZED)


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.full if name in list(VARIANTS)[1:] else ()) for name in VARIANTS]
)
def test_no_undefined_behaviour_and_nothing_beyond_the_end(
    variant: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operation in a library that traps, on memory that ends at a forbidden page: see tests/cpu_smoke.py."""
    monkeypatch.setattr(build, "FLAGS", VARIANTS[variant])
    done = subprocess.run(
        [sys.executable, "-m", "tests.cpu_smoke", str(build.build())],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"ended with {done.returncode} at {last}: {done.stderr[-2000:]}"
    assert last == ["done"]


def test_the_sources_compile_for_the_other_processor(tmp_path: Path) -> None:
    other = "aarch64" if X86 else "x86_64"
    flags = tuple("-mcpu=generic" if X86 else "-march=x86_64_v3" for flag in QUICK if flag == "-march=native")
    rest = tuple(flag for flag in QUICK if flag != "-march=native")
    build.compile_to(tmp_path / "kernels.so", (*rest, *flags, "-target", f"{other}-linux-gnu"))
    assert (tmp_path / "kernels.so").stat().st_size > 0
