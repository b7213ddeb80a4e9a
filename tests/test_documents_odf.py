"""OpenDocument files and rich text: the same marks as from Word, numbers as they are shown, what is left out told."""

from pathlib import Path

import pytest

from duolocal.documents import decode_document
from duolocal.documents.child import convert_bytes
from duolocal.documents.converted import ConversionError, Converted
from tests.document_files import zipped

PREFIXES = ("office", "text", "table", "style", "fo", "draw", "svg", "xlink", "form", "presentation", "dc")
SPACES = " ".join(f'xmlns:{prefix}="urn:oasis:names:tc:opendocument:xmlns:{prefix}:1.0"' for prefix in PREFIXES)


def content(kind: str, body: str, styles: str = "") -> str:
    return (
        f"<office:document-content {SPACES}><office:automatic-styles>{styles}</office:automatic-styles><office:body>"
        f"<office:{kind}>{body}</office:{kind}></office:body></office:document-content>"
    )


def packed(kind: str, body: str, styles: str = "") -> bytes:
    mimetype = f"application/vnd.oasis.opendocument.{kind}"
    return zipped({"mimetype": mimetype, "content.xml": content(kind, body, styles)}, stored=["mimetype"])


def text(body: str, styles: str = "") -> Converted:
    return convert_bytes(packed("text", body, styles), "odt")


def look(name: str, attributes: str) -> str:
    return f'<style:style style:name="{name}"><style:text-properties {attributes}/></style:style>'


LOOKS = (
    look("S", 'style:text-line-through-style="solid"')
    + look("U", 'style:text-position="super 58%"')
    + look("D", 'style:text-position="-33% 58%"')
    + look("H", 'text:display="none"')
)


@pytest.mark.parametrize(
    ("inside", "shown"),
    [
        ('10<text:span text:style-name="U">6</text:span> CO<text:span text:style-name="D">2</text:span>', "10^6 CO_2"),
        ('a <text:span text:style-name="S">10<text:span>0</text:span></text:span> b', "a ~~100~~ b"),
        ("a<text:s/>b<text:line-break/>c<text:soft-page-break/>d", "a b\ncd"),
        ("<text:ruby><text:ruby-base>東</text:ruby-base><text:ruby-text>とう</text:ruby-text></text:ruby>", "東(とう)"),
        ("a<draw:frame><draw:text-box><text:p>box</text:p></draw:text-box></draw:frame>b", "ab\n\nbox"),
        ("<text:a>link</text:a><text:date>today</text:date><text:unheard-of>x</text:unheard-of>", "linktodayx"),
        ('a<text:note><text:note-citation>7</text:note-citation><text:note-body><text:p>n</text:p></text:note-body>'
         "</text:note>", "a[7]\n\n[7] n"),
        ("a<office:annotation><dc:creator>Ada</dc:creator><text:p>why</text:p></office:annotation>",
         "a[comment 1]\n\n[comment 1] Ada: why"),
        ('<draw:frame><draw:image/><svg:desc>A ship</svg:desc></draw:frame>', "[image: A ship]"),
    ],
)  # fmt: skip
def test_text_of_odt(inside: str, shown: str) -> None:
    assert text(f"<text:p>{inside}</text:p>", LOOKS).text == shown


LISTS = (
    '<text:list-style style:name="L"><text:list-level-style-number text:level="1" style:num-format="1" '
    'style:num-suffix="." text:start-value="3"/><text:list-level-style-number text:level="2" style:num-format="a" '
    'style:num-prefix="(" style:num-suffix=")"/></text:list-style><text:list-style style:name="B">'
    '<text:list-level-style-bullet text:level="1"/></text:list-style><text:list-style style:name="M">'
    '<text:list-level-style-number text:level="1" style:num-format="I"/><text:list-level-style-number text:level="2" '
    'style:num-format="1" text:display-levels="2"/></text:list-style>'
)


def listed(*items: str, style: str = "L", more: str = "") -> str:
    entries = "".join(f"<text:list-item><text:p>{item}</text:p></text:list-item>" for item in items)
    return f'<text:list text:style-name="{style}" {more}>{entries}</text:list>'


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (listed("a", "b") + "<text:p>between</text:p>" + listed("c", more='text:continue-numbering="true"'),
         "3. a\n4. b\n\nbetween\n\n5. c"),
        (listed("a") + "<text:p>between</text:p>" + listed("b"), "3. a\n\nbetween\n\n3. b"),
        (listed("a", more='xml:id="k"') + listed("x", style="B") + listed("b", more='text:continue-list="k"'),
         "3. a\n\n- x\n\n4. b"),
        (listed("a</text:p>" + listed("x", "y") + "<text:p>more", "b"), "3. a\n  (a) x\n  (b) y\n  more\n4. b"),
        (listed("a</text:p>" + listed("x", style="M") + "<text:p>", style="M"), "I a\n  I.1 x"),
        ('<text:list text:style-name="L"><text:list-item text:start-value="9"><text:p>a</text:p></text:list-item>'
         "</text:list>", "9. a"),
    ],
)  # fmt: skip
def test_lists_of_odt(body: str, shown: str) -> None:
    assert text(body, LISTS).text == shown


