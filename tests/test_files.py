"""What duolocal.files promises: whole files whatever happens to the writer, locks, JSON that may be lost, names."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import duolocal
from duolocal.files import (
    JsonCache,
    Lock,
    free_bytes,
    free_name,
    read_json,
    replacing,
    replacing_folder,
    write_file,
    write_json,
)

ROOT = Path(duolocal.__file__).parents[1]
OLD, NEW = b"old content", b"x" * 300_000
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals, permissions or limits")


def child(code: str, *args: object) -> "subprocess.Popen[str]":
    """Start a process that runs `code` with its own `sys.argv`."""
    command = [sys.executable, "-c", "import os, signal, sys\nfrom pathlib import Path\n" + textwrap.dedent(code)]
    return subprocess.Popen(
        [*command, *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_module_loads_nothing_but_the_standard_library() -> None:
    code = "before = set(sys.modules); import duolocal.files; print(*sorted(set(sys.modules) - before))"
    out, _ = child(code).communicate(timeout=60)
    loaded = {name.partition(".")[0] for name in out.split()}
    assert loaded - sys.stdlib_module_names == {"duolocal"}


# --- whole files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("locked", [False, True])
def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path, durable: bool, locked: bool) -> None:
    path = tmp_path / "file"
    write_file(path, OLD, durable=durable, locked=locked)
    write_file(path, "Grüße\n", durable=durable, locked=locked)
    assert path.read_bytes() == "Grüße\n".encode()
    assert names(tmp_path) == ["file"]


@POSIX
def test_the_mode_follows_the_umask_or_what_was_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "plain", OLD)
        with replacing(tmp_path / "private", mode=0o600) as temporary:
            temporary.write_bytes(OLD)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


def test_what_raises_inside_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:  # noqa: PT012
        temporary.write_bytes(NEW)
        raise KeyboardInterrupt
    assert path.read_bytes() == OLD
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Space that was promised may turn out to be missing as late as at fsync, and a folder may have no room either."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    path.write_bytes(OLD)
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left on device"):
        write_file(path, NEW, durable=True)
    assert path.read_bytes() == OLD
    assert names(tmp_path) == ["file"]


@POSIX
def test_a_write_that_the_system_cuts_short_leaves_the_old_file(tmp_path: Path) -> None:
    code = """
        import resource
        from duolocal.files import write_file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            write_file(Path(sys.argv[1]), bytes(300_000))
        except OSError as error:
            print(error.errno)
    """
    path = tmp_path / "file"
    path.write_bytes(OLD)
    out, _ = child(code, path).communicate(timeout=60)
    assert int(out) == errno.EFBIG
    assert path.read_bytes() == OLD
    assert names(tmp_path) == ["file"]


@POSIX
@pytest.mark.parametrize("locked", [False, True])
def test_a_kill_between_write_and_replace_leaves_the_old_file(tmp_path: Path, locked: bool) -> None:
    code = """
        from duolocal.files import write_file
        os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        write_file(Path(sys.argv[1]), bytes(300_000), locked=sys.argv[2] == "True")
    """
    path = tmp_path / "file"
    path.write_bytes(OLD)
    assert child(code, path, locked).wait(timeout=60) == -signal.SIGKILL
    assert path.read_bytes() == OLD
    (left,) = set(names(tmp_path)) - {"file"}
    assert (tmp_path / left).stat().st_size == 300_000  # the kill did come in between
    write_file(path, NEW, locked=locked)
    assert path.read_bytes() == NEW
    assert (left in names(tmp_path)) is not locked  # under a lock the next writer takes the same name


def test_a_reader_never_sees_half_of_what_many_processes_write(tmp_path: Path) -> None:
    code = """
        from duolocal.files import write_file
        while not Path(sys.argv[3]).exists():
            write_file(Path(sys.argv[1]), sys.argv[2].encode() * 200_000)
    """
    path, stop = tmp_path / "file", tmp_path / "stop"
    path.write_bytes(b"z" * 200_000)
    writers = [child(code, path, letter, stop) for letter in "abc"]
    seen: set[bytes] = set()
    while not {b"a", b"b", b"c"} <= seen:
        data = path.read_bytes()
        assert len(data) == 200_000
        assert data == data[:1] * 200_000
        seen.add(data[:1])
    stop.touch()
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    assert names(tmp_path) == ["file", "stop"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with pytest.raises(ZeroDivisionError), replacing_folder(folder) as work:  # noqa: PT012
        (work / "half").write_bytes(OLD)
        raise ZeroDivisionError
    assert names(folder.parent) == []
    with replacing_folder(folder) as work:
        (work / "whole").write_bytes(OLD)
        assert not folder.exists()
    assert names(folder.parent) == ["folder"]
    assert names(folder) == ["whole"]
    with pytest.raises(OSError, match="not empty"), replacing_folder(folder):
        pass
    assert names(folder) == ["whole"]


# --- locks ---------------------------------------------------------------------------------------------------------


def test_a_lock_keeps_other_processes_out_until_its_own_ends(tmp_path: Path) -> None:
    code = """
        from duolocal.files import Lock
        lock = Lock(Path(sys.argv[1]))
        print("held", flush=True)
        sys.stdin.read()
    """
    path = tmp_path / "made" / "lock"
    other = child(code, path)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(TimeoutError):
        Lock(path)
    other.kill()
    other.wait()
    with Lock(path), pytest.raises(TimeoutError):
        Lock(path, timeout_s=0.01)
    lock = Lock(path)
    lock.release()
    lock.release()
    Lock(path).release()


def test_a_lock_that_cannot_be_made_is_no_timeout(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"exists|directory") as caught:
        Lock(tmp_path / "file" / "lock")
    assert not isinstance(caught.value, TimeoutError)


# --- JSON that may be lost -----------------------------------------------------------------------------------------


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "not UTF-8": lambda path: path.write_bytes(b'{"a": "\xff"}'),
    "no object": lambda path: path.write_bytes(b'["a"]'),
    "nested too deeply": lambda path: path.write_bytes(b"[" * 200_000),
    "a folder": become_a_folder,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_json_that_is_damaged_is_absent(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "cache.json"
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}
    DAMAGE[damage](path)
    assert read_json(path) is None
    cache = JsonCache(path)
    assert cache.get("a") is None
    cache.put("b", [2])
    assert cache.get("b") == (None if damage == "a folder" else [2])  # what can be mended is


def test_json_of_another_version_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"format": "x", "version": 2, "value": 3}, indent=None)
    assert read_json(path, format="x", version=2) == {"format": "x", "version": 2, "value": 3}
    assert read_json(path, format="x", version=1) is None
    assert read_json(path, other=None) is not None  # as `get`: what is not there is None


def test_processes_that_remember_at_once_keep_each_others_entries(tmp_path: Path) -> None:
    code = """
        from duolocal.files import JsonCache
        sys.stdin.read()
        for number in range(15):
            JsonCache(Path(sys.argv[1])).put(f"{sys.argv[2]}{number}", number)
    """
    path = tmp_path / "made" / "cache.json"
    writers = [child(code, path, letter) for letter in "abc"]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.close()
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    assert json.loads(path.read_bytes()) == {f"{letter}{number}": number for letter in "abc" for number in range(15)}
    assert not list(path.parent.glob("*.tmp"))


def test_a_cache_that_cannot_be_written_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    cache = JsonCache(tmp_path / "cache.json")
    cache.put("kept", 1)
    monkeypatch.setattr(os, "replace", refused)
    cache.put("lost", 2)
    assert (cache.get("kept"), cache.get("lost")) == (1, None)
    assert not list(tmp_path.glob("*.tmp"))
    (tmp_path / "file").write_bytes(b"")
    JsonCache(tmp_path / "file" / "cache.json").put("lost", 2)


def test_where_nothing_can_be_locked_entries_are_kept_all_the_same(tmp_path: Path) -> None:
    cache = JsonCache(tmp_path / "cache.json")
    (tmp_path / ".cache.json.lock").mkdir()
    cache.put("a", 1)
    assert cache.get("a") == 1


# --- room and names ------------------------------------------------------------------------------------------------


def test_the_room_of_a_folder_that_is_not_there_is_that_of_its_disk(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") > 0


def test_a_free_name_is_the_first_that_nobody_has() -> None:
    taken: set[str] = set()
    given = []
    for _ in range(4):
        given.append(free_name("a.txt", "docs/a.txt", taken=taken.__contains__))
        taken.add(given[-1])
    assert given == ["a.txt", "docs/a.txt", "docs/a.txt (2)", "docs/a.txt (3)"]
    assert free_name("run", taken={"run", "run-2"}.__contains__, form="{}-{}") == "run-3"
