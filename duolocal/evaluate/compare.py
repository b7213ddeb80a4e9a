"""Distributions of the next token, against those of the dense cache: KL, top-1 agreement, perplexity (`predictions`).

All caches are fed the same real tokens side by side, chunk by chunk, so one dense pass serves every setting and nothing
grows with the text but one number per prediction. A text is read in windows, each with an empty cache; what a window's
first tokens see lies in every head's own window, so KL is nothing there by construction: `kl_by_quarter` says how it
grows.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duolocal.engine.engine import Engine
from duolocal.errors import SettingsError
from duolocal.evaluate.engines import LOGIT_ROWS
from duolocal.evaluate.grid import clock
from duolocal.models.transformer import Transformer
from duolocal.predictions import Predictions, Reference

QUARTERS = 4
MIN_WINDOW = 16  # tokens


@dataclass(frozen=True)
class WindowFigures:
    """Means over the predictions of one window."""

    count: int  # predictions
    kl: float  # nats per token
    nll: float
    dense_nll: float
    top1: float  # share of predictions in which the likeliest token is the same


@dataclass(frozen=True)
class Comparison:
    """One cache against the dense one, over the same tokens."""

    name: str
    windows: tuple[WindowFigures, ...]
    kl_median: float  # over tokens
    kl_p99: float
    kl_most: float
    kl_by_quarter: tuple[float, ...]  # mean KL in each quarter of the windows
    elapsed_s: float  # to read all tokens, without comparing

    @property
    def count(self) -> int:
        """Predictions in all windows."""
        return sum(window.count for window in self.windows)

    @property
    def kl(self) -> float:
        """Mean nats per token."""
        return self._mean([window.kl for window in self.windows])

    @property
    def kl_error(self) -> float | None:
        """Standard error of the mean, from how windows differ; None for one window."""
        return _error([window.kl for window in self.windows])

    @property
    def worst_kl(self) -> float:
        """Mean KL of the worst window."""
        return max(window.kl for window in self.windows)

    @property
    def top1(self) -> float:
        """Share of predictions in which the likeliest token is the dense one's."""
        return self._mean([window.top1 for window in self.windows])

    @property
    def perplexity(self) -> float:
        return math.exp(self._mean([window.nll for window in self.windows]))

    @property
    def perplexity_error(self) -> float | None:
        """Standard error, from how windows differ; None for one window."""
        error = _error([window.nll for window in self.windows])
        return None if error is None else error * self.perplexity

    @property
    def rise(self) -> float:
        """Perplexity relative to dense, less 1."""
        return math.expm1(self._mean([window.nll - window.dense_nll for window in self.windows]))

    @property
    def rise_error(self) -> float | None:
        """Standard error of the rise, from how windows differ; None for one window."""
        error = _error([window.nll - window.dense_nll for window in self.windows])
        return None if error is None else error * (1 + self.rise)

    @property
    def worst_rise(self) -> float:
        return max(math.expm1(window.nll - window.dense_nll) for window in self.windows)

    def report(self) -> dict[str, object]:
        """Return the figures as JSON holds them."""
        return {
            "predictions": self.count,
            "kl": self.kl,
            "kl_standard_error": self.kl_error,
            "kl_worst_window": self.worst_kl,
            "kl_median": self.kl_median,
            "kl_p99": self.kl_p99,
            "kl_most": self.kl_most,
            "kl_by_quarter": list(self.kl_by_quarter),
            "top1_agreement": self.top1,
            "perplexity": self.perplexity,
            "perplexity_standard_error": self.perplexity_error,
            "perplexity_rise": self.rise,
            "perplexity_rise_standard_error": self.rise_error,
            "perplexity_rise_worst_window": self.worst_rise,
            "elapsed_s": self.elapsed_s,
            "windows": [vars(window) for window in self.windows],
        }

    def _mean(self, values: Sequence[float]) -> float:
        counts = [window.count for window in self.windows]
        return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)


