"""Sampling on the device that computed the logits: the ids of `Sampler`, without a word to the host.

Owns the buffers of one decode loop: the id that goes in, the id that comes out, the history and the settings. All of a
draw is fixed-shape tensor operations on them, so that it can be part of a CUDA graph that serves every answer. Only
the uniform number of each draw comes from the host, from the generator that `Sampler` would use.
"""

import math

import torch
from torch import Tensor

from duolocal.sampling import cannot_be_sampled, seeded_generator
from duolocal.settings import Sampling


class DeviceSampler:
    """Draws ids for one answer after another on `device`; same settings, seed, logits and history as `Sampler`.

    token: int64 [1], the id drawn last, -1 where the logits could not be sampled.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.sampling = Sampling()
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._yes = torch.ones(1, dtype=torch.bool, device=device)
        number = torch.ones(1, dtype=torch.float64, device=device)
        self._uniform, self._temperature, self._top_p = number.clone(), number.clone(), number.clone()
        self._log_min_p, self._penalty = number.clone(), number.clone()
        self._last_kept = torch.zeros(1, dtype=torch.int64, device=device)  # rank of the last id that top-k keeps
        self._generator = torch.Generator(device="cpu")

    def restart(self, sampling: Sampling) -> None:
        """Begin an answer: nothing is repetition yet."""
        self.sampling = sampling
        self._generator = seeded_generator(sampling)
        self._seen.zero_()
        self._temperature.fill_(sampling.temperature or 1.0)
        self._top_p.fill_(sampling.top_p)
        self._log_min_p.fill_(math.log(sampling.min_p) if sampling.min_p else -math.inf)
        self._penalty.fill_(sampling.repetition_penalty)
        kept = sampling.top_k if 0 < sampling.top_k < self.vocab_size else self.vocab_size
        self._last_kept.fill_(kept - 1)

    def prepare(self) -> None:
        """Take from the generator what the next draw needs; outside a captured graph."""
        if not self.sampling.greedy:
            self._uniform.fill_(float(torch.rand((), generator=self._generator, dtype=torch.float64)))

    def remember(self, ids: Tensor) -> None:
        """Count ids [1] int64 as part of the answer."""
        self._seen.scatter_(0, ids, self._yes)

    def sample(self, logits: Tensor, *, greedy: bool) -> None:
        """Draw from logits [vocab_size] into `token`, launching device operations only."""
        values = logits.double()
        changed = torch.where(values < 0, values * self._penalty, values / self._penalty)
        values = torch.where(self._seen, changed, values)
        peak = values.max()
        token = values.argmax() if greedy else self._draw((values - peak) / self._temperature)
        self.token.copy_(torch.where(peak.isfinite(), token, -1).view(1))

    def read(self) -> int:
        """Return the id drawn last, waiting for the device. Raises DuoLocalError where there is none."""
        token = int(self.token)
        if token < 0:
            raise cannot_be_sampled("not a finite number")
        return token

    def _draw(self, values: Tensor) -> Tensor:
        """Return an id drawn from values [vocab_size], the greatest of which is 0, after top-k, top-p and min-p."""
        ranked, ids = values.sort(descending=True, stable=True)
        kept = ranked >= ranked.gather(0, self._last_kept)  # ties with the last one stay
        probabilities = torch.where(kept, ranked.exp(), 0.0)
        probabilities = probabilities / probabilities.sum()
        before = probabilities.cumsum(0) - probabilities
        # The likeliest has nothing before it: one id is always left. A top_p of 1 keeps what rounding leaves beyond 1.
        kept &= (before < self._top_p) | (self._top_p >= 1.0)
        kept &= ranked >= self._log_min_p
        weights = torch.zeros_like(values).scatter(0, ids, torch.where(kept, ranked.exp(), 0.0)).cumsum(0)
        whole = weights[-1:]
        found = torch.searchsorted(weights, self._uniform * whole, right=True)
        # The product may be rounded up to the whole: then it is the last of any weight.
        return torch.minimum(found, torch.searchsorted(weights, whole))[0]
