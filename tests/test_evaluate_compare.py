"""KL and perplexity against dense: judged by dense float64 attention with an explicit mask, computed in one piece."""

import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from duolocal.engine.engine import Engine
from duolocal.errors import MemoryLimitError, SettingsError
from duolocal.evaluate import Choice, Lineup, Setting, combinations, engines
from duolocal.evaluate import compare as compare_module
from duolocal.evaluate.compare import Comparison, WindowFigures, compare, cut_windows
from duolocal.heads import HeadPlan
from duolocal.plan.memory import dense_16bit_bytes
from tests.oracle import OracleCache
from tests.tiny import random_model, tiny_config, transformer_of

CPU = torch.device("cpu")
SPLIT = HeadPlan(((True, False), (False, True)), sink_size=4, recent_size=24, source="test")
ALL = HeadPlan(((True, True),) * 2, sink_size=4, recent_size=24, source="test")
STREAMING = HeadPlan(((False, False),) * 2, sink_size=4, recent_size=24, source="test")


def lineup(*choices: Choice, chunk_size: int = 64, context: int = 400, dtype: torch.dtype = torch.float64) -> Lineup:
    transformer = transformer_of(random_model(tiny_config(max_positions=4096), dtype=dtype), context=context)
    return Lineup(transformer, choices, chunk_size=chunk_size)


def exact(this: Lineup) -> list[tuple[str, Engine]]:
    """Return engines of all choices behind a dense one that stores what was computed: nothing but the split differs."""
    dense = replace(this.dense, kv="32")
    return [(choice.name, this.engine(choice)) for choice in (dense, *this.choices)]


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def oracle_log_probs(this: Lineup, plan: HeadPlan | None, window: list[int]) -> Tensor:
    """Return [predictions, vocab_size] float64 of the whole window at once."""
    transformer = this.transformer
    cache = OracleCache(
        transformer.config,
        None if plan is None else plan.retrieval,
        sink_size=0 if plan is None else plan.sink_size,
        recent_size=1 if plan is None else plan.recent_size,
    )
    hidden = transformer.hidden(torch.tensor(window[:-1]), torch.arange(len(window) - 1), cache)
    weight = transformer.weights.lm_head.dequantize(torch.float64)
    return (hidden @ weight.T).log_softmax(-1)


def test_kl_top1_and_perplexity_are_those_of_the_oracle() -> None:
    this = lineup(Choice("split", SPLIT, "32"))
    windows = [ids(300, 1), ids(220, 2)]
    dense, split = compare(exact(this), windows)
    for window, figures in zip(windows, split.windows, strict=True):
        expected, actual = oracle_log_probs(this, None, window), oracle_log_probs(this, SPLIT, window)
        kl = (expected.exp() * (expected - actual)).sum(-1)
        targets = torch.tensor(window[1:])[:, None]
        # Logits are rounded to float32, distributions of 320 tokens: 1e-6 of a nat.
        assert figures.kl == pytest.approx(kl.mean().item(), abs=2e-6)
        assert figures.nll == pytest.approx(-actual.gather(1, targets).mean().item(), abs=2e-6)
        assert figures.dense_nll == pytest.approx(-expected.gather(1, targets).mean().item(), abs=2e-6)
        assert figures.top1 == (actual.argmax(-1) == expected.argmax(-1)).double().mean().item()
        assert figures.count == len(window) - 1
        assert figures.kl > 0.01  # or the comparison would be of nothing
    assert split.rise == pytest.approx(split.perplexity / dense.perplexity - 1)
    assert dense.kl == 0 and dense.top1 == 1 and dense.rise == 0
    assert split.kl_most >= split.kl_p99 >= split.kl_median >= -1e-6


