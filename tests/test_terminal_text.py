"""Untrusted text, Markdown while it streams, figures."""

import re
import time
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from duolocal.terminal import figures, markdown, progress
from duolocal.terminal.clean import clean, clean_line
from duolocal.terminal.markdown import MarkdownStream, SafeMarkdown, split_finished

ANSWER = """# Title
Some *text* with `code` and a [link](http://example.org/x)
second line

- a
- b
  1. x

| a | b |
|---|---|
| one | two |

```python
def f(x):

    return "a" + x
```

1. one

2. two

last words"""


def render(text: str, columns: int = 60) -> str:
    output = StringIO()
    Console(file=output, width=columns, force_terminal=False).print(SafeMarkdown(text))
    return output.getvalue()


def screen(raw: str, columns: int) -> list[str]:
    """Play the escape sequences that Rich's live display uses; return what stays on the screen."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", raw):
        if token == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif token == "\r":
            column = 0
        elif token.startswith("\x1b"):
            if token.endswith("A"):
                row -= int(token[2:-1])
                assert row >= 0
            elif token == "\x1b[2K":
                lines[row] = ""
            else:
                assert token[-1] in "mhl", token
        else:
            assert column + len(token) <= columns, f"a line wider than the terminal: {token!r}"
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines]


def test_escape_sequences_and_other_controls_become_visible() -> None:
    assert clean("a\x1b]0;title\x07b\x9b31mc\x00\x7f") == "a␛]0;title␇b\ufffd31mc␀␡"
    assert clean("one\r\ntwo\tthree\rfour") == "one\ntwo\tthreefour"
    assert clean("safe\u202etxt.exe\u2066") == "safe\ufffdtxt.exe\ufffd"
    assert clean_line("a\nb\tc") == "a␤b c"


@given(st.text())
def test_nothing_that_moves_a_cursor_survives(text: str) -> None:
    left = {ord(character) for character in clean(text)}
    assert not left & ({*range(0x20)} - {0x09, 0x0A} | {*range(0x7F, 0xA0)})
    assert clean("plain text ✓ 漢字 é") == "plain text ✓ 漢字 é"


@pytest.mark.parametrize("hostile", ["\x1b[2J", "&#27;[2J", "&#x9b;2J", "`\x1b[2J`", "```\n\x1b[2J\n```"])
def test_markdown_lets_no_escape_through(hostile: str) -> None:
    for text in (hostile, f"- {hostile}", f"# {hostile}", f"[a]({hostile})"):
        shown = render(text)
        assert "\x1b" not in shown
        assert "\x9b" not in shown


def test_entities_cannot_bring_back_a_bidirectional_override() -> None:
    assert "\u202e" not in render("a &#x202e; b")


def test_html_and_link_targets_stay_visible() -> None:
    assert "<think>hm</think>" in render("<think>hm</think>")
    assert "<div>" in render("<div>\n\nx")
    assert "http://example.org/x" in render("[text](http://example.org/x)")


def test_line_breaks_are_kept() -> None:
    assert render("roses\nviolets").split() == ["roses", "violets"]
    assert "roses\n" in re.sub(r" +\n", "\n", render("roses\nviolets"))


@given(st.text(alphabet="ab-*#`|>1. \n~\t\u2028\x0b", max_size=80))
def test_split_loses_nothing(text: str) -> None:
    finished, tail = split_finished(text)
    assert finished + tail == text


def test_a_fence_stays_open_until_it_is_closed() -> None:
    assert split_finished("intro\n\n```\na\n\nb\n\n# c\n") == ("intro\n\n", "```\na\n\nb\n\n# c\n")


@pytest.mark.parametrize("columns", [30, 80])
@pytest.mark.parametrize("height", [6, 40])
def test_streaming_ends_with_each_block_once(columns: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "_FRAME_S", 0.0)
    output = StringIO()
    console = Console(
        file=output,
        width=columns,
        height=height,
        force_terminal=True,
        color_system=None,
        legacy_windows=False,
    )
    with MarkdownStream(console) as stream:
        for start in range(0, len(ANSWER), 7):
            stream.feed(ANSWER[start : start + 7])
    shown = "\n".join(screen(output.getvalue(), columns))
    for once in ("Title", "second line", "def f(x):", 'return "a" + x', "last words", "one  two", " 2 two"):
        assert shown.count(once) == 1, (once, shown)
    assert "\n\n\n" not in shown
    assert "```" not in shown


def test_the_live_region_is_the_open_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer is not redrawn: what is written grows with its length, not with its square."""
    monkeypatch.setattr(markdown, "_FRAME_S", 0.0)
    written = []
    for paragraphs in (20, 40):
        output = StringIO()
        console = Console(file=output, width=80, height=24, force_terminal=True, color_system=None)
        with MarkdownStream(console) as stream:
            for number in range(paragraphs):
                for word in f"paragraph {number} has a few words in it\n\n".split(" "):
                    stream.feed(word + " " if not word.endswith("\n") else word)
        written.append(len(output.getvalue()))
    assert written[1] < 2.2 * written[0]


