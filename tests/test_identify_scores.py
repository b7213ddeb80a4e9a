"""Agreement of two rankings: the figures are those worked out by hand."""

import math

import pytest

from duolocal.errors import SettingsError
from duolocal.identify import agreement


def test_agreement_by_hand() -> None:
    a = [[4.0, 3.0], [2.0, 1.0]]
    same, other = agreement(a, a), agreement(a, [[1.0, 2.0], [3.0, 4.0]])
    assert (same.num_top, same.overlap, same.chance, same.spearman) == (2, 1.0, 0.5, 1.0)
    assert (other.overlap, other.spearman) == (0.0, -1.0)
    # Ranks 3 2 1 0 and 2 3 1 0: 1 - 6 · (1 + 1) / (4 · 15).
    swapped = agreement(a, [[3.0, 4.0], [2.0, 1.0]], 0.25)
    assert (swapped.num_top, swapped.overlap, swapped.chance) == (1, 0.0, 0.25)
    assert swapped.spearman == pytest.approx(0.8)
    # Ranks 3 2 1 0 and, at their mean, 2.5 2.5 0.5 0.5: the covariance 4 over sqrt(5 · 4).
    assert agreement(a, [[1.0, 1.0], [0.0, 0.0]]).spearman == pytest.approx(4 / 20**0.5)


def test_agreement_breaks_ties_by_the_secondary_scores() -> None:
    ties, a = [[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]]
    assert agreement(ties, a).overlap == 0.5  # a tie is spread over the layers
    assert agreement(ties, a, secondary_a=[[0.0, 0.1], [0.2, 0.3]]).overlap == 1.0
    assert math.isnan(agreement(ties, a).spearman)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(SettingsError, match="different shapes"):
        agreement([[1.0, 2.0]], [[1.0], [2.0]])
    with pytest.raises(SettingsError, match="between 0 and 1"):
        agreement([[1.0]], [[1.0]], 1.5)