def test_a_format_that_loses_nothing_measures_nothing() -> None:
    """All heads retrieval, but with another window: other tokens come from blocks, the same values."""
    other = replace(ALL, sink_size=64, recent_size=200)
    _, same, rounded = compare(exact(lineup(Choice("a", other, "32"), Choice("b", other, "16"))), [ids(390)])
    assert abs(same.kl) < 1e-7 and same.top1 == 1 and abs(same.rise) < 1e-7
    assert 0 < rounded.kl < 1e-4


def test_how_it_is_cut_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = (Choice("split", SPLIT, "int4"), Choice("all", ALL, "k8v4"))
    windows = [ids(300, 3), ids(150, 4)]
    expected = compare(exact(lineup(*choices, chunk_size=400)), windows)
    monkeypatch.setattr(compare_module, "LOGIT_ROWS", 7)
    for chunk_size in (1, 33, 128):
        for one, other in zip(compare(exact(lineup(*choices, chunk_size=chunk_size)), windows), expected, strict=True):
            assert one.kl == pytest.approx(other.kl, abs=1e-6)
            assert one.kl_by_quarter == pytest.approx(other.kl_by_quarter, abs=1e-6)
            assert one.perplexity == pytest.approx(other.perplexity, rel=1e-6)
            assert [w.count for w in one.windows] == [w.count for w in other.windows]


def test_coarser_settings_measure_worse_side_by_side() -> None:
    this = lineup(*(Choice(kv, ALL, kv) for kv in ("16", "int8", "k8v4", "int4")), Choice("streaming", STREAMING, "16"))
    results = {result.name: result for result in compare(exact(this), [ids(390, 5)])}
    assert results["16"].kl < results["int8"].kl < results["k8v4"].kl < results["int4"].kl < results["streaming"].kl


def test_a_broken_cache_is_noticed() -> None:
    this = lineup(Choice("all", ALL, "32"))
    dense, good = exact(this)
    engine = this.engine(this.choices[0])
    grow = engine.cache.pool.grow

    def swapped(num_blocks: int) -> None:
        grow(num_blocks)
        engine.cache.pool.table[:, :num_blocks] = engine.cache.pool.table[:, :num_blocks].roll(1, 0)

    engine.cache.pool.grow = swapped  # type: ignore[method-assign]
    _, fine, wrong = compare([dense, good, ("swapped", engine)], [ids(390)])
    assert abs(fine.kl) < 1e-7
    assert wrong.kl > 0.01 and wrong.top1 < 0.99


def test_what_every_head_sees_costs_nothing_and_the_last_quarter_most() -> None:
    narrow = HeadPlan(((False, False),) * 2, sink_size=4, recent_size=96, source="test")
    _, result = compare(exact(lineup(Choice("narrow", narrow, "16"))), [ids(400, seed) for seed in range(3)])
    first, *_, last = result.kl_by_quarter
    assert abs(first) < 1e-7  # 100 of 400 tokens see only the window
    assert last > 1e-3
    assert sum(result.kl_by_quarter) / 4 == pytest.approx(result.kl, rel=0.02)


def test_progress_counts_every_engine() -> None:
    seen: list[tuple[int, int]] = []
    compare(exact(lineup(Choice("split", SPLIT, "16"))), [ids(100), ids(50)], on_progress=lambda *at: seen.append(at))
    assert seen[-1] == (2 * (99 + 49), 2 * (99 + 49))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_means_and_errors() -> None:
    windows = (WindowFigures(100, 0.02, 2.0, 1.9, 0.9), WindowFigures(300, 0.04, 3.0, 2.95, 0.8))
    result = Comparison("x", windows, 0, 0, 0, (0,) * 4, 1.0)
    assert result.count == 400
    assert result.kl == pytest.approx(0.035)
    assert result.kl_error == pytest.approx(0.01)  # half the difference of two
    assert result.worst_kl == 0.04
    assert result.top1 == pytest.approx(0.825)
    assert result.perplexity == pytest.approx(math.exp(2.75))
    assert result.rise == pytest.approx(math.exp(0.0625) - 1)
    assert result.rise_error == pytest.approx(0.025 * math.exp(0.0625))
    assert result.worst_rise == pytest.approx(math.exp(0.1) - 1)
    assert Comparison("x", windows[:1], 0, 0, 0, (0,) * 4, 1.0).kl_error is None
    assert result.report()["windows"] == [vars(window) for window in windows]


