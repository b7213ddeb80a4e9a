"""What the converters make of each format, judged by documents that were written by hand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duolocal.documents import Document, Part, decode_document, load_document
from duolocal.documents.html_text import read_page
from duolocal.documents.pdf import _clean, _pages
from duolocal.errors import DocumentError
from tests.document_files import docx, epub, paragraph, pdf, pptx, xlsx, zipped


def read(data: bytes, name: str) -> Document:
    return decode_document(data, Path(name))


def refusal(data: bytes, name: str) -> str:
    with pytest.raises(DocumentError) as raised:
        read(data, name)
    assert str(raised.value).startswith(f"{name} ")
    return str(raised.value).removeprefix(f"{name} ")


def of_parts(document: Document) -> dict[str, str]:
    """Return label -> text of the part."""
    ends = [part.start for part in document.parts[1:]] + [len(document.text)]
    return {part.label: document.text[part.start : end].strip() for part, end in zip(document.parts, ends, strict=True)}


# --- PDF -----------------------------------------------------------------------------------------------------------


def test_pdf_pages() -> None:
    document = read(pdf(["First page (one)\nsecond line", "Café – “two”", "third"]), "a.pdf")
    assert (document.kind, document.encoding, document.notes) == ("pdf", "", ())
    assert of_parts(document) == {
        "page 1": "First page (one)\nsecond line",
        "page 2": "Café – “two”",
        "page 3": "third",
    }
    assert document.parts[0] == Part("page 1", 0) and document.pages == 3


def test_pdf_pages_without_text_are_told() -> None:
    document = read(pdf([None, "text", None, None, "more", None]), "a.pdf")
    assert document.notes == (
        "pages 1, 3-4 and 6 of 6 yield no text (blank, or a picture: run OCR over it to have that too)",
    )
    assert of_parts(document)["page 4"] == "" and of_parts(document)["page 5"] == "more"


def test_text_beyond_the_edge_of_a_page_is_told() -> None:
    document = read(pdf(["on the page\n" + "far " * 100]), "a.pdf")
    assert document.text.startswith("on the page\nfar far") and document.text.count("far") < 40
    assert document.notes == ("text beyond the edge of page 1, which no reader sees, is not read",)


def test_a_scanned_pdf_is_refused() -> None:
    assert refusal(pdf([None] * 12), "scan.pdf") == (
        "is a PDF of which 12 of 12 pages yield no text: it holds pictures of pages; run OCR over it first"
    )


def test_other_pdfs_that_cannot_be_read() -> None:
    assert refusal(pdf(["x"], encrypt=True), "a.pdf") == (
        "is a PDF locked with a password: save it without one and load that"
    )
    assert refusal(pdf([]), "a.pdf").startswith("is a damaged PDF")
    assert refusal(b"%PDF-1.7\n", "a.pdf").startswith("is a damaged PDF")
    assert "form" in str(read(pdf(["x"], extra=b"/AcroForm << /Fields [] >> "), "a.pdf").notes)


def test_a_pdf_without_its_suffix_is_known_by_its_first_bytes() -> None:
    assert read(pdf(["text"]), "stdin").kind == "pdf"


def test_words_cut_at_a_hyphen_are_mended() -> None:
    words = {"well", "known", "example", "exam", "ple"}
    assert _clean("an exam\x02ple is well\x02known, re\xadal\r\nend \r\n", words)[0] == (
        "an example is well-known, real\nend"
    )
    assert _clean("a\x17b\ue000", set()) == ("a\ufffdb\ufffd", 2)
    assert (_pages([7]), _pages([1, 2])) == ("page 7", "pages 1-2")
    assert _pages(list(range(1, 60, 2))).startswith("30 pages (1, 3, 5, ")


# --- Office --------------------------------------------------------------------------------------------------------


def test_docx() -> None:
    table = "".join(
        "<w:tr>" + "".join(f"<w:tc>{paragraph(cell)}</w:tc>" for cell in row) + "</w:tr>"
        for row in (["Name", "Height"], ["Ebb", "1.2 m"])
    )
    body = paragraph("The title", "Heading1") + paragraph("Überall – text &amp; more")
    document = read(docx(f"{body}<w:tbl>{table}</w:tbl>{paragraph('last')}"), "a.docx")
    assert document.text == (
        "# The title\n\nÜberall – text & more\n\n| Name | Height |\n| --- | --- |\n| Ebb | 1.2 m |\n\nlast"
    )
    assert (document.kind, document.parts, document.notes) == ("docx", (), ())
    assert read(docx(body + "<w:p><m:oMath/></w:p>"), "a.docx").notes == ("1 formula not read",)
    assert refusal(docx("<w:p/>"), "a.docx").startswith("is a Word document without text")


def test_deleted_text_of_a_docx_is_not_read() -> None:
    deleted = '<w:p><w:del w:id="1"><w:r><w:delText>secret</w:delText></w:r></w:del><w:r><w:t>kept</w:t></w:r></w:p>'
    assert read(docx(deleted), "a.docx").text == "kept"


def test_xlsx() -> None:
    sheets = {
        "Sales": [["what", "sum"], ["x, y", "<v>3.50</v>"], [], ["", "<f>SUM(B2)</f><v>3.5</v>"]],
        "Nothing": [],
        "Never computed": [["<f>1+1</f>"]],
    }
    document = read(xlsx(sheets), "a.xlsx")
    assert of_parts(document) == {
        "sheet Sales": '# Sales\n\nwhat,sum\n"x, y",3.5\n,3.5',
        "sheet Nothing": "",
        "sheet Never computed": "# Never computed\n\n=1+1",
    }
    assert document.notes == (
        "1 of 3 sheets are empty: Nothing",
        "1 formula never computed: what stands there is the formula; open and save it to have the value",
    )
    assert refusal(xlsx({"A": []}), "a.xlsx") == "is an Excel workbook without a filled cell: load another"


def test_pptx_slides_come_in_the_order_of_the_show() -> None:
    document = read(pptx(["Title\nfirst &lt;point&gt;", "", "Three"], notes={2: "say this"}), "a.pptx")
    assert of_parts(document) == {
        "slide 1": "Title\nfirst <point>",
        "slide 2": "",
        "slide 3": "Three\n\nSpeaker notes: say this",
    }
    assert document.notes == ("1 of 3 slides yield no text (pictures, charts or blank): 2",)
    assert refusal(pptx(["", ""]), "a.pptx").startswith("is a PowerPoint file without text")


# --- EPUB ----------------------------------------------------------------------------------------------------------


def test_epub_chapters() -> None:
    chapters = {
        "z.xhtml": "<h1>Heading of one</h1><p>first &amp; foremost</p>",
        "cover.xhtml": "<img src='cover.jpg'/>",
        "a%20b.xhtml": "<p>third</p>",
    }
    members = {name.replace("%20", " "): body for name, body in chapters.items()}
    data = epub(members, titles={"a%20b.xhtml": "The <i>third</i> one"})
    document = read(data, "a.epub")
    assert (document.kind, document.pages) == ("epub", 3)
    assert of_parts(document) == {
        "chapter 1: Heading of one": "# Heading of one\n\nfirst & foremost",
        "chapter 2": "",
        "chapter 3: The third one": "third",
    }
    assert document.notes == ("chapter 2 of 3 without text (pictures or blank)",)
    assert read(data, "stdin").kind == "epub"


def test_epubs_that_cannot_be_read() -> None:
    locked = (
        '<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><x:EncryptedData '
        'xmlns:x="http://www.w3.org/2001/04/xmlenc#"><x:EncryptionMethod Algorithm="{}"/></x:EncryptedData>'
        "</encryption>"
    )
    chapters = {"a.xhtml": "<p>text</p>"}
    drm = locked.format("http://www.w3.org/2001/04/xmlenc#aes128-cbc")
    assert refusal(epub(chapters, more={"META-INF/encryption.xml": drm}), "a.epub") == (
        "is an EPUB book locked by rights management (DRM): load a copy without it"
    )
    fonts = locked.format("http://www.idpf.org/2008/embedding")
    assert read(epub(chapters, more={"META-INF/encryption.xml": fonts}), "a.epub").text == "text"
    assert "1 of 1 chapters yield no text" in refusal(epub({"a.xhtml": ""}), "a.epub")
    assert "0 chapters" in refusal(epub({}), "a.epub")
    assert "holds no META-INF/container.xml" in refusal(zipped({"x": "y"}), "a.epub")


# --- HTML ----------------------------------------------------------------------------------------------------------


def test_html() -> None:
    page = """<!DOCTYPE html><html><head><title>A &amp; B</title><style>p {}</style></head><body>
    <h2>Head <b>er</b></h2><p>One   two
    three <a href="https://example.org">link</a>, <code>f(x)</code>.<br>next</p>
    <ul><li>a<li><p>b</p><ul><li>c</ul></li></ul><ol start=3><li>x</li><li>y</li></ol>
    <pre><code>def f():
        return 1