def test_drawing_is_limited_in_rate() -> None:
    output = StringIO()
    console = Console(file=output, width=80, height=24, force_terminal=True, color_system=None)
    began_s = time.monotonic()
    with MarkdownStream(console) as stream:
        for _ in range(2000):
            stream.feed("word ")
    frames = output.getvalue().count("\x1b[2K\x1b[1A") + 1
    assert frames <= 40 * (2 + 15 * (time.monotonic() - began_s))


def test_figures() -> None:
    assert figures.size(512) == "512 B"
    assert figures.size(98_362_432) == "93.8 MiB"
    assert figures.speed(10, 0) == "-"
    assert figures.speed(10, 4) == "2.5 tokens/s"
    assert [figures.duration(s) for s in (0.04, 9.96, 59.6, 185, 3723, 9_278_967)] == [
        "0.0 s",
        "10.0 s",
        "1:00 min",
        "3:05 min",
        "1:02:03 h",
        "107 days 9 h",
    ]
    assert figures.tokens(1) == "1 token"
    assert figures.tokens(8192) == "8,192 tokens"


@pytest.mark.parametrize("columns", [30, 40, 80])
def test_a_bar_is_one_line_whatever_the_width(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SHOW_AFTER_S", 0.0)
    output = StringIO()
    console = Console(file=output, width=columns, height=24, force_terminal=True, color_system=None)
    with progress.bar(console, "reading a-rather-long-file-name.txt", "tokens") as bar:
        bar.update(512, 131072, 1.0)
        time.sleep(0.3)  # a frame or two
    raw = output.getvalue()
    assert "4:15 min left" in raw
    assert max(len(line) for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", raw).split("\n")) <= columns
    assert [line for line in screen(raw, columns) if line] == []


def test_what_is_done_at_once_shows_no_bar() -> None:
    output = StringIO()
    console = Console(file=output, width=80, height=24, force_terminal=True, color_system=None)
    with progress.bar(console, "reading", "tokens") as bar:
        bar.update(5, 5, 0.1)
    assert "reading" not in output.getvalue()
    assert [line for line in screen(output.getvalue(), 80) if line] == []


def test_a_pipe_gets_no_bar() -> None:
    output = StringIO()
    with progress.bar(Console(file=output, width=80), "reading", "tokens") as bar:
        bar.update(5, 5, 0.1)
        bar.measuring(5, 10)
    assert output.getvalue() == ""


def test_a_pipe_is_told_once_of_long_work_that_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SAY_AFTER_S", -1.0)
    output = StringIO()
    with progress.bar(Console(file=output, width=80, quiet=True), "loading", "layers") as bar:
        bar.identifying(1, 10)
        bar.identifying(2, 10)
        bar.measuring(3, 4)
    first, second = output.getvalue().splitlines()
    assert first.startswith("finding the retrieval heads, once for this model: 10%")
    assert second.startswith("measuring KV formats, once for this model: 75%")
