"""Attribution: what each head's window costs the model's predictions, by one gradient per text. Of duolocal's own.

With every head's output gate · full + (1 - gate) · streaming (`mix.py`), the cost of closing all gates is shared out
among the heads by integrated gradients (Sundararajan et al., arXiv 1703.01365), in the one step of the midpoint rule:

    cost(h) = -∂ KL(full ‖ mixed) / ∂ gate_h  at all gates = 1/2

averaged over texts with passkeys (`text.py`), at the text around them and, with the weight ANSWER_WEIGHT, at the
answers. That sees what becomes of an error in later layers, and is rough for heads whose loss only counts in company;
drift (`drift.py`) is the reverse. A head's score is the sum of both, each relative to its mean, cost up to CAP of it:
a few heads carry most of the cost, and would otherwise leave the order of all others to chance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from duolocal.identify.drift import drift_scores
from duolocal.identify.mix import mixed_hidden, needs_checkpointing
from duolocal.identify.results import IdentifyProgress, last_of
from duolocal.identify.text import PasskeyText
from duolocal.models.transformer import Transformer
from duolocal.predictions import Reference

TEXTS = 5
ANSWER_WEIGHT = 0.05  # KL at an answer is some twenty times that at ordinary text
CAP = 1.5
TEXT_ROWS = 384  # predictions of the text around the passkeys, spread over it: logits of all would not fit
HALF = 0.5


@dataclass(frozen=True)
class AttributionScores:
    """Averages over all texts, each [num_layers, num_kv_heads] float64."""

    cost: Tensor  # nats per token, may be negative
    drift: Tensor  # relative
    kl_at_text: float  # nats per token, all gates half open
    kl_at_answers: float

    @property
    def score(self) -> Tensor:
        return self.drift / self.drift.mean() + (self.cost / self.cost.mean().clamp_min(1e-12)).clamp(max=CAP)


def attribution_scores(
    transformer: Transformer, texts: Sequence[PasskeyText], *, sink_size: int, recent_size: int
) -> Iterator[IdentifyProgress | AttributionScores]:
    """Yield progress, a text or a layer at a time, and at last the AttributionScores.

    transformer: one that computes with `TorchKernels`, the only differentiable ones; texts: longer than the window.
    """
    config = transformer.config
    cost = torch.zeros(config.num_layers, config.num_kv_heads, dtype=torch.float64)
    kl_at_text = kl_at_answers = 0.0
    checkpointing = needs_checkpointing(transformer, max(len(text.token_ids) for text in texts))
    drift = yield from last_of(drift_scores(transformer, texts, sink_size=sink_size, recent_size=recent_size))
    for number, text in enumerate(texts):
        gradient, at_text, at_answers = divergence(
            transformer, text, sink_size=sink_size, recent_size=recent_size, checkpointing=checkpointing
        )
        cost -= gradient / len(texts)
        kl_at_text += at_text / len(texts)
        kl_at_answers += at_answers / len(texts)
        yield IdentifyProgress(number + 1, len(texts), "texts", "gradients", loss=at_text)
    yield AttributionScores(cost=cost, drift=drift.at_text, kl_at_text=kl_at_text, kl_at_answers=kl_at_answers)


def divergence(
    transformer: Transformer, text: PasskeyText, *, sink_size: int, recent_size: int, checkpointing: bool
) -> tuple[Tensor, float, float]:
    """Return the gradient of the weighted KL by every gate, all half open, and the KL at the text and at the answers.

    The gradient is [num_layers, num_kv_heads], float64 on the CPU.
    """
    config, device = transformer.config, transformer.device
    ids = torch.tensor(text.token_ids, dtype=torch.int64, device=device)
    around = torch.arange(sink_size + recent_size, text.predicted_at[0], device=device)
    around = around[:: max(1, len(around) // TEXT_ROWS)]
    rows = torch.cat((around, torch.tensor(text.predicted_at, device=device)))
    hidden = partial(mixed_hidden, transformer, ids, rows, sink_size=sink_size, recent_size=recent_size)
    with torch.no_grad():
        full = Reference(transformer.logits(hidden(None)).log_softmax(-1))  # [rows, vocab_size]
    wide = torch.promote_types(transformer.dtype, torch.float32)
    gates = torch.full((config.num_layers, config.num_kv_heads), HALF, dtype=wide, device=device, requires_grad=True)
    kl = full.kl(transformer.logits(hidden(gates, checkpointing=checkpointing)).log_softmax(-1))
    at_text, at_answers = kl[: len(around)].mean(), kl[len(around) :].mean()
    (gradient,) = torch.autograd.grad(at_text + ANSWER_WEIGHT * at_answers, gates)
    return gradient.to("cpu", torch.float64), float(at_text.detach()), float(at_answers.detach())
