"""Bars and pictures where a terminal is said to know ASCII only."""

import time
from io import StringIO

import pytest
from rich.console import Console

from duolocal.terminal.eval_parts import bars
from duolocal.terminal.plan_view import memory_bar
from duolocal.terminal.progress import bar as work
from duolocal.terminal.reader_view import score_bar
from duolocal.terminal.views import share_bar


@pytest.mark.parametrize(
    ("variable", "locale", "plain"),
    [("LC_ALL", "C", True), ("LC_ALL", "POSIX", True), ("LANG", "C", True), ("LC_ALL", "en_GB.UTF-8", False)],
)
def test_bars_are_ascii_in_a_posix_locale(
    monkeypatch: pytest.MonkeyPatch, variable: str, locale: str, plain: bool
) -> None:
    for name in ("LC_ALL", "LANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LC_CTYPE", "C.UTF-8")  # as Python sets it where it takes the POSIX locale for UTF-8
    monkeypatch.setenv(variable, locale)
    over = memory_bar([("a", 150, ""), ("b", 50, "")], 100, 74).plain
    drawings = [bars(0.7, 1.0), score_bar(0.5, 8), share_bar(33, 100), over]
    assert [drawing.isascii() for drawing in drawings] == [plain] * 4
    shown = StringIO()
    with work(Console(file=shown, force_terminal=True, width=60), "reading", "tokens") as bar:
        bar.update(1, 2)
        time.sleep(0.5)  # what is done sooner shows no bar
    assert "reading" in shown.getvalue() and shown.getvalue().isascii() == plain
    assert score_bar(0.5, 8) == ("####" if plain else "████") and all(drawings)
