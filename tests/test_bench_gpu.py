"""The GPU suite: every section's code on tiny shapes, the deadline, what survives a crash, the report, no GPU."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from duolocal import cli
from duolocal.bench.decode import bytes_per_token
from duolocal.bench.gpu import floors, sizes, suite
from duolocal.bench.gpu.correctness import read_junit, run_files
from duolocal.bench.gpu.measure import Bench, Ceilings, changed, poisoned
from duolocal.bench.gpu.prefill import interpolated
from duolocal.bench.gpu.suite import (
    SECTIONS,
    Section,
    SuiteFiles,
    allotted,
    chosen_sections,
    failed,
    run_suite,
    suite_files,
)
from duolocal.engine.engine import Engine
from duolocal.errors import DuoLocalError
from duolocal.heads import HeadPlan
from duolocal.kernels.torch_kernels import TorchKernels
from duolocal.models.assemble import assemble
from duolocal.models.synthetic import RandomTensors, random_int4
from duolocal.models.transformer import Transformer
from duolocal.terminal.bench_gpu_view import render
from tests.triton_device import COMPUTE_DTYPES, DEVICE, INTERPRETED

HAS_TRITON = importlib.util.find_spec("triton") is not None
ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


def bench_of(records: list[dict[str, Any]], *, left_s: float = 3600, **more: Any) -> Bench:
    deadline = time.monotonic() + left_s
    return Bench(DEVICE, COMPUTE_DTYPES[0], sizes.TINY, deadline, records.append, Ceilings(1e9, 1e9), **more)


# What a section must have measured; everything it records must be free of errors.
RECORDED = {
    "device": {"machine", "copy", "matmul", "ceilings"},
    "products": {"gemv", "gemm"},
    "decode_kernels": {"decode_attention", "sdpa decode"},
    "prefill_kernels": {"band", "blocks", "chunk", "sdpa causal", "sdpa before"},
    "pointwise": {"rms_norm", "silu_mul", "append_token", "rotate", "close_blocks", "write_ring"},
    "decode": {"decode", "profile"},
    "selected": {"selected decode", "selection kernels"},
    "prefill": {"prefill"},
    "capped": {"capped decode", "capped prefill"},
    "sweep": {"sweep", "sweep best"},
}
DEAR = ("products", "sweep", "prefill")  # seconds each in the interpreter; their kernels have tests of their own


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the interpreter's work small: large tiles, one variant per constant, no tokens only to warm up."""
    from duolocal.bench.gpu import engines, sweep
    from duolocal.kernels.gpu import linear
    from duolocal.kernels.gpu.operations import TritonKernels

    class FewKernels(TritonKernels):
        """Products by torch: those of a whole model take minutes here, and have tests and a section of their own."""

        def linear(self, *args: Any, **more: Any) -> Any:
            return TorchKernels(self.dtype).linear(*args, **more)

        def gated_linear(self, *args: Any, **more: Any) -> Any:
            return TorchKernels(self.dtype).gated_linear(*args, **more)

    if INTERPRETED:
        monkeypatch.setattr(engines, "TritonKernels", FewKernels)
        monkeypatch.setattr(engines, "WARM_TOKENS", 1)
    monkeypatch.setattr(sweep, "DECODE_VALUES", {"STAGES": (2,)})
    monkeypatch.setattr(sweep, "LINEAR_VALUES", {"_VECTOR_REGISTERS": (128,)})
    with changed(linear, {"_WARPS_WANTED": 1}):
        yield


