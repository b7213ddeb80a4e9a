"""Repeated timings: the median is the figure, the extremes say how far to trust it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Seconds of the same work done several times."""

    median: float
    least: float
    most: float
    runs: int

    def per_s(self, count: float) -> dict[str, float]:
        """Return how many of `count` things were done per second: the median's figure, the slowest, the fastest."""
        return {
            "median": round(count / self.median, 3),
            "min": round(count / self.most, 3),
            "max": round(count / self.least, 3),
            "runs": self.runs,
        }

    def milliseconds(self) -> dict[str, float]:
        """Return the figures for a report."""
        return {
            "median": round(1e3 * self.median, 4),
            "min": round(1e3 * self.least, 4),
            "max": round(1e3 * self.most, 4),
            "runs": self.runs,
        }


def spread(seconds: Sequence[float]) -> Spread:
    """Return the Spread of at least one timing."""
    return Spread(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def total(parts: Sequence[Spread]) -> Spread:
    """Return the Spread of work done in parts, each repeated on its own."""
    return Spread(
        median=sum(part.median for part in parts),
        least=sum(part.least for part in parts),
        most=sum(part.most for part in parts),
        runs=min(part.runs for part in parts),
    )
