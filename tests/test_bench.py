"""Our own benchmarks: what they count, that they leave no trace, that their last line is JSON."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from duolocal import cli
from duolocal.bench import decode as decode_module
from duolocal.bench.decode import bytes_per_token, measure_decode
from duolocal.bench.load import measure_loads
from duolocal.bench.machine import machine_facts
from duolocal.bench.prefill import distinct, measure_prefill
from duolocal.bench.text import text_ids
from duolocal.bench.timing import Spread, spread, total
from duolocal.cache.cache import MIN_EXACT_RECENT
from duolocal.engine.engine import Engine
from duolocal.heads import HeadPlan
from duolocal.options import Option, counted, listed
from duolocal.processes import peak_bytes, resident_bytes
from duolocal.settings import LoadSettings
from tests.tiny import random_model, save_checkpoint, tiny_config, transformer_of
from tests.tokenizer_files import LLAMA3_SPLIT, byte_level

TOKENS = [(7 * i) % 300 + 3 for i in range(400)]
SINK, RECENT, BLOCK = 8, 32, 16


def engine(*, retrieval: tuple[bool, bool] = (True, False), tie: bool = False, kv: str = "int8") -> Engine:
    """A tiny model of two layers with two KV heads each, with room for 400 tokens."""
    transformer = transformer_of(random_model(tiny_config(max_positions=512, tie=tie)), context=400)
    plan = HeadPlan((retrieval, retrieval), SINK, RECENT, "test")
    return Engine.build(transformer, plan, kv=kv, chunk_size=64, block_size=BLOCK)


def record_steps(ours: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that will hold (position, tokens) of every forward pass."""
    steps: list[tuple[int, int]] = []
    append = ours.append

    def recorded(token_ids: Sequence[int], *rest: Any, **decode: Any) -> object:
        steps.append((ours.position, len(token_ids)))
        return append(token_ids, *rest, **decode)

    monkeypatch.setattr(ours, "append", recorded)
    return steps


def test_spread_is_median_and_extremes() -> None:
    found = spread([5.0, 1.0, 2.0])
    assert found == Spread(2.0, 1.0, 5.0, 3)
    assert found.per_s(10) == {"median": 5, "min": 2, "max": 10, "runs": 3}
    assert total([found, spread([1.0])]) == Spread(3.0, 2.0, 6.0, 1)


def test_decode_leaves_the_cache_as_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = engine()
    fed = record_steps(ours, monkeypatch)
    steps: list[str] = []
    results = []
    for result in measure_decode(ours, TOKENS, [30, 100], num_tokens=4, repeats=5, on_step=steps.append):
        assert ours.token_ids == TOKENS[: result.context]
        assert ours.position == result.context
        results.append(result)
    assert [result.context for result in results] == [30, 100]
    assert [result.token_s.runs for result in results] == [5, 5]
    # 30 tokens, then five runs of the first token and four timed ones; then 70 in chunks of 64, and five runs again.
    assert fed == [
        (0, 30),
        *[(position, 1) for _ in range(5) for position in range(30, 35)],
        *((30, 64), (94, 6)),
        *[(position, 1) for _ in range(5) for position in range(100, 105)],
    ]
    assert steps.count("100 tokens: run 5 of 5") == 1
    report = results[0].report()
    assert json.loads(json.dumps(report)) == report
    read = results[0].weight_bytes + results[0].kv_bytes
    assert report["gb_per_s"] == pytest.approx(read / results[0].token_s.median / 1e9, abs=1e-3)


def test_the_first_token_of_a_run_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = engine()
    clock = [0.0]
    append = ours.append

    def slow(*given: Any, **decode: Any) -> object:
        # A step after the step of the text's token costs 1 s, that step itself 1000 s.
        clock[0] += 1000.0 if ours.position == 30 else 1.0
        return append(*given, **decode)

    monkeypatch.setattr(ours, "append", slow)
    monkeypatch.setattr(decode_module.time, "perf_counter", lambda: clock[0])
    (result,) = measure_decode(ours, TOKENS, [30], num_tokens=4, repeats=2)
    assert result.token_s == Spread(1.0, 1.0, 1.0, 2)


def test_bytes_per_token_are_those_of_matrices_windows_and_blocks() -> None:
    # Streaming heads alone: 4 heads, keys and values of 16 float32 each, at most sink + recent tokens.
    ours = engine(retrieval=(False, False))
    weights = ours.transformer.weights
    matrices = [
        linear.weight
        for layer in weights.layers
        for linear in (
            *(layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj),
            *(layer.gate_proj, layer.up_proj, layer.down_proj),
        )
    ]
    read = sum(matrix.nbytes for matrix in matrices) + weights.lm_head.nbytes
    token_bytes = 4 * 2 * 16 * 4
    for count in (0, 20, 100):
        for _ in ours.prefill(TOKENS[ours.position : count]):
            pass
        assert bytes_per_token(ours) == (read, token_bytes * min(count + 1, SINK + RECENT))
    tied = engine(tie=True)
    assert bytes_per_token(tied)[0] == read  # the embedding is the head, and is read whole
    # Two retrieval heads: the wider window, and the blocks with tokens that are no sinks and older than it.
    mixed = engine()
    for _ in mixed.prefill(TOKENS[:300]):
        pass
    first, end = SINK // BLOCK, -(-(301 - MIN_EXACT_RECENT) // BLOCK)
    windows = 2 * 2 * 16 * 4 * (SINK + MIN_EXACT_RECENT + SINK + RECENT)
    assert bytes_per_token(mixed)[1] == windows + 2 * (end - first) * mixed.cache.layout.record_bytes


