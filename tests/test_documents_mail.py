"""Mail, saved web pages and notebooks: what a reader sees, and pictures as short notes."""

import base64
import json
from email.message import EmailMessage
from pathlib import Path

import pytest

from duolocal.documents import Document, decode_document
from duolocal.documents.child import convert_bytes
from duolocal.documents.converted import ConversionError, Converted

PICTURE = base64.b64encode(bytes(range(256)) * 20).decode()


def mail(**headers: str) -> EmailMessage:
    message = EmailMessage()
    for name, value in {"From": "a@example.org", "To": "b@example.org", "Subject": "Größe", **headers}.items():
        message[name] = value
    return message


def read(data: bytes | EmailMessage, kind: str = "mail") -> Converted:
    return convert_bytes(data if isinstance(data, bytes) else data.as_bytes(), kind)


HEAD = "From: a@example.org\nTo: b@example.org\nSubject: Größe\n\n"


def test_a_mail_is_its_headers_its_text_and_what_is_attached() -> None:
    message = mail(Date="Tue, 01 Dec 2026 10:00:00 +0100", Received="from x")
    message.set_content("Liebe Grüße,\nder Betrag ist 48.000 €.\n", cte="base64")
    message.add_attachment(bytes(3000), maintype="application", subtype="pdf", filename="Rechnung März.pdf")
    document = decode_document(message.as_bytes(), Path("a.eml"))
    assert (document.kind, document.parts) == ("mail", ())
    assert document.text == (
        "From: a@example.org\nTo: b@example.org\nDate: Tue, 01 Dec 2026 10:00:00 +0100\nSubject: Größe\n\n"
        "Liebe Grüße,\nder Betrag ist 48.000 €.\n\n"
        "Attached, not read:\n- Rechnung März.pdf (application/pdf, 3 KB)"
    )
    assert document.notes == ("1 attached file listed, not read",)
    for name, notes in (("stdin", ()), ("mail.txt", ("named .txt, but by its content a mail: read as that",))):
        named = decode_document(message.as_bytes(), Path(name))
        assert (named.text, named.notes[: len(notes)]) == (document.text, notes)


@pytest.mark.parametrize("encoding", ["base64", "quoted-printable", "8bit"])
@pytest.mark.parametrize("charset", ["utf-8", "iso-8859-1", "cp1250"])
def test_encodings_of_mail(encoding: str, charset: str) -> None:
    message = mail()
    message.set_content("Grüße, café\n", charset=charset, cte=encoding)
    assert read(message).text == HEAD + "Grüße, café"
    assert read(message.as_bytes().replace(b"\n", b"\r\n")).text == HEAD + "Grüße, café"


def test_of_several_forms_one_is_read() -> None:
    message = mail()
    message.set_content("The plain text of it.")
    message.add_alternative("<p>The <b>rich</b> text of it.</p>", subtype="html")
    assert read(message).text == HEAD + "The plain text of it."
    only = mail()
    only.set_content("<p>10<sup>6</sup><s>old</s><p hidden>x", subtype="html")
    assert read(only).text == HEAD + "10^6~~old~~"
    assert read(only).notes == ("hidden text is not read (1 place)",)
    stub = mail()
    stub.set_content("See the HTML.")
    stub.add_alternative("<p>" + "All that the mail says. " * 40, subtype="html")
    assert "All that the mail says." in read(stub).text
    stub.make_mixed()
    stub.add_attachment("later", filename="more.txt")
    assert "more.txt (text/plain" in read(stub).text


def test_mails_in_mails_and_mailboxes() -> None:
    inner = mail(Subject="Inner")
    inner.set_content("inner text")
    outer = mail(Subject="Outer")
    outer.set_content("outer text")
    outer.add_attachment(inner)
    text = read(outer).text
    assert text.index("outer text") < text.index("Subject: Inner") < text.index("inner text")
    box = b"".join(
        b"From a@example.org Tue Dec  1 10:00:00 2026\n" + item.as_bytes() + b"\n>From here on\n\n"
        for item in (inner, inner)
    )
    read_box = convert_bytes(box, "mail")
    assert [part.label for part in read_box.parts] == ["mail 1: Inner", "mail 2: Inner"]
    assert read_box.text.count("inner text\n\nFrom here on") == 2


def test_broken_mail_is_read_as_far_as_it_goes() -> None:
    head = b"From: a@example.org\nSubject: =?nonsense?B?eHg=?= =?utf-8?Q?caf=C3=A9?=\nMIME-Version: 1.0\n"
    assert "xx" in read(head + b"Content-Type: text/plain; charset=nonsense\n\ncaf\xc3\xa9\n").text
    cut = head + b"Content-Type: multipart/mixed; boundary=X\n\n--X\nContent-Type: text/plain\n\ntext\n"
    assert read(cut).text.endswith("text")
    deep = b"".join(b"Content-Type: multipart/mixed; boundary=%d\n\n--%d\n" % (at, at) for at in range(3000))
    with pytest.raises(ConversionError, match=r"nested deeper|made to harm|without text"):
        read(deep)


def saved_page(*pages: str) -> bytes:
    lines = ["From: <Saved by Blink>", "Subject: A page", "MIME-Version: 1.0"]
    lines += ['Content-Type: multipart/related; type="text/html"; boundary="X"', ""]
    for page in pages:
        encoded = base64.encodebytes(page.encode()).decode()
        lines += ["--X", "Content-Type: text/html; charset=utf-8", "Content-Transfer-Encoding: base64", "", encoded]
    lines += ["--X", "Content-Type: image/png", "Content-Transfer-Encoding: base64", "", PICTURE, "--X--", ""]
    return "\r\n".join(lines).encode()


