"""--kv auto: measured on first use, remembered, and never a format that failed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duolocal.engine import kv_choice
from duolocal.engine.engine import Engine
from duolocal.engine.events import LoadEvents
from duolocal.engine.kv_choice import KVMeasurement, measure_kv, verdict
from duolocal.heads import uniform_plan
from duolocal.models import layer_state
from duolocal.models.loader import open_model
from duolocal.models.rope import extended
from duolocal.models.transformer import Transformer
from duolocal.predictions import Reference
from duolocal.quant.kv import KV_FORMATS
from duolocal.settings import FirstUse
from tests.tiny import save_checkpoint
from tests.tokenizer_files import chatml, write


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kv_choice, "FIRST_USE_TOKENS", 600)
    folder = tmp_path / "model"
    save_checkpoint(folder, "llama", vocab_size=1024)
    write(folder, chatml())
    return folder


class Seen(LoadEvents):
    def __init__(self, progress: list[tuple[int, int]]) -> None:
        self.measuring = lambda done, total: progress.append((done, total))  # type: ignore[method-assign]


def measured(kv: str, *, kl: float, rise: float) -> KVMeasurement:
    return KVMeasurement(kv, 1.0, kl, 10.0, rise, 1.0)


@pytest.mark.parametrize(
    ("int4", "int8", "expected"),
    [
        ((0.0009, 0.001), (0.0, 0.0), "int4"),
        ((0.004, 0.001), (0.0001, 0.0), "int8"),
        ((0.0009, 0.02), (0.0001, 0.0), "int8"),
        ((0.5, 2.5), (0.02, 0.0), "16"),
        ((float("nan"), 0.0), (float("nan"), 0.0), "16"),
    ],
)
def test_the_smallest_that_passes(int4: tuple[float, float], int8: tuple[float, float], expected: str) -> None:
    results = [measured("int4", kl=int4[0], rise=int4[1]), measured("int8", kl=int8[0], rise=int8[1])]
    assert verdict(results) == expected


def test_measured_on_first_use_and_remembered(model: Path, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    # Whether a busy machine would leave it to `duolocal tune` is another test's subject.
    engine = Engine.load(str(model), context=256, events=Seen(progress), first_use=FirstUse(tune=True))
    assert progress[-1] == (engine.config.num_layers, engine.config.num_layers)
    remembered = json.loads((tmp_path / "cache" / "models" / "kv-formats.json").read_text())
    assert engine.source is not None
    entry = remembered[engine.source.fingerprint]
    assert entry["kv"] == engine.kv
    assert {result["kv"] for result in entry["results"]} == {"int4", "k8v4", "int8"}
    assert any("chosen by measurement on 600 tokens" in note for note in engine.notes)
    progress.clear()
    again = Engine.load(str(model), context=256, events=Seen(progress))
    assert again.kv == engine.kv
    assert progress == []
    assert any("when this model was first used here" in note for note in again.notes)


def test_the_shipped_verdict_needs_no_measurement(smollm2_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    engine = Engine.load(str(smollm2_path), context=1024, events=Seen(progress))
    assert engine.kv == "k8v4" and progress == []


def test_coarser_formats_measure_worse(model: Path) -> None:
    """Side by side on one model, the order is 32 (nothing lost but rounding to 16), int8, k8v4, int4."""
    source = open_model(model)
    token_ids = torch.randint(0, 1000, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    device, dtype = torch.device("cpu"), torch.float32
    transformer = Transformer(source.config, source.load(), context=16, device=device, dtype=dtype)
    results = {result.kv: result for result in measure_kv(source, transformer, token_ids, chunk_size=256)}
    assert set(results) == set(KV_FORMATS) - {"16"}
    assert results["32"].mean_kl < results["int8"].mean_kl < results["k8v4"].mean_kl < results["int4"].mean_kl
    assert results["32"].mean_kl < 1e-5
    assert replace(results["32"], kv="16").top1_agreement > 0.99


def test_layer_by_layer_and_cut_off_it_measures_what_whole_passes_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_state, "KEEP_EVERY_S", 0)
    source, generator = open_model(model), torch.Generator().manual_seed(1)
    config, _ = extended(source.config, 700)
    ids = torch.randint(0, 1000, (700,), generator=generator).tolist()
    transformer = Transformer(config, source.load(), context=700, device=torch.device("cpu"), dtype=torch.float32)
    heads = uniform_plan(num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, retrieval=True)
    dense, small = (
        Engine.build(transformer, heads, kv=kv, chunk_size=256).logits(ids[:-1]).log_softmax(-1)
        for kv in ("16", "int4")
    )
    seen: list[int] = []

    def measure_int4(state_file: Path | None, last_layer: int) -> list[KVMeasurement]:
        def on_progress(done: int, total: int) -> None:
            seen.append(done)
            if done == last_layer:
                raise KeyboardInterrupt

        return list(
            measure_kv(
                source,
                transformer,
                ids,
                formats=["int4"],
                chunk_size=256,
                state_file=state_file,
                on_progress=on_progress,
            )
        )

    whole = measure_int4(None, last_layer=99)
    assert whole[0].mean_kl == pytest.approx(Reference(dense).kl(small).mean().item(), rel=1e-6)
    state_file = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        measure_int4(state_file, last_layer=1)
    assert state_file.exists()
    seen.clear()
    assert measure_int4(state_file, last_layer=99) == whole
    assert seen == list(range(2, config.num_layers + 1)) and not state_file.exists()
