"""Head patterns and plans: ranking, cutting, and what each spelling of --heads means."""

import random
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duolocal.errors import SettingsError
from duolocal.heads import (
    HeadPattern,
    choose_heads,
    plan_heads,
    rank_heads,
    remember_pattern,
    remembered_file,
    remembered_pattern,
    save_pattern,
)
from tests.test_heads_files import write_pattern

SHAPE: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 3}


def tables(values: list[float]) -> st.SearchStrategy[tuple[tuple[float, ...], ...]]:
    row = st.lists(st.sampled_from(values), min_size=3, max_size=3).map(tuple)
    return st.lists(row, min_size=4, max_size=4).map(tuple)


@given(scores=tables([0.0, 0.5, 1.0]), secondary=tables([0.0, 1.0]), ratio=st.floats(0, 1))
def test_a_cut_takes_the_best_by_score_then_by_the_secondary_score(scores: Any, secondary: Any, ratio: float) -> None:
    plan = HeadPattern(scores, 4, 8, 0.5, "test", secondary=secondary).cut(ratio)
    assert plan.num_retrieval == round(ratio * 12)
    assert plan.num_retrieval + plan.num_streaming == 12
    pairs = list(zip(chain(*scores), chain(*secondary), strict=True))
    flags = list(chain(*plan.retrieval))
    chosen = [pair for pair, flag in zip(pairs, flags, strict=True) if flag]
    left = [pair for pair, flag in zip(pairs, flags, strict=True) if not flag]
    assert not chosen or not left or min(chosen) >= max(left)


@given(scores=tables([0.0, 1.0]), secondary=st.none() | tables([0.0, 1.0]))
def test_a_larger_cut_only_adds_heads(scores: Any, secondary: Any) -> None:
    pattern = HeadPattern(scores, 4, 8, 0.5, "test", secondary=secondary)
    plans = [set(places(pattern.cut(count / 12).retrieval)) for count in range(13)]
    assert [len(plan) for plan in plans] == list(range(13))
    assert all(smaller < larger for smaller, larger in pairwise(plans))


def places(table: Any) -> list[tuple[int, int]]:
    return [(layer, head) for layer, row in enumerate(table) for head, flag in enumerate(row) if flag]


