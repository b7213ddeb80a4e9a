"""Attribution: the cost is the slope of KL at half-open gates, and the head that retrieves costs most."""

import pytest
import torch
from torch import Tensor

from duolocal.identify import IdentifyProgress
from duolocal.identify.attribution import ANSWER_WEIGHT, CAP, AttributionScores, attribution_scores, divergence
from duolocal.identify.mix import mixed_hidden
from duolocal.identify.text import PasskeyText
from duolocal.models.transformer import Transformer
from tests.hand_built import RETRIEVAL, induction_model
from tests.test_identify_drift import RECENT, SINK, scores, text
from tests.tiny import random_model, tiny_config, transformer_of

WINDOW = {"sink_size": SINK, "recent_size": RECENT}


def kl_at(model: Transformer, drawn: PasskeyText, gates: Tensor) -> tuple[float, float]:
    """Return the mean KL to the full model at every token of the text beyond the window, and at the answers."""
    ids = torch.tensor(drawn.token_ids)
    log_probs = [
        model.logits(mixed_hidden(model, ids, torch.arange(len(ids)), which, sink_size=SINK, recent_size=RECENT))
        .double()
        .log_softmax(-1)
        for which in (None, gates)
    ]
    kl = torch.nn.functional.kl_div(log_probs[1], log_probs[0], log_target=True, reduction="none").sum(-1)
    return float(kl[SINK + RECENT : drawn.predicted_at[0]].mean()), float(kl[drawn.predicted_at].mean())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_gradient_is_the_slope_of_the_weighted_kl(architecture: str, checkpointing: bool) -> None:
    model = transformer_of(random_model(tiny_config(architecture), dtype=torch.float64))  # type: ignore[arg-type]
    drawn, step = text(1), 1e-3
    gradient, at_text, at_answers = divergence(model, drawn, **WINDOW, checkpointing=checkpointing)
    half = torch.full(gradient.shape, 0.5, dtype=torch.float64)
    # Logits are float32 in every model: differences of them bound how exactly a slope can be taken.
    assert (at_text, at_answers) == pytest.approx(kl_at(model, drawn, half), rel=1e-3)
    assert at_text > 1e-5
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        costs = []
        for sign in (1, -1):
            gates = half.clone()
            gates[place] += sign * step
            of_text, of_answers = kl_at(model, drawn, gates)
            costs.append(of_text + ANSWER_WEIGHT * of_answers)
        slope = (costs[0] - costs[1]) / (2 * step)
        assert float(gradient[place]) == pytest.approx(slope, rel=0.02, abs=2e-2 * float(gradient.abs().max()))


def attributed(model: Transformer, *texts: PasskeyText) -> AttributionScores:
    *progress, result = attribution_scores(model, texts, **WINDOW)
    assert isinstance(result, AttributionScores)
    last = progress[-1]
    assert isinstance(last, IdentifyProgress) and last.done == last.total == len(texts)
    return result


def test_the_score_is_drift_and_capped_cost_of_all_texts() -> None:
    model = transformer_of(random_model(dtype=torch.float64))
    result = attributed(model, text(1), text(2, length=60))
    both = [divergence(model, drawn, **WINDOW, checkpointing=False)[0] for drawn in (text(1), text(2, length=60))]
    torch.testing.assert_close(result.cost, -(both[0] + both[1]) / 2, rtol=1e-9, atol=0)
    drift = scores(model, text(1), text(2, length=60)).at_text
    torch.testing.assert_close(result.drift, drift, rtol=1e-12, atol=0)
    wanted = drift / drift.mean() + torch.minimum(result.cost / result.cost.mean(), torch.tensor(CAP))
    torch.testing.assert_close(result.score, wanted, rtol=1e-9, atol=0)


def test_the_head_that_retrieves_costs_most() -> None:
    result = attributed(transformer_of(induction_model(torch.float32)), text(3))
    assert divmod(int(result.cost.argmax()), result.cost.shape[1]) == RETRIEVAL
    assert divmod(int(result.score.argmax()), result.cost.shape[1]) == RETRIEVAL
    assert result.kl_at_answers > result.kl_at_text > 0
