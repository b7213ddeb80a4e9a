"""Models from the hub: the real huggingface-hub against a small hub that runs here on 127.0.0.1."""

import hashlib
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

import duolocal
from duolocal.downloads import PinnedFile
from duolocal.errors import ConfigError, DownloadError, ModelFileError, ModelNotFoundError
from duolocal.models.fetch_hub import cached_file, cached_repo, fetch_file, fetch_repo, missing_files
from duolocal.models.native import MODEL_TYPE
from duolocal.models.registry import cached_path, resolve
from tests.small_disk import run_on_small_disk

ROOT = Path(duolocal.__file__).parents[1]
COMMITS = {"main": "a" * 40, "v2": "b" * 40}
_random = random.Random(3)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 1024,
}
WANTED = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "tokenizer.model": b"spm",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "model-00001-of-00002.safetensors": _random.randbytes(700_000),
    "model-00002-of-00002.safetensors": _random.randbytes(300_000),
}
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"twice",
    "original/consolidated.00.pth": b"pickle",
    "original/params.json": b"{}",
    "model.Q4_K.gguf": b"GGUF",
    "README.md": b"# model",
}


def gguf_file(architecture: str) -> bytes:
    """Return the first bytes of a GGUF, which say its architecture."""
    key, name = b"general.architecture", architecture.encode()
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 2, len(key)) + key + struct.pack("<IQ", 8, len(name)) + name


@dataclass
class Hub:
    """A hub with one repository, and what was asked of it."""

    files: dict[str, bytes]
    url: str = ""
    token: str | None = None  # wanted, when set
    gated: str | None = None  # what of it: "all" or "files"
    fault: int | None = None  # HTTP status of every answer, when set
    break_at: int | None = None  # cut the connection once, after so many bytes of the first shard
    requests: list[str] = field(default_factory=list)
    sizes: dict[str, int | None] = field(default_factory=dict)  # what the listing says in place of the truth
    sums: dict[str, str] = field(default_factory=dict)  # SHA-256 that the hub names
    ranges: list[str] = field(default_factory=list)
    looked_into: list[str] = field(default_factory=list)  # the beginning alone was asked for
    downloaded: list[str] = field(default_factory=list)


