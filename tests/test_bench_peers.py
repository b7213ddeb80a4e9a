"""The comparison with other runtimes: who is asked when, what is divided by what, what a failing child says."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from duolocal import cli
from duolocal.bench import peer_list
from duolocal.bench.child import Child, runner_command
from duolocal.bench.compare import DUOLOCAL, RunnerSpec, fastest, ratios
from duolocal.bench.peer_list import (
    FLASH_QUANTIZED,
    LLAMA_CPP,
    REQUANTIZED,
    TRANSFORMERS,
    PeerChoice,
    check_packages,
    check_room,
    requantize,
    requantized_path,
    runner_specs,
)
from duolocal.bench.peers import PeersRun, measure_peers
from duolocal.bench.text import text_ids
from duolocal.engine.engine import Engine
from duolocal.errors import DuoLocalError, MemoryLimitError, SettingsError
from duolocal.kernels.cpu import threads
from duolocal.models.loader import open_model
from duolocal.settings import LoadSettings, Sampling
from duolocal.terminal import bench_peers_view
from duolocal.tokenizer import load_tokenizer
from tests.model_files import write_gguf
from tests.tiny import huggingface_model

FAKE = (sys.executable, "-m", "tests.fake_runner")
has_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python")


def spec(log: Path, name: str, peer: str, *, limit: int | None = None, **options: Any) -> RunnerSpec:
    return RunnerSpec(name, peer, FAKE, {"log": str(log), "name": name, "prefill": 100, "decode": 10, **options}, limit)


def measure(specs: Sequence[RunnerSpec], contexts: Sequence[int], *, repeats: int = 1) -> PeersRun:
    run = PeersRun()
    token_ids = range(contexts[-1] + 1)
    kwargs: dict[str, Any] = {"threads": 1, "repeats": repeats, "decode_tokens": 4, "run": run}
    assert list(measure_peers(specs, token_ids, contexts, **kwargs)) == list(contexts)
    return run


def test_runs_take_turns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    measure([spec(log, "a", DUOLOCAL), spec(log, "b", LLAMA_CPP)], [100, 2300], repeats=2)
    seen = [json.loads(line) for line in log.read_text().splitlines()]
    warm = [[name, *words] for name in "ab" for words in (["prefill", 64, False], ["decode", 0, 1])]
    assert seen[:4] == warm
    expected: list[list[Any]] = []
    # From 100 to 2300 in pieces of 2048 and 152; every piece in two rounds, the last of which is kept.
    for pieces, context in (([100], 100), ([2048, 152], 2300)):
        expected += [[name, "prefill", size, keep] for size in pieces for keep in (False, True) for name in "ab"]
        expected += [[name, "decode", context, 4] for _ in range(2) for name in "ab"]
    assert seen[4:] == expected


def test_long_pieces_are_filled_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    measure([spec(log, "a", DUOLOCAL)], [6000], repeats=3)
    pieces = [words[2:] for words in map(json.loads, log.read_text().splitlines()) if words[1] == "prefill"][1:]
    repeated = [[2048, False], [2048, False], [2048, True]]
    assert pieces == [*repeated, *repeated, [1904, True]]


def test_ratios_are_against_the_fastest_setting_of_each_figure(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = measure(
        [
            spec(log, "ours", DUOLOCAL, prefill=300, decode=60),
            spec(log, "x", LLAMA_CPP, prefill=100, decode=40),
            spec(log, "y", LLAMA_CPP, prefill=600, decode=20),
            spec(log, "z", LLAMA_CPP, prefill=200, decode=30),
            spec(log, "other", TRANSFORMERS, prefill=1200, decode=1),
        ],
        [32, 64],
        repeats=3,
    )
    for context in (32, 64):
        best = fastest(run.results, LLAMA_CPP, context)
        assert best is not None
        assert (best.prefill_runner, best.decode_runner) == ("y", "x")
        assert (best.prefill_tokens_per_s, best.decode_tokens_per_s) == pytest.approx((600, 40))
        assert best.peak_bytes == min(r.measured[context].peak_bytes for r in run.results if r.spec.peer == LLAMA_CPP)
        found = {ratio.against: (ratio.prefill, ratio.decode) for ratio in ratios(run.results, context)}
        assert found == {
            "x": (3, 1.5),
            "y": (0.5, 3),
            "z": (1.5, 2),
            "other": (0.25, 60),
            "llama.cpp, fastest": (0.5, 1.5),
            "transformers, fastest": (0.25, 60),
        }
    ours = run.results[0].measured[64]
    assert ours.prefill_s.median == pytest.approx(64 / 300)
    assert ours.last_tokens == 32
    assert (ours.token_s.least, ours.token_s.median, ours.token_s.most) == pytest.approx((0.2 / 60, 1 / 60, 10 / 60))
    report = ours.report()
    assert report["decode_tokens_per_s"] == {"median": 60, "min": 6, "max": 300, "runs": 3}


def test_a_peer_with_a_limit_is_left_out_beyond_it_and_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    specs = [spec(log, "ours", DUOLOCAL), spec(log, "short", TRANSFORMERS, limit=32)]
    run = PeersRun()
    steps = measure_peers(specs, range(65), [32, 64], threads=1, repeats=1, decode_tokens=2, run=run)
    assert next(steps) == 32
    pids = [result.loaded["info"]["pid"] for result in run.results]
    assert [psutil.pid_exists(pid) for pid in pids] == [True, True]
    assert next(steps) == 64
    assert [psutil.pid_exists(pid) for pid in pids] == [True, False]
    assert list(steps) == []
    assert not psutil.pid_exists(pids[0])
    assert [sorted(result.measured) for result in run.results] == [[32, 64], [32]]
    assert fastest(run.results, TRANSFORMERS, 64) is None
    assert ratios(run.results, 64) == []


@pytest.mark.parametrize("moment", ["prefill", "decode"])
def test_a_crashing_child_is_one_line_with_the_end_of_its_stderr(tmp_path: Path, moment: str) -> None:
    log = tmp_path / "log"
    with pytest.raises(DuoLocalError) as raised:
        measure([spec(log, "ours", DUOLOCAL), spec(log, "llama.cpp fa f16", LLAMA_CPP, crash=moment)], [32])
    assert str(raised.value) == (
        "llama.cpp fa f16 ended with exit code 7: warming up | CUDA error: out of paper | "
        "assertion failed: tokens <= paper"
    )


def test_a_killed_child_says_so(tmp_path: Path) -> None:
    with Child("big", FAKE) as child:
        info = child.ask("load", log=str(tmp_path / "log"), name="big")["info"]
        os.kill(info["pid"], 9)
        with pytest.raises(DuoLocalError, match=r"big was ended by signal 9 \(which the system sends where memory"):
            child.ask("decode", token_id=1, num_tokens=1)


def test_a_refusal_of_a_child_keeps_its_kind(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^ours: context is 3; give 16$"):
        measure([spec(tmp_path / "log", "ours", DUOLOCAL, refuse="context is 3; give 16")], [32])


def test_tokens_that_stay_behind_are_noticed(tmp_path: Path) -> None:
    # The parent looks at the positions that it is told; the child at those of its runner.
    with pytest.raises(AssertionError):
        measure([spec(tmp_path / "log", "ours", DUOLOCAL, leak=1)], [32])
    with Child("leaky", (*FAKE, "leaky")) as child:
        child.ask("load")
        assert child.ask("prefill", token_ids=[1, 2], keep=True)["position"] == 2
        with pytest.raises(DuoLocalError, match="AssertionError"):
            child.ask("decode", token_id=1, num_tokens=4)


def test_a_child_gets_all_cores_and_the_threads_that_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    bound = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    monkeypatch.setattr(threads, "_ALLOWED", tuple(range(os.cpu_count() or 1)))  # and so it was before torch bound it
    with Child("fake", FAKE, threads=3) as child:
        answer = child.ask("load", log=str(tmp_path / "log"), name="fake")
    info = answer["info"]
    assert info["environment"] == {"OMP_NUM_THREADS": "3", "OMP_PROC_BIND": "true", "HF_HUB_OFFLINE": "1"}
    assert answer["peak_bytes"] > 5 << 20
    if bound:
        assert len(info["cpus"]) == os.cpu_count()
        assert os.sched_getaffinity(0) == bound
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    with Child("fake", FAKE) as child:
        info = child.ask("load", log=str(tmp_path / "log"), name="fake")["info"]
    assert info["environment"]["OMP_PROC_BIND"] == "false"


def test_idle_children_use_no_processor_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = measure([spec(log, name, DUOLOCAL, prefill=1, decode=1) for name in "abc"], [32], repeats=2)
    assert run.elapsed_s > 100  # as told, not as waited
    assert run.idle_cpu_share < 0.01


# --- the list of runners ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(path, huggingface_model(), "llama")
    return path


def specs_of(path: Path, choice: PeerChoice, **settings: Any) -> list[RunnerSpec]:
    chosen = LoadSettings(model="tiny", heads="0.5", **settings)
    return runner_specs(
        open_model(path), chosen, choice, [16, 48], threads=3, decode_tokens=8, q4_0=Path("/cache/q4_0.gguf")
    )


def test_every_setting_of_llama_cpp_that_it_accepts(tiny_gguf: Path) -> None:
    specs = specs_of(tiny_gguf, PeerChoice(limits={TRANSFORMERS: 16}))
    settings = {
        s.name: (s.options["flash"], s.options["key"], s.options["value"]) for s in specs if s.peer == LLAMA_CPP
    }
    assert settings == {
        "llama.cpp fa f16": (True, "f16", "f16"),
        "llama.cpp fa q8_0": (True, "q8_0", "q8_0"),
        "llama.cpp fa q4_0": (True, "q4_0", "q4_0"),
        "llama.cpp f16": (False, "f16", "f16"),
        "llama.cpp q8_0/f16": (False, "q8_0", "f16"),
        "llama.cpp q4_0/f16": (False, "q4_0", "f16"),
    }
    q4_0 = [s for s in specs if s.peer == REQUANTIZED]
    assert len(q4_0) == 6 and {s.options["path"] for s in q4_0} == {"/cache/q4_0.gguf"}
    assert [s.name for s in specs[:2]] == ["duolocal heads=0.5", "duolocal heads=all"]
    # Room for the longest length of each, its decoded tokens, the one before them and the one after.
    assert {s.options["context"] for s in specs if s.peer != TRANSFORMERS} == {58}
    assert {s.options["threads"] for s in specs} == {3}
    assert len({s.name for s in specs}) == len(specs) == 15
    assert specs[-1].limit == 16


def test_the_list_can_be_cut(tiny_gguf: Path) -> None:
    choice = PeerChoice(peers=(LLAMA_CPP,), flash=(True,), kv=("f16",), limits={LLAMA_CPP: 16})
    specs = specs_of(tiny_gguf, choice, kv="int8")
    names = [s.name for s in specs]
    assert names[0] == "duolocal heads=0.5 kv=int8"
    assert names[2:] == ["llama.cpp fa f16", "llama.cpp Q4_0 fa f16"]
    assert [s.options["context"] for s in specs] == [58, 58, 26, 26]
    assert [s.limit for s in specs] == [None, None, 16, 16]
    assert [s.peer for s in specs_of(tiny_gguf, PeerChoice(peers=(TRANSFORMERS,), limits={TRANSFORMERS: 8}))] == [
        DUOLOCAL,
        DUOLOCAL,
    ]


def test_flash_attention_with_quantized_kv_has_a_limit_of_its_own(tiny_gguf: Path) -> None:
    choice = PeerChoice(peers=(LLAMA_CPP,), requantized=False, limits={FLASH_QUANTIZED: 16})
    limits = {s.name: s.limit for s in specs_of(tiny_gguf, choice) if s.peer == LLAMA_CPP}
    assert limits == {
        "llama.cpp fa f16": None,
        "llama.cpp fa q8_0": 16,
        "llama.cpp fa q4_0": 16,
        "llama.cpp f16": None,
        "llama.cpp q8_0/f16": None,
        "llama.cpp q4_0/f16": None,
    }
    below = PeerChoice(peers=(LLAMA_CPP,), requantized=False, limits={FLASH_QUANTIZED: 2})
    assert not {"llama.cpp fa q8_0", "llama.cpp fa q4_0"} & {s.name for s in specs_of(tiny_gguf, below)}


def test_runners_that_do_not_fit_together_are_refused_before_any_is_loaded(tiny_gguf: Path) -> None:
    specs = specs_of(tiny_gguf, PeerChoice())
    check_room(open_model(tiny_gguf), specs, 48, available=64 << 30)
    with pytest.raises(MemoryLimitError, match=r"15 runners at once need about \d\.\d GiB, 1\.0 GiB are free: compare"):
        check_room(open_model(tiny_gguf), specs, 48, available=1 << 30)


@pytest.mark.parametrize(
    ("missing", "peers", "left"),
    [
        ("llama_cpp", (LLAMA_CPP, TRANSFORMERS), "transformers"),
        ("gguf", (LLAMA_CPP, TRANSFORMERS), "llama.cpp"),
        ("llama_cpp", (LLAMA_CPP,), "none"),
    ],
)
def test_a_missing_package_is_named_with_what_to_do(
    missing: str, peers: tuple[str, ...], left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else name)
    with pytest.raises(SettingsError) as raised:
        check_packages(peers)
    text = str(raised.value)
    assert f"needs the package {missing}: " in text
    assert 'pip install "duolocal[peers]"' in text
    assert text.endswith(f"leave it out: --peers {left}")
    assert "\n" not in text
    check_packages([peer for peer in peers if peer == left])


# --- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--contexts", "512,"], "--contexts is '512,': a value is missing; give one, or several with commas between"),
        (["--peers", "vllm"], "--peers has 'vllm': give a list of llama.cpp, transformers"),
        (["--llama-kv", "q5_1"], "--llama-kv has 'q5_1': give a list of f16, q8_0, q4_0"),
        (["--llama-flash", "true"], "--llama-flash has 'true': give a list of on, off"),
        (["--limit", "8K"], "--limit is '8K': give for example transformers=8K"),
        (["--limit", "duolocal=8K"], "--limit is 'duolocal=8K': give for example transformers=8K"),
        (["--device", "cuda"], "--device is 'cuda': the peers are compared on the CPU; leave it out"),
        (["--repeats", "0"], "--repeats is '0': give between 1 and 2,147,483,647 tokens"),
        (["--peers", "none", "--json", "/no/where/x"], "--json is /no/where/x: there is no folder /no/where"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "peers", *words]) == 2
    assert capsys.readouterr() == ("", f"duolocal: {message}\n")


def test_peers_read_gguf_files_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huggingface_model().save_pretrained(tmp_path)
    capsys.readouterr()
    assert cli.main(["bench", "peers", "--model", str(tmp_path), "--peers", "transformers"]) == 2
    assert "is no .gguf file, which is what the peers read: give one, or --peers none" in capsys.readouterr().err


def test_the_command_prints_tables_and_json_last(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, file = tmp_path / "log", tmp_path / "out.json"
    fakes = [
        spec(log, "duolocal heads=0.5", DUOLOCAL, prefill=300, decode=60),
        spec(log, "llama.cpp fa q8_0", LLAMA_CPP, prefill=100, decode=40, key="q8_0"),
        spec(log, "llama.cpp q8_0/f16", LLAMA_CPP, prefill=600, decode=20, key="q8_0"),
        spec(log, "transformers", TRANSFORMERS, limit=32),
    ]
    asked: dict[str, Any] = {}

    def fake_specs(source: Any, settings: Any, choice: Any, contexts: Any, **more: Any) -> list[RunnerSpec]:
        asked.update(more, heads=settings.heads, choice=choice, contexts=contexts)
        return fakes

    monkeypatch.setattr(bench_peers_view, "runner_specs", fake_specs)
    monkeypatch.setattr(bench_peers_view, "check_room", lambda *_, **__: None)
    monkeypatch.setattr(bench_peers_view, "check_packages", lambda peers: None)
    monkeypatch.setattr(bench_peers_view, "load_tokenizer", lambda source: None)
    monkeypatch.setattr(bench_peers_view, "text_ids", lambda tokenizer, count: list(range(count)))
    words = ["--model", str(tiny_gguf), "--contexts", "64,32", "--tokens", "4", "--repeats", "1", "--threads", "2"]
    words += ["--no-requantized", "--limit", "transformers=32", "--json", str(file)]
    assert cli.main(["bench", "peers", *words]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    report = json.loads(lines[-1])
    assert report == json.loads(file.read_text())
    assert (asked["heads"], asked["threads"], asked["decode_tokens"], asked["contexts"]) == ("0.5", 2, 4, (32, 64))
    assert asked["q4_0"] is None
    assert report["contexts"] == [32, 64]
    assert report["machine"]["threads"] == 2
    assert [runner["name"] for runner in report["runners"]] == [fake.name for fake in fakes]
    assert {entry["context"] for entry in report["fastest"] if entry["peer"] == TRANSFORMERS} == {32}
    summary = {(r["context"], r["against"]): (r["prefill"], r["decode"]) for r in report["ratios"]}
    assert summary[64, "llama.cpp, fastest"] == (0.5, 1.5)
    rows = [line.split() for line in lines]
    assert ["transformers", "-", "-", "-", "-", "-", "-"] in rows
    assert ["llama.cpp", "64", "0.50", "1.50"] in [row[:4] for row in rows]
    assert "transformers is measured up to 32 (--limit transformers=64 for more)" in shown
    assert max(map(len, lines[:-1])) <= 80
    assert "…" not in shown


# --- the runners themselves ------------------------------------------------------------------------


def engine_ids(path: Path, token_ids: Sequence[int], first: int, count: int, **options: Any) -> list[int]:
    engine = Engine.load(str(path), context=len(token_ids) + count + 1, **options)
    for _ in engine.prefill(token_ids):
        pass
    return list(engine.generate([first], Sampling(temperature=0, max_tokens=count), eos_ids=frozenset()))


def test_the_runner_of_duolocal_is_the_engine(tiny_gguf: Path) -> None:
    token_ids = [(7 * i) % 300 + 3 for i in range(40)]
    options = {"path": str(tiny_gguf), "context": 50, "kv": "32", "heads": "all", "threads": 1}
    with Child("duolocal", runner_command("duolocal"), threads=1) as child:
        loaded = child.ask("load", **options)
        assert loaded["info"]["retrieval_heads"] == 4
        assert loaded["imported_bytes"] < loaded["peak_bytes"]
        for start, end in ((0, 20), (20, 40)):
            for keep in (False, True):
                answer = child.ask("prefill", token_ids=token_ids[start:end], keep=keep)
                assert answer["position"] == (end if keep else start)
            for _ in range(2):
                answer = child.ask("decode", token_id=5, num_tokens=6)
                assert answer["position"] == end
                assert answer["greedy_ids"] == engine_ids(tiny_gguf, token_ids[:end], 5, 7, kv="32", heads="all")
        with pytest.raises(DuoLocalError, match=r"^duolocal: 20 tokens do not fit"):
            child.ask("prefill", token_ids=token_ids[:20], keep=True)
        assert child.ask("decode", token_id=5, num_tokens=6)["position"] == 40


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_the_runner_of_transformers_computes_the_same_and_removes_its_tokens(tiny_gguf: Path) -> None:
    token_ids = [(7 * i) % 300 + 3 for i in range(40)]
    with Child("transformers", runner_command("transformers"), threads=1) as child:
        info = child.ask("load", path=str(tiny_gguf), threads=1)["info"]
        assert (info["dtype"], info["attention"], info["threads"]) == ("float32", "sdpa", 1)
        assert child.ask("prefill", token_ids=token_ids, keep=False)["position"] == 0
        for start, end in ((0, 20), (20, 40)):
            child.ask("prefill", token_ids=token_ids[start:end], keep=True)
            answer = child.ask("decode", token_id=5, num_tokens=6)
            assert answer["position"] == end
            assert answer["greedy_ids"] == engine_ids(tiny_gguf, token_ids[:end], 5, 7, kv="32", heads="all")


@has_llama_cpp
def test_the_runner_of_llama_cpp_carries_no_torch() -> None:
    program = "import sys, duolocal.bench.runners.llama_cpp; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@has_llama_cpp
@pytest.mark.real
@pytest.mark.parametrize(("flash", "key", "value"), [(True, "f16", "f16"), (False, "q8_0", "f16")])
def test_the_runner_of_llama_cpp_computes_the_same_and_removes_its_tokens(
    smollm2_path: Path, flash: bool, key: str, value: str
) -> None:
    token_ids = text_ids(load_tokenizer(open_model(smollm2_path)), 49)
    options = {"path": str(smollm2_path), "context": 64, "threads": 1, "flash": flash, "key": key, "value": value}
    with Child("llama.cpp", runner_command("llama_cpp"), threads=1) as child:
        child.ask("load", **options)
        assert child.ask("prefill", token_ids=token_ids[:48], keep=False)["position"] == 0
        for start, end in ((0, 24), (24, 48)):
            child.ask("prefill", token_ids=token_ids[start:end], keep=True)
            answers = [child.ask("decode", token_id=token_ids[end], num_tokens=4) for _ in range(2)]
            assert [answer["position"] for answer in answers] == [end, end]
            expected = engine_ids(smollm2_path, token_ids[:end], token_ids[end], 5, kv="16", heads="all")
            assert [answer["greedy_ids"] for answer in answers] == [expected, expected]


@has_llama_cpp
@pytest.mark.real
def test_llama_cpp_refuses_quantized_values_without_flash_attention(smollm2_path: Path) -> None:
    options = {"path": str(smollm2_path), "context": 64, "threads": 1, "flash": False, "key": "q8_0", "value": "q8_0"}
    with (
        Child("llama.cpp q8_0", runner_command("llama_cpp"), threads=1) as child,
        pytest.raises(DuoLocalError, match=r"^llama.cpp q8_0 ended with exit code 1: .*refuses flash=False"),
    ):
        child.ask("load", **options)


@has_llama_cpp
@pytest.mark.real
def test_requantizing_is_done_once_and_leaves_nothing_half_done(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path))
    source = open_model(smollm2_path)
    target = requantize(source, threads=1)
    assert target == requantized_path(source)
    made = open_model(target)
    assert (made.weight_format, made.config) == ("Q4_0", source.config)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    before = target.stat().st_mtime_ns
    monkeypatch.setattr(peer_list, "Child", None)  # a second time asks nobody
    assert requantize(source, threads=1).stat().st_mtime_ns == before


@has_llama_cpp
def test_a_file_that_cannot_be_requantized_leaves_nothing(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path))
    source = open_model(tiny_gguf)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_gguf.read_bytes()[:300])
    object.__setattr__(source, "path", broken)
    with pytest.raises(DuoLocalError, match=r"^llama.cpp "):
        requantize(source, threads=1)
    assert list(requantized_path(source).parent.iterdir()) == []
