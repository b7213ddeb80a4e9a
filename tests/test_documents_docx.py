"""Word documents as Word shows them: numbers, ticks, columns, what is struck, raised, hidden or wrapped."""

import pytest

from duolocal.documents.child import convert_bytes
from duolocal.documents.converted import ConversionError, Converted
from tests.document_files import docx, paragraph


def read(data: bytes) -> Converted:
    return convert_bytes(data, "docx")


def run(text: str, properties: str = "") -> str:
    return f'<w:r><w:rPr>{properties}</w:rPr><w:t xml:space="preserve">{text}</w:t></w:r>'


def item(text: str, key: int, level: int = 0) -> str:
    number = f'<w:numPr><w:ilvl w:val="{level}"/><w:numId w:val="{key}"/></w:numPr>'
    return f"<w:p><w:pPr>{number}</w:pPr>{run(text)}</w:p>"


def level(at: int, style: str, text: str, more: str = '<w:start w:val="1"/>') -> str:
    return f'<w:lvl w:ilvl="{at}">{more}<w:numFmt w:val="{style}"/><w:lvlText w:val="{text}"/></w:lvl>'


def numbering(*levels: str, lists: str = "") -> str:
    definition = f'<w:abstractNum w:abstractNumId="0">{"".join(levels)}</w:abstractNum>'
    return f'{definition}<w:num w:numId="1"><w:abstractNumId w:val="0"/></w:num>{lists}'


def own_list(key: int, start: int | None = None, inner: str = "") -> str:
    override = f'<w:startOverride w:val="{start}"/>' if start is not None else ""
    return (
        f'<w:num w:numId="{key}"><w:abstractNumId w:val="0"/><w:lvlOverride w:ilvl="0">{override}{inner}'
        "</w:lvlOverride></w:num>"
    )


USUAL = (level(0, "decimal", "%1."), level(1, "lowerLetter", "(%2)"), level(2, "lowerRoman", "%3."))


@pytest.mark.parametrize(
    ("body", "lists", "shown"),
    [
        (
            item("a", 1) + item("b", 1) + paragraph("between") + item("c", 1),
            numbering(*USUAL),
            "1. a\n2. b\n\nbetween\n\n3. c",
        ),
        (
            item("a", 1) + item("x", 1, 1) + item("y", 1, 1) + item("b", 1) + item("z", 1, 1) + item("deep", 1, 2),
            numbering(*USUAL),
            "1. a\n  (a) x\n  (b) y\n2. b\n  (a) z\n    i. deep",
        ),
        (item("a", 1) + item("b", 2) + item("c", 2), numbering(*USUAL, lists=own_list(2, 7)), "1. a\n7. b\n8. c"),
        (item("a", 1) + item("b", 2) + item("c", 1), numbering(*USUAL, lists=own_list(2, 7)), "1. a\n7. b\n2. c"),
        (item("a", 1) + item("b", 2), numbering(*USUAL, lists=own_list(2)), "1. a\n2. b"),
        (
            item("a", 2) + item("b", 2),
            numbering(*USUAL, lists=own_list(2, None, level(0, "upperRoman", "Article %1:", '<w:start w:val="4"/>'))),
            "Article IV: a\nArticle V: b",
        ),
        (item("a", 1), numbering(level(0, "decimal", "§%1", '<w:start w:val="3"/>')), "§3 a"),
        (item("a", 1), numbering(level(0, "decimalZero", "%1)")), "01) a"),
        (item("a", 1), numbering(level(0, "bullet", "\uf0b7")), "- a"),
        (item("a", 1), numbering(level(0, "none", "")), "a"),
        (
            item("a", 1) + item("b", 1, 1) + item("c", 1) + item("d", 1, 1),
            numbering(level(0, "upperRoman", "%1"), level(1, "decimal", "%1.%2")),
            "I a\n  I.1 b\nII c\n  II.1 d",
        ),
        (
            item("a", 1) + item("b", 1, 1),
            numbering(level(0, "upperRoman", "%1"), level(1, "decimal", "%1.%2", "<w:isLgl/>")),
            "I a\n  1.0 b",
        ),
        (
            item("a", 1) + item("b", 1, 1) + item("c", 1) + item("d", 1, 1),
            numbering(
                level(0, "decimal", "%1."), level(1, "decimal", "%2)", '<w:start w:val="1"/><w:lvlRestart w:val="0"/>')
            ),
            "1. a\n  1) b\n2. c\n  2) d",
        ),
        (item("a", 1, 1), numbering(level(0, "decimal", "%1"), level(1, "decimal", "%1.%2")), "  1.1 a"),
        (item("a", 9) + item("b", 0), numbering(*USUAL), "a\n\nb"),
    ],
)
def test_lists_have_the_numbers_that_word_shows(body: str, lists: str, shown: str) -> None:
    assert read(docx(body, more={"numbering": lists})).text == shown
    assert read(docx(body, more={"numbering": lists}, strict=True)).text == shown


