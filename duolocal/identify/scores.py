"""How far two rankings of heads agree; `heads.rank_heads` ranks them, ties included, as a plan cuts them."""

from collections.abc import Sequence
from dataclasses import dataclass

from duolocal.errors import SettingsError
from duolocal.heads import rank_heads


@dataclass(frozen=True)
class Agreement:
    """How far two rankings of the same heads agree."""

    ratio: float  # the share of heads that counts as the top
    num_top: int  # heads in each top
    overlap: float  # the share of one top that is in the other, 0..1
    chance: float  # what the overlap of unrelated rankings is on average
    spearman: float  # rank correlation over all heads, -1..1, ties at their mean rank; NaN where one has only ties


def agreement(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    ratio: float = 0.5,
    *,
    secondary_a: Sequence[Sequence[float]] | None = None,
    secondary_b: Sequence[Sequence[float]] | None = None,
) -> Agreement:
    """Compare the top round(ratio · heads) of two score tables [num_layers][num_kv_heads], and the whole rankings.

    Raises SettingsError for tables of different shapes or a ratio outside 0..1.
    """
    if [len(row) for row in a] != [len(row) for row in b]:
        raise SettingsError("two head patterns of different shapes cannot be compared: they are of different models")
    if not 0 <= ratio <= 1:
        raise SettingsError(f"the retrieval ratio is {ratio:g}; it must lie between 0 and 1")
    ranked_a, ranked_b = rank_heads(a, secondary_a), rank_heads(b, secondary_b)
    num_top = round(ratio * len(ranked_a))
    shared = len(set(ranked_a[:num_top]) & set(ranked_b[:num_top]))
    return Agreement(
        ratio=ratio,
        num_top=num_top,
        overlap=shared / num_top if num_top else 1.0,
        chance=num_top / len(ranked_a),
        spearman=_spearman(_flat(a), _flat(b)),
    )


def _flat(table: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in table for value in row]


def _spearman(a: Sequence[float], b: Sequence[float]) -> float:
    ranks_a, ranks_b = _mean_ranks(a), _mean_ranks(b)
    mean = (len(a) - 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(ranks_a, ranks_b, strict=True))
    spread = sum((x - mean) ** 2 for x in ranks_a) * sum((y - mean) ** 2 for y in ranks_b)
    return covariance / spread**0.5 if spread else float("nan")


def _mean_ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of every value from 0; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for index in order[start:stop]:
            ranks[index] = (start + stop - 1) / 2
        start = stop
    return ranks
