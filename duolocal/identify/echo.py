"""Echo and induction scores: what heads look back at when random tokens repeat (RazorAttention, arXiv 2407.15891).

Random tokens, and then the same again. At every token of the second copy, a head that gives weight to the token's
first copy echoes, and one that gives weight to what followed there does induction: both look back further than any
window, for content and not for place. Forward passes only, and no text: works for every model, without a tokenizer.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.errors import SettingsError
from duolocal.identify.attention_probe import over_group, probe
from duolocal.identify.results import IdentifyProgress
from duolocal.models.config import ModelConfig
from duolocal.models.transformer import Transformer

DRAWS = 3  # of random tokens, averaged
# The first copy lies beyond the window of every query of the second, with room on both sides.
WINDOWS_PER_COPY = 2


@dataclass(frozen=True)
class EchoScores:
    """Mean attention weights of the second copy's queries, each [num_layers, num_heads] float64."""

    echo: Tensor  # on the token's first copy
    induction: Tensor  # on the first copy's successor
    num_tokens: int  # of each draw
    draws: int

    def per_kv_head(self, num_kv_heads: int) -> tuple[Tensor, Tensor]:
        """Return the score and a secondary one, each [num_layers, num_kv_heads].

        The score is the two weights together, of the query head in the group that has most; the secondary the
        induction alone.
        """
        return over_group(self.echo + self.induction, num_kv_heads), over_group(self.induction, num_kv_heads)


def echo_scores(
    transformer: Transformer,
    *,
    sink_size: int,
    recent_size: int,
    seed: int,
    num_tokens: int,
    draws: int = DRAWS,
    tile: int | None = None,
) -> Iterator[IdentifyProgress | EchoScores]:
    """Yield progress, a layer at a time, and at last the EchoScores.

    num_tokens: of both copies together. Raises SettingsError as `check_tokens` does.
    """
    config = transformer.config
    check_tokens(num_tokens, sink_size=sink_size, recent_size=recent_size)
    copy = num_tokens // 2
    sums = torch.zeros(2, config.num_layers, config.num_heads, dtype=torch.float64)
    for draw in range(draws):
        ids = _random_ids(config, copy, random.Random(f"echo {seed} {draw}"))
        watch = _Watch(copy, sink_size, sums)
        for layers in probe(transformer, [*ids, *ids], watch, tile=tile):
            done, all_layers = draw * config.num_layers + layers, draws * config.num_layers
            yield IdentifyProgress(done, all_layers, "layers", f"random tokens, draw {draw + 1} of {draws}")
    echo, induction = sums / (draws * (copy - sink_size - 1))
    yield EchoScores(echo=echo, induction=induction, num_tokens=2 * copy, draws=draws)


def check_tokens(num_tokens: int, *, sink_size: int, recent_size: int) -> None:
    """Raise SettingsError where the first of two copies would not lie beyond the window of the second's queries."""
    least = 2 * (sink_size + recent_size + 2)
    if num_tokens < least:
        raise SettingsError(
            f"echo needs {least:,} tokens or more to look beyond a window of {sink_size} + {recent_size}, not "
            f"{num_tokens:,}: use more tokens or a smaller window"
        )


def default_tokens(sink_size: int, recent_size: int) -> int:
    """Return how many tokens a draw has, both copies together."""
    return 2 * WINDOWS_PER_COPY * (sink_size + recent_size)


class _Watch:
    """Adds up the weights of the second copy's queries into `sums` [2, num_layers, num_heads].

    The last query is left out, because what followed its first copy is the second copy itself; and so are those
    whose first copy is among the sinks, which every head sees.
    """

    def __init__(self, copy: int, sink_size: int, sums: Tensor) -> None:
        self._first, self._last = copy + sink_size, 2 * copy - 2
        self._copy = copy
        self._sums = sums

    def __call__(self, layer: int, positions: Tensor, weights: Tensor) -> None:
        rows = ((positions >= self._first) & (positions <= self._last)).nonzero()[:, 0]
        if len(rows) == 0:
            return
        source = positions[rows] - self._copy  # [t]
        for kind, index in enumerate((source, source + 1)):
            self._sums[kind, layer] += weights[:, rows, index].double().sum(-1).cpu()


def _random_ids(config: ModelConfig, count: int, generator: random.Random) -> list[int]:
    """Return ids in random order, none twice while the vocabulary lasts, and no BOS or end token."""
    excluded = {config.bos_id, *config.eos_ids}
    usable = [token for token in range(config.vocab_size) if token not in excluded]
    ids: list[int] = []
    while len(ids) < count:
        ids += generator.sample(usable, min(count - len(ids), len(usable)))
    return ids