def test_numbers_that_styles_bring() -> None:
    styles = (
        '<w:style w:type="paragraph" w:styleId="berschrift1"><w:name w:val="heading 1"/><w:pPr><w:numPr>'
        '<w:numId w:val="1"/></w:numPr></w:pPr></w:style><w:style w:type="paragraph" w:styleId="Sub"><w:name '
        'w:val="My heading"/><w:basedOn w:val="berschrift1"/><w:pPr><w:numPr><w:ilvl w:val="1"/></w:numPr>'
        '<w:outlineLvl w:val="1"/></w:pPr></w:style>'
    )
    body = (
        paragraph("One", "berschrift1")
        + paragraph("Sub", "Sub")
        + paragraph("text")
        + paragraph("Two", "berschrift1")
        + '<w:p><w:pPr><w:pStyle w:val="berschrift1"/><w:numPr><w:numId w:val="0"/></w:numPr></w:pPr>'
        + f"{run('plain')}</w:p>"
    )
    levels = numbering(level(0, "decimal", "%1"), level(1, "decimal", "%1.%2"))
    document = read(docx(body, more={"numbering": levels, "styles": styles}))
    assert document.text == "# 1 One\n\n## 1.1 Sub\n\ntext\n\n# 2 Two\n\n# plain"


def test_a_list_whose_levels_stand_in_a_style() -> None:
    lists = (
        '<w:abstractNum w:abstractNumId="0">'
        + level(0, "upperLetter", "%1.")
        + '<w:styleLink w:val="S"/></w:abstractNum>'
        '<w:abstractNum w:abstractNumId="1"><w:numStyleLink w:val="S"/></w:abstractNum>'
        '<w:num w:numId="1"><w:abstractNumId w:val="0"/></w:num><w:num w:numId="2"><w:abstractNumId w:val="1"/></w:num>'
    )
    styles = (
        '<w:style w:type="numbering" w:styleId="S"><w:pPr><w:numPr><w:numId w:val="1"/></w:numPr></w:pPr></w:style>'
    )
    assert read(docx(item("a", 2) + item("b", 2), more={"numbering": lists, "styles": styles})).text == "A. a\nB. b"


def cell(text: str, properties: str = "") -> str:
    return f"<w:tc><w:tcPr>{properties}</w:tcPr>{paragraph(text)}</w:tc>"