class HubHandler(BaseHTTPRequestHandler):
    """The endpoints that snapshot_download uses."""

    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refused(self) -> bool:
        hub = self.hub
        if hub.fault is not None:
            self.answer(hub.fault)
        elif hub.gated == "all" or (hub.gated == "files" and "/resolve/" in self.path):
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        elif hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        else:
            return False
        return True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        path = self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if self.refused():
            return
        if found := re.fullmatch(r"/api/models/org/tiny(?:/(revision|tree)/([^/]+))?", path):
            commit = COMMITS.get(found[2] or "main", found[2] or "main")
            if commit not in COMMITS.values():
                self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            elif found[1] == "tree":
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in hub.files.items()
                ]
                self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            else:
                siblings = [
                    {"rfilename": name, "size": hub.sizes.get(name, len(data))} for name, data in hub.files.items()
                ]
                body = {"id": "org/tiny", "modelId": "org/tiny", "sha": commit, "siblings": siblings}
                self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        elif found := re.fullmatch(r"/org/tiny/resolve/([^/]+)/(.+)", path):
            self.file(found[2], COMMITS.get(found[1], found[1]))
        else:
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def file(self, name: str, commit: str) -> None:
        hub, data = self.hub, self.hub.files[name]
        tag = hub.sums.get(name, hashlib.sha1(data).hexdigest())
        headers = {"ETag": f'"{tag}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            self.answer(200, data, **headers)
            return
        if asked := re.fullmatch(r"bytes=0-(\d+)", self.headers.get("Range", "")):
            hub.looked_into.append(name)
            self.answer(206, data[: int(asked[1]) + 1], **headers)
            return
        hub.downloaded.append(name)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked:
            hub.ranges.append(f"{name} {asked[1]}")
            start = int(asked[1])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.answer(206, data[start:], **headers)
        elif hub.break_at is not None and name.startswith("model-00001"):
            cut, hub.break_at = hub.break_at, None
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:cut])
            self.close_connection = True
        else:
            self.answer(200, data, **headers)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub(WANTED | UNWANTED)
    handler = type("Handler", (HubHandler,), {"hub": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    # The library reads its environment when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", state.url)
    template = state.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield state
    server.shutdown()
    server.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_fetches_the_wanted_files_and_nothing_else(hub: Hub) -> None:
    folder = resolve("org/tiny")
    assert contents(folder) == WANTED
    assert sorted(hub.downloaded) == sorted(WANTED)


def test_progress_counts_the_bytes_of_all_files_together(hub: Hub) -> None:
    seen: list[tuple[int, int]] = []
    fetch_repo("org/tiny", on_progress=lambda done, total: seen.append((done, total)))
    total = sum(len(data) for data in WANTED.values())
    assert {size for _, size in seen} == {total}
    assert seen[-1] == (total, total)
    assert any(0 < done < total for done, _ in seen)


def test_what_is_cached_is_not_fetched_again_and_counts_as_done(hub: Hub) -> None:
    folder = fetch_repo("org/tiny")
    lost = folder / "model-00002-of-00002.safetensors"
    lost.resolve().unlink()
    lost.unlink()
    assert cached_repo("org/tiny") is None  # not complete
    hub.downloaded.clear()
    seen: list[int] = []
    assert fetch_repo("org/tiny", on_progress=lambda done, total: seen.append(done)) == folder
    assert hub.downloaded == [lost.name]
    assert min(seen) >= sum(len(data) for name, data in WANTED.items() if name != lost.name)


def test_a_broken_connection_resumes_where_it_broke(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # 10 MB: more than these files have
    hub.break_at = 250_000
    assert contents(fetch_repo("org/tiny")) == WANTED
    assert len(hub.ranges) == 1
    name, start = hub.ranges[0].split()
    assert name == "model-00001-of-00002.safetensors"
    assert int(start) == 200_000  # two whole chunks had arrived


def test_a_revision_is_its_own_snapshot(hub: Hub) -> None:
    assert fetch_repo("org/tiny", revision="v2").name == COMMITS["v2"]
    assert fetch_repo("org/tiny").name == COMMITS["main"]
    assert cached_repo("org/tiny", revision="v2") == cached_repo("org/tiny", revision=COMMITS["v2"])
    with pytest.raises(ModelNotFoundError) as caught:
        fetch_repo("org/tiny", revision="v9")
    assert one_line(caught) == "org/tiny has no revision 'v9' on the hub: give a branch, tag or commit of it"


def test_the_token_is_sent_with_every_request(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    with pytest.raises(ModelNotFoundError) as caught:
        fetch_repo("org/tiny")
    assert one_line(caught) == (
        "the hub has no model org/tiny that you may see: check the spelling, or set HF_TOKEN if it is private"
    )
    assert contents(fetch_repo("org/tiny", token="hf_secret")) == WANTED
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch_repo("org/tiny", revision="v2").name == COMMITS["v2"]


@pytest.mark.parametrize("gated", ["all", "files"])
@pytest.mark.parametrize("spelled", ["org/tiny", "org/tiny:Q8_0"])
def test_a_gated_repository_says_what_to_accept_and_set(hub: Hub, gated: str, spelled: str) -> None:
    hub.gated = gated
    hub.files = GGUFS if ":" in spelled else hub.files
    with pytest.raises(DownloadError) as caught:
        resolve(spelled)
    assert one_line(caught) == (
        f"org/tiny is gated: accept its licence on its page ({hub.url}/org/tiny), then set HF_TOKEN to a read token "
        "of that account (or run `hf auth login`)"
    )
    assert hub.downloaded == hub.looked_into == []


def test_a_missing_repository_and_a_failing_hub_differ(hub: Hub) -> None:
    with pytest.raises(ModelNotFoundError, match=r"^the hub has no model org/other that you may see"):
        fetch_repo("org/other")
    hub.fault = 403
    with pytest.raises(DownloadError, match=r"^the hub refused org/tiny \(HTTP 403\): set HF_TOKEN to a valid read"):
        fetch_repo("org/tiny")
    hub.fault = 418
    with pytest.raises(DownloadError, match=r"^the hub answered HTTP 418 for org/tiny: try again later, or run `hf "):
        fetch_repo("org/tiny")


def test_without_a_network_the_cache_serves_or_the_error_says_what_to_do(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch_repo("org/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert fetch_repo("org/tiny") == folder
    with pytest.raises(DownloadError) as caught:
        fetch_repo("org/tiny", revision="v2")
    assert re.fullmatch(
        r"cannot fetch org/tiny at v2 \(.*\): check the network, or run `hf download org/tiny --local-dir FOLDER` on "
        r"a machine with network, copy FOLDER here and give its path as the model",
        one_line(caught),
    )


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_complete_cache_is_used_without_asking_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None, listed: bool
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("the network was touched")

    folder = resolve("org/tiny", revision=revision)
    if not listed:  # as older versions of the library leave a cache: it does not say what the repository has
        shutil.rmtree(tmp_path / "hub" / "models--org--tiny" / "trees")
    hub.requests.clear()
    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    assert resolve("org/tiny", revision=revision) == folder
    assert hub.requests == []


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model-00002-of-00002.safetensors"])
@pytest.mark.parametrize("listed", [True, False])
def test_an_incomplete_cache_asks_the_hub(hub: Hub, tmp_path: Path, lost: str, listed: bool) -> None:
    folder = resolve("org/tiny")
    (folder / lost).resolve().unlink()
    (folder / lost).unlink()
    if not listed:
        shutil.rmtree(tmp_path / "hub" / "models--org--tiny" / "trees")
        (folder / "tokenizer.model").unlink()
    hub.requests.clear()
    hub.downloaded.clear()
    assert contents(resolve("org/tiny")) == WANTED
    assert lost in hub.downloaded
    assert len(hub.requests) > 0


def test_offline_touches_no_network(hub: Hub) -> None:
    with pytest.raises(DownloadError, match=r"^org/tiny is not cached and offline mode is on; run `hf download"):
        fetch_repo("org/tiny", offline=True)
    assert hub.requests == []
    folder = fetch_repo("org/tiny")
    hub.requests.clear()
    assert fetch_repo("org/tiny", offline=True) == folder
    assert hub.requests == []


def test_repositories_without_safetensors_are_refused_before_a_fetch(hub: Hub) -> None:
    hub.files = {"config.json": b"{}", "a.Q4_0.gguf": b"GGUF", "a.Q8_0.gguf": b"GGUF"}
    with pytest.raises(
        ModelNotFoundError, match=r"^org/tiny has several \.gguf files and no single Q4_K_M: give org/tiny:"
    ):
        fetch_repo("org/tiny")
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(ModelNotFoundError, match=r"^org/tiny has no safetensors weights \(pickled"):
        fetch_repo("org/tiny")
    assert hub.downloaded == []


def test_a_repository_that_lacks_a_shard_is_named(hub: Hub) -> None:
    del hub.files["model-00002-of-00002.safetensors"]
    with pytest.raises(DownloadError, match=r"^org/tiny lacks model-00002-of-00002\.safetensors on the hub"):
        fetch_repo("org/tiny")
    assert hub.downloaded == ["model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gemma3"},
            r"org/tiny: config\.json: model_type is 'gemma3'; duolocal runs llama, mistral, .*: ",
        ),
        (
            {"dual_chunk_attention_config": {}},
            r"dual_chunk_attention_config is .*it would change the computation .*; choose",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            r"quant_method is 'gptq', which duolocal does not read; choose",
        ),
        ({"num_hidden_layers": 0}, r"num_layers is 0, wanted 1 to "),
    ],
)
def test_a_model_that_is_not_run_is_refused_before_its_weights(hub: Hub, changes: dict[str, Any], message: str) -> None:
    hub.files["config.json"] = json.dumps(CONFIG | changes).encode()
    with pytest.raises(ConfigError, match=message) as caught:
        resolve("org/tiny")
    one_line(caught)
    assert sorted(hub.downloaded) == ["config.json", "model.safetensors.index.json"]
    assert cached_path("org/tiny") is None
    hub.files["config.json"] = b"<html>"
    with pytest.raises(ConfigError, match=r"is a web page"):
        resolve("org/tiny", revision="v2")
    assert not any(name.startswith("model-") for name in hub.downloaded)


def test_a_model_in_the_native_format_is_fetched(hub: Hub) -> None:
    hub.files["config.json"] = json.dumps({"model_type": MODEL_TYPE, "version": 1, "config": {}}).encode()
    assert contents(resolve("org/tiny")) == WANTED | {"config.json": hub.files["config.json"]}


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            gguf_file("gemma3"),
            ConfigError,
            r"^org/tiny: a-Q8_0\.gguf: general\.architecture is 'gemma3'; duolocal runs",
        ),
        (b"version https://git-lfs", ModelFileError, r"^org/tiny: a-Q8_0\.gguf: is a Git LFS pointer"),
        (b"", ModelFileError, r"is empty: download it again"),
    ],
)
def test_a_gguf_that_is_not_run_is_refused_by_its_first_bytes(
    hub: Hub, data: bytes, error: type[Exception], message: str
) -> None:
    hub.files = {"a-Q8_0.gguf": data + b"GGUF" * 50_000 if data else b""}
    with pytest.raises(error, match=message) as caught:
        resolve("org/tiny")
    one_line(caught)
    assert (hub.looked_into, hub.downloaded) == (["a-Q8_0.gguf"], [])