def test_ties_are_spread_over_the_layers() -> None:
    """Published gates at a 25% cut: most of them are exactly 1, and a cut must not empty the last layers."""
    pattern = HeadPattern(((1.0,) * 8,) * 32, 4, 8, 0.5, "test")
    for count, per_layer in ((64, {2}), (32, {1}), (40, {1, 2}), (256, {8}), (0, {0})):
        plan = pattern.cut(count / 256)
        assert {sum(row) for row in plan.retrieval} == per_layer
    # What a layer has by rank already counts: layer 0 has two better heads, so the tie goes to the others first.
    ranked = rank_heads(((1.0, 1.0, 0.5), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    assert ranked == [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2)]


def test_a_rank_depends_on_nothing_but_the_pattern() -> None:
    draw = random.Random(3)
    scores = tuple(tuple(draw.choice((0.25, 1.0)) for _ in range(8)) for _ in range(32))
    ranked = rank_heads(scores)
    random.seed(draw.random())
    assert rank_heads(scores) == ranked == rank_heads([list(row) for row in scores])
    assert sorted(ranked) == [(layer, head) for layer in range(32) for head in range(8)]


def test_a_layer_may_have_any_number_of_retrieval_heads() -> None:
    pattern = HeadPattern(((9.0, 8.0, 7.0), (0.0, 0.0, 0.0), (6.0, 0.0, 5.0)), 4, 8, 0.5, "test")
    assert [sum(row) for row in pattern.cut(5 / 9).retrieval] == [3, 0, 2]


@pytest.mark.parametrize("ratio", [-0.01, 1.01, float("nan")])
def test_a_ratio_outside_is_refused(ratio: float) -> None:
    pattern = HeadPattern(((1.0,),), 4, 8, 0.5, "test")
    with pytest.raises(SettingsError, match="it must lie between 0 and 1"):
        pattern.cut(ratio)


def test_spellings_of_heads(tmp_path: Path) -> None:
    path = write_pattern(tmp_path / "pattern.json")
    plan, note = plan_heads("all", **SHAPE, fingerprint=None)
    assert (plan.num_retrieval, plan.sink_size, plan.recent_size, note) == (6, 64, 256, None)
    plan, note = plan_heads("auto", **SHAPE, fingerprint="unknown")
    assert plan.num_retrieval == 6
    assert note is not None
    assert note.startswith("no head pattern is known for this model: every KV head keeps the whole context")
    plan, _ = plan_heads(str(path), **SHAPE, fingerprint=None)
    assert plan.retrieval == ((False, True, True), (False, False, True))
    assert (plan.sink_size, plan.recent_size) == (16, 128)
    plan, _ = plan_heads(str(path), **SHAPE, fingerprint=None, sink_size=2, recent_size=99)
    assert (plan.sink_size, plan.recent_size) == (2, 99)
    for zero in (0, "0", "ratio=0"):
        assert plan_heads(zero, **SHAPE, fingerprint=None)[0].num_retrieval == 0
    assert plan_heads(1.0, **SHAPE, fingerprint=None)[0].num_retrieval == 6


def test_a_pattern_can_be_cut_elsewhere(tmp_path: Path) -> None:
    path = write_pattern(tmp_path / "pattern.json")
    for ratio, count in (("0", 0), ("0.17", 1), ("0.999", 6)):
        assert plan_heads(f"{path}@{ratio}", **SHAPE, fingerprint=None)[0].num_retrieval == count
    odd = write_pattern(tmp_path / "pattern@0.5")  # a name is a name
    assert plan_heads(str(odd), **SHAPE, fingerprint=None)[0].num_retrieval == 3
    with pytest.raises(SettingsError, match=r"pattern\.json@7: a ratio must lie between 0 and 1"):
        plan_heads(f"{path}@7", **SHAPE, fingerprint=None)


def test_a_published_folder_is_a_pattern_too(tmp_path: Path) -> None:
    scores = ((0.0, 1.0, 0.5), (0.25, 1.0, 0.75))
    save_pattern(HeadPattern(scores, 128, 256, 0.5, "test"), f"{tmp_path}/published/")
    plan, _ = plan_heads(str(tmp_path / "published"), **SHAPE, fingerprint=None)
    assert plan.retrieval == ((False, True, False), (False, True, True))
    assert (plan.sink_size, plan.recent_size) == (128, 256)


def test_heads_by_chance_are_the_seeds() -> None:
    shape = {"num_layers": 30, "num_kv_heads": 3, "fingerprint": None}
    plan, note = plan_heads("random@0.5", **shape)
    assert plan.num_retrieval == 45 and note == "retrieval heads by chance (seed 0): for comparisons, not for use"
    assert plan == plan_heads("random:0@0.5", **shape)[0]
    other = plan_heads("random:1@0.5", **shape)[0]
    assert other.num_retrieval == 45 and other != plan


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ("random:x", "the seed of heads by chance is 'x': give a whole number"),
        ("1.5", "--heads 1.5: a ratio must lie between 0 and 1"),
        ("nan", "--heads nan: a ratio must lie between 0 and 1"),
        ("ratio=x", "head pattern ratio=x: No such file or directory"),
        ("atuo", "--heads 'atuo' is unknown: give auto, all, a ratio such as 0.5, published, or a pattern file"),
        ("0.25", "a ratio needs a ranking of heads, and none ships for this model"),
        ("published", "no pattern is published for this model"),
        ("published:GPT-2", "no head pattern is published as 'GPT-2': there are Llama-2-7B-32K-Instruct, "),
    ],
)
def test_what_heads_cannot_be(heads: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        plan_heads(heads, **SHAPE, fingerprint="unknown")
    assert message in str(caught.value)


def test_an_unknown_model_s_heads_are_to_be_ranked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The plan that stands for the one to come has as many heads, so memory can be checked with it."""
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path))
    choice = choose_heads("auto", **SHAPE, fingerprint="new", can_rank=True)
    assert (choice.unranked, choice.ratio, choice.plan.num_retrieval) == (True, None, 4)
    choice = choose_heads("0.5", **SHAPE, fingerprint="new", can_rank=True)
    assert (choice.unranked, choice.ratio, choice.plan.num_retrieval) == (True, 0.5, 3)
    for heads in ("all", "1", "0"):
        assert not choose_heads(heads, **SHAPE, fingerprint="new", can_rank=True).unranked

    scores = ((0.1, 0.9, 0.5), (0.5, 0.2, 0.7))
    pattern = HeadPattern(scores, 4, 8, 0.5, "test", method="echo", fingerprints=("new",))
    assert remember_pattern(pattern, "new") == remembered_file("new") == tmp_path / "head-patterns" / "new.json"
    choice = choose_heads("auto", **SHAPE, fingerprint="new", can_rank=True)
    assert (choice.unranked, choice.plan.num_retrieval) == (False, 3)
    assert choice.note is not None
    assert choice.note.startswith("retrieval heads as found on this machine by echo")
    assert choose_heads("0.17", **SHAPE, fingerprint="new").plan.num_retrieval == 1
    # Of another shape, of other weights, or damaged: as if there were none.
    assert choose_heads("auto", num_layers=2, num_kv_heads=2, fingerprint="new", can_rank=True).unranked
    remember_pattern(pattern, "other")
    assert remembered_pattern("other") is None
    remembered_file("new").write_text('{"format": ')
    assert remembered_pattern("new") is None


def test_the_shipped_pattern_is_used_for_its_weights_only(smollm2_path: Path) -> None:
    from duolocal.models.loader import open_model

    source = open_model(smollm2_path)
    shape: dict[str, Any] = {"num_layers": source.config.num_layers, "num_kv_heads": source.config.num_kv_heads}
    plan, note = plan_heads("auto", **shape, fingerprint=source.fingerprint)
    assert note is None
    assert 0 < plan.num_retrieval < 90
    quarter, _ = plan_heads("0.25", **shape, fingerprint=source.fingerprint)
    assert quarter.num_retrieval == 22
    assert plan_heads("auto@0.25", **shape, fingerprint=source.fingerprint)[0] == quarter
