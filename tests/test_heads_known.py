"""Published patterns: which models they are for, and fetching one, from a server on 127.0.0.1 or a local folder."""

import json
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from duolocal.errors import DownloadError, SettingsError
from duolocal.heads import KNOWN_PATTERNS, ModelShape, known_pattern, plan_heads
from duolocal.heads.known import is_here, pattern_called, published_pattern
from duolocal.terminal import fetching
from duolocal.terminal.consoles import progress_console

LLAMA = ModelShape(num_layers=32, num_heads=32, num_kv_heads=8, hidden_size=4096)
LLAMA_31 = pattern_called("Meta-Llama-3.1-8B-Instruct")
CONFIG = json.dumps({"sink_size": 128, "recent_size": 256, "supervision": "distill", "lr": 0.02}).encode()
SCORES = (("\t".join(["1.0", "0.25"] * 4) + "\n") * 32).encode()
SHAPE: dict[str, Any] = {"num_layers": 32, "num_kv_heads": 8, "fingerprint": None}


@dataclass
class Server:
    """Serves one pattern's files, or a fault; remembers what was asked for."""

    files: dict[str, bytes]
    fault: int | None = None
    url: str = ""
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    state = Server({f"/p/{LLAMA_31.folder}/config.json": CONFIG, f"/p/{LLAMA_31.folder}/{TSV}": SCORES})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urllib.parse.unquote(self.path)
            state.asked.append(path)
            body = state.files.get(path)
            self.send_response(state.fault or (200 if body is not None else 404))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args: object) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{served.server_address[1]}/p"
    monkeypatch.setenv("DUOLOCAL_HEAD_PATTERNS", state.url)
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield state
    served.shutdown()
    served.server_close()


TSV = "full_attention_heads.tsv"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "Meta-Llama-3.1-8B-Instruct"),
        ("Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf", "Meta-Llama-3.1-8B-Instruct"),
        ("models--hugging-quants--Meta-Llama-3.1-8B-Instruct-AWQ-INT4", "Meta-Llama-3.1-8B-Instruct"),
        ("Meta Llama 3.1 8B Instruct", "Meta-Llama-3.1-8B-Instruct"),
        ("models--gradientai--Llama-3-8B-Instruct-Gradient-1048k", "Llama-3-8B-Instruct-Gradient-1048k"),
        ("Llama-3-8B-Instruct-Gradient-4194k", "Llama-3-8B-Instruct-Gradient-4194k"),
        ("mistral-7b-instruct-v0.2.Q4_0.gguf", "Mistral-7B-Instruct-v0.2"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-Instruct-v0.3"),
        ("meta-llama/Llama-3.1-8B", None),  # the base model
        ("meta-llama/Meta-Llama-3-8B-Instruct", None),
        ("Mistral-7B-Instruct-v0.1", None),
        ("Llama-2-7B-32K-Instruct", None),  # of another shape
        ("", None),
    ],
)
def test_a_model_is_known_by_its_shape_and_name(name: str, expected: str | None) -> None:
    known = known_pattern(["snapshot", name], LLAMA)
    assert (known.name if known else None) == expected
    assert known_pattern([name], ModelShape(num_layers=28, num_heads=32, num_kv_heads=8, hidden_size=4096)) is None


def test_every_known_pattern_finds_itself() -> None:
    for known in KNOWN_PATTERNS:
        assert known_pattern([known.name], known.shape) is known
        assert known_pattern([known.hub], known.shape) is known
        assert pattern_called(known.hub.lower()) is known


