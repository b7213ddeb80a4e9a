"""What `make test` leaves to `make test-all`."""

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.thinning import covering

pytest_plugins = ["pytester"]


@given(st.lists(st.fixed_dictionaries({name: st.integers(0, 3) for name in "abcd"}), max_size=60), st.integers(1, 4))
def test_a_cover_has_every_combination_that_occurs(rows: list[dict[str, int]], strength: int) -> None:
    kept = covering(rows, strength)
    for names in combinations("abcd", strength):
        assert {tuple(rows[i][name] for name in names) for i in kept} == {tuple(row[n] for n in names) for row in rows}


def test_pairs_of_a_product_need_few_rows() -> None:
    rows = [dict(zip("abcd", values, strict=True)) for values in product(range(3), repeat=4)]
    assert len(covering(rows, 2)) <= 13  # 9 is the least possible, of 81
    assert len(covering(rows, 1)) == 3
    assert covering(rows[:1], 2) == {0} and covering([], 2) == set()


def test_what_is_left_out_and_what_runs_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.full
        def test_dear(): pass

        @pytest.mark.parametrize("x", [0, pytest.param(1, marks=pytest.mark.full)])
        def test_case(x): pass

        @pytest.mark.cover(1)
        @pytest.mark.parametrize("x", range(3))
        @pytest.mark.parametrize("y", range(4))
        def test_covered(x, y): pass
        """
    )
    options = "-p", "tests.thinning", "-p", "no:cacheprovider"
    pytester.runpytest_inprocess(*options).assert_outcomes(passed=1 + 4, deselected=1 + 1 + 8)
    pytester.runpytest_inprocess(*options, "--full", "test_what*").assert_outcomes(passed=1 + 2 + 12)
    pytester.runpytest_inprocess(*options, "--full", "test_other*").assert_outcomes(passed=1 + 4, deselected=10)
