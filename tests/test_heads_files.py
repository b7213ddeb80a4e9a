"""Pattern files: our JSON and the published layout, round trips, and files that are none."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duolocal.errors import SettingsError
from duolocal.heads import HeadPattern, load_pattern, save_pattern


def write_pattern(path: Path, **changes: object) -> Path:
    """Write a small pattern file; a change to None leaves the key out."""
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
    path.write_text(json.dumps({key: value for key, value in pattern.items() if value is not None}))
    return path


def write_published(folder: Path, tsv: str = "0.5\t1.0\n0\t-1e-4\n", config: object = None) -> Path:
    folder.mkdir()
    (folder / "full_attention_heads.tsv").write_text(tsv)
    config = {"sink_size": 128, "recent_size": 256} if config is None else config
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def rows(value: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[tuple[float, ...], ...]]:
    return st.lists(st.tuples(value, value, value), min_size=1, max_size=4).map(tuple)


FINITE = st.floats(allow_nan=False, allow_infinity=False)
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@same_folder
@given(scores=rows(FINITE), with_secondary=st.booleans(), ratio=st.floats(0, 1), words=st.text())
def test_our_file_is_read_back_as_it_was(
    tmp_path: Path, scores: Any, with_secondary: bool, ratio: float, words: str
) -> None:
    pattern = HeadPattern(
        scores=scores,
        sink_size=0,
        recent_size=7,
        default_ratio=ratio,
        source="",
        secondary=tuple(row[::-1] for row in scores) if with_secondary else None,
        method=words,
        model="a/b",
        fingerprints=("f00d", words),
        seed=3,
        details={"losses": [1.5, 2.5], "words": words},
    )
    path = save_pattern(pattern, tmp_path / "p.json")
    assert replace(load_pattern(path), source="") == pattern
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.json"]


@same_folder
@given(scores=rows(st.floats(0, 1)))
def test_the_published_layout_is_read_back_as_it_was(tmp_path: Path, scores: Any) -> None:
    pattern = HeadPattern(
        scores, 128, 256, 0.25, "", secondary=scores, method="distill", model="m", fingerprints=("x",), seed=0
    )
    folder = save_pattern(pattern, f"{tmp_path}/published/")
    read = load_pattern(folder)
    assert replace(read, source="") == pattern
    # As DuoAttention's own loader reads it.
    gates = np.loadtxt(folder / "full_attention_heads.tsv", delimiter="\t", ndmin=2)
    assert np.array_equal(np.clip(gates, 0, 1), np.array(scores))


def test_scores_beyond_gates_keep_their_order_in_the_published_layout(tmp_path: Path) -> None:
    draw = random.Random(1)
    scores = tuple(tuple(draw.gauss(0, 3) for _ in range(8)) for _ in range(32))
    pattern = HeadPattern(scores, 64, 256, 0.5, "")
    read = load_pattern(save_pattern(pattern, tmp_path / "folder", published=True))
    assert read.ranking() == pattern.ranking()
    assert {min(map(min, read.scores)), max(map(max, read.scores))} == {0.0, 1.0}


def test_what_was_published_is_read_as_their_loader_reads_it(tmp_path: Path) -> None:
    """A line and a configuration as they stand in the repository: gates a little below 0 count as 0."""
    line = "-9.584426879882812500e-05\t5.585937500000000000e-01\t1.000000000000000000e+00\n"
    config = {
        "model_name": "models/Mistral-7B-Instruct-v0.2",
        "lr": 0.02,
        "num_steps": 2000,
        "num_passkeys": 10,
        "reg_weight": 0.05,
        "rope_theta": None,
        "supervision": "distill",
        "sink_size": 128,
        "recent_size": 256,
    }
    pattern = load_pattern(write_published(tmp_path / "p", line * 2, config))
    assert pattern.scores == ((0.0, 0.55859375, 1.0),) * 2
    assert (pattern.sink_size, pattern.recent_size, pattern.default_ratio) == (128, 256, 0.5)
    assert pattern.model == "Mistral-7B-Instruct-v0.2"
    assert pattern.method == "DuoAttention's distillation (lr 0.02, reg 0.05, steps 2000, passkeys 10)"


def test_windows_line_ends_and_an_empty_last_line(tmp_path: Path) -> None:
    assert load_pattern(write_published(tmp_path / "p", "1\t0.5\r\n0\t1\r\n\r\n")).scores == ((1.0, 0.5), (0.0, 1.0))


def test_the_same_pattern_gives_the_same_bytes(tmp_path: Path) -> None:
    pattern = HeadPattern(((0.1, 0.2),), 64, 256, 0.5, "", seed=0, details={"b": 1, "a": 2})
    one, two = (save_pattern(pattern, tmp_path / name).read_bytes() for name in ("1.json", "2.json"))
    assert one == two


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, " is not a head pattern: its format is not 'duolocal-head-pattern'"),
        ({"version": 2}, ": version 2 is unknown; this duolocal reads version 1"),
        ({"score": [[1]]}, ": 'score' is no part of version 1; a newer duolocal may know it"),
        ({"scores": [[0.1, 0.2], [0.3]]}, ": scores must be a full table, one row per layer, one number per KV head"),
        ({"scores": []}, ": scores must be a full table"),
        ({"scores": [[], []]}, ": scores must be a full table"),
        ({"scores": "0.5"}, ": scores must be a full table"),
        ({"scores": [[1, 2, "x"], [1, 2, 3]]}, ": a value of scores is 'x', not a number"),
        ({"scores": [[1, 2, True], [1, 2, 3]]}, ": a value of scores is True, not a number"),
        ({"scores": [[1, 2, 10**400], [1, 2, 3]]}, ": a value of scores is 1000"),
        ({"scores": [[1, 2, float("nan")], [1, 2, 3]]}, ": a score is not a finite number"),
        ({"scores": [[1, 2, float("inf")], [1, 2, 3]]}, ": a score is not a finite number"),
        ({"secondary": [[1, 2, 3]]}, ": secondary must be a table of the same shape as scores"),
        ({"secondary": [[1, 2, 3], [1, 2, None]]}, ": a value of secondary is None, not a number"),
        ({"sink_size": None}, ": sink_size is missing"),
        ({"sink_size": "64"}, ": sink_size is '64'; it must be a whole number"),
        ({"sink_size": -1}, ": sink_size is -1; it must lie between 0 and 2147483647"),
        ({"recent_size": 0}, ": recent_size is 0; it must lie between 1 and 2147483647"),
        ({"recent_size": 1e300}, ": recent_size is 1e+300; it must be a whole number"),
        ({"recent_size": 10**300}, ": recent_size is 1000"),
        ({"default_ratio": 1.5}, ": default_ratio is 1.5; it must lie between 0 and 1"),
        ({"default_ratio": float("nan")}, ": default_ratio is nan; it must lie between 0 and 1"),
        ({"num_layers": 3}, ": num_layers is 3, but the scores have 2"),
        ({"fingerprints": "f00d"}, ": fingerprints must be a list of texts"),
        ({"method": 3}, ": method is 3; it must be a text"),
        ({"details": []}, ": details must be an object"),
        ({"scores": [[0.5]] * 70_000, "num_layers": 70_000, "num_kv_heads": 1}, "are more than any model has"),
    ],
)
def test_a_bad_pattern_file_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = write_pattern(tmp_path / "pattern.json", **change)
    refused(path, str(path), message)


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_pattern(path)
    text = str(caught.value)
    assert all(part in text for part in parts), text
    assert "\n" not in text
    assert len(text) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON: "),
        (b"", "is not JSON: "),
        (b"[1, 2]", "is not a head pattern"),
        (b"\xff\xfe\x00", "is not text"),
        (b"[" * 100_000, "is not JSON: nested too deeply"),
        (b"1" * 100_000, "is not JSON: "),
        (b'{"format": "duolocal-head-pattern"}' + b" " * 2**22, "has more than 4 MiB: it is not a head pattern"),
    ],
)
def test_a_file_that_is_no_pattern(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    refused(tmp_path / "x.json", "x.json", message)


def test_no_file_and_no_ordinary_file(tmp_path: Path) -> None:
    refused(tmp_path / "missing.json", "No such file or directory")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        refused(tmp_path / "pipe", "is no ordinary file")
    refused(Path("/dev/zero"), "is no ordinary file")


@pytest.mark.parametrize(
    ("tsv", "config", "message"),
    [
        ("1\tx\n", None, "full_attention_heads.tsv, line 1: 'x' is not a number"),
        ("1\t1\n1\tnan\n", None, "full_attention_heads.tsv, line 2: 'nan' is not a finite number"),
        ("1\tinf\n", None, "'inf' is not a finite number"),
        ("1\t1\n1\n", None, "scores must be a full table"),
        ("", None, "scores must be a full table"),
        ("1,1\n", None, "'1,1' is not a number"),
        ("1\n", "[]", "config.json must be an object with sink_size and recent_size"),
        ("1\n", "{", "config.json is not JSON"),
        ("1\n", {"sink_size": 1}, "config.json lacks recent_size"),
        ("1\n", {"sink_size": 1, "recent_size": 0}, "recent_size is 0; it must lie between 1"),
        ("1\n", {"sink_size": 1, "recent_size": None}, "recent_size is None; it must be a whole number"),
        ("1\n", {"sink_size": 1, "recent_size": 2, "duolocal": 3}, "duolocal in config.json must be an object"),
        ("1\n", {"sink_size": 1, "recent_size": 2, "duolocal": {"seeed": 3}}, "'seeed' is no part of version 1"),
        ("1\t" * 3_000_000 + "1\n", None, "has more than 4 MiB"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_bad_published_folder_is_named(tmp_path: Path, tsv: str, config: object, message: str) -> None:
    refused(write_published(tmp_path / "p", tsv, config), "p", message)


def test_a_folder_that_lacks_a_file(tmp_path: Path) -> None:
    refused(tmp_path, "full_attention_heads.tsv: No such file or directory")
    (tmp_path / "full_attention_heads.tsv").write_text("1\n")
    refused(tmp_path, "config.json: No such file or directory")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    pattern = HeadPattern(((1.0,),), 4, 8, 0.5, "test")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SettingsError, match=r"cannot write .*missing"):
        save_pattern(pattern, tmp_path / "missing" / "p.json")
    with pytest.raises(SettingsError, match="cannot make the folder"):
        save_pattern(pattern, f"{tmp_path}/file/p/")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