SPAN = '<w:gridSpan w:val="2"/>'
DOWN, ON = '<w:vMerge w:val="restart"/>', "<w:vMerge/>"


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        (
            (cell("") + cell("2023", SPAN) + cell("2024", SPAN), "".join(map(cell, "abcde"))),
            ("|  | 2023 |  | 2024 | |", "| a | b | c | d | e |"),
        ),
        (
            (cell("North", DOWN) + cell("Q1"), cell("", ON) + cell("Q2"), cell("South") + cell("Q3")),
            ("| North | Q1 |", "|  | Q2 |", "| South | Q3 |"),
        ),
        (
            (cell("x", SPAN + DOWN) + cell("y"), cell("", SPAN + ON) + cell("z"), "".join(map(cell, "abc"))),
            ("| x |  | y |", "|  |  | z |", "| a | b | c |"),
        ),
        (
            (
                cell("a") + cell("b", '<w:hMerge w:val="restart"/>') + cell("", '<w:hMerge w:val="continue"/>'),
                "".join(map(cell, "cde")),
            ),
            ("| a | b | |", "| c | d | e |"),
        ),
        (
            ("".join(map(cell, "abc")), '<w:trPr><w:gridBefore w:val="1"/></w:trPr>' + cell("d") + cell("e")),
            ("| a | b | c |", "|  | d | e |"),
        ),
        ((cell("a", ON) + cell("b"), cell("c") + cell("d")), ("| a | b |", "| c | d |")),  # nothing above to go on
        (
            (cell("a") + f"<w:sdt><w:sdtContent>{cell('b')}</w:sdtContent></w:sdt>", cell("c") + cell("d")),
            ("| a | b |", "| c | d |"),
        ),
    ],
)
def test_cells_stay_in_their_columns(rows: tuple[str, ...], shown: tuple[str, ...]) -> None:
    lines = read(docx("<w:tbl>" + "".join(f"<w:tr>{row}</w:tr>" for row in rows) + "</w:tbl>")).text.split("\n")
    del lines[1]
    assert lines == list(shown)


def test_a_table_in_a_cell_leaves_the_columns_as_they_are() -> None:
    inner = f"<w:tbl><w:tr>{cell('x')}{cell('y')}</w:tr><w:tr>{cell('z')}</w:tr></w:tbl>"
    table = f"<w:tbl><w:tr>{cell('a')}<w:tc>{inner}</w:tc></w:tr><w:tr>{cell('b')}{cell('c' * 900)}</w:tr></w:tbl>"
    assert read(docx(table)).text == f"| a | x, y; z |\n| --- | --- |\n| b | {'c' * 900} |"


def box(text: str) -> str:
    return f"<w:txbxContent>{paragraph(text)}</w:txbxContent>"


NEW = f"<w:drawing><wp:inline><a:graphic><wps:txbx>{box('in the box')}</wps:txbx></a:graphic></wp:inline></w:drawing>"
OLD = f"<w:pict><v:shape><v:textbox>{box('in the box')}</v:textbox></v:shape></w:pict>"
EITHER = (
    f'<mc:AlternateContent><mc:Choice Requires="wps">{NEW}</mc:Choice><mc:Fallback>{OLD}</mc:Fallback>'
    "</mc:AlternateContent>"
)
CHECKED = (
    '<w:sdt><w:sdtPr><w14:checkbox><w14:checked w14:val="{}"/></w14:checkbox></w:sdtPr>'
    "<w:sdtContent>{}</w:sdtContent></w:sdt>"
)


