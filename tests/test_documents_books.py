"""Books whose chapters are named in odd ways, and presentations: numbers, alternatives, hidden slides."""

import unicodedata

import pytest

from duolocal.documents.child import convert_bytes
from duolocal.documents.converted import Converted
from tests.document_files import epub, pptx, zipped


def book(data: bytes) -> Converted:
    return convert_bytes(data, "epub")


@pytest.mark.parametrize(
    ("member", "link"),
    [
        ("chapter%201.xhtml", "chapter%201.xhtml"),
        ("chapter 1.xhtml", "chapter%201.xhtml"),
        ("chapter 1.xhtml", "chapter 1.xhtml"),
        ("chapter 1.xhtml", "chapter%25201.xhtml"),
        ("c1.xhtml", "/OEBPS/c1.xhtml"),
        ("c1.xhtml", "/c1.xhtml"),
        ("c1.xhtml", "OEBPS/c1.xhtml"),
        ("Text/C1.XHTML", "text/c1.xhtml"),
        ("text/c1.xhtml", "text\\c1.xhtml"),
        ("c1.xhtml", "./c1.xhtml"),
        ("c1.xhtml", " c1.xhtml "),
        ("c1.xhtml", "../OEBPS/./x/../c1.xhtml"),
        ("c1.xhtml", "c1.xhtml?v=3#top"),
        ("c1.xhtml", "elsewhere/c1.xhtml"),
        ("c#1.xhtml", "c#1.xhtml"),
        (unicodedata.normalize("NFD", "Größe.xhtml"), unicodedata.normalize("NFC", "Größe.xhtml")),
        (unicodedata.normalize("NFC", "Größe.xhtml"), "Gro%CC%88%C3%9Fe.xhtml"),
    ],
)
def test_chapters_are_found_however_their_path_is_written(member: str, link: str) -> None:
    chapters = {member: "<p>first</p>", "other.xhtml": "<p>second</p>"}
    read = book(epub(chapters, links={member: link.replace("&", "&amp;")}, titles={link: "The first"}))
    assert (read.text, read.notes) == ("first\n\nsecond", ())
    assert read.parts[0].label == "chapter 1: The first"


def test_of_two_members_the_one_is_read_that_is_meant() -> None:
    chapters = {"a%20b.xhtml": "<p>percent</p>", "a b.xhtml": "<p>space</p>", "A B.xhtml": "<p>capital</p>"}
    assert book(epub(chapters)).text == "percent\n\nspace\n\ncapital"


def test_what_a_book_lacks_is_told_with_the_reason() -> None:
    chapters = {"a.xhtml": "<p>text</p>", "b.xhtml": "<p>x</p>", "c.xhtml": "<p>x</p>", "d.xhtml": "<p>x</p>"}
    links = {"b.xhtml": "gone.xhtml", "c.xhtml": "https://example.org/c.xhtml"}
    read = book(epub(chapters, links=links))
    assert read.text == "text\n\nx"
    assert read.notes == (
        "chapter 2: gone.xhtml is not in the archive",
        "chapter 3: https://example.org/c.xhtml is not in the archive",
    )
    broken = epub({"a.xhtml": "<p>text</p>"}, more={"OEBPS/b.xhtml": "\1\2\3\4" * 99}, links={"a.xhtml": "b.xhtml"})
    with pytest.raises(Exception, match=r"yield no text \(chapter 1: OEBPS/b.xhtml is a binary file"):
        book(broken)