def test_prefill_uses_the_chunk_sizes_in_turn_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = engine()
    fed = record_steps(ours, monkeypatch)
    results = measure_prefill({"exact": ours}, TOKENS, [40, 80], [32, 64], repeats=2)
    assert [(result.context, result.chunk_size) for result in results] == [(40, 32), (40, 64), (80, 32), (80, 64)]
    assert {result.elapsed_s.runs for result in results} == {2}
    turn = [(0, 32), (32, 8), (0, 40), (0, 32), (32, 32), (64, 16), (0, 64), (64, 16)]
    assert fed == [(0, 40), *turn, *turn]
    assert (ours.position, ours.chunk_size) == (0, 64)
    assert results[0].report()["tokens_per_s"] == results[0].elapsed_s.per_s(40)


def test_chunks_that_hold_a_whole_context_are_measured_once() -> None:
    assert distinct([64, 512], [32, 128, 256, 512]) == [
        *((64, 32), (64, 128)),
        *((512, 32), (512, 128), (512, 256), (512, 512)),
    ]
    assert distinct([64], [16]) == [(64, 16)]


def test_load_is_timed_in_fresh_processes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level(LLAMA3_SPLIT, ["<|end_of_text|>"])))
    settings = LoadSettings("tiny", context=48, kv="32", heads="all", threads=1)
    speed = measure_loads({"": tmp_path}, [5, 6, 7], settings, repeats=2)[""]
    assert list(speed.steps_s) == ["start", "import", "open", "load", "first token", "total"]
    assert {steps_s.runs for steps_s in speed.steps_s.values()} == {2}
    assert all(steps_s.least > 0 for steps_s in speed.steps_s.values())
    # Importing torch is the longest step of a tiny model; a process that had it already would need none.
    assert speed.steps_s["import"].least > 0.1 * speed.steps_s["total"].least
    assert (speed.kv, speed.context, speed.cold, speed.device) == ("32", 48, False, "cpu")
    assert json.loads(json.dumps(speed.report()))["ms"]["first_token"]["runs"] == 2


def test_text_is_repeated_where_it_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        def encode(self, text: str, *, bos: bool = False) -> list[int]:
            return [0] * bos + [len(word) for word in text.split()[:10]]

    monkeypatch.setattr("duolocal.bench.text.sample_text", lambda: "a " * 10)
    monkeypatch.setattr("duolocal.bench.text.license_text", lambda: "bb " * 10)
    assert text_ids(Words(), 4) == [0, 1, 1, 1]  # type: ignore[arg-type]
    assert text_ids(Words(), 45) == [0, *[1] * 10, *[2] * 10, *[1] * 10, *[2] * 10, *[1] * 4]  # type: ignore[arg-type]


def test_facts_of_the_machine() -> None:
    facts = machine_facts(threads=3, device="cpu")
    assert (facts["threads"], facts["device"]) == (3, "cpu")
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"] and facts["versions"]
    assert 0 < resident_bytes() <= peak_bytes()


def test_the_package_loads_no_torch_until_asked() -> None:
    program = (
        "import sys, duolocal.bench, duolocal.bench.machine, duolocal.bench.runners.serve, duolocal.bench.child\n"
        "assert 'torch' not in sys.modules\n"
        "from duolocal.bench import memory_report\n"
        "assert 'torch' in sys.modules and callable(memory_report)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_lists_of_sizes() -> None:
    assert Option(listed(counted(), ascending=True), "").parse("2K, 512,2048", "--contexts") == (512, 2048)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["decode", "--contexts", "1Q"], "--contexts is '1Q': give a number of tokens such as 131072, 32K or 1M"),
        (["prefill", "--chunk-sizes", "0"], "--chunk-sizes is '0': give between 1 and 2,147,483,647 tokens"),
        (["prefill", "--chunk-size", "512"], "unknown option --chunk-size: did you mean --chunk-sizes?"),
        (["load", "--repeats", "no"], "--repeats is 'no': give a number of tokens such as 131072, 32K or 1M"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words]) == 2
    assert capsys.readouterr() == ("", f"duolocal: {message}\n")


@pytest.mark.real
@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (["decode", "--contexts", "24,48", "--tokens", "2", "--repeats", "1"], [["24"], ["48"]]),
        (
            ["prefill", "--contexts", "24,48", "--chunk-sizes", "16,32", "--repeats", "1"],
            [["24", "16"], ["24", "32"], ["48", "16"], ["48", "32"]],
        ),
        (
            ["load", "--context", "64", "--repeats", "1"],
            [["start"], ["import"], ["open"], ["load"], ["first"], ["total"]],
        ),
    ],
)
def test_the_commands_print_a_table_and_json_last(
    words: list[str], rows: list[list[str]], smollm2_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(smollm2_path), "--heads", "0.5", "--kv", "int8", "--threads", "1"]
    assert cli.main(["bench", *words, *common]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split() for line in lines]
    assert [shown[1 + row][: len(start)] for row, start in enumerate(rows)] == rows
    report = json.loads(lines[-1])
    assert (report["benchmark"], report["kv"]) == (words[0], "int8")
    assert report["machine"]["threads"] == 1
    if words[0] != "load":
        assert report["retrieval_heads"] == 45