@pytest.mark.parametrize(
    ("inside", "shown"),
    [
        (run("10") + run("6", '<w:vertAlign w:val="superscript"/>') + run(" N"), "10^6 N"),
        (run("CO") + run("2", '<w:vertAlign w:val="subscript"/>'), "CO_2"),
        (run("10") + run("6", '<w:position w:val="8"/>') + run(" a", '<w:position w:val="0"/>'), "10^6 a"),
        (run("a ") + run("10", "<w:strike/>") + run("0", "<w:strike/>") + run(" b"), "a ~~100~~ b"),
        (run("a", "<w:dstrike/>") + run("b", '<w:strike w:val="0"/>'), "~~a~~b"),
        ("<w:fldSimple w:instr='AUTHOR'>" + run("a") + "</w:fldSimple>", "a"),
        ("<w:bdo w:val='rtl'>" + run("a") + "</w:bdo><w:dir w:val='rtl'>" + run("b") + "</w:dir>", "ab"),
        ("<w:ins><w:smartTag><w:customXml>" + run("a") + "</w:customXml></w:smartTag></w:ins>", "a"),
        ("<w:unheardOf>" + run("a") + "</w:unheardOf><w:moveTo>" + run("b") + "</w:moveTo>", "ab"),
        (
            "<w:r><w:ruby><w:rubyPr/><w:rt>"
            + run("とう")
            + "</w:rt><w:rubyBase>"
            + run("東")
            + "</w:rubyBase></w:ruby></w:r>",
            "東(とう)",
        ),
        (
            '<w:r><w:fldChar w:fldCharType="begin"/></w:r><w:r><w:instrText> EQ \\* jc2 \\o\\ad(\\s\\up 9(とう),東)'
            '</w:instrText></w:r><w:r><w:fldChar w:fldCharType="end"/></w:r>',
            "東(とう)",
        ),
        (
            '<w:r><w:fldChar w:fldCharType="begin"/></w:r>' + run("not shown") + "<w:r><w:instrText>DATE</w:instrText>"
            '</w:r><w:r><w:fldChar w:fldCharType="separate"/></w:r>' + run("today") + "<w:r><w:fldChar "
            'w:fldCharType="end"/></w:r>' + run(" after"),
            "today after",
        ),
        (CHECKED.format(1, run("☒")) + run(" yes"), "[x] yes"),
        (CHECKED.format("true", run("☑")) + run("yes"), "[x] yes"),
        (CHECKED.format(0, run("☐")) + run(" no"), "[ ] no"),
        (
            '<w:r><w:fldChar w:fldCharType="begin"><w:ffData><w:checkBox><w:default w:val="0"/><w:checked/>'
            "</w:checkBox></w:ffData></w:fldChar></w:r><w:r><w:instrText>FORMCHECKBOX</w:instrText></w:r><w:r>"
            '<w:fldChar w:fldCharType="end"/></w:r>' + run("yes"),
            "[x] yes",
        ),
        (
            '<w:r><w:fldChar w:fldCharType="begin"><w:ffData><w:ddList><w:result w:val="1"/><w:listEntry w:val="no"/>'
            '<w:listEntry w:val="yes"/></w:ddList></w:ffData></w:fldChar></w:r><w:r><w:fldChar w:fldCharType="end"/>'
            "</w:r>",
            "yes",
        ),
        (run("end") + '<w:r><w:br w:type="page"/></w:r>' + run("start"), "end\nstart"),
        ('<w:r><w:t>end</w:t><w:br w:type="column"/><w:t>start</w:t><w:cr/><w:t>x</w:t></w:r>', "end\nstart\nx"),
        (
            "<w:r><w:t>re</w:t><w:softHyphen/><w:t>al well</w:t><w:noBreakHyphen/><w:t>known</w:t></w:r>",
            "real well-known",
        ),
        ('<w:r><w:sym w:font="Wingdings" w:char="F0FE"/></w:r><w:r><w:sym w:font="Symbol" w:char="F062"/></w:r>', "☑β"),
        (run("p", '<w:rFonts w:ascii="Symbol"/>'), "π"),
        (f"<w:r><w:t>before</w:t></w:r><w:r>{NEW}</w:r>" + run(" after"), "before after\n\nin the box"),
        (f"<w:r>{OLD}</w:r>" + run("after"), "after\n\nin the box"),
        (f"<w:r>{EITHER}</w:r>" + run("after"), "after\n\nin the box"),
        ('<w:r><w:pict><v:shape><v:textpath string="Draft"/></v:shape></w:pict></w:r>', "Draft"),
        (
            "<m:oMath><m:sSup><m:e><m:r><m:t>10</m:t></m:r></m:e><m:sup><m:r><m:t>6</m:t></m:r></m:sup></m:sSup></m:oMath>",
            "10^6",
        ),
        (
            "<m:oMath><m:f><m:num><m:r><m:t>a+b</m:t></m:r></m:num><m:den><m:r><m:t>2</m:t></m:r></m:den></m:f></m:oMath>",
            "(a+b)/2",
        ),
    ],
)
def test_text_is_found_and_marked(inside: str, shown: str) -> None:
    assert read(docx(f"<w:p>{inside}</w:p>")).text == shown
    assert read(
        docx(f"<w:customXml><w:sdt><w:sdtContent><w:p>{inside}</w:p></w:sdtContent></w:sdt></w:customXml>")
    ).text == (shown)


