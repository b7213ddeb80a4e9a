"""`--select` and `--kv-device-memory` on a real model: budgets, channels, answers that do not depend on the place."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duolocal.cli import main
from duolocal.engine.engine import Engine
from duolocal.engine.select_choice import AUTO_BUDGET, choose_channels, selection_budget
from duolocal.errors import SettingsError
from duolocal.kernels.digest import digest_channels
from duolocal.models.loader import open_model
from duolocal.sample_text import sample_text
from duolocal.settings import Sampling
from duolocal.tokenizer import load_tokenizer
from tests.tiny import tiny_config

GREEDY = Sampling(temperature=0, max_tokens=24)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep channels away from the user's; the kernels are found where they are built already."""
    from duolocal.engine import engine as engine_module
    from duolocal.engine import select_choice

    monkeypatch.setattr(select_choice, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(engine_module, "cache_folder", lambda: tmp_path)


def engine_of(path: Path, **options: object) -> Engine:
    return Engine.load(open_model(path), context=2048, heads="0.5", kv="int8", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("select", "context", "budget"),
    [
        ("off", 2**20, None),
        ("auto", 32 * 1024 - 1, None),
        ("auto", 32 * 1024, AUTO_BUDGET),
        ("512", 1024, 512),
        ("4K", 2**20, 4096),
    ],
)
def test_budgets(select: str, context: int, budget: int | None) -> None:
    for kernels in ("compiled", "triton"):
        assert selection_budget(select, context, config=tiny_config(), kernels=kernels) == budget


@pytest.mark.parametrize("wrong", ["63", "0", "on", "-1", "2.5"])
def test_wrong_budgets_are_refused(wrong: str) -> None:
    with pytest.raises(SettingsError, match="^--select is '?" + wrong):
        selection_budget(wrong, 2**20, config=tiny_config(), kernels="compiled")


@pytest.mark.parametrize(("heads", "largest"), [(1, 5461 * 64), (4, 1365 * 64), (5, 682 * 64), (8, 682 * 64)])
def test_a_gpu_has_a_largest_budget(heads: int, largest: int) -> None:
    """What a program ranks is held in registers: more than 16 for each of 1,024 threads do not fit."""
    config = replace(tiny_config(), num_heads=2 * heads, num_kv_heads=2)
    assert selection_budget(str(largest), 2**20, config=config, kernels="triton") == largest
    with pytest.raises(SettingsError, match=f"^--select is 1M: on a GPU this model reads up to {largest:,} tokens; "):
        selection_budget("1M", 2**20, config=config, kernels="triton")
    assert selection_budget("1M", 2**20, config=config, kernels="compiled") == 2**20


def test_a_plan_for_a_card_refuses_what_its_kernels_cannot_choose(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--no-measure", "--model", "llama3-8b-awq", "--context", "1M", "--card", "rtx4090"]
    assert main([*words, "--select", "80K"]) in (0, 1)
    assert "--select" not in capsys.readouterr().err
    assert main([*words, "--select", "100K"]) == 2
    assert "--select is 100K: on a GPU this model reads up to 87,360 tokens" in capsys.readouterr().err


@pytest.mark.full
def test_answers_do_not_depend_on_where_blocks_lie(smollm2_path: Path) -> None:
    """Read 900 tokens, answer: dense equals dense, selected equals selected, to the last bit of the logits."""
    token_ids = load_tokenizer(open_model(smollm2_path)).encode(sample_text())[:900]
    answers, states = {}, {}
    for select, memory in (("off", None), ("off", 0), ("128", None), ("128", 900_000)):
        engine = engine_of(smollm2_path, select=select, kv_device_memory=memory)
        assert engine.cache.pool.tiered == (memory is not None)
        for _ in engine.prefill(token_ids):
            pass
        answers[select, memory is None] = list(engine.generate([5], GREEDY, eos_ids=frozenset()))
        states[select, memory is None] = engine.logits([7])
    for select in ("off", "128"):
        assert answers[select, True] == answers[select, False]
        assert torch.equal(states[select, True], states[select, False])
    assert not torch.equal(states["off", True], states["128", True])  # something was left out


@pytest.mark.full
def test_channels_are_found_once_and_belong_together(smollm2_path: Path, tmp_path: Path) -> None:
    source = open_model(smollm2_path)
    engine = engine_of(smollm2_path, select="256")
    (file,) = (tmp_path / "selection").iterdir()
    selection = engine.cache.selection
    assert selection is not None
    channels = selection.channels.tolist()
    count = digest_channels(64)
    for row in channels:
        assert len(set(row)) == count and all(0 <= channel < 64 for channel in row)
        assert [channel + 32 for channel in row[: count // 2]] == row[count // 2 :]  # pairs that RoPE turns together
    assert len({tuple(row) for row in channels}) > 5  # heads differ
    stamp = file.stat().st_mtime_ns
    again = choose_channels(source, engine.transformer, engine.plan)
    assert torch.equal(again.channels, selection.channels) and file.stat().st_mtime_ns == stamp
    for damage in ("{}", json.dumps({"channels": [[[99]]], "centre": [[[0]]]})):
        file.write_text(damage)
        once_more = choose_channels(source, engine.transformer, engine.plan)
        assert torch.equal(once_more.channels, again.channels)
        torch.testing.assert_close(once_more.centre, again.centre)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "kl", "--select", "512"], "--select is for answers, and eval kl measures reading"),
        (
            ["eval", "passkey", "--kv-device-memory", "1GiB"],
            "--kv-device-memory changes no result: leave it out of eval",
        ),
        (["bench", "prefill", "--select", "512"], "bench prefill reads all blocks, in memory"),
        (["bench", "decode", "--select", "7"], "--select is 7: give off, auto, or 64 tokens or more"),
        (["chat", "--kv-device-memory", "lots"], "--kv-device-memory is 'lots': give a size such as 24GiB"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], smollm2_path: Path
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_bench_decode_shows_the_ways_side_by_side(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = ["--select", "256", "--kv-device-memory", "1MiB", "--heads", "0.5", "--kv", "int8"]
    words = ["bench", "decode", "--context", "4K", *ways, "--tokens", "2", "--repeats", "1"]
    assert main([*words, "--model", str(smollm2_path)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["variant"]: row for row in report["results"]}
    assert [*rows][:3] == ["all", "256 tokens", "1 MiB of all"] and len(rows) == 6
    for name, row in rows.items():
        assert row["bit_for_bit"] == (True if "1 MiB" in name else None)
        assert (row["outer_bytes"] > 20_000_000) == ("1 MiB" in name)
    assert rows["1 MiB of all"]["device_bytes"] < rows["all"]["device_bytes"] - 20_000_000