def test_windows_are_whole_spread_and_exact() -> None:
    text = list(range(1000))
    windows = cut_windows(text, num_tokens=600, context=200, bos=[-1])
    assert [len(window) for window in windows] == [201] * 3
    assert [window[1] for window in windows] == [0, 400, 800]
    assert all(window == [-1, *range(window[1], window[1] + 200)] for window in windows)
    assert cut_windows(text, num_tokens=1000, context=500) == [text[:500], text[500:]]
    assert cut_windows(text, num_tokens=100, context=4096) == [text[:100]]
    for num_tokens, context, message in (
        (1000, 300, "1,000 tokens are no whole number of windows of 300: use --tokens 900 or 1200"),
        (2000, 500, "the text has 1,000 tokens, --tokens is 2,000: give a longer text, or --tokens 1000"),
        (8, 500, "a window of 8 tokens says nothing: give 16 or more"),
    ):
        with pytest.raises(SettingsError, match=f"^{message}$"):
            cut_windows(text, num_tokens=num_tokens, context=context)


def test_every_choice_has_a_name_of_its_own() -> None:
    this = lineup(*(Choice(name, ALL, "16") for name in ("a", "a", "a (2)", "dense")))
    assert [choice.name for choice in this.everyone] == ["dense", "a", "a (2)", "a (2) (2)", "dense (2)"]


def test_engines_share_weights_and_have_caches_of_their_own() -> None:
    this = lineup(Choice("a", SPLIT, "int4"), Choice("a", ALL, "16"))
    assert [choice.name for choice in this.everyone] == ["dense", "a", "a (2)"]
    first, second = this.engine(this.choices[0]), this.engine(this.choices[1], context=100)
    assert first.transformer is second.transformer is this.transformer
    assert first.cache is not second.cache
    assert (first.context, second.context) == (400, 100)
    assert (first.kv, first.plan) == ("int4", SPLIT)
    for choice, engine in zip(this.choices, (first, this.engine(this.choices[1])), strict=True):
        # What is promised is what is allocated, but for one step's start and the like.
        assert abs(this.kv_bytes(choice, 400) - engine.memory().cache.total) < 64


def test_every_combination() -> None:
    assert combinations(["1", "0.5"], ["16", "int4"], [None], [64, 128]) == [
        Setting(heads, kv, None, recent) for heads in ("1", "0.5") for kv in ("16", "int4") for recent in (64, 128)
    ]


def test_caches_that_do_not_fit_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    this = lineup(Choice("a", ALL, "16"), Choice("b", ALL, "16"))
    this.check_memory(context=400)
    size: Any = 40 * 2**20  # each of the three caches takes 20 MiB at 80K tokens
    monkeypatch.setattr(engines, "available_bytes", lambda device: size)
    assert dense_16bit_bytes(this.transformer.config, 80 * 1024) == 20 * 2**20
    with pytest.raises(MemoryLimitError, match=r"^3 caches of 81,920 tokens, one of them dense, need 0\.1 GiB on cpu"):
        this.check_memory(context=80 * 1024)
    with pytest.raises(MemoryLimitError, match=r"^2 caches of 81,920"):
        this.check_memory(context=80 * 1024, side_by_side=False)

    def least(side_by_side: bool) -> int:
        """Return the MiB that are enough."""
        nonlocal size
        for mib in range(1, 400):
            size = mib * 2**20
            with suppress(MemoryLimitError):
                this.check_memory(context=80 * 1024, side_by_side=side_by_side)
                return mib
        raise AssertionError

    assert 40 < least(False) < 120
    assert 20 <= least(True) - least(False) <= 22  # the third cache, and what is compared with it
