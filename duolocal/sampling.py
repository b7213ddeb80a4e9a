"""From logits to one token id, and from text pieces to where a stop string ends them.

Owns `Sampler` and `StopStrings`; what a user may set is `duolocal.settings.Sampling`. The order of operations and the
meaning of each setting are those of transformers' logits processors: repetition penalty, temperature, top-k, top-p,
min-p. Knows neither model nor tokenizer.
"""

import math
from collections.abc import Sequence

import torch

from duolocal.errors import DuoLocalError
from duolocal.settings import Sampling

_NUCLEUS_FLOORS = (
    1e-3,
    1e-5,
    0.0,
)  # probabilities below which ids are left out of the sorting, tried in turn


class Sampler:
    """Draws ids for one answer; same settings, seed, logits and history, same ids.

    Works on the CPU in float64 with a generator of its own, whatever device the logits are on.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = seeded_generator(sampling)
        self.seed = self._generator.initial_seed()  # drawn or given: it can be told and used again
        self._seen = torch.zeros(0, dtype=torch.bool)  # [vocab_size]
        self._counted = 0  # ids of the history that are in _seen
        self._last = -1  # the last of them

    def __call__(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        """Return the next id.

        logits: [vocab_size], any float type; -inf forbids an id. history: the ids that count as repetition, read
        only by the repetition penalty; from call to call it may only grow. Raises DuoLocalError where logits
        hold NaN or +inf, or forbid everything.
        """
        assert logits.dim() == 1, f"logits are {tuple(logits.shape)}, wanted [vocab_size]"
        if logits.numel() == 0 or not math.isfinite(peak := float(logits.max())):  # max is NaN if any is
            raise cannot_be_sampled("none" if logits.numel() == 0 else f"{peak}")
        if self.sampling.repetition_penalty != 1.0:
            logits = self._penalise(logits.to("cpu", torch.float64), history)
        if self.sampling.greedy:
            return int(logits.argmax())
        values, ids = filter_logits(logits, self.sampling)
        if ids is not None:  # in order of id, so that a draw does not depend on which filters were used
            ids, order = ids.sort()
            values = values[order]
        weights = values.softmax(0).cumsum(0)
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * weights[-1]
        # the first whose cumulated weight exceeds the draw: never one of weight 0
        index = int(torch.searchsorted(weights, drawn, right=True))
        if index == len(weights):  # the product was rounded up to the whole
            index = int(torch.searchsorted(weights, weights[-1]))
        return index if ids is None else int(ids[index])

    def _penalise(self, logits: torch.Tensor, history: Sequence[int]) -> torch.Tensor:
        """Return the logits with ids of the history made less likely (Keskar et al. 2019, as in transformers)."""
        grown = self._counted <= len(history) and (self._counted == 0 or history[self._counted - 1] == self._last)
        if len(self._seen) != len(logits) or not grown:
            self._seen = torch.zeros(len(logits), dtype=torch.bool)
            self._counted = 0
        if len(history) > self._counted:
            self._seen[torch.tensor(history[self._counted :], dtype=torch.int64)] = True
            self._counted, self._last = len(history), history[-1]
        penalty = self.sampling.repetition_penalty
        changed = torch.where(logits < 0, logits * penalty, logits / penalty)
        return torch.where(self._seen, changed, logits)


def seeded_generator(sampling: Sampling) -> torch.Generator:
    """Return a generator on the CPU with the settings' seed, or with a drawn one that can be asked for."""
    generator = torch.Generator(device="cpu")
    seed = generator.seed() % 2**63 if sampling.seed is None else sampling.seed
    return generator.manual_seed(seed)


def cannot_be_sampled(peak: str) -> DuoLocalError:
    """Return the error for logits whose maximum is `peak`."""
    return DuoLocalError(
        f"the model computed logits that cannot be sampled (their maximum is {peak}); the weights may be "
        "damaged or the compute type too narrow: try --dtype float32"
    )


def filter_logits(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return logits [n] float64 over the temperature, and their ids [n] (None: all), after top-k, top-p and min-p.

    At least one id is left. Sources: top-k (Fan et al. 2018), top-p (Holtzman et al. 2019), min-p (Nguyen et al.
    2024), each as transformers' warpers have it. Logits are finite or -inf.
    """
    values = logits.to("cpu", torch.float64)
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    values = (values - values.max()) / sampling.temperature
    ids: torch.Tensor | None = None
    if 0 < sampling.top_k < len(values):
        lowest = values.topk(sampling.top_k).values[-1]
        ids = (values >= lowest).nonzero()[:, 0]  # ties with the last one stay
        values = values[ids]
    if sampling.top_p < 1.0:
        kept = _nucleus(values.softmax(0), sampling.top_p)
        values, ids = values[kept], kept if ids is None else ids[kept]
    if sampling.min_p > 0.0:
        kept = (values >= values.max() + math.log(sampling.min_p)).nonzero()[:, 0]
        values, ids = values[kept], kept if ids is None else ids[kept]
    return values, ids


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the ids [n], likeliest first, of which those before each sum to less than `top_p`."""
    for floor in _NUCLEUS_FLOORS:
        ids = (probabilities >= floor).nonzero()[:, 0]
        if float(probabilities[ids].sum()) >= top_p:
            break  # the ids above the floor hold the nucleus: no need to sort the others
    best, order = probabilities[ids].sort(descending=True, stable=True)
    before = best.cumsum(0) - best
    count = int((before < top_p).sum())
    return ids[order[: max(1, count)]]


class StopStrings:
    """Holds back text that may be the beginning of a stop string, and ends where one is complete.

    The string that is complete first ends the text; of two complete at once, the longer. Where the text is cut
    into pieces makes no difference.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return the text that can be shown; "" after a stop string."""
        if self.stopped or not self._stop:
            return "" if self.stopped else text
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)[1]]
        keep = self._beginning(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        text, self._held = self._held, ""
        return text

    def _beginning(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