def test_books_that_are_packed_carelessly() -> None:
    package = (
        '\n <?xml version="1.0"?><package><manifest><item id="a" href="a.xhtml" media-type="application/xhtml+xml"/>'
        '<item id="b" href="b.xhtml" media-type="text/plain"/><item id="c" href="c.bin" media-type="x/y" fallback="d"/>'
        '<item id="d" href="d.xhtml" media-type="application/xhtml+xml"/>'
        '<item id="e" href="e.xhtml" media-type="application/xhtml+xml"/></manifest><spine>{}</spine></package>'
    )
    spine = '<itemref idref="a"/><itemref idref="b"/><itemref idref="c"/>'
    container = '<container><rootfiles><rootfile full-path=" /oebps/Book.OPF"/></rootfiles></container>'
    pages = {f"OEBPS/{name}.xhtml": f"<p>page {name}</p>" for name in "abde"} | {"OEBPS/c.bin": "x"}
    for members in ({"META-INF/container.xml": container}, {}, {"META-INF/container.xml": "<container>"}):
        read = book(zipped(members | {"OEBPS/book.opf": package.format(spine)} | pages))
        assert read.text == "page a\n\npage b\n\npage d"
        assert read.notes == ("pages that stand outside the order of the book are not read (1): e.xhtml",)
    read = book(zipped({"OEBPS/book.opf": package.format("")} | pages))
    assert read.text == "page a\n\npage d\n\npage e"
    assert read.notes == ("it does not say in which order it is read: chapters come as it lists them",)
    hidden = epub({"a.xhtml": "<p>a</p><p hidden='hidden'>x</p><p>10<sup>6</sup> soft\xadhyphen</p>"})
    assert (book(hidden).text, book(hidden).notes) == ("a\n\n10^6 softhyphen", ("hidden text is not read (1 place)",))


def test_style_sheets_of_books_strike_and_raise() -> None:
    chapter = "<p>fee <span class='old'>100</span> 10<span class='up'>6</span></p>"
    sheet = ".old { text-decoration: line-through; } .up { vertical-align: super }"
    data = epub({"a.xhtml": chapter, "s.css": ""}, more={"OEBPS/s.css": sheet})
    assert "~~" not in book(data).text  # it is no page, and not listed as a style sheet
    package = (
        '<package><manifest><item id="a" href="a.xhtml" media-type="application/xhtml+xml"/>'
        '<item id="s" href="s.css" media-type="text/css"/></manifest><spine><itemref idref="a"/></spine></package>'
    )
    read = book(zipped({"book.opf": package, "a.xhtml": chapter, "s.css": sheet}))
    assert read.text == "fee ~~100~~ 10^6"


# --- presentations -------------------------------------------------------------------------------------------------


def paragraph(text: str, number: str = "", level: int = 0, start: int = 0) -> str:
    begin = f' startAt="{start}"' if start else ""
    bullet = f'<a:buAutoNum type="{number}"{begin}/>' if number else ""
    return f'<a:p><a:pPr lvl="{level}">{bullet}</a:pPr><a:r><a:t>{text}</a:t></a:r></a:p>'


def shape(inside: str, place: str = "", more: str = "") -> str:
    return (
        f'<p:sp><p:nvSpPr><p:cNvPr id="1" name="n"{more}/><p:nvPr>{place}</p:nvPr></p:nvSpPr>'
        f"<p:txBody>{inside}</p:txBody></p:sp>"
    )


def slide_text(inside: str) -> str:
    return convert_bytes(pptx([inside]), "pptx").text


PERIOD, PAREN = "arabicPeriod", "alphaLcParenR"


@pytest.mark.parametrize(
    ("paragraphs", "shown"),
    [
        ((("a", PERIOD), ("b", PERIOD), ("c",)), "1. a\n2. b\nc"),
        ((("a", PERIOD), ("x", PAREN, 1), ("y", PAREN, 1), ("b", PERIOD), ("z", PAREN, 1)),
         "1. a\na) x\nb) y\n2. b\na) z"),
        ((("a", PERIOD, 0, 5), ("b", PERIOD, 0, 5)), "5. a\n6. b"),
        ((("a", PERIOD), ("between",), ("b", PERIOD)), "1. a\nbetween\n1. b"),
        ((("a", PERIOD), ("", ), ("b", PERIOD)), "1. a\n2. b"),
        ((("a", "romanUcPeriod"), ("b", "romanUcPeriod")), "I. a\nII. b"),
        ((("a", "arabicParenBoth"), ("b", "alphaUcPeriod")), "(1) a\nA. b"),
        ((("a", "circleNumDbPlain"), ("b", "unheardOf")), "① a\n1. b"),
    ],
)  # fmt: skip
def test_automatic_numbers(paragraphs: tuple[tuple[str], ...], shown: str) -> None:
    assert slide_text(shape("".join(paragraph(*item) for item in paragraphs))) == shown