</code></pre><blockquote><p>quoted</blockquote>
    <table><tr><th>A<th>B</tr><tr><td>1<td>2|3</tr></table>
    <table><tr><td>lay<table><tr><td>in</td></tr></table></td><td>out</td></tr></table>
    <script>alert("<p>x")</script><img alt="a picture">end &lt;tag&gt; &nbsp; x</body>"""
    document = read(page.encode(), "a.html")
    assert document.text == (
        "# A & B\n\n## Head er\n\nOne two three link, `f(x)`.\nnext\n\n- a\n- b\n  - c\n\n3. x\n4. y\n\n"
        "```\ndef f():\n        return 1\n```\n\n> quoted\n\n| A | B |\n| --- | --- |\n| 1 | 2\\|3 |\n\n"
        "lay\n\nin\n\nout\n\n[image: a picture]end <tag> x"
    )
    assert (document.kind, document.encoding) == ("html", "utf-8")


def test_a_table_that_is_the_layout_of_a_page_keeps_all_its_cells() -> None:
    long = "words " * 150
    page = (
        f"<table><tr><td>{long}</td><td>side</td></tr><tr><td>foot</td><td><table><tr><td>in</table></td></tr></table>"
    )
    assert read_page(page).text == f"{long.strip()}\n\nside\n\nfoot\n\nin"
    assert read_page("<table><tr><td>one<tr><td>two</table>").text == "one\n\ntwo"


def test_html_says_its_encoding() -> None:
    text = "Příliš žluťoučký kůň"
    page = f'<html><meta charset="iso-8859-2"><title>x</title><p>{text}'.encode("iso8859-2")
    document = read(page, "a.htm")
    assert document.text.endswith(text) and (document.encoding, document.notes) == ("iso8859-2", ())
    assert read(f"<html><meta charset=nonsense><p>{text}".encode("cp1250"), "a.htm").encoding == "cp1250"
    assert read("<html><meta charset=latin1><p>“café”".encode("cp1252"), "a.htm").text == "“café”"
    assert read(f"<html><meta charset=latin1><p>{text}".encode(), "a.htm").text == text  # it is UTF-8, whatever it says


def test_html_without_text() -> None:
    assert refusal(b"<html><script>document.write('x')</script></html>", "a.html").startswith("yields no text")


TAGS = (
    *("<p>", "</p>", "<td>", "<tr>", "</tr>", "<table>", "</table>", "<ul>", "<li>", "</ul>", "<pre>", "</pre>", "<b>"),
    *("<title>", "</title>", "<blockquote>", "</blockquote>", "<h1>", "<br>", "<code>", "</code>", "<", "&"),
)


@given(st.lists(st.sampled_from([*TAGS, *["word"] * 12]), max_size=60))
def test_no_word_of_a_page_is_lost_whatever_its_tags(pieces: list[str]) -> None:
    markup = " ".join(f"w{at}x" if piece == "word" else piece for at, piece in enumerate(pieces))
    page = read_page(markup)
    found = re.findall(r"w\d+x", f"{page.title} {page.text}")
    assert sorted(found) == sorted(f"w{at}x" for at, piece in enumerate(pieces) if piece == "word")


# --- without the extra ---------------------------------------------------------------------------------------------


def test_without_the_extra_one_line_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['pypdfium2'] = None\n"
        "from duolocal.documents.child import convert_bytes\n"
        "try: convert_bytes(sys.stdin.buffer.read(), 'pdf')\n"
        "except Exception as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], input=pdf(["x"]), capture_output=True, check=True, timeout=60
    )
    expected = 'is a PDF, which needs one more package: pip install "duolocal[documents]"\n'
    assert result.stdout.decode() == expected


def test_every_format_but_pdf_needs_nothing_extra() -> None:
    script = (
        "import sys\n"
        "for name in ('pypdfium2', 'charset_normalizer'): sys.modules[name] = None\n"
        "from duolocal.documents.child import convert_bytes\n"
        "print(convert_bytes(sys.stdin.buffer.read(), sys.argv[1]).text)"
    )
    for kind, data in (
        ("html", "<p>Grüße".encode("cp1252")),
        ("epub", epub({"a.xhtml": "<p>Grüße</p>"})),
        ("pptx", pptx(["Grüße"])),
        ("xlsx", xlsx({"A": [["Grüße"]]})),
        ("docx", docx(paragraph("Grüße"))),
    ):
        result = subprocess.run(
            [sys.executable, "-c", script, kind], input=data, capture_output=True, check=True, timeout=60
        )
        assert result.stdout.decode().endswith("Grüße\n")


def test_a_real_document_of_this_repository() -> None:
    document = load_document(Path(__file__).parents[1] / "README.md")
    assert (document.kind, document.encoding, document.notes) == ("markdown", "utf-8", ())