def test_saved_pages_are_their_html() -> None:
    page = "<title>A page</title><p>Grüße</p><table><tr><td rowspan=2>a<td>b<tr><td>c</table>"
    shown = "# A page\n\nGrüße\n\n| a | b |\n| --- | --- |\n|  | c |\n\nsecond sheet"
    for name, note in (("a.mhtml", ()), ("a.mht", ()), ("a.doc", ("named .doc, ",)), ("a.xls", ("named .xls, ",))):
        document = decode_document(saved_page(page, "<p>second sheet"), Path(name))
        assert (document.kind, document.text) == ("mhtml", shown)
        assert [note[:12] for note in document.notes] == [*(item[:12] for item in note), "1 picture or"]


# --- notebooks -----------------------------------------------------------------------------------------------------


def notebook(*cells: dict[str, object]) -> Document:
    content = {"cells": cells, "metadata": {"language_info": {"name": "python"}}, "nbformat": 4}
    return decode_document(json.dumps(content).encode(), Path("a.ipynb"))


def test_notebooks() -> None:
    outputs = [
        {"output_type": "stream", "text": ["10%\r", "100%\n", "done\n"]},
        {"output_type": "execute_result", "data": {"text/plain": ["42"], "text/html": "<b>42</b>"}},
        {"output_type": "display_data", "data": {"image/png": PICTURE, "text/plain": "<Figure>"}},
        {"output_type": "error", "traceback": ["\x1b[0;31mValueError\x1b[0m: no"]},
        {"output_type": "display_data", "data": {"application/x-unknown": {}}},
    ]
    document = notebook(
        {"cell_type": "markdown", "source": ["# Title\n", f"![x](data:image/png;base64,{PICTURE})"]},
        {"cell_type": "code", "source": "print(1)", "outputs": outputs},
        {"cell_type": "markdown", "source": "see", "attachments": {"a.png": {"image/png": PICTURE}}},
    )
    note = "[picture left out: image/png, 5 KB]"
    assert document.kind == "notebook" and [part.label for part in document.parts] == ["cell 1", "cell 2", "cell 3"]
    assert document.text == (
        f"# Title\n![x]({note})\n\n```python\nprint(1)\n```\n\n```\n100%\ndone\n```\n\n```\n42\n```\n\n"
        f"{note}\n\n```\n<Figure>\n```\n\n```\nValueError: no\n```\n\nsee\n\na.png: {note}"
    )
    assert document.notes[0].startswith("3 embedded pictures or files left out (")
    assert document.notes[1] == "1 output or cell of unknown kinds not read"


def test_old_and_broken_notebooks() -> None:
    output = {"output_type": "pyout", "text": "1", "png": PICTURE}
    code = {"cell_type": "code", "input": "x", "language": "r", "outputs": [output]}
    old = {"worksheets": [{"cells": [{"cell_type": "heading", "level": 2, "source": "Old"}, code]}]}
    document = decode_document(json.dumps(old).encode(), Path("a.ipynb"))
    assert document.text == "## Old\n\n```r\nx\n```\n\n[picture left out: image/png, 5 KB]\n\n```\n1\n```"
    for data in (b"{", b"[]", b'{"cells": 3}', b"[" * 100_000):
        with pytest.raises(ConversionError, match=r"damaged notebook|nested deeper"):
            convert_bytes(data, "notebook")
    with pytest.raises(ConversionError, match="without text"):
        convert_bytes(b'{"cells": []}', "notebook")


# --- pictures in texts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.md", "before ![x](data:image/png;base64,{}) after"),
        ("a.md", "before\n\n[image1]: <data:image/jpeg;base64,{}>\nafter"),
        ("a.txt", "before data:application/octet-stream;name=x.bin;base64,{} after"),
        ("a.css", "before url('data:image/svg+xml;charset=utf-8;base64,{}') after"),
        ("a.json", '{{"before": "data:;base64,{}", "x": "after"}}'),
        ("a.html", "<p>before <img src='data:image/png;base64,{}'> <code>data:image/png;base64,{}</code> after"),
        ("a.svg", "<svg before><image href='data:image/png;base64,{}'/> after</svg>"),
    ],
)
def test_embedded_pictures_become_a_note(name: str, text: str) -> None:
    for picture in (PICTURE, "\n".join(PICTURE[at : at + 76] for at in range(0, len(PICTURE), 76))):
        document = decode_document(text.format(picture, picture).encode(), Path(name))
        assert "before" in document.text and "after" in document.text and " left out: " in document.text
        assert len(document.text) < len(text) + 100
        assert document.notes[-1].startswith("1 embedded picture or file left out (")


@pytest.mark.parametrize("start", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"%PDF-1.7", b"PK\x03\x04"])
def test_pictures_without_an_address_are_known_by_how_they_begin(start: bytes) -> None:
    picture = base64.b64encode(start + bytes(range(256)) * 9).decode()
    lines = "\n".join(picture[at : at + 76] for at in range(0, len(picture), 76))
    for name, text in (
        ("a.json", f'{{"before": "{picture}", "x": "after"}}'),
        ("a.json", '{{"before": "{}", "x": "after"}}'.format(lines.replace("\n", "\\n"))),
        ("a.fb2", f"<binary id='before'>{lines}</binary><p>after</p>"),
    ):
        document = decode_document(text.encode(), Path(name))
        assert "before" in document.text and "after" in document.text and "left out: " in document.text
        assert len(document.text) < 130
    genes = "ACGT" * 900
    assert decode_document(genes.encode(), Path("a.txt")).text == genes


def test_what_is_short_or_no_picture_stays() -> None:
    text = "data:image/gif;base64,R0lGODlhAQABAAAAACw= and data:text/plain,hello " + "x" * 900 + "\n"
    document = decode_document(text.encode(), Path("a.md"))
    assert (document.text, document.notes) == (text, ())
