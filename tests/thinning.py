"""A pytest plugin: which tests `make test` leaves to `make test-all`.

`@pytest.mark.full`: a test, or a case of one (`pytest.param(..., marks=pytest.mark.full)`), of which a cheaper one
remains. `@pytest.mark.cover(n)`: of a test's cases only as many remain as have every combination of n values that
occurs among them: with n = 2 all pairs. `--full GLOB` runs everything of the files that GLOB matches.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from itertools import combinations
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    said = "run also what `make test` leaves out, of the test files that GLOB matches ('*': of all)"
    parser.addoption("--full", metavar="GLOB", action="append", default=[], help=said)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: left to make test-all; a cheaper test of the same remains")
    config.addinivalue_line("markers", "cover(n): of its cases, make test runs some with all combinations of n values")


def is_full(config: pytest.Config, file: Path) -> bool:
    """Return whether everything of a test file is wanted."""
    return any(fnmatch(file.name, glob) for glob in config.getoption("full"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out: set[pytest.Item] = set()
    covered: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if is_full(config, item.path):
            continue
        if item.get_closest_marker("full"):
            left_out.add(item)
        elif isinstance(item, pytest.Function) and item.get_closest_marker("cover"):
            covered[item.nodeid.partition("[")[0]].append(item)
    for cases in covered.values():
        marker = cases[0].get_closest_marker("cover")
        assert marker is not None
        (strength,) = marker.args
        kept = covering([case.callspec.params for case in cases], strength)
        left_out.update(case for i, case in enumerate(cases) if i not in kept)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def covering(rows: Sequence[Mapping[str, object]], strength: int) -> set[int]:
    """Return the indices of rows that have among them each combination of `strength` values that any row has.

    Greedy: next comes the row that adds most, the first of equals. Values are told apart by their repr.
    """

    def of(row: Mapping[str, object]) -> set[Iterable[tuple[str, str]]]:
        return set(combinations(((name, repr(value)) for name, value in sorted(row.items())), min(strength, len(row))))

    each = [of(row) for row in rows]
    missing = set().union(*each)
    kept: set[int] = set()
    while missing:
        best = max(range(len(rows)), key=lambda i: len(each[i] & missing))
        kept.add(best)
        missing -= each[best]
    return kept
