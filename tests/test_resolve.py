"""One set of decisions: what the planner counts, the engine loads and the evaluation compares is the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duolocal.engine import resolve as resolve_module
from duolocal.engine.engine import Engine
from duolocal.engine.known_model import ModelByArithmetic, OpenedModel
from duolocal.engine.measured import Measured
from duolocal.engine.planning import plan_settings
from duolocal.engine.resolve import DEFAULT_CONTEXT, Resolved, default_context, resolve, settings_with
from duolocal.errors import DuoLocalError, SettingsError
from duolocal.evaluate import Lineup, Setting
from duolocal.models.loader import ModelSource, open_model
from duolocal.plan.dials import Cost
from duolocal.plan.memory import GIB
from duolocal.plan.request import Request
from duolocal.plan.weights import NAMED_FORMATS
from duolocal.settings import LoadSettings
from tests.tiny import tiny_config

MATRIX: list[dict[str, Any]] = [
    {},
    {"context": 600},
    {"context": 20_000, "rope": "dynamic"},
    {"kv": "int4", "heads": "0.5"},
    {"kv": "16", "heads": "all", "chunk_size": 64, "kernels": "torch"},
    {"heads": "random:3@5e-1", "sink_size": 4, "recent_size": 100, "kernels": "torch", "dtype": "bfloat16"},
    {"heads": "0", "outer_weights": "int4", "kernels": "torch", "dtype": "float64"},
    {"select": "128", "prefill": "sparse", "threads": 2},
    {"kv": "fp8", "heads": "1", "kv_device_memory": 2**20},
]


@pytest.fixture(scope="module")
def source(smollm2_path: Path) -> ModelSource:
    return open_model(smollm2_path)


@pytest.mark.real
@pytest.mark.parametrize("changes", MATRIX)
def test_planner_engine_and_evaluation_decide_the_same(
    source: ModelSource, smollm2_path: Path, changes: dict[str, Any]
) -> None:
    settings = LoadSettings(str(smollm2_path), **({"context": 1024} | changes if changes else changes))
    resolved = resolve(settings, OpenedModel(source, settings.model))
    asked = resolved.request()
    planned = plan_settings(settings)
    assert planned.fits and planned.request == asked
    assert planned.kv == resolved.kv

    engine = Engine.load(smollm2_path.as_posix(), settings)
    assert counted(engine, resolved) == asked
    assert set(resolved.notes) <= set(engine.notes) and set(planned.notes) <= set(engine.notes)

    settings = replace(settings, kv_device_memory=None)  # where caches are compared all lie in memory
    shared = replace(settings, heads="auto", kv="auto", sink_size=None, recent_size=None, select="off", prefill="exact")
    names = ("heads", "kv", "sink_size", "recent_size", "select", "prefill")
    choice = Setting(**{name: getattr(settings, name) for name in names})
    lineup = Lineup.load(source, [choice], shared)
    again = lineup.engine(lineup.choices[0])
    assert counted(again, resolved) == replace(asked, kv_device_memory=None)
    assert lineup.notes == resolved.notes


def counted(engine: Engine, resolved: Resolved) -> Request:
    """Return the request that a loaded engine stands for: all of it that can be seen from outside."""
    cache, transformer = engine.cache, engine.transformer
    selection = cache.selection
    return replace(
        resolved.request(),
        config=transformer.config,
        heads=engine.plan,
        layout=cache.layout,
        context=engine.context,
        chunk_size=engine.chunk_size,
        dtype=transformer.dtype,
        kernels=transformer.kernels.name,
        device=transformer.device.type,
        kv_device_memory=resolved.settings.kv_device_memory if cache.pool.tiered else None,
        select=None if selection is None else (selection.lists.shape[1] - 1) * cache.layout.block_size,
        sparse=cache.prefill is not None,
    )


@pytest.mark.real
@pytest.mark.parametrize(
    "changes",
    [
        {"context": 4},
        {"kv": "int3"},
        {"heads": "1.5"},
        {"heads": "nowhere.json"},
        {"heads": "published"},
        {"rope": "yarn"},
        {"kernels": "compiled", "dtype": "float64"},
        {"select": "7"},
        {"prefill": "sparse", "chunk_size": 64},
        {"weights": "nf4"},
        {"device": "tpu"},
    ],
)
def test_all_three_refuse_with_the_same_line(source: ModelSource, smollm2_path: Path, changes: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"context": 1024, "kv": "16"}
    settings = LoadSettings(str(smollm2_path), **(asked | changes))
    choice = Setting(settings.heads, settings.kv, None, None, settings.select, settings.prefill)
    said = set()
    for attempt in (
        lambda: plan_settings(settings),
        lambda: Engine.load(settings.model, settings),
        lambda: Lineup.load(source, [choice], settings),
    ):
        with pytest.raises(DuoLocalError) as caught:
            attempt()
        said.add(f"{type(caught.value).__name__}: {caught.value}")
    assert len(said) == 1 and "\n" not in said.pop()


@pytest.mark.real
def test_a_model_that_is_not_here_is_resolved_like_one_that_is(source: ModelSource) -> None:
    """All but what only its file can tell: the ranking of its heads, its KV format, and the file's own bytes."""
    settings = LoadSettings("m", context=1024, outer_weights="int4", kernels="torch")
    here = resolve(settings, OpenedModel(source))
    layers, outer = NAMED_FORMATS["smollm2-135m"]
    away = resolve(settings, ModelByArithmetic(source.config, layers, outer, ("m",)))
    assert (here.kv, away.kv, here.heads.unranked, away.heads.unranked) == ("k8v4", "int8", False, True)
    assert away.undecided and not here.undecided
    sized = replace(away.weights, nbytes=here.weights.nbytes, copies=here.weights.copies, exact=True)
    known: dict[str, Any] = {
        "known": here.known,
        "model": here.model,
        "unmeasured": False,
        "heads": here.heads,
        "kv": here.kv,
        "kv_note": here.kv_note,
        "weights": sized,
    }
    assert replace(away, **known) == here