def cut_windows(token_ids: Sequence[int], *, num_tokens: int, context: int, bos: Sequence[int] = ()) -> list[list[int]]:
    """Return `num_tokens` tokens of a text as windows of `context` tokens, spread evenly over all of it.

    The windows do not overlap; `bos` is put before each, where a model wants it. Raises SettingsError where the text
    is too short or the numbers do not go into each other: nothing is left out that was asked for.
    """
    context = min(context, num_tokens)
    if context < MIN_WINDOW:
        raise SettingsError(f"a window of {context} tokens says nothing: give {MIN_WINDOW} or more")
    count, rest = divmod(num_tokens, context)
    if rest:
        raise SettingsError(
            f"{num_tokens:,} tokens are no whole number of windows of {context:,}: "
            f"use --tokens {count * context} or {(count + 1) * context}"
        )
    if len(token_ids) < num_tokens:
        least = len(token_ids) // context * context or len(token_ids)
        raise SettingsError(
            f"the text has {len(token_ids):,} tokens, --tokens is {num_tokens:,}: give a longer text, "
            f"or --tokens {least}"
        )
    spare = len(token_ids) - num_tokens
    starts = [at * context + spare * at // max(1, count - 1) for at in range(count)]
    return [[*bos, *token_ids[start : start + context]] for start in starts]


def compare(
    engines: Sequence[tuple[str, Engine]],
    windows: Sequence[Sequence[int]],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Comparison]:
    """Read every window with every engine, compare all with the first, and return a Comparison for each, it included.

    engines: (name, engine), the dense one first, of one Transformer or of models with one vocabulary; windows: token
    ids, two or more each. `on_progress` gets (tokens read, tokens to read), those of all engines together.
    """
    dense = engines[0][1]
    assert all(engine.config.vocab_size == dense.config.vocab_size for _, engine in engines)
    tallies = [_Tally() for _ in engines]
    done, total = 0, sum(len(window) - 1 for window in windows) * len(engines)
    for window in windows:
        ids = torch.tensor(window, dtype=torch.int64, device=dense.transformer.device)
        for _, engine in engines:
            engine.reset()
        for tally in tallies:
            tally.windows.append(Predictions())
        for start in range(0, len(window) - 1, dense.chunk_size):
            stop = min(start + dense.chunk_size, len(window) - 1)
            hidden = []
            for (_, engine), tally in zip(engines, tallies, strict=True):
                began_s = clock(engine)
                hidden.append(engine.step(window[start:stop]))
                tally.elapsed_s += clock(engine) - began_s
                done += stop - start
                if on_progress is not None:
                    on_progress(done, total)
            transformers = [engine.transformer for _, engine in engines]
            _compare_chunk(transformers, hidden, tallies, ids[start + 1 : stop + 1])
    for _, engine in engines:
        engine.reset()
    return [tally.result(name, tallies[0]) for (name, _), tally in zip(engines, tallies, strict=True)]


@torch.inference_mode()
def _compare_chunk(
    transformers: Sequence[Transformer], hidden: Sequence[Tensor], tallies: Sequence["_Tally"], targets: Tensor
) -> None:
    """Add the predictions made from `hidden` [q_len, hidden_size] of every engine, dense first, a tile at a time."""
    for row in range(0, len(targets), LOGIT_ROWS):
        rows = slice(row, row + LOGIT_ROWS)
        dense: Reference | None = None
        for model, states, tally in zip(transformers, hidden, tallies, strict=True):
            log_probs = model.logits(states[rows]).log_softmax(-1)  # [rows, vocab_size] float32
            dense = Reference(log_probs) if dense is None else dense
            tally.windows[-1].add(log_probs, dense, targets[rows])


class _Tally:
    """What one engine's predictions come to, window by window."""

    def __init__(self) -> None:
        self.windows: list[Predictions] = []
        self.elapsed_s = 0.0

    def result(self, name: str, dense: "_Tally") -> Comparison:
        kl = [window.kl for window in self.windows]
        ranked = torch.cat(kl).sort().values
        quarters = [
            torch.cat([window.tensor_split(QUARTERS)[quarter] for window in kl]).mean().item()
            for quarter in range(QUARTERS)
        ]
        return Comparison(
            name=name,
            windows=tuple(
                WindowFigures(count=ours.count, kl=ours.mean_kl, nll=ours.nll, dense_nll=theirs.nll, top1=ours.top1)
                for ours, theirs in zip(self.windows, dense.windows, strict=True)
            ),
            kl_median=ranked[len(ranked) // 2].item(),
            kl_p99=ranked[int(0.99 * (len(ranked) - 1))].item(),
            kl_most=ranked[-1].item(),
            kl_by_quarter=tuple(quarters),
            elapsed_s=self.elapsed_s,
        )


def _error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