def test_fetched_once_and_not_for_all_heads(server: Server, tmp_path: Path) -> None:
    plan, _ = plan_heads("all", **SHAPE, published=LLAMA_31)
    assert plan.num_retrieval == 256
    assert server.asked == []
    plan, note = plan_heads("auto", **SHAPE | {"fingerprint": "here"}, published=LLAMA_31)
    assert plan.num_retrieval == 256 and note is not None and note.startswith("no head pattern is known")
    assert server.asked == []  # it comes with the model; a later start asks nobody
    for heads in ("published", "auto"):
        plan, note = plan_heads(heads, **SHAPE, published=LLAMA_31)
        assert plan.retrieval == ((True, False) * 4,) * 32
        assert (plan.sink_size, plan.recent_size) == (128, 256)
        assert note == (
            "head pattern of Meta-Llama-3.1-8B-Instruct from github.com/mit-han-lab/duo-attention (MIT licence)"
        )
    assert len(server.asked) == 2
    kept = tmp_path / "cache" / "head-patterns" / "published" / "Meta-Llama-3.1-8B-Instruct"
    assert sorted(path.name for path in kept.iterdir()) == ["config.json", TSV]
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    # By name, for a model that is called otherwise, and cut elsewhere.
    plan, _ = plan_heads("published:meta-llama/Llama-3.1-8B-Instruct@0.25", **SHAPE)
    assert [sum(row) for row in plan.retrieval] == [2] * 32  # 128 gates tie at 1: every layer gets the same


@pytest.mark.parametrize("damaged", [False, True])
def test_a_fetched_model_brings_its_pattern(
    damaged: bool, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if damaged:
        server.files[f"/p/{LLAMA_31.folder}/{TSV}"] = b"<html>"
    path = tmp_path / "model.gguf"
    monkeypatch.setattr(fetching, "resolve", lambda model, **_: path)
    monkeypatch.setattr("duolocal.models.loader.open_model", lambda at: {path: None}[at])
    monkeypatch.setattr("duolocal.engine.head_choice.published_for", lambda source, name: LLAMA_31)
    monkeypatch.setattr(fetching, "cached_path", lambda model: path)
    assert fetching.fetch("org/name", progress_console()) == path
    assert server.asked == []  # the model was here
    monkeypatch.setattr(fetching, "cached_path", lambda model: None)
    assert fetching.fetch("org/name", progress_console()) == path
    assert is_here(LLAMA_31) is not damaged
    said = capsys.readouterr().err
    assert ("no head pattern came with org/name" in said) is damaged


def test_one_damaged_half_is_fetched_again(server: Server, tmp_path: Path) -> None:
    published_pattern(LLAMA_31)
    (tmp_path / "cache" / "head-patterns" / "published" / LLAMA_31.name / TSV).unlink()
    assert published_pattern(LLAMA_31).num_layers == 32
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("files", "fault", "error", "message"),
    [
        ({}, None, DownloadError, "HTTP 404"),
        (None, 503, DownloadError, "HTTP 503"),
        ({TSV: b"<html>"}, None, SettingsError, "line 1: '<html>' is not a number"),
        ({TSV: b"1\t1\n"}, None, SettingsError, "is for 1 layers × 2 KV heads, but Meta-Llama-3.1-8B-Instruct has 32"),
        ({TSV: b"1\n" * 2**22}, None, DownloadError, "more than 4 MiB"),
    ],
)
def test_what_cannot_be_fetched_leaves_nothing(
    server: Server, tmp_path: Path, files: dict[str, bytes] | None, fault: int | None, error: type, message: str
) -> None:
    server.fault = fault
    if files is not None:
        server.files = {**server.files, **{f"/p/{LLAMA_31.folder}/{name}": data for name, data in files.items()}}
        server.files = server.files if files else {}
    with pytest.raises(error) as caught:
        published_pattern(LLAMA_31)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if error is DownloadError:
        assert "config.json and full_attention_heads.tsv" in str(caught.value)
    assert list((tmp_path / "cache" / "head-patterns").glob("*/*")) == []


def test_no_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUOLOCAL_HEAD_PATTERNS", "http://127.0.0.1:9/nothing")
    with pytest.raises(DownloadError, match=r"cannot fetch the head pattern of .*: check the network, or place"):
        published_pattern(LLAMA_31)


def test_a_local_folder_stands_for_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DUOLOCAL_HEAD_PATTERNS", str(tmp_path))
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SettingsError, match="No such file or directory"):
        published_pattern(LLAMA_31)
    folder = tmp_path / LLAMA_31.folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(CONFIG)
    (folder / TSV).write_bytes(SCORES)
    pattern = published_pattern(LLAMA_31)
    assert pattern.method == "DuoAttention's distillation (lr 0.02)"
    assert pattern.default_ratio == 0.5
    assert not (tmp_path / "cache").exists()
