"""Distilling gates: the mix is the oracle's, gradients are finite differences, and a run can be cut anywhere."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from duolocal.errors import SettingsError
from duolocal.identify import IdentifyProgress
from duolocal.identify.distill import DistillSettings, DistillState, descend, distance, distill
from duolocal.identify.mix import decoded, mixed_attention
from duolocal.identify.state_file import load_state, save_state
from duolocal.identify.text import PasskeyShape, PasskeyText
from duolocal.kernels.torch_kernels import TorchKernels
from duolocal.models import observe
from duolocal.models.observe import ObservedCache
from duolocal.models.transformer import Transformer
from tests.hand_built import RETRIEVAL, induction_model
from tests.oracle import OracleCache, oracle_attention
from tests.tiny import random_model, tiny_config, transformer_of

SETTINGS = DistillSettings(
    steps=8, num_tokens=48, seed=0, sink_size=2, recent_size=5, passkeys=PasskeyShape(num_passkeys=1, num_words=1)
)


def draw(step: int) -> PasskeyText:
    """Return random tokens, the last ten of them those of places 10 to 20."""
    ids = random.Random(step).sample(range(3, 320), 38 + step % 3)
    ids += ids[10:20]
    last = len(ids) - 1
    return PasskeyText(ids, predicted_at=list(range(last - 9, last)), sources=[(10, 20)] * 9)


def some_gates(seed: int = 0) -> Tensor:
    return 0.2 + 0.6 * torch.rand(2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(model: Transformer, settings: DistillSettings = SETTINGS) -> DistillState:
    *_, state = distill(model, draw, settings)
    assert isinstance(state, DistillState)
    return state


@given(n=st.integers(1, 30), sink=st.integers(0, 12), recent=st.integers(1, 20), tile=st.integers(1, 9))
def test_the_mix_is_the_oracles(n: int, sink: int, recent: int, tile: int) -> None:
    generator = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(n, heads, 8, generator=generator, dtype=torch.float64) for heads in (6, 2, 2))
    gates = torch.tensor([0.3, 1.0], dtype=torch.float64)
    positions = torch.arange(n)

    def oracle(retrieval: bool) -> Tensor:
        return oracle_attention(q, k, v, positions, retrieval=[retrieval] * 2, sink_size=sink, recent_size=recent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observe, "BAND_TILE", tile)
        cache = ObservedCache(mixed_attention(gates, sink_size=sink, recent_size=recent))
        cache.append(0, k, v)
        mixed = cache.attend(0, q, positions)
    per_head = gates.repeat_interleave(3)[:, None]
    wanted = per_head * oracle(True) + (1 - per_head) * oracle(False)
    torch.testing.assert_close(mixed, wanted, rtol=0, atol=1e-13)


def test_the_distance_is_that_of_two_models_of_the_oracle() -> None:
    config, weights = random_model(dtype=torch.float64)
    model, text = transformer_of((config, weights)), draw(0)
    retrieval = [[True, False], [False, True]]
    ids, positions = torch.tensor(text.token_ids), torch.arange(len(text.token_ids))
    split = OracleCache(config, retrieval, sink_size=SETTINGS.sink_size, recent_size=SETTINGS.recent_size)
    full, cut = (model.hidden(ids, positions, cache) for cache in (OracleCache(config), split))
    squares = (full - cut).square().mean(-1)  # [num_tokens]
    at_answers = float(squares[text.predicted_at].mean())
    at_text = float(squares[2 + 5 : text.predicted_at[0]].mean())  # before token 7 every head sees all
    assert squares[: 2 + 5].max() < 1e-20 and at_answers > 1e-3 and abs(at_answers - at_text) > 1e-3
    gates = torch.tensor(retrieval, dtype=torch.float64)
    for share in (0.0, 0.3, 1.0):
        loss, _ = distance(model, gates, text, replace(SETTINGS, text_share=share))
        assert loss == pytest.approx((1 - share) * at_answers + share * at_text, rel=1e-10)


def test_a_text_shorter_than_a_window_is_judged_by_its_answers() -> None:
    model, gates = transformer_of(random_model(dtype=torch.float64)), some_gates()
    answers = PasskeyText(list(range(3, 43)), predicted_at=[5, 39], sources=[(0, 1)] * 2)  # no text before token 5
    assert (
        distance(model, gates, answers, SETTINGS)[0]
        == distance(model, gates, answers, replace(SETTINGS, text_share=0))[0]
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gradients_are_finite_differences(architecture: str) -> None:
    model = transformer_of(random_model(tiny_config(architecture), dtype=torch.float64))  # type: ignore[arg-type]
    gates, text, step = some_gates(), draw(1), 1e-5
    _, gradient = distance(model, gates, text, SETTINGS)
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        above, below = gates.clone(), gates.clone()
        above[place] += step
        below[place] -= step
        slope = (distance(model, above, text, SETTINGS)[0] - distance(model, below, text, SETTINGS)[0]) / (2 * step)
        assert float(gradient[place]) == pytest.approx(slope, rel=1e-6)
    assert gradient.abs().min() > 1e-5


def test_checkpointing_changes_nothing() -> None:
    model = transformer_of(random_model())
    with_it = distance(model, some_gates(), draw(2), SETTINGS, checkpointing=True)
    without = distance(model, some_gates(), draw(2), SETTINGS, checkpointing=False)
    assert with_it[0] == without[0] and torch.equal(with_it[1], without[1])


def test_the_steps_are_adams() -> None:
    gates = torch.full((2, 2), 0.5, dtype=torch.float64)
    state = replace(DistillState.begin(2, 2), gates=gates)
    settings = replace(SETTINGS, steps=40, rate=0.01)
    parameter = torch.nn.Parameter(gates.clone())
    optimiser = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        gradient = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        parameter.grad = gradient + settings.pressure / 4
        optimiser.param_groups[0]["lr"] = settings.rate_at(step)
        optimiser.step()
        state = descend(state, 0.0, gradient, settings)
    assert (state.gates - 0.5).abs().min() > 1e-3 and state.gates.min() > 0 and state.gates.max() < 1  # never clipped
    torch.testing.assert_close(state.gates, parameter.detach(), rtol=0, atol=1e-12)


def test_the_rate_rises_and_falls() -> None:
    settings = replace(SETTINGS, steps=100, rate=1.0)
    assert [settings.rate_at(step) for step in (0, 1, 9, 19, 50, 80, 90, 99)] == pytest.approx(
        [0.1, 0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.1]
    )


def test_only_the_gate_of_the_retrieval_head_stays_open() -> None:
    state = run(transformer_of(induction_model(torch.float32)), replace(SETTINGS, steps=60, rate=0.1))
    open_gates = (state.gates > 0.5).nonzero().tolist()
    assert open_gates == [list(RETRIEVAL)]
    assert state.gates[RETRIEVAL] > 0.9
    assert state.gates.min() == 0.0


def test_gates_stay_between_0_and_1_at_any_rate() -> None:
    model, seen = transformer_of(random_model()), []
    list(distill(model, draw, replace(SETTINGS, rate=3.0), save=lambda state: seen.append(state.gates)))
    gates = torch.stack(seen)
    assert len(seen) == 8 and gates.min() == 0.0 and gates.max() == 1.0


def test_progress_says_loss_and_open_gates() -> None:
    *progress, state = distill(transformer_of(random_model()), draw, SETTINGS)
    assert isinstance(state, DistillState)
    assert all(isinstance(event, IdentifyProgress) for event in progress)
    assert [(event.done, event.total) for event in progress] == [(step, 8) for step in range(1, 9)]  # type: ignore[union-attr]
    assert tuple(event.loss for event in progress) == state.losses  # type: ignore[union-attr]
    assert progress[-1].open_share == state.open_share


@pytest.mark.parametrize("cut", [1, 5, 8])
def test_going_on_from_a_file_equals_never_having_stopped(tmp_path: Path, cut: int) -> None:
    model, file = transformer_of(random_model()), tmp_path / "state.json"
    whole = run(model)
    for event in distill(model, draw, SETTINGS, save=lambda state: save_state(file, state, "f")):
        if isinstance(event, IdentifyProgress) and event.done == cut:
            break
    kept = load_state(file, "f", num_layers=2, num_kv_heads=2)
    assert kept is not None and kept.step == cut
    *rest, resumed = distill(model, draw, SETTINGS, state=kept)
    assert len(rest) == 8 - cut and isinstance(resumed, DistillState)
    for name in ("gates", "mean", "square", "gates_sum"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name
    assert resumed.losses == whole.losses and [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    shape = {"num_layers": 2, "num_kv_heads": 2}
    assert load_state(file, "f", **shape) is None
    save_state(file, DistillState.begin(2, 2), "f")
    assert load_state(file, "f", **shape) is not None
    with pytest.raises(SettingsError, match="other settings or of another model: go on with those, or delete it"):
        load_state(file, "g", **shape)
    with pytest.raises(SettingsError, match="damaged"):
        load_state(file, "f", num_layers=3, num_kv_heads=2)
    data = json.loads(file.read_text())
    for change in ({"step": 3}, {"gates": [[1, 1], [1, float("nan")]]}, {"mean": None}, {"losses": "x"}):
        file.write_text(json.dumps(data | change))
        with pytest.raises(SettingsError, match="damaged"):
            load_state(file, "f", **shape)
    for text in ("", "[]", "{}", json.dumps(data | {"version": 2})):
        file.write_text(text)
        with pytest.raises(SettingsError, match="is not the state of a distillation"):
            load_state(file, "f", **shape)
    with pytest.raises(SettingsError, match="cannot be read"):  # which may pass: nobody is told to move it away
        load_state(tmp_path, "f", **shape)
    with pytest.raises(SettingsError, match="cannot be written"):
        save_state(tmp_path / "no" / "state.json", DistillState.begin(2, 2), "f")


def test_the_fingerprint_is_of_all_settings_and_the_model() -> None:
    changes = [
        {},
        {"steps": 9},
        {"seed": 1},
        {"passkeys": PasskeyShape(2, 1)},
        {"pressure": 0.1},
        {"text_share": 0.1},
        {"recent_size": 6},
    ]
    prints = [replace(SETTINGS, **change).fingerprint("m") for change in changes]  # type: ignore[arg-type]
    prints += [SETTINGS.fingerprint("n"), SETTINGS.fingerprint("m", "text"), SETTINGS.fingerprint("mtext")]
    assert len(set(prints)) == len(prints)
    assert replace(SETTINGS).fingerprint("m") == prints[0]


def test_decoded_computes_the_same_in_torch() -> None:
    config, weights = random_model()
    model = transformer_of((config, weights))
    plain = decoded(model)
    assert isinstance(plain.kernels, TorchKernels)
    assert distance(plain, some_gates(), draw(0), SETTINGS)[0] == distance(model, some_gates(), draw(0), SETTINGS)[0]
