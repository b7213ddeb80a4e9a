"""Drift: the score is the oracle's difference through the output projection, and the head that retrieves has most."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from duolocal.identify import IdentifyProgress
from duolocal.identify.drift import TEXT_STRIDE, DriftScores, drift_scores
from duolocal.identify.text import PasskeyText
from duolocal.kernels.interface import Rotation, StepTraits
from duolocal.models import layer_state
from duolocal.models.layer_state import LayerState
from duolocal.models.transformer import Transformer
from tests.hand_built import RETRIEVAL, induction_model
from tests.oracle import oracle_attention
from tests.tiny import random_model, tiny_config, transformer_of

SINK, RECENT = 2, 5


def text(seed: int, length: int = 60) -> PasskeyText:
    """Return random tokens, the last ten of them those of places 10 to 20."""
    ids = random.Random(seed).sample(range(3, 320), length)
    ids += ids[10:20]
    return PasskeyText(ids, predicted_at=list(range(length, length + 9)), sources=[(10, 20)] * 9)


def scores(model: Transformer, *texts: PasskeyText) -> DriftScores:
    *progress, result = drift_scores(model, texts, sink_size=SINK, recent_size=RECENT)
    assert isinstance(result, DriftScores)
    total = len(texts) * model.config.num_layers
    assert [(event.done, event.total) for event in progress if isinstance(event, IdentifyProgress)] == [
        (done, total) for done in range(1, total + 1)
    ]
    return result


class Both:
    """A cache of the oracle: dense attention goes on, dense and streaming are kept."""

    traits = StepTraits()

    def append(self, layer: int, k: Tensor, v: Tensor, rotation: Rotation | None = None) -> None:
        self.kv = k, v

    def attend(self, layer: int, q: Tensor, positions: Tensor, rotation: Rotation | None = None) -> Tensor:
        def attend(retrieval: bool) -> Tensor:
            heads = [retrieval] * self.kv[0].shape[1]
            return oracle_attention(q, *self.kv, positions, retrieval=heads, sink_size=SINK, recent_size=RECENT)

        self.full, self.streaming = attend(True), attend(False)
        return self.full


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_score_is_the_oracles_difference_through_the_output_projection(architecture: str) -> None:
    model = transformer_of(random_model(tiny_config(architecture), dtype=torch.float64))  # type: ignore[arg-type]
    config, drawn = model.config, text(1)
    result = scores(model, drawn)
    positions, cache = torch.arange(len(drawn.token_ids)), Both()
    x, group = model.embed(torch.tensor(drawn.token_ids)), config.num_heads // config.num_kv_heads
    for layer in range(config.num_layers):
        x = model.run_layer(layer, x, positions, model.rotation(positions), cache)
        weight = model.weights.layers[layer].o_proj.weight.dequantize(torch.float64)
        for head in range(config.num_kv_heads):
            only = torch.zeros_like(cache.full)
            mine = slice(head * group, (head + 1) * group)
            only[:, mine] = cache.full[:, mine] - cache.streaming[:, mine]
            drift = (only.flatten(1) @ weight.T).norm(dim=1) / x.norm(dim=1)
            assert drift[: SINK + RECENT].max() < 1e-12  # nothing is missed before the window is full
            at_text = float(drift[SINK + RECENT : drawn.predicted_at[0] : TEXT_STRIDE].mean())
            at_answers = float(drift[drawn.predicted_at].mean())
            assert float(result.at_text[layer, head]) == pytest.approx(at_text, rel=1e-10)
            assert float(result.at_answers[layer, head]) == pytest.approx(at_answers, rel=1e-10)
            assert float(result.score[layer, head]) == pytest.approx(at_text + at_answers, rel=1e-10)
            assert at_text > 1e-3 and abs(at_text - at_answers) > 1e-6


def test_several_texts_are_averaged() -> None:
    model = transformer_of(random_model(dtype=torch.float64))
    one, other = text(1), text(2, length=80)
    mean = (scores(model, one).score + scores(model, other).score) / 2
    torch.testing.assert_close(scores(model, one, other).score, mean, rtol=1e-12, atol=0)


def test_cut_off_after_any_layer_it_goes_on_to_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_state, "KEEP_EVERY_S", 0)
    model, texts = transformer_of(random_model(dtype=torch.float64)), [text(1), text(2)]
    wanted, layers = scores(model, *texts), model.config.num_layers
    for cut in range(1, 2 * layers + 1):
        kept = LayerState(tmp_path / "state", cut=cut)
        for event in drift_scores(model, texts, sink_size=SINK, recent_size=RECENT, kept=kept):
            if isinstance(event, IdentifyProgress) and event.done == cut:
                break
        *progress, result = drift_scores(model, texts, sink_size=SINK, recent_size=RECENT, kept=kept)
        assert len(progress) == 2 * layers - cut
        assert isinstance(result, DriftScores) and torch.equal(result.score, wanted.score)
        assert LayerState(tmp_path / "state", cut=-1).read() == (0, {})  # of another pass


def test_the_head_that_retrieves_drifts_most_at_the_answers() -> None:
    at_answers = scores(transformer_of(induction_model(torch.float32)), text(3)).at_answers
    assert divmod(int(at_answers.argmax()), at_answers.shape[1]) == RETRIEVAL
    others = at_answers.clone()
    others[RETRIEVAL] = 0
    assert float(others.max()) < 0.5 * float(at_answers[RETRIEVAL])
