"""HTML to text in the manner of Markdown: headings, lists, tables, code and quotes keep their marks.

The parser is Python's own, which never fails on bad markup. What a reader sees is kept, menus and footers included;
scripts, styles and the addresses of links and pictures are not. Nesting costs no stack, and its depth is bounded
where it would cost time.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser

from duolocal.documents.converted import MAX_TEXT, ConversionError, Converted
from duolocal.documents.text import NotTextError, decode

_SPACE = re.compile(r"[ \t\n\r\f\xa0]+")
_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]{2,40})""", re.IGNORECASE)
_XML_ENCODING = re.compile(rb"""^\s*<\?xml[^>]{0,100}?encoding\s*=\s*["']([A-Za-z0-9_:.-]{2,40})""")
_DROPPED = frozenset(("script", "style", "template", "svg", "object", "iframe", "canvas", "noembed", "noframes", "rp"))
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_BLOCKS = frozenset(
    """
    p div section article main header footer nav aside address figure figcaption form fieldset legend details
    summary dl dt dd ul ol li table caption thead tbody tfoot tr blockquote pre hr h1 h2 h3 h4 h5 h6 body html title
    hgroup center dialog menu search option optgroup select textarea
    """.split()  # noqa: SIM905
)
_TIGHT = frozenset(("li", "dt", "dd", "option", "summary", "legend", "figcaption", "caption", "tr"))
_MAX_LISTS, _MAX_QUOTES, _MAX_TABLES = 8, 4, 12  # nesting beyond is shown flat
_MAX_TITLE = 500  # characters
_MAX_CELL = 600  # characters; a table with longer cells is a page layout


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert a web page; raises ConversionError."""
    try:
        decoded = decode(data, declared=declared_encoding(data))
    except NotTextError as error:
        raise ConversionError(str(error)) from error
    title, text = html_to_text(decoded.text)
    if not text:
        raise ConversionError("yields no text: it may be made by its scripts; open it in a browser and save the text")
    if title and title.casefold() not in text[: 4 * len(title) + 400].casefold():
        text = f"# {title}\n\n{text}"
    return Converted(text, (), decoded.notes, decoded.encoding, decoded.num_replaced)


def declared_encoding(data: bytes) -> str | None:
    """Return the encoding that a page says it is in."""
    match = _XML_ENCODING.search(data[:200]) or _CHARSET.search(data[:4096])
    return match[1].decode("ascii") if match else None


def html_to_text(markup: str) -> tuple[str, str]:
    """Return the title of a page (or an empty string) and its text."""
    reader = _Reader()
    reader.feed(markup)
    reader.close()
    return reader.finish()


@dataclass
class _Table:
    """A table being read; its cells are the texts of the frames that were closed in it."""

    rows: list[list[str]] = field(default_factory=list)
    is_layout: bool = False  # it holds another table, or whole paragraphs


@dataclass
class _Frame:
    """Text being built: the page itself, or a cell of a table."""

    table: _Table | None = None  # the one that this is a cell of
    blocks: list[tuple[str, bool]] = field(default_factory=list)  # (text, whether the next follows closely)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._frames = [_Frame()]
        self._tables: list[_Table] = []
        self._line: list[str] = []  # the block being read
        self._spaced = True  # whether it ends with white space (or is empty)
        self._mark = ""  # before its first line: "# ", "- "
        self._tight = False
        self._lists: list[int | None] = []  # the next number, None for a list without
        self._quotes = 0
        self._preformatted = 0
        self._dropped: list[str] = []  # open elements whose content is not shown
        self._title: list[str] | None = None
        self._page_title = ""
        self._length = 0

    # --- from the parser -------------------------------------------------------------------------------------------

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._dropped:
            if tag == self._dropped[0] and len(self._dropped) < 1000:
                self._dropped.append(tag)
            return
        if tag in _DROPPED:
            self._dropped.append(tag)
            return
        if tag in _BLOCKS:
            self._end_block()
        self._tight = tag in _TIGHT
        match tag:
            case "br":
                self._push("\n", raw=True)
            case "hr":
                self._add("---", tight=False)
            case "title" if not self._tables:
                self._title = self._title or []
            case "ul" | "menu":
                self._lists.append(None)
            case "ol":
                start = str(dict(attrs).get("start") or "1")
                self._lists.append(int(start) if start.isascii() and start.isdigit() and len(start) < 9 else 1)
            case "li":
                self._mark = self._item_mark()
            case "blockquote":
                self._quotes += 1
            case "pre":
                self._preformatted += 1
            case "code" | "kbd" | "samp" if not self._preformatted:
                self._push("`")
            case "img":
                alt = _SPACE.sub(" ", dict(attrs).get("alt") or "").strip()
                if alt:
                    self._push(f"[image: {alt}]")
            case "table" if len(self._tables) < _MAX_TABLES:
                if self._tables:
                    self._tables[-1].is_layout = True
                self._tables.append(_Table())
            case "tr" if self._tables:
                self._end_cell()
                self._tables[-1].rows.append([])
            case "td" | "th" if self._tables:
                self._end_cell()
                self._frames.append(_Frame(self._tables[-1]))
            case _:
                if tag in _HEADINGS:
                    self._mark = _HEADINGS[tag]

    def handle_endtag(self, tag: str) -> None:
        if self._dropped:
            if tag == self._dropped[-1]:
                self._dropped.pop()
            return
        if tag in _BLOCKS:
            self._end_block()
            self._tight = False
        match tag:
            case "title" if self._title is not None:
                title, self._title = _SPACE.sub(" ", "".join(self._title)).strip(), None
                if self._page_title or len(title) > _MAX_TITLE:
                    self._push(title)  # a page has one; what else is called so is text
                else:
                    self._page_title = title
            case "ul" | "ol" | "menu" if self._lists:
                self._lists.pop()
                self._loosen()
            case "dl" | "select" | "fieldset":
                self._loosen()
            case "blockquote" if self._quotes:
                self._quotes -= 1
            case "pre" if self._preformatted:
                self._preformatted -= 1
            case "code" | "kbd" | "samp" if not self._preformatted:
                self._push("`")
            case "td" | "th" | "tr":
                self._end_cell()
            case "table" if self._tables:
                self._end_table()

    def handle_data(self, data: str) -> None:
        if self._dropped:
            return
        if self._title is not None:
            self._title.append(data)
        elif self._preformatted:
            self._push(data.replace("\r\n", "\n"), raw=True)
        else:
            self._push(data)

    # --- blocks ----------------------------------------------------------------------------------------------------

    def _push(self, text: str, *, raw: bool = False) -> None:
        if not raw:
            text = _SPACE.sub(" ", text)
            if self._spaced:
                text = text.removeprefix(" ")
        elif text == "\n" and self._line and self._line[-1].endswith(" ") and not self._preformatted:
            self._line[-1] = self._line[-1].rstrip(" ")
        if not text:
            return
        self._length += len(text)
        if self._length > MAX_TEXT:
            raise ConversionError(f"holds more than {MAX_TEXT:,} characters of text: cut it up")
        self._line.append(text)
        self._spaced = text[-1] in " \n"

    def _end_block(self) -> None:
        text = "".join(self._line)
        self._line, self._spaced = [], True
        mark, self._mark = self._mark, ""
        if self._preformatted:
            text = text.strip("\n").rstrip()
            if text:
                fence = "```" if "```" not in text else "~~~~"
                self._add(f"{mark}{fence}\n{text}\n{fence}", tight=False)
            return
        text = text.strip()
        if not text.strip("`"):
            self._mark = mark  # <li><p>text: the mark is for what comes
            return
        if mark.startswith("#"):
            text = " ".join(text.split("\n"))
        indent = "  " * max(0, min(len(self._lists), _MAX_LISTS) - 1)
        if self._lists and not mark:
            indent += "  "  # a further paragraph of an item
        text = (f"{indent}{mark}" if self._lists else mark) + text.replace("\n", f"\n{indent}" if indent else "\n")
        self._add(text, tight=self._tight or bool(self._lists))

    def _add(self, text: str, *, tight: bool) -> None:
        quotes = min(self._quotes, _MAX_QUOTES)
        if quotes:
            text = "> " * quotes + text.replace("\n", "\n" + "> " * quotes)
        self._frames[-1].blocks.append((text, tight))

    def _loosen(self) -> None:
        """Let a blank line follow a list."""
        blocks = self._frames[-1].blocks
        if blocks and not self._lists:
            blocks[-1] = (blocks[-1][0], False)

    def _item_mark(self) -> str:
        if not self._lists or (number := self._lists[-1]) is None:
            return "- "
        self._lists[-1] = number + 1
        return f"{number}. "

    # --- tables ----------------------------------------------------------------------------------------------------

    def _end_cell(self) -> None:
        self._end_block()
        if len(self._frames) == 1 or self._frames[-1].table is not self._tables[-1]:
            return
        frame = self._frames.pop()
        table = self._tables[-1]
        text = _joined(frame.blocks)
        if len(text) > _MAX_CELL:
            table.is_layout = True
        if not table.rows:
            table.rows.append([])
        table.rows[-1].append(text)

    def _end_table(self) -> None:
        self._end_cell()
        table = self._tables.pop()
        rows = [row for row in table.rows if any(row)]
        columns = max((len(row) for row in rows), default=0)
        if not rows:
            return
        if table.is_layout or columns < 2:
            for row in rows:
                for cell in row:
                    if cell:
                        self._add(cell, tight=False)
            return
        lines = []
        for at, row in enumerate(rows):
            cells = [" ".join(cell.split()).replace("|", "\\|") for cell in row]
            lines.append("| " + " | ".join(cells + [""] * (columns - len(cells))).rstrip() + " |")
            if at == 0:
                lines.append("|" + " --- |" * columns)
        self._add("\n".join(lines), tight=False)

    def finish(self) -> tuple[str, str]:
        """Close whatever is open and return title and text."""
        if self._title is not None:  # a title that never ends holds the page
            self._line.append("".join(self._title))
            self._title = None
        self._end_block()
        while self._tables:
            self._end_table()
        return self._page_title, _joined(self._frames[0].blocks).strip("\n")


def _joined(blocks: list[tuple[str, bool]]) -> str:
    pieces: list[str] = []
    for at, (text, _) in enumerate(blocks):
        if at:
            pieces.append("\n" if blocks[at - 1][1] else "\n\n")
        pieces.append(text)
    return "".join(pieces)
