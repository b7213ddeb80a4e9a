"""Markdown as it streams: finished blocks are printed once, only the open block is redrawn.

Redrawing a whole answer flickers and cannot scroll. CommonMark decides at the start of a block that the one
before it is finished, so everything but the last top-level block is printed for good, and the live region
holds that one block, cropped to the screen from above.
"""

import time
from collections.abc import Iterable
from typing import Any, ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import CodeBlock, Heading, Markdown
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax

from duolocal.terminal.clean import clean

_FRAME_S = 1 / 15


def _parser() -> MarkdownIt:
    # HTML off: a tag in an answer is text to read, and Rich would drop it in silence.
    return MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


class _PlainHeading(Heading):
    """A heading at the left, without the box that Rich draws around the first level."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        if self.tag in ("h1", "h2"):
            self.text.stylize(Style(bold=True, underline=self.tag == "h1"))
        yield self.text


class _PlainCode(CodeBlock):
    """Code in the terminal's own colours, without padding, so that it copies cleanly."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme="ansi_dark", background_color="default", word_wrap=True, tab_size=4)


class SafeMarkdown(Markdown):
    """Markdown of an untrusted text: no HTML, no hidden links, no control characters, line breaks kept."""

    elements: ClassVar[dict[str, Any]] = {
        **Markdown.elements,
        "heading_open": _PlainHeading,
        "fence": _PlainCode,
        "code_block": _PlainCode,
    }

    def __init__(self, markup: str) -> None:
        super().__init__("", hyperlinks=False)
        self.markup = clean(markup)
        self.parsed = _parser().parse(self.markup)
        _tidy(self.parsed)


def _tidy(parsed: Iterable[Token]) -> None:
    for token in parsed:
        # Entities such as &#x202e; become characters only here.
        token.content = clean(token.content)
        if token.type == "softbreak":
            token.type = "hardbreak"  # people and models write lines as they want them shown
        if token.children:
            _tidy(token.children)


def split_finished(text: str) -> tuple[str, str]:
    """Split Markdown into (finished blocks, the open last block); their concatenation is `text`."""
    starts = [token.map[0] for token in _parser().parse(text) if token.level == 0 and token.map]
    if len(starts) < 2 or starts[-1] == 0:
        return "", text
    lines = text.splitlines(keepends=True)
    # splitlines also cuts at characters that are no line ends in CommonMark.
    if len(lines) != text.count("\n") + (not text.endswith("\n")):
        lines = [line + "\n" for line in text.split("\n")]
        lines[-1] = lines[-1][:-1]
    return "".join(lines[: starts[-1]]), "".join(lines[starts[-1] :])


class _Block:
    """Rendered Markdown without blank lines around it; `rows` crops it from above for a live region."""

    def __init__(self, text: str, *, gap: bool, rows: int | None = None) -> None:
        self.text = text
        self.gap = gap  # a blank line towards the block before
        self.rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(SafeMarkdown(self.text), options.update(height=None), pad=False)
        while lines and _is_blank(lines[0]):
            del lines[0]
        while lines and _is_blank(lines[-1]):
            del lines[-1]
        if self.gap and lines:
            lines = [[], *lines]
        for line in lines if self.rows is None else lines[-self.rows :]:
            yield from line
            yield Segment.line()


def _is_blank(line: list[Segment]) -> bool:
    return not any(segment.text.strip() for segment in line)


class MarkdownStream:
    """Prints a growing Markdown text; a context manager that leaves the terminal clean when it is left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._open = ""
        self._printed_any = False
        self._drawn_s = 0.0
        self._live = Live("", console=console, auto_refresh=False, transient=True, vertical_overflow="visible")

    def __enter__(self) -> "MarkdownStream":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Erase the live block first: what is printed next is the same text, for good.
        self._live.update("")
        self._live.stop()
        if self._open.strip():
            self._print(self._open)
        self._open = ""

    def feed(self, text: str) -> None:
        """Add text; draw at most 15 times a second."""
        self._open += text
        now_s = time.monotonic()
        if now_s - self._drawn_s < _FRAME_S:
            return
        self._drawn_s = now_s
        finished, self._open = split_finished(self._open)
        if finished.strip():
            # First hand the live region its new text, so that the old one is never seen twice.
            self._live.update(self._tail(gap=True))
            self._print(finished)
        self._live.update(self._tail(gap=self._printed_any), refresh=True)

    def _tail(self, *, gap: bool) -> _Block:
        return _Block(self._open, gap=gap, rows=max(1, self._console.height - 2))

    def _print(self, text: str) -> None:
        self._console.print(_Block(text, gap=self._printed_any), end="")
        self._printed_any = True