def test_an_altered_shard_is_not_kept(hub: Hub) -> None:
    name = "model-00002-of-00002.safetensors"
    good = hub.files[name]
    hub.sums[name] = hashlib.sha256(good).hexdigest()
    hub.files[name] = bytes(len(good))
    with pytest.raises(DownloadError, match=rf"^{name} of org/tiny has SHA-256 \w+, wanted \w+; nothing") as caught:
        fetch_repo("org/tiny")
    one_line(caught)
    assert cached_repo("org/tiny") is None
    hub.files[name] = good
    hub.downloaded.clear()
    assert contents(fetch_repo("org/tiny")) == WANTED
    assert hub.downloaded == [name]


def test_a_disk_that_fills_up_leaves_nothing_half_written(hub: Hub, tmp_path: Path) -> None:
    big = "model-00001-of-00002.safetensors"
    hub.files[big] = bytes(4_000_000)
    hub.sizes[big] = 1000  # less than what comes, so that the look at the disk beforehand does not help
    disk = tmp_path / "disk"
    code = """
        from duolocal import downloads
        from duolocal.errors import DownloadError
        from duolocal.models.registry import cached_path, resolve
        downloads._HEADROOM_BYTES = 0
        try:
            resolve("org/tiny")
        except DownloadError as error:
            print(error)
        print(cached_path("org/tiny"))
        grow("9m")
        folder = resolve("org/tiny")
        print(sorted((path.name, path.stat().st_size) for path in folder.iterdir()))
    """
    said, cached, then = run_on_small_disk(disk, "3m", code, HF_HOME=str(disk), HF_ENDPOINT=hub.url)
    assert said == f"no space left while fetching org/tiny into {disk}/hub: make room and retry"
    assert cached == "None"
    assert then == str(sorted((name, len(hub.files[name])) for name in WANTED))


