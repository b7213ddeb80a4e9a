"""The decode loop's body: one sampled id in, the next one out.

On the CPU the id is sampled on the host. On a GPU the step, from the id that goes in to the id that comes out, is one
CUDA graph: the host fills in an id and, where the embedding is in host memory, its row, replays and reads an id.
Lengths, block table and position are read from device memory, so the graph stays valid while the context grows.

A decoder computes; that its token becomes part of the context, or does not, is the engine's business.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from duolocal.cache import DuoCache
from duolocal.device_sampling import DeviceSampler
from duolocal.engine.speculation import PromptLookup, Speculation
from duolocal.models.transformer import Transformer
from duolocal.sampling import Sampler
from duolocal.settings import Sampling


class Decoder(Protocol):
    """Samples one answer: `first`, then in turn `look_ahead`, `step` (or `take_ahead`) and `sample`."""

    def first(self, hidden: Tensor) -> int:
        """Return the first id, given the last hidden state [1, hidden_size] of the prompt."""
        ...

    def take_ahead(self, token: int) -> bool:
        """Return whether the last step tried the id that was sampled last, in its place, so that no step is needed."""
        ...

    def look_ahead(self, token: int, most: int) -> int:
        """Return how many tokens, at most `most`, the step of the id that was sampled last tries along with it."""
        ...

    def step(self, token: int, before_layer: Callable[[int], None]) -> None:
        """Append the id that was sampled last, in a decode step that the cache has begun.

        before_layer: as for `Transformer.hidden`; a step that is repeated or is a graph calls it once.
        """
        ...

    def sample(self) -> int:
        """Return the id after the one just appended."""
        ...


class HostDecoder:
    """Samples on the host, and looks ahead where `speculation` finds that worth it.

    context: all tokens before the answer, read when its first id is drawn; speculation: None to compute token by token.
    """

    def __init__(
        self,
        transformer: Transformer,
        cache: DuoCache,
        sampling: Sampling,
        *,
        context: Sequence[int] = (),
        speculation: Speculation | None = None,
    ) -> None:
        self._transformer, self._cache = transformer, cache
        self._sampler = Sampler(sampling)
        # The penalty looks at the answer only: over a long document it would forbid the document's own words.
        self._answer: list[int] = []
        self._context, self._speculation = context, speculation
        self._lookup: PromptLookup | None = None
        self._logits = torch.empty(0)  # of the last step: [1 + tokens ahead, vocab_size]
        self._ahead: list[int] = []  # the tokens that it tried and that are still to be drawn

    def first(self, hidden: Tensor) -> int:
        """Return the first id, given the last hidden state [1, hidden_size] of the prompt."""
        if self._speculation is not None:
            self._speculation.restart()
            self._lookup = PromptLookup(self._context)
        self._logits = self._transformer.logits(hidden)
        return self.sample()

    def look_ahead(self, token: int, most: int) -> int:
        """Take the id that was sampled last; return how many that may follow it the step tries, at most `most`."""
        self._answer.append(token)
        self._ahead = []
        lookup, speculation = self._lookup, self._speculation
        if lookup is not None and speculation is not None:
            self._learn(token)
            if lookup.length:
                self._ahead = lookup.proposal(speculation.ahead(lookup.length, min(most, self._cache.most_ahead)))
                speculation.counts.steps += bool(self._ahead)
                speculation.counts.tried += len(self._ahead)
        return len(self._ahead)

    def step(self, token: int, before_layer: Callable[[int], None]) -> None:
        """Append the id that was sampled last."""
        speculation, count = self._speculation, 1 + len(self._ahead)
        with nullcontext() if speculation is None else speculation.timing(count - 1):
            positions = self._cache.start if count == 1 else self._cache.start + torch.arange(count)
            token_ids = torch.tensor([token, *self._ahead])
            hidden = self._transformer.hidden(token_ids, positions, self._cache, before_layer=before_layer)
            self._logits = self._transformer.logits(hidden)

    def take_ahead(self, token: int) -> bool:
        """Return whether the last step tried the id that was sampled last in its place: `sample` goes on from there."""
        if self._speculation is None or not self._ahead or self._ahead[0] != token:
            return False
        del self._ahead[0]
        self._logits = self._logits[1:]
        self._answer.append(token)
        self._learn(token)
        self._speculation.counts.accepted += 1
        return True

    def sample(self) -> int:
        """Return the id after the one just appended."""
        return self._sampler(self._logits[0], self._answer)

    def _learn(self, token: int) -> None:
        lookup, speculation = self._lookup, self._speculation
        assert lookup is not None and speculation is not None
        if lookup.length:
            speculation.drawn(lookup.length, as_found=lookup.proposal(1) == [token])
        lookup.add(token)


class GpuDecoder:
    """The decode step of a model and a cache as a CUDA graph, captured once for greedy answers and once for drawn ones.

    Where blocks are selected, steps that choose them and steps that read those chosen before are graphs of their own.

    Everything a graph reads or writes stays where it is: the cache, the weights, `_ids`, `_row` and the sampler's
    buffers. No graph reads host memory: an embedding that lies there is read before the replay (`_fill_row`).
    """

    def __init__(self, transformer: Transformer, cache: DuoCache) -> None:
        self._transformer, self._cache = transformer, cache
        device, shape = transformer.device, (1, transformer.config.hidden_size)
        self._ids = torch.zeros(1, dtype=torch.int64, device=device)
        self._row = torch.zeros(shape, dtype=transformer.dtype, device=device)  # of the embedding
        # Pinned, so that the copy from it waits for nothing.
        self._staged = torch.zeros(shape, dtype=transformer.dtype, pin_memory=device.type == "cuda")
        self._sampler = DeviceSampler(transformer.config.vocab_size, transformer.device)
        # By the kind of step: greedy or not, and what the cache says.
        self._warm: set[tuple[bool, str]] = set()  # kernels are compiled and loaded
        self._graphs: dict[tuple[bool, str], torch.cuda.CUDAGraph] = {}

    def restart(self, sampling: Sampling) -> "GpuDecoder":
        """Begin an answer."""
        self._sampler.restart(sampling)
        return self

    def take_ahead(self, _token: int) -> bool:
        """Return that no step has looked ahead: on a GPU none does."""
        return False

    def look_ahead(self, _token: int, _most: int) -> int:
        """Return that the step does not look ahead."""
        return 0

    @torch.inference_mode()
    def first(self, hidden: Tensor) -> int:
        """Return the first id, given the last hidden state [1, hidden_size] of the prompt."""
        self._sampler.prepare()
        self._sampler.sample(self._transformer.logits(hidden)[0], greedy=self._sampler.sampling.greedy)
        return self._sampler.read()

    def step(self, token: int, before_layer: Callable[[int], None]) -> None:
        """Append the id that was sampled last."""
        before_layer(0)
        greedy = self._sampler.sampling.greedy
        self._ids.fill_(token)
        if self._transformer.embeds_on_host:
            self._fill_row(token)
        self._sampler.prepare()
        if self._transformer.device.type != "cuda":
            self._run(greedy)
            return
        kind = greedy, self._cache.traits.kind
        if kind not in self._warm:
            self._run(greedy)  # compiles and loads what a capture must find loaded
            self._warm.add(kind)
        else:
            if kind not in self._graphs:
                self._graphs[kind] = self._capture(greedy)
            self._graphs[kind].replay()

    def sample(self) -> int:
        """Return the id after the one just appended; waits for the device."""
        return self._sampler.read()

    def _fill_row(self, token: int) -> None:
        """Copy the embedding's row of a token to the device. The copy before it is done: `sample` waited for it."""
        transformer = self._transformer
        self._staged.copy_(transformer.kernels.embed(transformer.weights.embedding, torch.tensor([token])))
        self._row.copy_(self._staged, non_blocking=True)

    def _capture(self, greedy: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(greedy)
        return graph

    def _run(self, greedy: bool) -> None:
        """From `_ids` and `_row` to the sampler's `token`, with operations on the device only."""
        transformer, cache = self._transformer, self._cache
        self._sampler.remember(self._ids)
        if transformer.embeds_on_host:
            hidden = transformer.hidden_of(self._row, cache.start, cache)
        else:
            hidden = transformer.hidden(self._ids, cache.start, cache)
        self._sampler.sample(transformer.logits(hidden)[0], greedy=greedy)