def test_the_context_without_one_asked_for() -> None:
    assert default_context(tiny_config(max_positions=2048)) == 2048
    assert default_context(tiny_config(max_positions=2**20)) == DEFAULT_CONTEXT


def test_changes_are_fields_of_the_settings() -> None:
    given = LoadSettings("m", context=64, kv="int8")
    assert settings_with("m", given, {"kv": "16", "heads": 0.5}) == LoadSettings("m", context=64, kv="16", heads="0.5")
    assert settings_with("m", given, {"kv": 16, "select": 128}) == LoadSettings("m", context=64, kv="16", select="128")
    assert settings_with("m", None, {}) == LoadSettings("m")
    for wrong, said in (
        ({"contxt": 1}, "no setting is called 'contxt': did you mean context?"),
        ({"zzz": 1}, "no setting is called 'zzz': there are model, context, kv, heads, "),
    ):
        with pytest.raises(SettingsError) as caught:
            settings_with("m", given, wrong)
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_ratio_stays_one_however_it_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--heads 5e-1` was planned right, but no other ratio was suggested for it."""
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    suggested = []
    for heads in ("0.5", "5e-1", "ratio=.5"):
        found = plan_settings(
            LoadSettings("llama3-8b-awq", context=2**20, heads=heads),
            card="rtx3090",
            memory=15 * GIB,
            host_memory=0,
            disk=0,
        )
        suggested.append([setting.options for setting in found.nearest])
    assert suggested[0] == suggested[1] == suggested[2]
    assert any(options[:1] == ("--heads",) for options in suggested[0])


def test_planning_with_a_published_pattern_fetches_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("DUOLOCAL_HEAD_PATTERNS", raising=False)
    monkeypatch.setattr("duolocal.downloads.read_url", lambda url, **_: pytest.fail(f"asked for {url}"))

    def planned(heads: str) -> tuple[int, str]:
        found = plan_settings(LoadSettings("llama3-8b-awq", context=4096, kv="int4", heads=heads), card="h100")
        return found.request.heads.num_retrieval, " ".join(found.notes)

    count, notes = planned("published")
    assert count == 128 and "the head pattern of Llama-3-8B-Instruct-Gradient-1048k is not on this machine" in notes
    assert planned("published@0.25")[0] == 64
    # What is here is used: its own gates, its own window.
    name = "Llama-3-8B-Instruct-Gradient-1048k"
    folder = tmp_path / "head-patterns" / "published" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"sink_size": 128, "recent_size": 256}')
    (folder / "full_attention_heads.tsv").write_text(("\t".join(["1.0", "0.25"] * 4) + "\n") * 32)
    count, notes = planned("published")
    assert count == 128 and f"head pattern of {name} from github.com" in notes and "not on this machine (" not in notes


def test_a_kv_format_that_ruins_the_model_is_warned_of(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"int4": Cost(2.9, 15.9, measured=True), "k8v4": Cost(0.001, 0.0, measured=True)}
    monkeypatch.setattr(resolve_module, "measured", lambda _: Measured("k8v4", costs))
    model = OpenedModel(source, "m")
    (note,) = [n for n in resolve(LoadSettings("m", kv="int4"), model).notes if "int4" in n]
    assert "KL 2.9, perplexity +1,590%" in note and "--kv auto" in note
    for harmless in ("k8v4", "int8", "16"):
        assert not any("ruin" in n for n in resolve(LoadSettings("m", kv=harmless), model).notes)