def test_too_little_space_is_said_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(DownloadError, match=r"^no space for org/tiny in .*: needs 18 MB, 0 MB are free; make"):
        fetch_repo("org/tiny")
    assert not any(name.startswith("model-") for name in hub.downloaded)


def test_leftovers_of_a_killed_fetch_go_unless_someone_writes_them(hub: Hub, tmp_path: Path) -> None:
    from filelock import FileLock

    blobs = tmp_path / "hub" / "models--org--tiny" / "blobs"
    locks = tmp_path / "hub" / ".locks" / "models--org--tiny"
    blobs.mkdir(parents=True)
    locks.mkdir(parents=True)
    dead, alive, resumable = (blobs / name for name in ("d1.0a.incomplete", "e2.0b.incomplete", "f3.incomplete"))
    for path in (dead, alive, resumable):
        path.write_bytes(b"half")
    with FileLock(locks / "e2.lock"):
        fetch_repo("org/tiny")
    assert [path.exists() for path in (dead, alive, resumable)] == [False, True, True]


def test_a_folder_says_what_it_lacks(tmp_path: Path) -> None:
    assert missing_files(tmp_path) == ["config.json", "tokenizer.json", "*.safetensors"]
    (tmp_path / "tokenizer.model").write_bytes(b"spm")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert missing_files(tmp_path) == []
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    assert missing_files(tmp_path) == ["x.safetensors"]
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert missing_files(tmp_path) == ["model.safetensors.index.json"]


def test_the_environment_variables_of_the_hub_library_hold(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_env"
    code = "from duolocal.models.registry import resolve; print(resolve('org/tiny', revision='v2'))"

    def run(**changes: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        env |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url} | changes
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    fetched = run(HF_TOKEN="hf_env")
    assert fetched.returncode == 0, fetched.stderr
    folder = Path(fetched.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home" / "hub")
    assert contents(folder) == WANTED
    assert "%|" not in fetched.stderr  # no bars of its own

    hub.requests.clear()
    offline = run(HF_HUB_OFFLINE="1")
    assert offline.stdout == fetched.stdout
    assert hub.requests == []


GGUFS = {
    "tiny-q4_k_m.gguf": gguf_file("llama") + b"4" * 9000,
    "tiny-Q8_0.gguf": gguf_file("qwen3") + b"8" * 160_000,
    "mmproj-Q8_0.gguf": b"m",
    "README.md": b"# m",
}


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("org/tiny:Q8_0", "tiny-Q8_0.gguf"),
        ("org/tiny:q4_K_M", "tiny-q4_k_m.gguf"),
        ("hf.co/org/tiny:q8_0", "tiny-Q8_0.gguf"),
        ("https://huggingface.co/org/tiny:Q4_K_M", "tiny-q4_k_m.gguf"),
        ("https://hf.co/org/tiny", "tiny-q4_k_m.gguf"),
    ],
)
def test_a_quant_is_found_as_people_write_it_and_the_hub_asked_once(hub: Hub, spelled: str, name: str) -> None:
    hub.files = GGUFS
    path = resolve(spelled)
    assert (path.name, path.read_bytes()) == (name, GGUFS[name])
    assert hub.downloaded == [name]
    hub.requests.clear()
    assert resolve(spelled) == cached_path(spelled) == path
    assert hub.requests == []


