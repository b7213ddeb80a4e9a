"""How `measure_selection.py` reads a prompt and decodes after it: with all keys in sight, or only the blocks chosen.

A prompt is read through the engine's own cache while keys and values are kept; the decode steps then attend in plain
torch, so that what a selection would have missed can be seen.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from selection_digests import BLOCK, EARLY, Digest, Early
from torch import Tensor

from duolocal.cache import DuoCache
from duolocal.engine.engine import Engine
from duolocal.kernels.interface import StepTraits

CHUNK = 256  # tokens read at a time

# Scores [heads, group, steps, blocks] (-inf where a step cannot choose a block) and the log-sum-exp of the window
# [heads, group, steps] to one score per KV head [heads, steps, blocks].
COMBINED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "max": lambda scores, _: scores.amax(1),
    "mean": lambda scores, _: scores.mean(1),
    "sum of p": lambda scores, _: scores.softmax(-1).sum(1),
    "max of p": lambda scores, _: scores.softmax(-1).amax(1),
    "sum of p, window": lambda scores, window: _with_window(scores, window).sum(1),
    "max of p, window": lambda scores, window: _with_window(scores, window).amax(1),
}


def _with_window(scores: Tensor, window: Tensor) -> Tensor:
    mass = scores + math.log(BLOCK)
    return (mass - torch.logaddexp(mass.logsumexp(-1), window)[..., None]).exp()


@dataclass(frozen=True)
class Step:
    """Attention of retrieval heads in one layer at all decode steps of a prompt."""

    layer: int
    heads: list[int]  # KV heads
    keys: Tensor  # [heads, blocks, BLOCK, head_dim]
    q: Tensor  # [heads, group, steps, head_dim], scaled
    early: Early
    mass: Tensor  # of each block, [heads, group, steps, blocks], of 1 with the window; 0 where not to choose
    can: Tensor  # bool [steps, blocks]
    window: Tensor  # log-sum-exp [heads, group, steps]

    def order(self, digest: Digest | None, combined: str) -> Tensor:
        """Return the blocks [heads, steps, blocks], the best first."""
        if digest is None:
            return self.mass.sum(1).argsort(-1, descending=True)
        scores = digest.build(self.keys, self.early)(self.q).masked_fill(~self.can, -torch.inf)
        return COMBINED[combined](scores, self.window).masked_fill(~self.can, -torch.inf).argsort(-1, descending=True)

    def kept(self, order: Tensor) -> Tensor:
        """Return the mass [heads, group, steps, blocks] of the first 1, 2, … blocks of an order."""
        return self.mass.gather(-1, order[:, None].expand_as(self.mass)).cumsum(-1)


@dataclass(frozen=True)
class Choice:
    """A way to really decode: what is chosen by, how much, and for how many steps."""

    digest: Digest | None  # None: the true mass
    combined: str
    budget: int
    reuse: int = 1

    def __call__(self, step: Step) -> Tensor:
        """Return which blocks each KV head reads at each step: bool [heads, steps, blocks]."""
        order = step.order(self.digest, self.combined)[..., : self.budget // BLOCK]
        reads = torch.zeros(order.shape[0], *step.can.shape, dtype=torch.bool).scatter_(-1, order, True)
        reads |= ~step.can  # the window, and at later steps what has left it since
        made = torch.arange(step.can.shape[0])
        return reads[:, made - made % self.reuse]


class Reading:
    """A cache that reads through another and keeps all keys and values; then the last tokens attend in plain torch.

    Invariant: `keys` and `values` [layers, KV heads, tokens, head_dim] hold what was appended, RoPE applied.
    """

    traits = StepTraits()

    def __init__(self, cache: DuoCache, num_tokens: int, cut: int) -> None:
        self._cache = cache
        self._cut = cut
        plan = cache.plan
        self.keys = torch.zeros(plan.num_layers, plan.num_kv_heads, num_tokens, cache.layout.head_dim)
        self.values = torch.zeros_like(self.keys)
        self.early: Reading = self  # whose beginning digests know
        self.moments = torch.zeros(plan.num_layers, plan.num_kv_heads, *[cache.layout.head_dim] * 2)
        self._start = 0
        self.listen: Callable[[Step], None] | None = None
        self.choice: Callable[[Step], Tensor] | None = None  # to which blocks are read: bool [heads, steps, blocks]

    def start(self, position: int) -> None:
        """Say which position the next tokens begin at."""
        self._start = position

    def append(self, layer: int, k: Tensor, v: Tensor, _rotation: object = None) -> None:
        span = slice(self._start, self._start + k.shape[0])
        self.keys[layer, :, span], self.values[layer, :, span] = k.transpose(0, 1), v.transpose(0, 1)
        if self._start < self._cut:
            self._cache.append(layer, k, v)

    def attend(self, layer: int, q: Tensor, positions: Tensor, _rotation: object = None) -> Tensor:
        if self._start < self._cut:
            if self._start < EARLY:
                early = q.view(len(q), self._cache.plan.num_kv_heads, -1, q.shape[-1]).permute(1, 2, 0, 3).flatten(1, 2)
                self.moments[layer] += early.mT @ early
            return self._cache.attend(layer, q, positions)
        plan, recent = self._cache.plan, self._cache.exact_recent
        keys, values = self.keys[layer], self.values[layer]
        grouped = q.view(len(q), plan.num_kv_heads, -1, q.shape[-1]).permute(1, 2, 0, 3) * q.shape[-1] ** -0.5
        logits = torch.einsum("hgnd,hkd->hgnk", grouped, keys)
        distance = positions[:, None] - torch.arange(keys.shape[1])
        logits.masked_fill_(distance < 0, -torch.inf)
        flags = torch.tensor(plan.retrieval[layer])
        far = (distance >= plan.recent_size) & (torch.arange(keys.shape[1]) >= plan.sink_size)
        logits.masked_fill_(far & ~flags[:, None, None, None], -torch.inf)
        if bool(flags.any()) and (self.listen or self.choice):
            heads = [head for head, flag in enumerate(plan.retrieval[layer]) if flag]
            step = self._step(layer, heads, grouped[heads], logits[heads], positions, recent)
            if self.listen:
                self.listen(step)
            if self.choice:
                hidden = ~self.choice(step)
                hidden = hidden.repeat_interleave(BLOCK, -1)
                logits[heads, :, :, : hidden.shape[-1]] = logits[heads, :, :, : hidden.shape[-1]].masked_fill(
                    hidden[:, None], -torch.inf
                )
        out = torch.einsum("hgnk,hkd->hgnd", logits.softmax(-1), values)
        return out.permute(2, 0, 1, 3).reshape(q.shape)

    def _step(self, layer: int, heads: list[int], q: Tensor, logits: Tensor, positions: Tensor, recent: int) -> Step:
        first = -(-self._cache.plan.sink_size // BLOCK)
        num_blocks = (int(positions[-1]) - recent + 1) // BLOCK
        blocks = torch.arange(num_blocks)
        can = (blocks >= first) & ((blocks + 1) * BLOCK - 1 <= positions[:, None] - recent)
        end = num_blocks * BLOCK
        within = logits[..., :end].unflatten(-1, (num_blocks, BLOCK)).logsumexp(-1)
        whole = logits.logsumexp(-1)
        mass = (within - whole[..., None]).exp().masked_fill(~can, 0.0)
        rest = (1 - mass.double().sum(-1)).clamp_min(1e-12).log().float()
        keys = self.keys[layer, heads, :end].unflatten(1, (num_blocks, BLOCK))
        early = Early(self.early.keys[layer, heads, :EARLY], self.early.moments[layer, heads])
        return Step(layer, heads, keys, q, early, mass, can, whole + rest)


@torch.inference_mode()
def read(engine: Engine, token_ids: Sequence[int], cut: int) -> Reading:
    """Read the tokens before `cut`."""
    engine.reset()
    cache = engine.cache
    reading = Reading(cache, len(token_ids), cut)
    for start in range(0, cut, CHUNK):
        stop = min(start + CHUNK, cut)
        reading.start(start)
        cache.begin(stop - start)
        engine.transformer.hidden(torch.tensor(token_ids[start:stop]), torch.arange(start, stop), reading)
        cache.commit()
    return reading


@torch.inference_mode()
def decode(engine: Engine, reading: Reading, token_ids: Sequence[int], cut: int) -> Tensor:
    """Run the tokens from `cut` on as decode steps; return log probabilities [steps, vocabulary]."""
    reading.start(cut)
    hidden = engine.transformer.hidden(torch.tensor(token_ids[cut:]), torch.arange(cut, len(token_ids)), reading)
    return engine.transformer.logits(hidden).log_softmax(-1)
