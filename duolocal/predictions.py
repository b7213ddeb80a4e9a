"""Distributions of the next token against others of the same tokens: KL, top-1 agreement, likelihood, perplexity.

KL(reference ‖ this) = Σ_v p_reference(v) · (log p_reference(v) − log p_this(v)), in nats, for every position
"""

import torch
from torch import Tensor


class Reference:
    """The distributions that others are measured against: log_probs [rows, vocab_size]."""

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs
        self._probs, self._likeliest = log_probs.exp(), log_probs.argmax(-1)

    def kl(self, log_probs: Tensor) -> Tensor:
        """Return the KL divergence of every row, [rows] float64."""
        # The terms of either sign cancel almost: float64 keeps the sum of 100,000 of them exact enough.
        return (self._probs * (self.log_probs - log_probs)).sum(-1, dtype=torch.float64)

    def agreed(self, log_probs: Tensor) -> int:
        """Return in how many rows the likeliest token is the same."""
        return int((log_probs.argmax(-1) == self._likeliest).sum())


def negative_log_likelihood(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return -log p(target) of log_probs [rows, vocab_size] and targets [rows]: [rows] float64."""
    return -log_probs.gather(1, targets[:, None])[:, 0].double()


class Predictions:
    """What one model's predictions of a text come to, added up as they are made."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []  # float32 on the CPU
        self._agreed = 0
        self._nll = 0.0

    def add(self, log_probs: Tensor, reference: Reference, targets: Tensor) -> None:
        """Add log_probs [rows, vocab_size] for the tokens `targets` [rows]; the reference's rows are the same."""
        self._kl.append(reference.kl(log_probs).float().cpu())
        self._agreed += reference.agreed(log_probs)
        self._nll += negative_log_likelihood(log_probs, targets).sum().item()

    @property
    def kl(self) -> Tensor:
        """Return the KL of every prediction, [count] float64."""
        return torch.cat(self._kl).double()

    @property
    def count(self) -> int:
        return sum(map(len, self._kl))

    @property
    def mean_kl(self) -> float:
        """Nats per token."""
        return self.kl.mean().item()

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return self._nll / self.count

    @property
    def perplexity(self) -> float:
        return torch.tensor(self.nll, dtype=torch.float64).exp().item()  # inf, where math.exp would raise

    @property
    def top1(self) -> float:
        """Share of predictions in which the likeliest token is the reference's."""
        return self._agreed / self.count