def test_without_a_quant_the_usual_one_is_taken_and_all_are_listed(hub: Hub) -> None:
    hub.files = GGUFS
    notes: list[str] = []
    assert resolve("org/tiny", on_note=notes.append).name == "tiny-q4_k_m.gguf"
    assert notes == [
        "org/tiny: Q4_K_M is taken; org/tiny:QUANT takes another of tiny-Q8_0.gguf (0.00 GB), "
        "tiny-q4_k_m.gguf (0.00 GB)"
    ]


def test_another_cached_quant_is_no_answer_to_one_that_is_named(hub: Hub) -> None:
    hub.files = GGUFS
    resolve("org/tiny:Q8_0")
    assert cached_path("org/tiny:Q4_K_M") is None
    notes: list[str] = []
    assert resolve("org/tiny", on_note=notes.append).name == "tiny-Q8_0.gguf"
    assert notes == ["org/tiny: tiny-Q8_0.gguf is taken, the one that is cached"]
    assert resolve("org/tiny:Q4_K_M").name == "tiny-q4_k_m.gguf"


def test_quants_that_are_not_there_or_not_whole_are_refused_with_the_list(hub: Hub) -> None:
    hub.files = GGUFS
    with pytest.raises(
        ModelNotFoundError, match=r"^org/tiny has no single file for 'Q5_K_M': give org/tiny:QUANT .*Q8_0\.g"
    ):
        resolve("org/tiny:Q5_K_M")
    hub.files = {"big-Q4_K_M-00001-of-00002.gguf": b"1", "big-Q8_0.gguf": b"8"}
    for spelled in ("org/tiny", "org/tiny:q4_k_m"):
        with pytest.raises(
            ModelNotFoundError, match=r"^org/tiny lacks big-Q4_K_M-00002-of-00002\.gguf, of the parts of big-"
        ):
            resolve(spelled)
    hub.files = WANTED
    with pytest.raises(ModelNotFoundError, match=r"^org/tiny has no \.gguf files: leave out :Q4_K_M"):
        resolve("org/tiny:Q4_K_M")
    assert hub.downloaded == []


def test_a_pinned_file_comes_from_the_hub_or_not_at_all(hub: Hub) -> None:
    hub.files = GGUFS
    name, data = "tiny-Q8_0.gguf", GGUFS["tiny-Q8_0.gguf"]
    file = PinnedFile(name, len(data), hashlib.sha256(data).hexdigest())
    assert cached_file("org/tiny", file) is None
    with pytest.raises(
        DownloadError, match=r"^tiny-Q8_0\.gguf of org/tiny has SHA-256 \w+, wanted 0{64}; nothing of it is"
    ):
        fetch_file("org/tiny", PinnedFile(name, len(data), "0" * 64))
    assert cached_file("org/tiny", file) is None  # what was another file is gone
    path = fetch_file("org/tiny", file)
    assert path.read_bytes() == data and cached_file("org/tiny", file) == path
    with pytest.raises(ModelNotFoundError, match=r"^org/tiny has no tiny-Q8_0\.gguf of 5 bytes on the hub"):
        fetch_file("org/tiny", PinnedFile(name, 5, file.sha256))


def test_all_parts_of_a_split_file_are_fetched_and_the_first_is_given(hub: Hub) -> None:
    parts = {f"Q4_K_M/big-Q4_K_M-0000{i}-of-00002.gguf": gguf_file("llama") + bytes(900 * i) for i in (1, 2)}
    hub.files = parts | {"big-Q8_0.gguf": b"8"}
    path = resolve("org/tiny:Q4_K_M")
    assert path.name == "big-Q4_K_M-00001-of-00002.gguf"
    assert sorted(hub.downloaded) == sorted(parts)
    hub.requests.clear()
    assert resolve("org/tiny:Q4_K_M") == path and hub.requests == []
    second = path.with_name("big-Q4_K_M-00002-of-00002.gguf")
    second.unlink()
    assert cached_path("org/tiny:Q4_K_M") is None  # a part is missing
    assert resolve("org/tiny:Q4_K_M") == path and second.is_file()
