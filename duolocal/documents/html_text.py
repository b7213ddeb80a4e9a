"""HTML to text in the manner of Markdown (`blocks`).

The parser is Python's own, which never fails on bad markup. What a reader sees is kept, menus and footers included;
scripts, hidden text and the addresses of links and pictures are not. Of style sheets it is heeded what strikes, raises
or lowers text; what they hide is shown, since most of it is what a click shows.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import NamedTuple

from duolocal.documents.blocks import SPACE, TextBuilder
from duolocal.documents.converted import ConversionError, Converted
from duolocal.documents.embedded import without_pictures
from duolocal.documents.inline import PLAIN, Style
from duolocal.documents.numbering import numbered
from duolocal.documents.text import decode
from duolocal.documents.told import Told

_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]{2,40})""", re.IGNORECASE)
_XML_ENCODING = re.compile(rb"""^\s*<\?xml[^>]{0,100}?encoding\s*=\s*["']([A-Za-z0-9_:.-]{2,40})""")
_DROPPED = frozenset(
    """script style template object iframe canvas noembed noframes annotation annotation-xml""".split()  # noqa: SIM905
)
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_BLOCKS = frozenset(
    """
    p div section article main header footer nav aside address figure figcaption form fieldset legend details
    summary dl dt dd ul ol li table caption thead tbody tfoot tr blockquote pre hr h1 h2 h3 h4 h5 h6 body html title
    hgroup center dialog menu search option optgroup select textarea
    """.split()  # noqa: SIM905
)
_TIGHT = frozenset(("li", "dt", "dd", "option", "summary", "legend", "figcaption", "caption", "tr"))
_VOID = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr")
)
# Elements that end where one of these begins, and what they are never looked for beyond.
_ENDED = {
    "li": ("li",),
    "dt": ("dt", "dd"),
    "dd": ("dt", "dd"),
    "td": ("td", "th"),
    "th": ("td", "th"),
    "tr": ("tr", "td", "th"),
    "tbody": ("thead", "tbody", "tfoot", "tr", "td", "th"),
    "tfoot": ("thead", "tbody", "tfoot", "tr", "td", "th"),
    "option": ("option",),
    "rt": ("rt", "rb", "rp"),
    "rb": ("rt", "rb", "rp"),
    "rp": ("rt", "rb", "rp"),
}
_BARRIERS = frozenset(("ul", "ol", "menu", "dl", "table", "select", "ruby"))
_SILENT = frozenset(("rp", "svg"))  # what is for browsers that know no ruby; drawings, but for the text in them
_MAX_OPEN, _MAX_SEARCH = 2000, 64  # elements
_MAX_TITLE = 500  # characters
_MAX_CELL = 600  # characters; a table with longer cells is a page layout
_RAISED = {"sup": 1, "sub": -1}
# Formulas: how the children of an element stand, in their order.
_SCRIPTS = {"msup": (0, 1), "msub": (0, -1), "msubsup": (0, -1, 1), "mover": (0, 1), "munder": (0, -1)}
_SCRIPTS["munderover"] = (0, -1, 1)
_STYLE = re.compile(
    r"(?P<hidden>\bdisplay\s*:\s*none|\bvisibility\s*:\s*(?:hidden|collapse)|\bmso-hide\s*:\s*all)"
    r"|(?P<struck>\btext-decoration(?:-line)?\s*:[^;]*line-through)|vertical-align\s*:\s*(?P<level>super|sub)\b"
    r"|\blist-style(?:-type)?\s*:[^;]*?(?P<list>(?:lower|upper)-(?:roman|alpha|latin|greek)|decimal-leading-zero)",
    re.IGNORECASE,
)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_AT_RULE = re.compile(r"@[^{};]*+\{(?:[^{}]*+\{[^{}]*+\})*+[^{}]*+\}")  # for print, for narrow screens
_RULE = re.compile(r"([^{}]*+)\{([^{}]*+)\}")
_CLASS = re.compile(r"\s*[A-Za-z0-9]*\.([\w-]+)\s*")
_MAX_CSS = 2**20  # characters
_LIST_TYPES = {
    **{"a": "lowerAlpha", "A": "upperAlpha", "i": "lowerRoman", "I": "upperRoman"},
    **{"lower-roman": "lowerRoman", "upper-roman": "upperRoman", "lower-alpha": "lowerAlpha"},
    **{"upper-alpha": "upperAlpha", "lower-latin": "lowerAlpha", "upper-latin": "upperAlpha"},
    **{"lower-greek": "lowerGreek", "decimal-leading-zero": "decimalZero"},
}
_WHOLE = re.compile(r"\s*(-?\d{1,8})", re.ASCII)
_COUNTED_BACK = re.compile("\0(\\d+):(\\d+)\0")  # an item of a list that counts down from its length: list and place
_FIELDS = frozenset(("", "text", "number", "date", "email", "tel", "url", "search", "time", "month", "datetime-local"))


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert a web page; raises ConversionError."""
    decoded = decode(data, declared=declared_encoding(data))
    page = read_page(decoded.text)
    text = page.text
    if not text:
        raise ConversionError("yields no text: it may be made by its scripts; open it in a browser and save the text")
    if page.title and page.title.casefold() not in text[: 4 * len(page.title) + 400].casefold():
        text = f"# {page.title}\n\n{text}"
    notes = (*decoded.notes, *Told(hidden=page.num_hidden).notes())
    return without_pictures(Converted(text, (), notes, decoded.encoding, decoded.num_replaced))


def declared_encoding(data: bytes) -> str | None:
    """Return the encoding that a page says it is in."""
    match = _XML_ENCODING.search(data[:200]) or _CHARSET.search(data[:4096])
    return match[1].decode("ascii") if match else None


def classes_of(css: str) -> dict[str, Style]:
    """Return which classes of a style sheet strike, raise or lower text."""
    found = {}
    for selectors, properties in _RULE.findall(_AT_RULE.sub("", _COMMENT.sub("", css[:_MAX_CSS]))):
        style = _styled(properties, PLAIN)
        if style != PLAIN:
            names = (_CLASS.fullmatch(selector) for selector in selectors.split(","))
            found.update({name[1]: style for name in names if name})
    return found


def _styled(properties: str, style: Style) -> Style:
    for match in _STYLE.finditer(properties[:2000]):
        if match["struck"]:
            style = style._replace(is_struck=True)
        elif match["level"]:
            style = style._replace(level=1 if match["level"].lower() == "super" else -1)
    return style


class Page(NamedTuple):
    """A page as text, and how many of its elements hide text."""

    title: str
    text: str
    num_hidden: int


def read_page(markup: str, classes: dict[str, Style] | None = None) -> Page:
    """Return a page as text; `classes` are those of its style sheets, if they are known."""
    reader = _Reader(classes or {})
    reader.feed(markup)
    reader.close()
    return reader.finish()


@dataclass
class _List:
    """An open list: how its items are numbered, if they are."""

    style: str | None = None  # None: not at all
    number: int | None = 1  # of the next item; None while it depends on how many there are
    step: int = 1
    count: int = 0
    key: int = 0  # of all lists of the page


@dataclass
class _Open:
    """An element that is open: what held before it, and whether it hides what is in it."""

    tag: str
    style: Style
    was_hidden: bool
    is_hidden: bool
    closing: str = ""  # what ends it
    count: int = 0  # elements in it


class _Reader(HTMLParser):
    def __init__(self, classes: dict[str, Style]) -> None:
        super().__init__(convert_charrefs=True)
        self._classes = dict(classes)
        self._css: list[str] = []
        self._out = TextBuilder(max_cell=_MAX_CELL)
        self._lists: list[_List] = []
        self._counted: dict[int, _List] = {}  # lists that count down from their length, which is known at the end
        self._open: list[_Open] = []
        self._is_hidden = False
        self._has_hidden = False  # text, in the element that hides it
        self._num_hidden = 0
        self._dropped: list[str] = []  # open elements whose content is not shown to anyone
        self._title: list[str] | None = None
        self._page_title = ""

    # --- from the parser -------------------------------------------------------------------------------------------

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._dropped:
            if tag == self._dropped[0] and len(self._dropped) < 1000:
                self._dropped.append(tag)
            return
        self._end_implied(tag)
        if tag in _DROPPED:
            self._dropped.append(tag)
            return
        attributes = {name: value or "" for name, value in attrs}
        was_hidden, style = self._is_hidden, self._out.style
        closing = self._in_formula(tag) if self._open else ""
        found = self._apply(tag, attributes)
        if tag not in _VOID and len(self._open) < _MAX_OPEN:
            closing = ")" if tag in ("rt", "msqrt") else closing
            self._open.append(_Open(tag, style, was_hidden, self._is_hidden, closing))
            style, was_hidden = self._out.style, self._is_hidden
        if not self._is_hidden:
            self._start(tag, attributes, found)
        self._out.style, self._is_hidden = style, was_hidden  # of what holds nothing

    def handle_endtag(self, tag: str) -> None:
        if self._dropped:
            if tag == self._dropped[-1]:
                self._dropped.pop()
                if self._css:
                    self._classes |= classes_of("".join(self._css))
                    self._css = []
            return
        is_hidden = self._is_hidden
        for at in range(len(self._open) - 1, max(-1, len(self._open) - 1 - _MAX_SEARCH), -1):
            if self._open[at].tag == tag:
                is_hidden = self._open[at].is_hidden
                self._close(at)
                break
        if not is_hidden:
            self._end(tag)

    def handle_data(self, data: str) -> None:
        if self._dropped:
            if self._dropped[0] == "style":
                self._css.append(data)
            return
        if "\0" in data:
            data = data.replace("\0", "\ufffd")
        if self._is_hidden:
            is_silent = any(item.tag in _SILENT for item in self._open[-_MAX_SEARCH:])
            self._has_hidden = self._has_hidden or (bool(data.strip()) and not is_silent)
        elif self._title is not None:
            self._title.append(data)
        elif self._out.preformatted:
            self._out.push(data.replace("\r\n", "\n"), raw=True)
        else:
            self._out.push(data)

    # --- what is open ----------------------------------------------------------------------------------------------

    def _apply(self, tag: str, attributes: dict[str, str]) -> str:
        """Let an element strike, raise or hide what is in it; return the kind of list that its style says."""
        out, kind = self._out, ""
        if tag in ("s", "strike", "del"):
            out.style = out.style._replace(is_struck=True)
        elif tag in _RAISED:
            out.style = out.style._replace(level=_RAISED[tag])
        if tag in ("text", "foreignobject"):
            drawing = next((item for item in reversed(self._open[-_MAX_SEARCH:]) if item.tag == "svg"), None)
            self._is_hidden = self._is_hidden if drawing is None else drawing.was_hidden
        if tag in _SILENT or ("hidden" in attributes and attributes["hidden"] != "until-found"):
            self._is_hidden = True
        if self._classes and "class" in attributes:
            for name in attributes["class"].split()[:20]:
                if (style := self._classes.get(name)) is not None:
                    out.style = Style(out.style.is_struck or style.is_struck, style.level or out.style.level)
        if "style" not in attributes:
            return kind
        out.style = _styled(attributes["style"], out.style)
        for match in _STYLE.finditer(attributes["style"][:2000]):
            if match["hidden"]:
                self._is_hidden = True
            elif match["list"]:
                kind = match["list"].lower()
        return kind

    def _in_formula(self, tag: str) -> str:
        """Write what stands between the parts of a formula; return what closes the part that begins."""
        parent = self._open[-1]
        parent.count += 1
        out = self._out
        if (levels := _SCRIPTS.get(parent.tag)) and parent.count <= len(levels):
            out.style = out.style._replace(level=levels[parent.count - 1] or out.style.level)
        elif parent.tag == "mfrac" and not self._is_hidden:
            out.push("/" if parent.count == 2 else "")
            if tag == "mrow":
                out.push("(")
                return ")"
        return ""

    def _end_implied(self, tag: str) -> None:
        """Close what a start tag ends although no end tag says so."""
        ended = _ENDED.get(tag) or (("p",) if tag in _BLOCKS else ())
        found = None
        if ended:
            for at in range(len(self._open) - 1, max(-1, len(self._open) - 1 - _MAX_SEARCH), -1):
                name = self._open[at].tag
                if name in ended:
                    found = at
                elif name in _BARRIERS or (ended == ("p",) and name in ("td", "th", "li", "button", "object")):
                    break
        if found is not None:
            self._close(found)

    def _close(self, at: int) -> None:
        """Close the element at a place of the stack and all that were opened in it."""
        for item in reversed(self._open[at:]):
            if item.closing and not item.is_hidden:
                self._out.close_bracket()
            if item.is_hidden and not item.was_hidden:
                self._num_hidden += self._has_hidden
                self._has_hidden = False
        self._out.style, self._is_hidden = self._open[at].style, self._open[at].was_hidden
        del self._open[at:]

    def _start(self, tag: str, attributes: dict[str, str], kind: str) -> None:
        out = self._out
        if tag in _BLOCKS:
            out.end()
        out.is_tight = tag in _TIGHT
        match tag:
            case "br":
                out.break_line()
            case "hr":
                out.add("---")
            case "title" if not out.in_table:
                self._title = self._title or []
            case "ul" | "menu":
                self._lists.append(_List())
                out.lists += 1
            case "ol":
                self._lists.append(self._numbered(attributes, kind))
                out.lists += 1
            case "li":
                out.mark = self._item_mark(attributes)
            case "blockquote":
                out.quotes += 1
            case "pre":
                out.preformatted += 1
            case "code" | "kbd" | "samp" if not out.preformatted:
                out.push("`")
            case "text" | "foreignobject":  # of a drawing
                out.end()
            case "rt":
                out.push("(")
            case "msqrt":
                out.push("√")
                out.push("(")
            case "img":
                alt = SPACE.sub(" ", attributes.get("alt", "")).strip()
                if alt:
                    out.push(f"[image: {alt}]")
            case "input":
                self._input(attributes)
            case "option" if "selected" in attributes:
                out.push("[x] ")
            case "table":
                out.open_table()
            case "thead" | "tbody" | "tfoot" if out.in_table:
                out.close_rows()
            case "tr" if out.in_table:
                out.open_row()
            case "td" | "th" if out.in_table:
                rows = _span(attributes.get("rowspan", "")) or 65_535  # 0: to the end of the group
                out.open_cell(columns=_span(attributes.get("colspan", "")), rows=rows)
            case _:
                if tag in _HEADINGS:
                    out.mark = _HEADINGS[tag]
                elif attributes.get("role") == "checkbox":
                    out.push("[x] " if attributes.get("aria-checked") == "true" else "[ ] ")

    def _end(self, tag: str) -> None:
        out = self._out
        if tag in _BLOCKS:
            out.end()
            out.is_tight = False
        match tag:
            case "title" if self._title is not None:
                title, self._title = SPACE.sub(" ", "".join(self._title)).strip(), None
                if self._page_title or len(title) > _MAX_TITLE:
                    out.push(title)  # a page has one; what else is called so is text
                else:
                    self._page_title = title
            case "ul" | "ol" | "menu" if self._lists:
                self._lists.pop()
                out.close_list()
            case "dl" | "select" | "fieldset":
                out.loosen()
            case "blockquote" if out.quotes:
                out.quotes -= 1
            case "pre" if out.preformatted:
                out.preformatted -= 1
            case "code" | "kbd" | "samp" if not out.preformatted:
                out.push("`")
            case "text" | "foreignobject":
                out.end()
            case "td" | "th" | "tr" if out.in_table:
                out.close_cell()
            case "thead" | "tbody" | "tfoot" if out.in_table:
                out.close_rows()
            case "table" if out.in_table:
                out.close_table()

    # --- lists and fields ------------------------------------------------------------------------------------------

    def _numbered(self, attributes: dict[str, str], kind: str) -> _List:
        style = _LIST_TYPES.get(attributes.get("type", ""), _LIST_TYPES.get(kind, "decimal"))
        back = "reversed" in attributes
        start = _WHOLE.match(attributes.get("start", ""))
        number = int(start[1]) if start else None if back else 1
        found = _List(style, number, -1 if back else 1, key=len(self._counted))
        if number is None:
            self._counted[found.key] = found
        return found

    def _item_mark(self, attributes: dict[str, str]) -> str:
        if not self._lists or (inner := self._lists[-1]).style is None:
            return "- "
        inner.count += 1
        if value := _WHOLE.match(attributes.get("value", "")):
            inner.number = int(value[1])
        style = _LIST_TYPES.get(attributes.get("type", ""), inner.style)
        if inner.number is None:
            return f"\0{inner.key}:{inner.count}\0. "
        number = inner.number
        inner.number += inner.step
        return f"{numbered(number, style)}. "

    def _input(self, attributes: dict[str, str]) -> None:
        kind = attributes.get("type", "").lower()
        if kind in ("checkbox", "radio"):
            self._out.push("[x] " if "checked" in attributes else "[ ] ")
        elif kind in _FIELDS and attributes.get("value", "").strip():
            self._out.push(f" {attributes['value']} ")

    def finish(self) -> Page:
        """Close whatever is open and return title and text."""
        if self._title is not None:  # a title that never ends holds the page
            self._out.push("".join(self._title), raw=True)
            self._title = None
        if self._open:
            self._close(0)
        text = _COUNTED_BACK.sub(self._counted_back, self._out.text())
        return Page(self._page_title, text, self._num_hidden)

    def _counted_back(self, match: re.Match[str]) -> str:
        counted = self._counted[int(match[1])]
        return numbered(counted.count - int(match[2]) + 1, counted.style or "decimal")


def _span(text: str) -> int:
    match = _WHOLE.match(text)
    return int(match[1]) if match and int(match[1]) >= 0 else 1