def test_tables_and_headings_of_odt() -> None:
    cell = "<table:table-cell{}><text:p>{}</text:p></table:table-cell>"
    rows = (
        "<table:table-header-rows><table:table-row>"
        + cell.format(' table:number-columns-spanned="2"', "wide")
        + "<table:covered-table-cell/>"
        + cell.format("", "c")
        + "</table:table-row></table:table-header-rows><table:table-row>"
        + cell.format(' table:number-columns-repeated="3"', "x")
        + "</table:table-row>"
    )
    outline = (
        '<text:outline-style><text:outline-level-style text:level="1" style:num-format="1" style:num-suffix="."/>'
        '<text:outline-level-style text:level="2" style:num-format="1" text:display-levels="2"/></text:outline-style>'
    )
    body = '<text:h text:outline-level="1">One</text:h><text:h text:outline-level="2">Sub</text:h>'
    assert text(f"{body}<table:table>{rows}</table:table>", outline).text == (
        "# 1. One\n\n## 1.1 Sub\n\n| wide |  | c |\n| --- | --- | --- |\n| x | x | x |"
    )


def test_what_odt_hides_deletes_or_holds_as_a_picture_is_told() -> None:
    body = (
        "<text:tracked-changes><text:changed-region><text:deletion><text:p>gone</text:p></text:deletion>"
        '</text:changed-region></text:tracked-changes><text:p>a<text:span text:style-name="H">x</text:span>'
        "<draw:frame><draw:image/></draw:frame></text:p>"
        "<text:section text:display='none'><text:p>x</text:p></text:section>"
    )
    read = text(body, LOOKS)
    assert read.text == "a"
    assert read.notes == (
        "1 picture not read",
        "hidden text is not read (2 places)",
        "text that tracked changes deleted is not read (1 place)",
    )


def test_ticks_of_odt_forms() -> None:
    forms = (
        '<office:forms><form:form><form:checkbox form:id="a" form:label="yes" form:current-state="checked"/>'
        '<form:checkbox form:id="b" form:label="no"/></form:form></office:forms>'
    )
    body = '<text:p><draw:control draw:control="a"/><draw:control draw:control="b"/></text:p>'
    assert text(forms + body).text == "[x] yes [ ] no"


def test_ods() -> None:
    rows = (
        '<table:table-row><table:table-cell office:value-type="string"><text:p>a</text:p><text:p>b</text:p>'
        '</table:table-cell><table:table-cell table:number-columns-repeated="2"/><table:table-cell '
        'office:value-type="float" office:value="3.0" table:style-name="S"><text:p>3</text:p></table:table-cell>'
        '<table:table-cell table:number-columns-repeated="16380"/></table:table-row>'
        '<table:table-row table:number-rows-repeated="1048000"><table:table-cell/></table:table-row>'
        '<table:table-row table:number-rows-repeated="2"><table:table-cell table:number-columns-spanned="2" '
        'office:value-type="date" office:date-value="2024-05-03"/><table:covered-table-cell/><table:table-cell '
        'office:value-type="boolean" office:boolean-value="true"/><table:table-cell office:value-type="time" '
        'office:time-value="PT26H05M00S"/><table:table-cell table:formula="of:=A1+1"/><table:table-cell '
        'office:value-type="string" table:formula="of:=&quot;&quot;"/></table:table-row>'
    )
    hidden = '<style:style style:name="N"><style:table-properties table:display="false"/></style:style>'
    body = f'<table:table table:name="S">{rows}</table:table><table:table table:name="E" table:style-name="N"/>'
    read = convert_bytes(packed("spreadsheet", body, LOOKS + hidden), "ods")
    row = "2024-05-03,,TRUE,26:05:00,=A1+1"
    assert read.text == f'# S\n\n"a\nb",,,~~3~~\n{row}\n{row}'
    assert [part.label for part in read.parts] == ["sheet S", "sheet E (hidden)"]
    assert read.notes == (
        "1 of 2 sheets are empty: E",
        "1 formula never computed: what stands there is the formula; open and save it to have the value",
    )
    row = '<table:table-row table:visibility="collapse"><table:table-cell><text:p>x</text:p></table:table-cell>'
    collapsed = convert_bytes(packed("spreadsheet", f"<table:table>{row}</table:table-row></table:table>"), "ods")
    assert (collapsed.text, collapsed.notes) == ("# Sheet1\n\nx", ("1 hidden row or column read too",))
    cell = '<table:table-cell table:number-columns-repeated="9999"><text:p>x</text:p></table:table-cell>'
    wide = packed("spreadsheet", f"<table:table><table:table-row>{cell * 20}</table:table-row></table:table>")
    with pytest.raises(ConversionError, match="more than 100,000 columns"):
        convert_bytes(wide, "ods")


