"""Rich text (RTF) to text: paragraphs, headings, tables, the numbers of lists as they stand in the file, ticks, notes.

Not read, and told: pictures, embedded files, headers, footers, hidden and deleted text.
"""

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from duolocal.documents.blocks import TextBuilder
from duolocal.documents.converted import ConversionError, Converted
from duolocal.documents.inline import PLAIN, Style
from duolocal.documents.symbols import in_symbols, is_symbol_font
from duolocal.documents.told import Told

_TOKEN = re.compile(
    r"\\(?P<word>[A-Za-z]{1,32})(?P<number>-?\d{1,10})? ?|\\'(?P<byte>[0-9A-Fa-f]{2})|\\(?P<sign>[^A-Za-z])"
    r"|(?P<brace>[{}])|(?P<text>[^\\{}\r\n]+)|[\r\n]+|\\",
    re.DOTALL,
)
_MAX_GROUPS = 5_000  # within each other
_REPORT_TOKENS = 200_000
# Groups without text that a reader sees. A group that begins with \* and is not among the known ones is skipped too.
_SKIPPED = frozenset(
    """fonttbl colortbl stylesheet info fldinst datafield filetbl listtable listoverridetable rsidtbl revtbl themedata
    colorschememapping datastore latentstyles xmlnstbl generator bkmkstart bkmkend object objdata nonshppict shprslt
    header headerl headerr headerf footer footerl footerr footerf ftnsep ftnsepc aftnsep pntxta pntxtb template
    formfield mmath operator author title upr do sp blipuid picprop atnid atntime atndate atnref""".split()  # noqa: SIM905
)
_KNOWN = frozenset(("shpinst", "shptxt", "ud", "footnote", "annotation", "pict", "fldrslt", "atnauthor", "formfield"))
_RUNNING = frozenset(("header", "headerl", "headerr", "headerf", "footer", "footerl", "footerr", "footerf"))
_SIGNS = {"emdash": "—", "endash": "–", "lquote": "‘", "rquote": "’", "ldblquote": "“", "rdblquote": "”", "bullet": "•"}
_SIGNS |= dict.fromkeys(("emspace", "enspace", "qmspace"), " ")
_SIGNS |= {"zwj": "\u200d", "zwnj": "\u200c", "tab": "\t", "nestcell": "; "}
_CHARSETS = {
    **{0: "cp1252", 77: "mac_roman", 128: "cp932", 129: "cp949", 130: "johab", 134: "gb18030", 136: "big5"},
    **{161: "cp1253", 162: "cp1254", 163: "cp1258", 177: "cp1255", 178: "cp1256", 186: "cp1257", 204: "cp1251"},
    **{222: "cp874", 238: "cp1250", 255: "cp850"},
}
_HEADING = re.compile(r"heading ([1-9])", re.IGNORECASE)


@dataclass(frozen=True)
class _State:
    """What holds in a group."""

    destination: str = ""
    is_skipped: bool = False
    style: Style = PLAIN
    is_hidden: bool = False
    is_deleted: bool = False
    num_after_unicode: int = 1  # signs for old readers that follow one in Unicode
    font: int | None = None


@dataclass
class _Row:
    """A row of a table: where its cells end, which go on from others, and their texts."""

    ends: list[int] = field(default_factory=list)
    merged: list[bool] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def convert(data: bytes, report: Callable[[int, int], None]) -> Converted:
    """Convert a file of rich text; raises ConversionError."""
    reader = _Reader(data.decode("latin-1"), report)
    text = reader.read()
    if not text:
        raise ConversionError("is a rich-text file without text: it may hold pictures only; run OCR over them first")
    return Converted(text, (), reader.told.notes())


