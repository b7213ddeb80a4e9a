"""What web pages say by their markup alone: columns, numbers, ticks, what is struck, raised, hidden."""

from pathlib import Path

import pytest

from duolocal.documents import decode_document
from duolocal.documents.html_text import read_page
from duolocal.documents.numbering import numbered
from tests.document_files import epub


def table(*rows: str) -> str:
    return "<table><tr>" + "<tr>".join(rows) + "</table>"


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        (
            ("<th>Region<th>Q<th>Sales", "<td rowspan=2>North<td>Q1<td>10", "<td>Q2<td>20", "<td>South<td>Q1<td>30"),
            ("Region | Q | Sales", "North | Q1 | 10", " | Q2 | 20", "South | Q1 | 30"),
        ),
        (
            ("<td><td colspan=2>2023<td colspan='2'>2024", "<td>Item<td>plan<td>real<td>plan<td>real"),
            (" | 2023 |  | 2024 |", "Item | plan | real | plan | real"),
        ),
        (("<td colspan=2 rowspan=2>a<td>b", "<td>c", "<td>d<td>e<td>f"), ("a |  | b", " |  | c", "d | e | f")),
        (("<td>a<td rowspan=2>b<td>c", "<td>d<td>e"), ("a | b | c", "d |  | e")),
        (("<td rowspan=0>a<td>b", "<td>c", "<td>d"), ("a | b", " | c", " | d")),
        (("<td colspan=3>a<td>b", "<td colspan=3>c<td>d"), ("a | b", "c | d")),  # no column begins within them
        (("<td rowspan=-1 colspan=x>a<td>b", "<td>c<td>d"), ("a | b", "c | d")),
        (("<td rowspan=9>a<td>b<tbody><tr><td>c<td>d",), ("a | b", "c | d")),  # no further than its group
    ],
)
def test_cells_stay_in_their_columns(rows: tuple[str, ...], shown: tuple[str, ...]) -> None:
    lines = read_page(table(*rows)).text.split("\n")
    del lines[1]
    assert [line.removeprefix("| ").removesuffix(" |").rstrip() for line in lines] == [line.rstrip() for line in shown]
    book = decode_document(epub({"a.xhtml": table(*rows)}), Path("a.epub"))
    assert book.text == read_page(table(*rows)).text


@pytest.mark.parametrize(
    ("markup", "shown"),
    [
        ("<ol start=4><li>a<li>b</ol>", "4. a\n5. b"),
        ("<ol reversed><li>a<li>b<ol><li>x<li>y</ol><li>c</ol>", "3. a\n2. b\n  1. x\n  2. y\n1. c"),
        ("<ol reversed start=9 type=a><li>a<li>b</ol>", "i. a\nh. b"),
        ("<ol type=I><li>a<li value=9>b<li>c</ol>", "I. a\nIX. b\nX. c"),
        ("<ol type=a start=26><li>a<li>b</ol>", "z. a\naa. b"),
        ("<ol style='list-style-type: lower-roman'><li>a<li type=A>b</ol>", "i. a\nB. b"),
        ("<ol start=-1><li>a<li>b<li>c</ol>", "-1. a\n0. b\n1. c"),
        ("<ol start=x><li>a</ol><ol><li>b</ol>", "1. a\n\n1. b"),
        ("<ol reversed><li>a", "1. a"),
    ],
)
def test_items_have_the_numbers_that_a_browser_shows(markup: str, shown: str) -> None:
    assert read_page(markup).text == shown