def test_numbers_that_the_layout_brings() -> None:
    place = '<p:ph type="body" idx="1"/>'
    style = '<a:lstStyle><a:lvl1pPr><a:buAutoNum type="arabicPeriod"/></a:lvl1pPr></a:lstStyle>'
    layout = f"<p:cSld><p:spTree>{shape(style, place)}</p:spTree></p:cSld>"
    slide = shape(
        paragraph("a") + paragraph("b") + "<a:p><a:pPr><a:buNone/></a:pPr><a:r><a:t>c</a:t></a:r></a:p>", place
    )
    assert convert_bytes(pptx([slide], more={"slideLayout": layout}), "pptx").text == "1. a\n2. b\nc"
    own = shape(style + paragraph("a") + paragraph("b"))
    assert slide_text(own) == "1. a\n2. b"


def test_an_alternative_is_read_once() -> None:
    new, old = shape(paragraph("text")), shape(paragraph("text"))
    either = f"<mc:AlternateContent><mc:Choice>{new}</mc:Choice><mc:Fallback>{old}</mc:Fallback></mc:AlternateContent>"
    assert slide_text(either) == "text"
    picture = (
        f"<mc:AlternateContent><mc:Choice><p:pic/></mc:Choice><mc:Fallback>{old}</mc:Fallback></mc:AlternateContent>"
    )
    assert slide_text(f"<p:grpSp>{picture}</p:grpSp>") == "text"


def test_marks_of_slides() -> None:
    run = "<a:r><a:rPr {}/><a:t>{}</a:t></a:r>"
    inside = (
        "<a:p>"
        + "".join(
            run.format(*item)
            for item in (
                ("", "10"),
                ('baseline="30000"', "6"),
                ("", " CO"),
                ('baseline="-25000"', "2"),
                ('baseline="0"', " fee "),
                ('strike="sngStrike"', "100"),
                ('strike="noStrike"', " 250 soft\xadhyphen"),
            )
        )
        + '<a:br/><a:fld type="datetime"><a:t>today</a:t></a:fld></a:p>'
    )
    assert slide_text(shape(inside)) == "10^6 CO_2 fee ~~100~~ 250 softhyphen\ntoday"
    row = "<a:tr>{}</a:tr>"
    cell = "<a:tc{}><a:txBody><a:p><a:r><a:t>{}</a:t></a:r></a:p></a:txBody></a:tc>"
    first = row.format(cell.format(' gridSpan="2"', "wide") + cell.format(' hMerge="1"', "") + cell.format("", "c"))
    second = row.format("".join(cell.format("", text) for text in "abc"))
    assert (
        slide_text(f"<p:graphicFrame><a:tbl>{first}{second}</a:tbl></p:graphicFrame>")
        == "| wide |  | c |\n| a | b | c |"
    )


def test_what_is_hidden_or_no_text_is_told() -> None:
    slides = [
        "first",
        "second",
        shape(paragraph("x"), more=' hidden="1"')
        + '<p:pic><p:nvPicPr><p:cNvPr id="2" name="n" descr="A  ship"/></p:nvPicPr></p:pic><p:graphicFrame>'
        '<c:chart xmlns:c="c" r:id="rId9"/></p:graphicFrame>',
    ]
    number = shape(paragraph("3"), '<p:ph type="sldNum"/>') + shape(paragraph("say this"))
    read = convert_bytes(pptx(slides, hidden=[1], notes={0: number}), "pptx")
    assert read.text == "first\n\nSpeaker notes: say this\n\n[hidden slide]\nsecond\n\n[image: A ship]"
    assert [part.label for part in read.parts] == ["slide 1", "slide 2 (hidden)", "slide 3"]
    assert read.notes == (
        "hidden slides are read too: 2",
        "1 picture not read",
        "1 chart not read",
        "hidden shapes are not read (1 with text)",
    )