class _Reader:
    def __init__(self, source: str, report: Callable[[int, int], None]) -> None:
        self._source, self._report = source, report
        self._out = self._main = TextBuilder()
        self._state = _State()
        self._stack: list[_State] = []
        self._outer: list[tuple[int, TextBuilder, str]] = []  # groups that write elsewhere: depth, where, kind
        self.told = Told()
        self._codec = "cp1252"
        self._fonts: dict[int, tuple[str, str]] = {}  # codec and name
        self._named: list[str] = []  # text of the font or style that is being defined
        self._styles: dict[int, str] = {}
        self._number = self._charset = 0  # of the font or style that is being defined
        self._bytes = bytearray()
        self._num_ignored = 0  # signs that stand in for one in Unicode
        self._high = 0  # the first half of a sign beyond 16 bits
        self._outline = 0
        self._in_table = False
        self._defined = _Row()
        self._is_merged = False
        self._rows: list[_Row] = []
        self._cell: TextBuilder | None = None
        self._notes: list[str] = []
        self._boxes: list[str] = []  # text boxes of the paragraph
        self._box: dict[str, int] = {}  # of a form field
        self._starred = False

    def read(self) -> str:
        position = count = 0
        while match := _TOKEN.match(self._source, position):
            position = match.end()
            count += 1
            if count % _REPORT_TOKENS == 0:
                self._report(0, 1)
            if match["byte"]:
                self._byte(int(match["byte"], 16))
                continue
            self._flush()
            if match["word"]:
                number = int(match["number"]) if match["number"] else None
                if match["word"] == "bin":
                    position += max(0, number or 0)
                else:
                    self._word(match["word"], number)
            elif match["sign"]:
                self._sign(match["sign"])
            elif match["brace"] == "{":
                self._open()
            elif match["brace"]:
                self._close()
            elif match["text"]:
                self._text(match["text"])
        self._flush()
        while self._stack:
            self._close()
        self._end_paragraph()
        self._end_table()
        for number, text in enumerate(self._notes, 1):
            self._main.add(f"[{number}] {text}")
        return self._main.text()

    # --- groups ----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        if len(self._stack) >= _MAX_GROUPS:
            raise ConversionError("is nested deeper than a rich-text file can be: it is damaged or made to harm")
        self._stack.append(self._state)
        self._starred = False

    def _close(self) -> None:
        if not self._stack:
            return
        ended, self._state = self._state, self._stack.pop()
        if ended.destination != self._state.destination:
            if ended.destination == "formfield" and self._box.get("fftype") == 1:
                chosen = self._box.get("ffres", 25)
                chosen = self._box.get("ffdefres", 0) if chosen == 25 else chosen
                self._out.push("[x] " if chosen == 1 else "[ ] ")
            self._end_definition()
        while self._outer and len(self._stack) < self._outer[-1][0]:
            _, outer, kind = self._outer.pop()
            text, self._out = self._out.text(), outer
            if kind == "note":
                self._notes.append(" ".join(text.split("\n\n")))
                self._out.push(f"[{len(self._notes)}]")
            elif kind == "mark":
                mark = " ".join(text.split())
                is_bullet = len(mark) == 1 and not mark.isalnum()
                self._out.mark = "- " if is_bullet or not mark else f"{mark} "
            elif text:
                self._boxes.append(text)

    def _begin(self, destination: str) -> None:
        """Take the first word of a group that says what it is for."""
        state = self._state
        if destination in ("listtext", "pntext"):
            self._write_elsewhere("mark")
        elif destination in ("footnote", "annotation"):
            self._write_elsewhere("note")
        elif destination == "shptxt":
            self._write_elsewhere("box")
            state = replace(state, is_skipped=False)
        elif destination == "ud":
            state = replace(state, is_skipped=False)
        self._state = replace(
            state, destination=destination, is_skipped=state.is_skipped or destination in (*_SKIPPED, "shpinst")
        )
        if destination == "pict":
            # The same picture for old readers stands in a group that is skipped already.
            self.told["picture"] += not state.is_skipped or state.destination in ("shpinst", "shppict")
            self._state = replace(self._state, is_skipped=True)
        elif destination == "object":
            self.told["object"] += 1
        elif destination == "mmath":
            self.told["formula"] += 1
        elif destination == "formfield":
            self._box = {}

    def _write_elsewhere(self, kind: str) -> None:
        self._outer.append((len(self._stack), self._out, kind))
        self._out = TextBuilder()

    # --- words and text --------------------------------------------------------------------------------------------

    def _word(self, word: str, number: int | None) -> None:
        starred, self._starred = self._starred, False
        if word == "u":
            self._unicode(number or 0)
            return
        if word in _SKIPPED or word in _KNOWN or word in ("listtext", "pntext"):
            self._begin(word)
            return
        if starred:
            is_picture = word == "shppict"
            self._state = replace(self._state, destination=word, is_skipped=self._state.is_skipped or not is_picture)
            return
        state = self._state
        match word:
            case "uc":
                self._state = replace(state, num_after_unicode=max(0, min(number or 0, 10)))
            case "ansicpg":
                self._codec = _known(f"cp{number}") or self._codec
            case "mac" | "pc" | "pca":
                self._codec = {"mac": "mac_roman", "pc": "cp437", "pca": "cp850"}[word]
            case "f":
                self._state = replace(state, font=number)
                self._number = number or 0
            case "s" if state.destination == "stylesheet":
                self._number = number or 0
            case "fcharset":
                self._charset = number or 0
            case "fftype" | "ffres" | "ffdefres":
                self._box[word] = number or 0
            case "super" | "sub" | "up" | "dn":
                level = 0 if number == 0 else 1 if word in ("super", "up") else -1
                self._state = replace(state, style=state.style._replace(level=level))
            case "nosupersub":
                self._state = replace(state, style=state.style._replace(level=0))
            case "strike" | "striked":
                self._state = replace(state, style=state.style._replace(is_struck=number != 0))
            case "v":
                self._state = replace(state, is_hidden=number != 0)
            case "deleted":
                self._state = replace(state, is_deleted=number != 0)
            case "plain":
                self._state = replace(state, style=PLAIN, is_hidden=False, is_deleted=False)
            case _ if not state.is_skipped:
                self._layout(word, number)

    def _layout(self, word: str, number: int | None) -> None:
        match word:
            case "par" | "sect" | "page" | "column":
                self._end_paragraph()
            case "line" | "softline" | "nestrow":
                self._place().break_line()
            case "pard":
                self._in_table, self._outline = False, 0
            case "intbl":
                self._in_table = True
            case "outlinelevel":
                self._outline = min((number or 0) + 1, 6) if number is not None and number < 9 else 0
            case "s":
                heading = _HEADING.fullmatch(self._styles.get(number or 0, ""))
                self._outline = min(int(heading[1]), 6) if heading else self._outline
            case "trowd":
                self._defined = _Row()
            case "clvmrg" | "clmrg":
                self._is_merged = True
            case "cellx":
                self._defined.ends.append(number or 0)
                self._defined.merged.append(self._is_merged)
                self._is_merged = False
            case "cell":
                self._in_table = True
                self._place()
                assert self._cell is not None
                self._end_paragraph()
                if not self._rows or self._rows[-1] is not self._defined:
                    self._rows.append(self._defined)
                self._defined.texts.append(self._cell.text())
                self._cell, self._out = None, self._main
            case "row":
                ended = self._defined
                self._defined = _Row(list(ended.ends), list(ended.merged))
            case _ if word in _SIGNS:
                self._put(_SIGNS[word])

    def _sign(self, sign: str) -> None:
        if sign == "*":
            self._starred = True
        elif sign == "~":
            self._put("\xa0")
        elif sign == "_":
            self._put("-")
        elif sign in "\\{}":
            self._text(sign)
        elif sign in "\r\n" and not self._state.is_skipped:
            self._end_paragraph()

    def _byte(self, byte: int) -> None:
        if self._num_ignored:
            self._num_ignored -= 1
        else:
            self._bytes.append(byte)

    def _unicode(self, code: int) -> None:
        code &= 0xFFFF
        if 0xD800 <= code < 0xDC00:
            self._high = code
        elif 0xDC00 <= code < 0xE000 and self._high:
            self._put(chr(0x10000 + ((self._high - 0xD800) << 10) + code - 0xDC00))
            self._high = 0
        else:
            self._put("\ufffd" if 0xD800 <= code < 0xE000 else chr(code))
        self._num_ignored = self._state.num_after_unicode

    def _flush(self) -> None:
        """Decode the bytes that were written as such; some encodings take two for a character."""
        if not self._bytes:
            return
        codec, _ = self._fonts.get(self._state.font or 0, ("", "")) if self._state.font is not None else ("", "")
        data, self._bytes = bytes(self._bytes), bytearray()
        if codec == "symbol":
            self._put(data.decode("latin-1"))
        else:
            self._put(data.decode(codec or self._codec, errors="replace"))

    def _text(self, text: str) -> None:
        if self._num_ignored:
            text, self._num_ignored = text[self._num_ignored :], max(0, self._num_ignored - len(text))
        if text and not text.isascii():  # written as it is, against the rules
            text = text.encode("latin-1").decode(self._codec, errors="replace")
        self._put(text)

    def _put(self, text: str) -> None:
        state = self._state
        self._num_ignored = 0 if text else self._num_ignored
        if not text:
            return
        if state.destination in ("fonttbl", "stylesheet"):
            name, semicolon, _ = text.partition(";")
            self._named.append(name)
            if semicolon:
                self._end_definition()
        elif state.destination in _RUNNING:
            self.told["running"] += bool(re.search(r"[^\W\d_]", text)) and not self.told["running"]
        elif state.is_skipped:
            return
        elif state.is_hidden or state.is_deleted:
            self.told["hidden" if state.is_hidden else "deleted"] += bool(text.strip())
        else:
            out = self._place()
            _, name = self._fonts.get(state.font or 0, ("", "")) if state.font is not None else ("", "")
            out.style = state.style
            out.push(in_symbols(text, name) if is_symbol_font(name) else text, raw=text == "\t")
            out.style = PLAIN

    def _end_definition(self) -> None:
        name, self._named = "".join(self._named).strip(), []
        if not name:
            return
        if self._state.destination == "stylesheet":
            self._styles[self._number] = name
        else:
            codec = "symbol" if self._charset == 2 else _CHARSETS.get(self._charset, "")
            self._fonts[self._number] = ("" if self._charset in (0, 1) else codec, name)
        self._number = self._charset = 0

    # --- paragraphs and tables -------------------------------------------------------------------------------------

    def _place(self) -> TextBuilder:
        """Return where text goes: a cell, or what is around the tables."""
        if self._out is not self._main and self._out is not self._cell:
            return self._out
        if self._in_table:
            if self._cell is None:
                self._cell = self._out = TextBuilder()
        elif self._cell is None and self._rows:
            self._end_table()
        return self._out

    def _end_paragraph(self) -> None:
        out = self._out
        if self._outline and out is self._main and not out.is_blank:
            out.mark = "#" * self._outline + " "
        out.end()
        if out is self._main or out is self._cell:
            for text in self._boxes:
                out.add(text)
            self._boxes = []

    def _end_table(self) -> None:
        rows, self._rows = self._rows, []
        if not rows:
            return
        edges = sorted({end for row in rows for end in row.ends})
        column = {edge: at + 1 for at, edge in enumerate(edges)}
        mark, self._main.mark = self._main.mark, ""
        self._main.open_table()
        for row in rows:
            self._main.open_row()
            left = 0
            for at, text in enumerate(row.texts):
                right = column[row.ends[at]] if at < len(row.ends) else left + 1
                is_shown = not (at < len(row.merged) and row.merged[at])
                self._main.open_cell(columns=max(1, right - left), is_shown=is_shown)
                self._main.add(text)
                left = max(right, left + 1)
        self._main.close_table()
        self._main.mark = mark


def _known(name: str) -> str | None:
    try:
        return codecs.lookup({"cp65001": "utf-8", "cp10000": "mac_roman", "cp936": "gb18030"}.get(name, name)).name
    except LookupError:
        return None
