"""--heads auto for an unknown model: ranked by echo once, remembered, said so; and when it is left alone."""

from pathlib import Path
from typing import Any

import pytest

from duolocal.engine import head_choice
from duolocal.engine.engine import Engine
from duolocal.engine.events import LoadEvents
from duolocal.heads import load_pattern
from duolocal.models.loader import open_model
from tests.tiny import save_checkpoint


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    save_checkpoint(folder, "llama", max_position_embeddings=2048, num_hidden_layers=3)
    return folder


def load(model: Path, **settings: Any) -> Engine:
    # Not with compiled kernels: they are built anew in every test's cache folder.
    return Engine.load(str(model), **{"kv": "16", "kernels": "torch", **settings})


def test_ranked_on_first_use_and_remembered(model: Path, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []

    class Seen(LoadEvents):
        def identifying(self, done: int, total: int) -> None:
            progress.append((done, total))

    engine = load(model, context=1024, events=Seen())
    assert progress
    assert progress[-1][0] == progress[-1][1]
    assert (engine.plan.num_retrieval, engine.plan.num_streaming) == (4, 2)  # two thirds
    (note,) = [note for note in engine.notes if "echo" in note]
    assert note.startswith("retrieval heads found by echo in ")
    assert " s, as no pattern is known for this model, and remembered (`duolocal heads identify` " in note
    assert "--heads all keeps the whole context)" in note

    assert engine.source is not None
    file = tmp_path / "cache" / "head-patterns" / f"{engine.source.fingerprint}.json"
    kept = load_pattern(file)
    assert (kept.method, kept.fingerprints) == ("echo", (engine.source.fingerprint,))
    assert kept.secondary is not None

    progress.clear()
    again = load(model, context=1024, events=Seen())
    assert progress == []
    assert again.plan.retrieval == engine.plan.retrieval
    assert any("as found on this machine by echo" in note for note in again.notes)
    half = load(model, context=1024, heads="0.5", sink_size=4, recent_size=32)
    assert half.plan.num_retrieval == 3
    assert (half.plan.sink_size, half.plan.recent_size) == (4, 32)
    assert half.plan.retrieval == kept.cut(0.5).retrieval


def test_a_ratio_ranks_too_and_what_runs_is_what_was_kept(model: Path, tmp_path: Path) -> None:
    engine = load(model, context=700, heads=0.5)
    assert engine.plan.num_retrieval == 3
    (file,) = (tmp_path / "cache" / "head-patterns").iterdir()
    assert engine.plan.retrieval == load_pattern(file).cut(0.5).retrieval
    assert len(list(engine.prefill([5] * 300))) == 1  # and it runs


@pytest.mark.parametrize("settings", [{"heads": "all"}, {"heads": "0"}, {"heads": "1"}, {"context": 320}])
def test_nothing_is_ranked_where_it_means_nothing(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    load(model, **{"context": 1024, **settings})
    assert not (tmp_path / "cache" / "head-patterns").exists()


def test_a_model_that_reaches_no_further_than_the_window_is_left_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama", max_position_embeddings=head_choice.LEAST_POSITIONS - 1)
    engine = load(tmp_path)
    assert engine.plan.num_streaming == 0
    assert any(note.startswith("no head pattern is known for this model") for note in engine.notes)


def test_a_cache_folder_that_cannot_be_written(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "file"))
    engine = load(model, context=1024)
    assert engine.plan.num_retrieval == 4
    assert any("and not remembered (cannot make the folder" in note for note in engine.notes)


def test_layers_of_none_and_all_run(model: Path, tmp_path: Path) -> None:
    """Per-layer counts from none to all, through the engine, give what the dense model gives within the window."""
    path = tmp_path / "pattern.json"
    path.write_text(
        '{"format": "duolocal-head-pattern", "version": 1, "sink_size": 4, "recent_size": 64, '
        '"default_ratio": 0.5, "scores": [[9, 8], [0, 0], [7, 0]]}'
    )
    engine = load(model, context=128, kv="32", heads=str(path))
    assert [sum(row) for row in engine.plan.retrieval] == [2, 0, 1]
    dense = load(model, context=128, kv="32", heads="all")
    ids = [7, 300, 12, 5] * 16
    assert (engine.logits(ids) - dense.logits(ids)).abs().max() < 1e-4
    more = [9, 11] * 24  # beyond the window the streaming heads lose what the dense model sees
    assert (engine.logits(more) - dense.logits(more)).abs().max() > 1e-4


def test_the_published_pattern_of_a_model_is_named(model: Path) -> None:
    source = open_model(model)
    assert head_choice.published_for(source, "meta-llama/Llama-3.1-8B-Instruct") is None  # of another shape
