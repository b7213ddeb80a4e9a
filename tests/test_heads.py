"""Head plans: cutting a ranking, reading pattern files, and what each spelling of --heads means."""

import json
from itertools import chain, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duolocal.errors import SettingsError
from duolocal.heads import HeadPattern, load_pattern, plan_heads

SHAPE = {"num_layers": 2, "num_kv_heads": 3}


def write_pattern(path: Path, **changes: object) -> Path:
    pattern = {
        "format": "duolocal-head-pattern",
        "version": 1,
        "model": "test",
        "fingerprints": ["f00d"],
        "num_layers": 2,
        "num_kv_heads": 3,
        "sink_size": 16,
        "recent_size": 128,
        "default_ratio": 0.5,
        "method": "by hand",
        "scores": [[0.1, 0.9, 0.5], [0.5, 0.2, 0.7]],
        **changes,
    }
    path.write_text(json.dumps(pattern))
    return path


@given(
    scores=st.lists(st.lists(st.sampled_from([0.0, 0.5, 0.5, 1.0]), min_size=3, max_size=3), min_size=2, max_size=5),
    ratio=st.floats(0, 1),
)
def test_a_cut_takes_the_best_and_breaks_ties_in_order(scores: list[list[float]], ratio: float) -> None:
    pattern = HeadPattern(tuple(map(tuple, scores)), 4, 8, 0.5, "test")
    plan = pattern.cut(ratio)
    assert plan.num_retrieval == round(ratio * 3 * len(scores))
    assert plan.num_retrieval + plan.num_streaming == 3 * len(scores)
    flat = list(zip(chain(*scores), chain(*plan.retrieval), strict=True))
    chosen, left = ([score for score, flag in flat if flag is wanted] for wanted in (True, False))
    assert not chosen or not left or min(chosen) >= max(left)
    tied = [flag for score, flag in flat if chosen and score == min(chosen)]
    assert tied == sorted(tied, reverse=True)  # among equals the earlier are chosen


def test_a_larger_ratio_only_adds_heads() -> None:
    pattern = HeadPattern(((0.1, 0.9, 0.5), (0.5, 0.2, 0.7)), 4, 8, 0.5, "test")
    plans = [pattern.cut(count / 6) for count in range(7)]
    for smaller, larger in pairwise(plans):
        for a, b in zip(smaller.retrieval, larger.retrieval, strict=True):
            assert all(not x or y for x, y in zip(a, b, strict=True))


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


def test_the_shipped_pattern_is_used_for_its_weights_only(smollm2_path: Path) -> None:
    from duolocal.models.loader import open_model

    source = open_model(smollm2_path)
    shape = {"num_layers": source.config.num_layers, "num_kv_heads": source.config.num_kv_heads}
    plan, note = plan_heads("auto", **shape, fingerprint=source.fingerprint)
    assert note is None
    assert 0 < plan.num_retrieval < 90
    quarter, _ = plan_heads("0.25", **shape, fingerprint=source.fingerprint)
    assert quarter.num_retrieval == 22
    with pytest.raises(SettingsError, match="a ratio needs a ranking of heads, and none ships for this model"):
        plan_heads("0.25", **shape, fingerprint="unknown")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not a head pattern: its format is not 'duolocal-head-pattern'"),
        ({"version": 2}, "version 2 is unknown; this duolocal reads version 1"),
        ({"scores": [[0.1, 0.2], [0.3]]}, "scores must be a full table, one row per layer, one number per KV head"),
        ({"scores": []}, "scores must be a full table"),
        ({"scores": [[1, 2, "x"], [1, 2, 3]]}, "ValueError: could not convert string to float: 'x'"),
        ({"scores": [[1, 2, float("nan")], [1, 2, 3]]}, "a score is not a number"),
        ({"sink_size": None}, "TypeError"),
        ({"scores": [[1.0, 2.0, 3.0]]}, "is for 1 layers × 3 KV heads, but the model has 2 × 3"),
        ({"default_ratio": 1.5}, "the retrieval ratio is 1.5; it must lie between 0 and 1"),
    ],
)
def test_a_bad_pattern_file_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = write_pattern(tmp_path / "pattern.json", **change)
    with pytest.raises(SettingsError) as caught:
        plan_heads(str(path), **SHAPE, fingerprint=None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(SettingsError, match=r"x\.json is not JSON: "):
        load_pattern(tmp_path / "x.json")