def test_what_is_hidden_deleted_or_a_picture_is_told() -> None:
    styles = '<w:style w:type="character" w:styleId="Secret"><w:rPr><w:vanish/></w:rPr></w:style>'
    body = (
        "<w:p>"
        + run("a")
        + run("x", "<w:vanish/>")
        + run("x", "<w:vanish/>")
        + run("b", '<w:vanish w:val="0"/>')
        + "</w:p>"
        "<w:p>"
        + run("x", '<w:rStyle w:val="Secret"/>')
        + run("c")
        + "</w:p><w:p><w:del><w:r><w:delText>x</w:delText></w:r>"
        '</w:del><w:r><w:drawing><wp:inline><wp:docPr descr="A ship"/><a:blip r:embed="p"/></wp:inline></w:drawing>'
        "</w:r></w:p>"
        "<w:tbl><w:tr><w:trPr><w:del/></w:trPr>" + cell("x") + "</w:tr></w:tbl>"
    )
    document = read(docx(body, more={"styles": styles, "header": "<w:p>" + run("Letterhead") + "</w:p>"}))
    assert document.text == "ab\n\nc\n\n[image: A ship]"
    assert document.notes == (
        "1 picture not read",
        "hidden text is not read (2 places)",
        "text that tracked changes deleted is not read (2 places)",
        "1 header or footer not read",
    )


def test_a_paragraph_whose_end_was_deleted_goes_on() -> None:
    body = "<w:p><w:pPr><w:rPr><w:del/></w:rPr></w:pPr>" + run("one ") + "</w:p><w:p>" + run("line") + "</w:p>"
    assert read(docx(body + paragraph("two"))).text == "one line\n\ntwo"


def test_a_tick_around_a_cell() -> None:
    table = "<w:tbl><w:tr>" + cell("agreed") + CHECKED.format(1, cell("☒")) + "</w:tr></w:tbl>"
    assert read(docx(table)).text == "| agreed | [x] |\n| --- | --- |"


def test_notes_stand_at_the_end() -> None:
    body = (
        "<w:p>"
        + run("a")
        + '<w:r><w:rPr><w:vertAlign w:val="superscript"/></w:rPr><w:footnoteReference w:id="7"/></w:r>'
        + run("b")
        + '<w:r><w:endnoteReference w:id="7"/></w:r><w:r><w:commentReference w:id="0"/></w:r></w:p>'
    )
    more = {
        "footnotes": f'<w:footnote w:id="7">{paragraph("foot")}{paragraph("more")}</w:footnote>',
        "endnotes": f'<w:endnote w:id="7">{paragraph("end")}</w:endnote>',
        "comments": f'<w:comment w:id="0" w:author="Ada">{paragraph("why?")}</w:comment>',
    }
    assert read(docx(body, more=more)).text == (
        "a[1]b[2][comment 1]\n\n[1] foot\n\nmore\n\n[2] end\n\n[comment 1] Ada: why?"
    )


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("a.html", "<p>from <b>the</b> chunk"),
        ("a.txt", "from the chunk\n"),
        ("a.rtf", "{\\rtf1 from the chunk}"),
        ("a.mht", "MIME-Version: 1.0\nContent-Type: text/html\n\n<p>from the chunk"),
        ("a.docx", docx(paragraph("from the chunk"))),
    ],
)
def test_alternative_chunks_are_read(name: str, chunk: str | bytes) -> None:
    document = read(docx(f'<w:altChunk r:id="{name}"/>', chunks={name: chunk}))
    assert (document.text, document.notes) == ("from the chunk", ())


def test_chunks_that_cannot_be_read_are_told() -> None:
    chunk, chunks = '<w:altChunk r:id="a.bin"/>', {"a.bin": bytes(range(256))}
    assert read(docx(paragraph("text") + chunk, chunks=chunks)).notes == ("1 document inside this one not read",)
    with pytest.raises(ConversionError, match=r"without text \(1 document inside this one not read\): open it in Word"):
        read(docx(chunk, chunks=chunks))
    inner = docx(paragraph("deep"))
    for _ in range(3):
        inner = docx(paragraph("x") + '<w:altChunk r:id="a.docx"/>', chunks={"a.docx": inner})
    assert "deep" not in read(inner).text
