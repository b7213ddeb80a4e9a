"""The decode loop's body: one sampled id in, the next one out.

On the CPU the id is sampled on the host, and the step is the engine's own. On a GPU the step, from the id that goes in
to the id that comes out, is one CUDA graph: the host fills in an id, replays and reads an id. Lengths, block table
and position are read from device memory, so the graph stays valid while the context grows.
"""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from duolocal.device_sampling import DeviceSampler
from duolocal.sampling import Sampler
from duolocal.settings import Sampling

if TYPE_CHECKING:
    from duolocal.engine.engine import Engine


class Decoder(Protocol):
    """Samples one answer."""

    def first(self, hidden: Tensor) -> int:
        """Return the first id, given the last hidden state [1, hidden_size] of the prompt."""
        ...

    def next(self, token: int) -> int:
        """Append the id that was sampled last, and return the next one."""
        ...


class HostDecoder:
    """Steps with the engine and samples on the host."""

    def __init__(self, engine: "Engine", sampling: Sampling) -> None:
        self._engine = engine
        self._sampler = Sampler(sampling)
        # The penalty looks at the answer only: over a long document it would forbid the document's own words.
        self._answer: list[int] = []

    def first(self, hidden: Tensor) -> int:
        """Return the first id, given the last hidden state [1, hidden_size] of the prompt."""
        return self._sampler(self._engine.transformer.logits(hidden)[0], self._answer)

    def next(self, token: int) -> int:
        """Append the id that was sampled last, and return the next one."""
        self._answer.append(token)
        return self.first(self._engine.step([token]))


class GpuDecoder:
    """The step of one engine as a CUDA graph, captured once for greedy answers and once for drawn ones.

    Where blocks are selected, steps that choose them and steps that read those chosen before are graphs of their own.

    Everything a graph reads or writes stays where it is: the cache, the weights, `_ids` and the sampler's buffers.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        device = engine.transformer.device
        self._ids = torch.zeros(1, dtype=torch.int64, device=device)
        self._sampler = DeviceSampler(engine.config.vocab_size, device)
        # By the kind of step: greedy, choosing blocks.
        self._warm: set[tuple[bool, bool]] = set()  # kernels are compiled and loaded
        self._graphs: dict[tuple[bool, bool], torch.cuda.CUDAGraph] = {}

    def restart(self, sampling: Sampling) -> "GpuDecoder":
        """Begin an answer."""
        self._sampler.restart(sampling)
        return self

    @torch.inference_mode()
    def first(self, hidden: Tensor) -> int:
        """Return the first id, given the last hidden state [1, hidden_size] of the prompt."""
        self._sampler.prepare()
        self._sampler.sample(self._engine.transformer.logits(hidden)[0], greedy=self._sampler.sampling.greedy)
        return self._sampler.read()

    def next(self, token: int) -> int:
        """Append the id that was sampled last, and return the next one."""
        self._engine.append([token], lambda: self._run(token))
        return self._sampler.read()

    def _run(self, token: int) -> None:
        greedy = self._sampler.sampling.greedy
        self._engine.raise_if_cancelled()
        self._ids.fill_(token)
        self._sampler.prepare()
        if self._engine.transformer.device.type != "cuda":
            self._step(greedy)
            return
        kind = greedy, self._engine.cache.chooses
        if kind not in self._warm:
            self._step(greedy)  # compiles and loads what a capture must find loaded
            self._warm.add(kind)
        else:
            if kind not in self._graphs:
                self._graphs[kind] = self._capture(greedy)
            self._graphs[kind].replay()

    def _capture(self, greedy: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(greedy)
        return graph

    def _step(self, greedy: bool) -> None:
        """From `_ids` to the sampler's `token`, with operations on the device only."""
        transformer, cache = self._engine.transformer, self._engine.cache
        self._sampler.remember(self._ids)
        hidden = transformer.hidden(self._ids, cache.start, cache)
        self._sampler.sample(transformer.logits(hidden)[0], greedy=greedy)