def test_odp_and_flat_files() -> None:
    hidden = (
        '<style:style style:name="N"><style:drawing-page-properties presentation:visibility="hidden"/></style:style>'
    )
    frame = "<draw:frame><draw:text-box><text:p>{}</text:p></draw:text-box></draw:frame>"
    notes = f"<presentation:notes>{frame.format('say')}</presentation:notes>"
    first, second = frame.format("One") + notes, frame.format("Two")
    body = f'<draw:page>{first}</draw:page><draw:page draw:style-name="N">{second}</draw:page>'
    read = convert_bytes(packed("presentation", body, hidden), "odp")
    assert read.text == "One\n\nSpeaker notes: say\n\n[hidden slide]\n\nTwo"
    assert [part.label for part in read.parts] == ["slide 1", "slide 2 (hidden)"]
    flat = content("text", "<text:p>flat</text:p>").encode()
    assert decode_document(flat, Path("a.fodt")).text == "flat"
    for suffix in ("odt", "ott", "zip", "bin"):
        assert decode_document(packed("text", "<text:p>x</text:p>"), Path(f"a.{suffix}")).kind == "odt"
    locked = zipped({"content.xml": "<x/>", "META-INF/manifest.xml": "<manifest:encryption-data/>"})
    with pytest.raises(ConversionError, match="locked with a password"):
        convert_bytes(locked, "odt")


# --- rich text -----------------------------------------------------------------------------------------------------


def rtf(body: str) -> Converted:
    fonts = "{\\fonttbl{\\f0\\fcharset0 Arial;}{\\f1\\fcharset204 Times;}{\\f2\\fcharset2 Symbol;}"
    fonts += "{\\f3\\fcharset128 Mincho;}}"
    styles = "{\\stylesheet{\\s0 Normal;}{\\s1 heading 1;}}{\\info{\\title not shown}}"
    return convert_bytes(f"{{\\rtf1\\ansi\\ansicpg1252\n{fonts}{styles}{body}}}".encode("latin-1"), "rtf")


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (
            "Gr\\'fc\\'dfe \\u8364?uro \\emdash  {\\f1\\'cf\\'f0\\'e8} {\\f3\\'93\\'8c}{\\f2 p}\\par",
            "Grüße €uro — При 東π",
        ),
        ("\\uc2\\u26481\\'93\\'8cx\\u-10179\\'3f\\'3f\\u-8704\\'3f\\'3f", "東x😀"),
        ("10{\\super 6} CO{\\sub 2} a {\\strike 10}{\\strike 0} b\\strike c\\strike0 d", "10^6 CO_2 a ~~100~~ b~~c~~d"),
        ("end\\page start\\line next\\par last", "end\n\nstart\nnext\n\nlast"),
        ("re\\-al well\\_known\\~x\\tab y", "real well-known x\ty"),
        ("{\\listtext 3.\\tab}a\\par{\\pntext\\f2\\'b7\\tab}b", "3. a\n\n- b"),
        ("\\pard\\s1 Title\\par\\pard\\outlinelevel1 Sub\\par\\pard text", "# Title\n\n## Sub\n\ntext"),
        ("{\\field{\\*\\fldinst HYPERLINK x}{\\fldrslt link}}", "link"),
        ("{\\field{\\*\\fldinst FORMCHECKBOX{\\*\\formfield{\\fftype1\\ffres1}}}{\\fldrslt}} a", "[x] a"),
        ("{\\field{\\*\\fldinst FORMCHECKBOX{\\*\\formfield{\\fftype1\\ffres25\\ffdefres0}}}} a", "[ ] a"),
        ("a{\\shp{\\*\\shpinst{\\sp{\\sn x}{\\sv y}}{\\shptxt box\\par}}{\\shprslt old}}b", "ab\n\nbox"),
        ("{\\upr{old}{\\*\\ud new}}{\\*\\unheardof gone}", "new"),
        ("a{\\footnote\\pard {\\super\\chftn} note}b\\par", "a[1]b\n\n[1] note"),
        (
            "\\trowd\\cellx100\\cellx200\\cellx300\\pard\\intbl a\\cell b\\cell c\\cell\\row"
            "\\trowd\\clvmrg\\cellx100\\cellx300\\pard\\intbl x\\cell wide\\cell\\row\\pard after",
            "| a | b | c |\n| --- | --- | --- |\n|  | wide | |\n\nafter",
        ),
    ],
)
def test_rich_text(body: str, shown: str) -> None:
    assert rtf(body).text == shown


def test_what_rich_text_hides_is_told() -> None:
    read = rtf(
        "a{\\v x}{\\deleted x}{\\*\\shppict{\\pict 00}}{\\nonshppict{\\pict 00}}{\\header Letterhead}{\\bin3 }}}b"
    )
    assert read.text == "ab"
    assert read.notes == (
        "1 picture not read",
        "hidden text is not read (1 place)",
        "text that tracked changes deleted is not read (1 place)",
        "1 header or footer not read",
    )
    with pytest.raises(ConversionError, match="without text"):
        rtf("{\\pict 00}")
    with pytest.raises(ConversionError, match="nested deeper"):
        convert_bytes(b"{\\rtf1" + b"{" * 10_000 + b"x", "rtf")