@needs_triton
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in DEAR else ()) for name in RECORDED]
)
def test_every_section_runs(name: str, tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    bench = bench_of(records, profile_path=str(tmp_path / "profile.txt"))
    if name == "device":
        bench.known_ceilings = None
    module = importlib.import_module(f"duolocal.bench.gpu.{name}")
    with torch.inference_mode():
        module.run(bench)
        if name == "capped":
            module.run_long(bench)
    assert [record for record in records if "error" in record] == []
    assert {record["what"] for record in records if "skipped" not in record} == RECORDED[name]
    json.dumps(records)  # everything can be written
    if name == "decode":
        table = (tmp_path / "profile.txt").read_text(encoding="utf-8")
        assert "after 0 tokens" in table and table.count("\n") > 10
        contexts = [(record["context"], record["heads"]) for record in records if record["what"] == "decode"]
        assert contexts[:3] == [(0, "50%"), (200, "50%"), (200, "all")] and len(contexts) == 4
        assert records[0]["weights"] == "random"
    if name == "prefill":
        kinds = [(r["context"], r["heads"], r["sampled"]) for r in records if r["what"] == "prefill"]
        assert (36, "50%", True) in kinds and (36, "50%", False) in kinds and (20, "all", False) in kinds
    assert list(render({**report_head(), "sections": {name: {"status": "done", "records": records}}}))


@needs_triton
def test_the_constants_that_are_swept_exist() -> None:
    from duolocal.bench.gpu import sweep
    from duolocal.kernels.gpu import decode, linear

    assert all(hasattr(decode, name) for name in sweep.DECODE_VALUES)
    assert all(hasattr(linear, name) for name in (*sweep.LINEAR_VALUES, "FUSED_ROWS"))


def report_head() -> dict[str, Any]:
    return {
        "device": "NVIDIA H200",
        "date": "2026-11-22T10:00:00+00:00",
        "weights": "random",
        "ceilings": {"copy_bytes_per_s": 4.3e12, "matmul_flop_per_s": 7.8e14},
    }


@needs_triton
def test_a_wrong_kernel_is_an_error_in_its_section(monkeypatch: pytest.MonkeyPatch) -> None:
    from duolocal.bench.gpu import decode_kernels

    right = decode_kernels.decode_attention
    monkeypatch.setattr(decode_kernels, "decode_attention", lambda *args: right(*args) * 1.1)
    records: list[dict[str, Any]] = []
    with torch.inference_mode():
        decode_kernels.run(bench_of(records))
    wrong = [record for record in records if record["what"] == "decode_attention"]
    assert wrong and all("ArithmeticError: relative error" in record["error"] for record in wrong)
    assert all("trace" in record for record in wrong)


def test_what_no_kernel_wrote_is_found() -> None:
    bench = bench_of([])
    with pytest.raises(ArithmeticError, match="never written"):
        bench.check(lambda: torch.empty(4, 4))
    with poisoned():
        assert torch.empty(3).isnan().all() and (torch.empty(3, dtype=torch.uint8) == 255).all()
    assert not torch.are_deterministic_algorithms_enabled()
    x = torch.ones(3)
    assert bench.check(lambda: x, 1.001 * x, tolerance=0.01) == pytest.approx(0.001, rel=0.01)
    with pytest.raises(ArithmeticError, match="relative error"):
        bench.check(lambda: x, 1.1 * x, tolerance=0.01)


def test_an_item_that_fails_does_not_end_the_section() -> None:
    records: list[dict[str, Any]] = []
    bench = bench_of(records)
    with bench.item("thing", kv="int4"):
        raise RuntimeError("no\nluck")
    assert records[0]["error"] == "RuntimeError: no luck" and records[0]["kv"] == "int4"
    bench.deadline = time.monotonic() + 1
    assert not bench.fits(5, "other", context=7)
    assert records[1]["what"] == "other" and "wanted 5 s" in records[1]["skipped"]


def test_inputs_rotate_until_they_exceed_the_caches() -> None:
    bench = bench_of([])
    bench.sizes = sizes.FULL
    assert bench.copies(1 << 20) == 64  # as many as there may be
    assert bench.copies(100 << 20) == 3 and bench.copies(1 << 30) == 1


# --- the random model -------------------------------------------------------------------------------------------------


def test_random_weights_have_the_size_and_spread_of_real_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = random_int4(64, 512, 128, generator)
    values = weight.dequantize(torch.float32)
    assert weight.nbytes == 64 * 512 // 2 + 64 * 4 * 3
    assert 0.015 < float(values.std()) < 0.025 and abs(float(values.mean())) < 0.005
    assert not torch.equal(values[0], values[1])


def test_hidden_states_stay_finite_and_of_size_one() -> None:
    from dataclasses import replace

    config = replace(sizes.TINY.config, num_layers=16, hidden_size=256, intermediate_size=512, num_heads=16)
    device, dtype = torch.device("cpu"), torch.float32
    weights = assemble(
        config, RandomTensors("INT4", "F32", group_size=32, device=device, seed=1), device=device, dtype=dtype
    )
    transformer = Transformer(config, weights, context=64, device=device, dtype=dtype)
    plan = HeadPlan(((True, False),) * 16, sink_size=4, recent_size=16, source="test")
    engine = Engine.build(transformer, plan, kv="int4", chunk_size=16)
    logits = engine.logits(list(range(40)))
    assert logits.isfinite().all() and 0.01 < float(logits.std()) < 10
    assert len(set(logits.argmax(dim=-1).tolist())) > 10  # other tokens, other answers


def test_the_real_sizes_come_to_the_known_bytes() -> None:
    """W4-g128 3.63 GB (AWQ packs zero points in 4 bits, here they take a byte), lm_head 1.05 GB."""
    config = sizes.LLAMA_3_8B
    assert floors.linear_bytes(config, 128) == pytest.approx(3.63e9, rel=0.02)
    assert floors.lm_head_bytes(config) == pytest.approx(1.05e9, rel=0.01)
    # 14 PFLOP of products and 131 of attention for a million tokens, half of the heads being retrieval heads.
    assert floors.prefill_flop(config, 10**6, retrieval=0.0, window=1) == pytest.approx(14e15, rel=0.02)
    assert floors.prefill_flop(config, 10**6, retrieval=0.5, window=320) == pytest.approx(145e15, rel=0.02)


@needs_triton
def test_bytes_of_a_layer_are_those_of_an_engine() -> None:
    from duolocal.bench.gpu.engines import bench_weights, engine_for, fill
    from duolocal.bench.gpu.layers import read_bytes

    bench = bench_of([])
    engine = engine_for(bench, bench_weights(bench), heads="50%", context=640)
    for tokens in (0, 3, 30, 127, 200, 600):
        fill(engine, tokens, seed=1)
        assert engine.position == tokens
        per_layer = read_bytes(engine.cache, tokens + 1)
        assert bytes_per_token(engine)[1] == sizes.TINY.config.num_layers * per_layer


def test_interpolation_between_sampled_chunks() -> None:
    assert [interpolated([0, 4, 8], [1.0, 3.0, 11.0], place) for place in range(9)] == [1, 1.5, 2, 2.5, 3, 5, 7, 9, 11]
    assert interpolated([0], [2.0], 0) == 2.0


# --- the suite: children, deadline, what survives ---------------------------------------------------------------------


def section(name: str, function: str, *, least_s: float = 1, most_s: float = 60) -> Section:
    return Section("a", name, f"tests.gpu_sections:{function}", least_s, most_s)


def run(tmp_path: Path, *sections: Section, seconds: float = 120) -> tuple[dict[str, Any], SuiteFiles]:
    files = suite_files(tmp_path, "NVIDIA H200", "2026-11-22")
    deadline = time.monotonic() + seconds
    report = run_suite(sections, files, device="NVIDIA H200", deadline=deadline, torch_device="cpu", sizes="tiny")
    assert json.loads(files.report.read_text(encoding="utf-8")) == report
    return report, files


def test_what_was_measured_before_a_crash_survives(tmp_path: Path) -> None:
    report, files = run(tmp_path, section("crash", "crash"), section("killed", "killed"), section("good", "good"))
    entries = report["sections"]
    assert [entry["status"] for entry in entries.values()] == ["crashed", "crashed", "done"]
    assert all(entry["records"][0] == {"what": "thing", "value": 1} for entry in entries.values())
    assert "RuntimeError: an illegal memory access" in entries["crash"]["tail"]
    assert entries["killed"]["why"] == f"ended by signal {signal.SIGKILL.value}"
    log = files.log.read_text(encoding="utf-8")
    assert all(f"===== {name}" in log for name in entries) and "a line for the log" in log
    # The ceilings of the first section that measured them reach the later ones.
    assert report["ceilings"] == {"copy_bytes_per_s": 2.0, "matmul_flop_per_s": 3.0}
    assert entries["good"]["records"][1] == {"what": "seen", "copy": 2.0}
    assert [line.split(":")[0] for line in failed(report)] == ["crash", "killed"]
    assert sum(line.startswith("FAILED") for line in render(report)) == 2


@pytest.mark.full
def test_what_was_measured_before_a_hang_survives(tmp_path: Path) -> None:
    # A child takes seconds to import torch, more on a busy machine.
    report, _ = run(tmp_path, section("hang", "hang", most_s=30), section("good", "good"))
    hung, good = report["sections"].values()
    assert (hung["status"], good["status"]) == ("timeout", "done")
    assert hung["records"] == [{"what": "thing", "value": 1}]
    assert "in hang" in hung["tail"]  # where it was
    assert [line.split(":")[0] for line in failed(report)] == ["hang"]


def test_a_section_leaves_the_later_ones_their_least() -> None:
    long, short = section("long", "good", least_s=2, most_s=600), section("short", "good", least_s=8)
    assert allotted(long, [short, short], 118) == 102
    assert allotted(short, [], 118) == 60  # its most
    assert allotted(long, [short] * 20, 118) == 2
    assert allotted(short, [], 8) == 8 and allotted(short, [], 7.9) == 0


def test_sections_that_no_longer_fit_are_left_out(tmp_path: Path) -> None:
    report, _ = run(tmp_path, section("never", "good", least_s=100), section("good", "good"), seconds=90)
    never = report["sections"]["never"]
    assert (never["status"], never["limit_s"], never["records"]) == ("skipped", 0, [])
    assert "100 s are wanted" in never["why"]
    assert report["sections"]["good"]["status"] == "done"
    assert failed(report) == []  # no time is no failure
    run(tmp_path, section("never", "good", least_s=100), seconds=1)
    assert (tmp_path / "gpu-h200-2026-11-22-2.json").exists()  # a second run of a day overwrites nothing


def test_partial_results_are_on_disk_when_the_suite_itself_is_killed(tmp_path: Path) -> None:
    program = (
        "import signal, time; from pathlib import Path; from duolocal.bench.gpu.suite import *\n"
        # Where the tests themselves run in the background, Ctrl-C is ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"files = suite_files(Path({str(tmp_path)!r}), 'x', 'd')\n"
        "run_suite([Section('a', 'hang', 'tests.gpu_sections:hang', 1, 90)], files, device='x',"
        " deadline=time.monotonic() + 100, torch_device='cpu', sizes='tiny')\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    report = tmp_path / "gpu-x-d.json"
    try:
        for _ in range(900):
            if report.exists() and '"value": 1' in report.read_text(encoding="utf-8"):
                break
            time.sleep(0.1)
    finally:
        parent.send_signal(signal.SIGINT)
        parent.wait(timeout=20)
    entry = json.loads(report.read_text(encoding="utf-8"))["sections"]["hang"]
    assert entry["status"] == "running" and entry["records"] == [{"what": "thing", "value": 1}]


def test_all_sections_together_leave_time_and_exist() -> None:
    assert sum(section.least_s for section in SECTIONS) < 60 * 9 / 2
    for section in SECTIONS:
        module, function = section.run.split(":")
        assert importlib.util.find_spec(module) is not None, module
        assert f"def {function}(" in Path(str(importlib.util.find_spec(module).origin)).read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert [section.letter for section in chosen_sections(("c", "a"))] == ["a", "c", "c", "c", "c"]


def test_test_files_run_each_for_itself(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    contents = {
        "good": "def test_a(): pass\ndef test_b(): pass\n",
        "bad": "def test_c(): assert 1 == 2, 'not so'\ndef test_d(): pass\n",
        "dead": "import os\ndef test_e(): os._exit(3)\n",
    }
    for name, text in contents.items():
        (folder / f"test_{name}.py").write_text(text, encoding="utf-8")
    records: list[dict[str, Any]] = []
    files = [folder / f"test_{name}.py" for name in contents]
    run_files(bench_of(records, left_s=150), files, at_once=4)
    found = {record["file"]: record for record in records}
    assert len(found) == 3
    good, bad, dead = (found[file.name] for file in files)
    assert (good["passed"], good["failed"], "error" in good) == (2, 0, False)
    assert (bad["passed"], bad["failed"], bad["error"]) == (1, 1, "1 failed")
    assert bad["failures"][0]["test"] == "test_c" and "not so" in bad["failures"][0]["message"]
    assert dead["error"] == "pytest's exit code is 3"
    (folder / "test_slow.py").write_text("import time\ndef test_f(): time.sleep(100)\n", encoding="utf-8")
    records.clear()
    run_files(bench_of(records, left_s=5), [folder / "test_slow.py", folder / "test_good.py"], at_once=1)
    slow, unstarted = records
    assert slow["error"] == "not finished in the time there was"
    assert unstarted == {"what": "tests", "file": "test_good.py", "skipped": "no time was left"}
    assert read_junit(tmp_path / "none.xml") == ({}, [])


# --- the report -------------------------------------------------------------------------------------------------------


def hand_made() -> dict[str, Any]:
    m, k = sizes.M, sizes.K
    attention = [
        {"what": "decode_attention", "kv": kv, "context": 128 * k, "retrieval": 8, "heads": 8, "us": us, "of_copy": 0.9}
        for kv, us in (("int4", 30.0), ("16", 110.0))
    ]
    sdpa = {"what": "sdpa decode", "context": 128 * k, "retrieval": 8, "us": 105.0, "of_copy": 0.8, "backend": "cudnn"}
    decode = [
        {
            "what": "decode",
            "heads": "50%",
            "kv": "int4",
            "context": context,
            "reserved_tokens": m,
            "ms": ms,
            "floor_ms": 0.8 * ms,
            "of_floor": 0.8,
            "cache_bytes": 17 * 10**9,
            "peak_reserved_bytes": 23 * 10**9,
        }
        for context, ms in ((0, 1.5), (m, 6.0))
    ]
    selected = [
        {
            **decode[1],
            "what": "selected decode",
            "way": way,
            "context": context,
            "ms": ms,
            "peak_reserved_bytes": 7 * 10**9,
            **more,
        }
        for way, context, ms, more in (
            ("all", m, 6.0, {}),
            ("selected", 128 * k, 1.5, {"ms_choosing": 1.7, "ms_reusing": 1.4}),
            ("selected", m, 1.75, {"ms_choosing": 1.9, "ms_reusing": 1.7}),
            ("selected, offloaded", m, 3.4, {"ms_choosing": 9.0, "ms_reusing": 1.7, "copies_per_choice": 12.5}),
        )
    ]
    alone = {"what": "selection kernels", "name": "select_blocks", "context": m, "budget": 2048, "us": 31.0}
    capped = [
        {**decode[1], "what": "capped decode", "cap_bytes": 24 << 30},
        {"what": "capped decode", "context": 4_000_000, "cap_bytes": 80 * 10**9, "error": "OutOfMemoryError: no"},
    ]
    prefill = [
        {
            "what": "prefill",
            "context": 320 * k,
            "heads": heads,
            "chunk": chunk,
            "tokens_per_s": rate,
            "seconds": 30.0,
            "sampled": chunk == 4 * k,
            "of_matmul": 0.5,
        }
        for heads, chunk, rate in (("50%", 16 * k, 10000.0), ("50%", 4 * k, 9000.0), ("all", 16 * k, 5000.0))
    ]
    tests = [{"what": "tests", "file": "test_triton_x.py", "passed": 7, "failed": 1, "errors": 0, "error": "1 failed"}]
    return {
        **report_head(),
        "sections": {
            "correctness": {"status": "done", "records": tests},
            "decode attention": {"status": "done", "records": [*attention, sdpa]},
            "decode": {"status": "done", "records": decode},
            "selected decode": {"status": "done", "records": [*selected, alone]},
            "prefill": {"status": "timeout", "why": "still running", "records": prefill},
            "capped": {"status": "done", "records": capped},
            "sweep": {"status": "skipped", "why": "3 s were left", "records": [{"what": "sweep", "skipped": "x"}]},
        },
    }


def test_the_table_of_a_report() -> None:
    lines = list(render(hand_made()))
    text = "\n".join(lines)
    assert len(text) < 6000 and max(map(len, lines)) <= 160
    assert "copy 4,300 GB/s" in lines[1] and "weights: random" in lines[0]
    assert "tests on the device: 1 files, 7 passed, 1 failed, 0 skipped" in lines
    assert any(line.startswith("8 heads, 128K") and "30.0 90%" in line and "cudnn" in line for line in lines)
    assert any(line.startswith("1M") and "6.000" in line and "80%" in line for line in lines)
    assert "sweep: skipped, 3 s were left" in lines
    assert "FAILED capped: capped decode 4000000: OutOfMemoryError: no" in lines
    assert "FAILED correctness: tests test_triton_x.py: 1 failed" in lines
    marks = {target.text.split(":")[0]: target for target in floors.targets(hand_made())}
    # 8.2 ms on an H100 of 3.35 TB/s is 5.72 on an H200 of 4.8.
    assert any(target.text.startswith("decode at 1M, 50% int4: 5.72 ms") for target in marks.values())
    # 2.4 ms become 1.67, and 1.75 is more; 1.17 times 128K; offloaded 1.94 times; 7 of 8 GB.
    assert [target.met for target in marks.values()] == [
        *(False, True, True, True, True, False),
        *(False, True, True, True),
        *(True, False),
    ]
    assert marks["... at most 2 × that with blocks in host memory"].measured == "1.94"
    assert any(line.startswith("1M, selected, offloaded") and "12.5" in line for line in lines)
    assert "of one layer, µs: select_blocks at 1M 31.0" in lines
    assert marks["... and 3.2 × the best 16-bit kernel of this run"].measured == "3.50"
    assert marks["... within 3% over chunk sizes"].measured == "11.1%"


def test_the_targets_of_an_empty_report_are_not_measured() -> None:
    empty = {**report_head(), "device": "Some GPU", "ceilings": None, "sections": {}}
    assert all(target.met is None for target in floors.targets(empty))
    assert sum("not measured" in line for line in render(empty)) == 12


# --- the commands -----------------------------------------------------------------------------------------------------

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@no_gpu
def test_without_a_gpu_the_command_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "gpu", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr() == ("", f"duolocal: {suite.NO_DEVICE}\n")
    assert not (tmp_path / "out").exists()


@no_gpu
def test_python_dash_m_is_the_same_command() -> None:
    command = [sys.executable, "-m", "duolocal.bench", "gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"duolocal: {suite.NO_DEVICE}\n")


def make(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run make as from a shell, also when these tests are run by make, which its children would mention."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**inherited, **environment}
    )


@no_gpu
def test_make_gpu_check_says_one_line_and_fails_nothing() -> None:
    done = make("gpu-check")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("\n") == 1 and "nothing was measured" in done.stdout


def test_make_gpu_check_fails_where_a_check_fails(tmp_path: Path) -> None:
    """With a python3 that claims a CUDA device, and then ends as a failed suite does."""
    fake = tmp_path / "python3"
    fake.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "suite $*"\nexit 1\n', encoding="utf-8")
    fake.chmod(0o755)
    done = make("gpu-check", "ARGS=--sections a", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode != 0 and done.stdout == "suite -m duolocal.bench gpu --sections a\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sections", "a,z"], "--sections has 'z': give a list of a, b, c, d, e, f, g"),
        (["--minutes", "0"], "--minutes is '0': give a number such as 9, at most 1440"),
        (["--model", "x"], "unknown option --model: did you mean --minutes?"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "gpu", *words]) == 2
    err = capsys.readouterr().err
    assert err == f"duolocal: {message}\n" or (words[0] == "--model" and err.startswith("duolocal: unknown option"))


def test_a_torch_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "PROBE", "raise RuntimeError('driver too old')")
    with pytest.raises(DuoLocalError, match="driver too old"):
        suite.cuda_device_name()


def test_nothing_of_the_chat_reaches_the_synthetic_fill() -> None:
    program = (
        "import sys, duolocal.terminal.chat, duolocal.terminal.once, duolocal.engine.session\n"
        "assert not [name for name in sys.modules if 'synthetic' in name or name.startswith('duolocal.bench.gpu')]"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