@pytest.mark.parametrize(
    ("markup", "shown"),
    [
        ("10<sup>6</sup> N, 10<sup>-3</sup>, CO<sub>2</sub>", "10^6 N, 10^-3, CO_2"),
        ("H<sub>2</sub>O, m<sup>2</sup>K, 10<sup>6</sup>7, x<sub>i</sub>y", "H_2O, m^2K, 10^{6}7, x_{i}y"),
        ("SO<sub>4</sub><sup>2-</sup>, x<sup>n + 1</sup>", "SO_4^{2-}, x^{n + 1}"),
        ("the 1<sup>st</sup>, a note<sup>[3]</sup>, Name<sup>®</sup>", "the 1st, a note[3], Name®"),
        ("10<span style='vertical-align: super'>6</span> a", "10^6 a"),
        ("fee <s>100</s> 250", "fee ~~100~~ 250"),
        ("<del>a <b>b</b></del><strike> c</strike>d", "~~a b c~~d"),
        ("<span style='text-decoration:line-through'>a</span>b", "~~a~~b"),
        ("<s><p>a<p>b</s>c", "~~a~~\n\n~~b~~c"),
        ("<s>10<sup>6</sup></s> a", "~~10^6~~ a"),
        ("<p><s>a<p>b", "~~a~~\n\nb"),
        ("<img style='vertical-align:super'>a", "a"),
        ("<input type=checkbox checked>yes<br><input type=CHECKBOX> no", "[x] yes\n[ ] no"),
        ("<ul><li><input type=radio checked disabled>a<li><input type=radio>b</ul>", "- [x] a\n- [ ] b"),
        ("<div role=checkbox aria-checked=true>a</div><div role=checkbox>b", "[x] a\n\n[ ] b"),
        ("Name <input value='Ada'> <input type=password value=x>", "Name Ada"),
        ("<select><option>a<option selected>b</select>", "a\n[x] b"),
        ("<ruby>東<rp>(</rp><rt>とう</rt><rp>)</rp>京<rt>きょう</ruby>で", "東(とう)京(きょう)で"),
        ("<ruby>東<rp>(<rt>とう<rp>)</ruby>で<ruby>行<rt></rt></ruby>", "東(とう)で行"),
        ("soft\xadhy&shy;phen", "softhyphen"),
        ("a <svg><title>icon</title><path d='M'/></svg>b", "a b"),
        (
            "a<svg><style>x</style><g><text x=1>one <tspan>two</tspan></text><text>three</text></g></svg>b",
            "a\n\none two\n\nthree\n\nb",
        ),
        ("<style>/* x */ .a, p.b { text-decoration:line-through }</style><span class='c a'>x</span> y", "~~x~~ y"),
        (
            "<style>.a{vertical-align:super} @media print{.b{text-decoration:line-through}}</style>"
            "10<span class=a>6</span> <b class=b>x</b>",
            "10^6 x",
        ),
        (
            "<math><msup><mn>10</mn><mn>6</mn></msup><mo>+</mo><msub><mi>x</mi><mrow><mi>i</mi><mo>+</mo><mn>1</mn></mrow>"
            "</msub><annotation>10^6</annotation></math>",
            "10^6+x_{i+1}",
        ),
        (
            "<math><mfrac><mrow><mi>a</mi><mo>+</mo><mi>b</mi></mrow><mn>2</mn></mfrac><msqrt><mn>3</mn></msqrt></math>",
            "(a+b)/2√(3)",
        ),
    ],
)
def test_what_marks_change_is_marked(markup: str, shown: str) -> None:
    page = read_page(markup)
    assert (page.text, page.num_hidden) == (shown, 0)


@pytest.mark.parametrize(
    "markup",
    [
        "a <span hidden>x</span>b",
        "a <p style='display: none'>x<p>b",
        "a <div hidden=''><div>x</div><ul><li>x</ul></div>b",
        "a <span style='visibility:hidden'>x<b>x</b></span>b",
        "a <table><tr hidden><td>x<td>x</table>b",
        "a b<p hidden>x",
        "a <div hidden>x<svg><text>x</text></svg></div>b",
    ],
)
def test_hidden_text_is_told_and_not_read(markup: str) -> None:
    page = read_page(markup)
    assert "".join(page.text.split()) == "ab"
    assert page.num_hidden == 1
    document = decode_document(markup.encode(), Path("a.html"))
    assert document.notes == ("hidden text is not read (1 place)",)


def test_what_can_be_opened_is_read() -> None:
    page = read_page("<p hidden=until-found>a<details><summary>b</summary>c</details><p hidden></p>")
    assert (page.text.split(), page.num_hidden) == (["a", "b", "c"], 0)


@pytest.mark.parametrize(
    ("number", "style", "shown"),
    [
        *((27, "lowerLetter", "aa"), (28, "lowerLetter", "bb"), (28, "lowerAlpha", "ab"), (4, "upperRoman", "IV")),
        *(
            (7, "decimalZero", "07"),
            (22, "ordinal", "22nd"),
            (13, "ordinal", "13th"),
            (21, "ordinalText", "Twenty-first"),
        ),
        *((40, "ordinalText", "Fortieth"), (105, "cardinalText", "One hundred five"), (0, "lowerRoman", "0")),
        *((23, "chineseCounting", "二十三"), (10, "chineseCounting", "十"), (105, "japaneseCounting", "一百零五")),
        *((3, "decimalEnclosedCircle", "③"), (5, "none", ""), (5, "nonsense", "5"), (16, "hebrew1", "טז")),
        *((1990, "lowerRoman", "mcmxc"), (9999, "lowerRoman", "9999"), (-3, "lowerLetter", "-3")),
    ],
)
def test_numbers_in_the_styles_of_lists(number: int, style: str, shown: str) -> None:
    assert numbered(number, style) == shown
