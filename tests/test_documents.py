import codecs
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duolocal import documents
from duolocal.documents import decode_document, load_document
from duolocal.errors import DocumentError

TEXT = "Grüße, naïve café – “quoted”\nsecond line\n"


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (TEXT.encode(), "utf-8"),
        (codecs.BOM_UTF8 + TEXT.encode(), "utf-8"),
        (codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"), "utf-16"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "utf-16"),
        (codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"), "utf-32"),
        (TEXT.encode("utf-16-le"), "utf-16-le"),
        (TEXT.encode("utf-16-be"), "utf-16-be"),
        (TEXT.encode("cp1252"), "cp1252"),
        (TEXT.replace("\n", "\r\n").encode(), "utf-8"),
        (TEXT.replace("\n", "\r").encode(), "utf-8"),
    ],
)
def test_encodings_are_found(tmp_path: Path, data: bytes, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    document = load_document(path)
    assert (document.name, document.path) == ("a.txt", path)
    assert (document.text, document.encoding, document.num_bytes) == (TEXT, encoding, len(data))
    assert (document.note is None) == (encoding != "cp1252")


def test_latin_1_is_the_last_resort() -> None:
    document = decode_document(b"caf\xe9 \x81 la cr\xe8me", Path("a.txt"))
    assert document.encoding == "latin-1"
    assert document.note == ("a.txt is not UTF-8: read as latin-1; look at its accents before you rely on it")


def test_a_stray_byte_does_not_spoil_utf_8() -> None:
    document = decode_document(("é" * 50).encode() + b"\xff" + "ü".encode(), Path("a.txt"))
    assert document.text == "é" * 50 + "\ufffd" + "ü"
    assert document.note == "a.txt is not quite UTF-8: 1 times U+FFFD stands for what was unreadable"


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_utf_8_is_read_back(text: str) -> None:
    text = "x" + text
    assert decode_document(text.encode(), Path("a.txt")).text == text


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.pdf", b"%PDF-1.7\n", "{} is a PDF: convert it (for example: pdftotext {}) and load the text"),
        ("a.docx", b"PK\x03\x04..", "{} is a Word document: save or convert it as plain text and load that"),
        ("a.zip", b"PK\x03\x04..", "{} is a zip archive: unpack it and load the text inside"),
        ("a.gz", b"\x1f\x8b\x08", "{} is a gzip archive: unpack it and load the text inside"),
        ("a.gguf", b"GGUF\x03\0\0\0", "{} is a model file: choose it with --model"),
        ("a.bin", bytes(range(256)) * 4, "{} is a binary file, not text: load a text file instead"),
        ("a.bin", b"\x01\x02\x03\x04" * 9, "{} is a binary file, not text: load a text file instead"),
        ("a.txt", b"", "{} is empty: load a file that has text in it"),
        ("a.txt", b" \n\t\r\n", "{} is empty: load a file that has text in it"),
        ("a.txt", codecs.BOM_UTF8, "{} is empty: load a file that has text in it"),
        (
            "a.txt",
            codecs.BOM_UTF16_LE + b"a\0b",
            "{} starts like utf-16 but breaks off at byte 4: save it as UTF-8",
        ),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DocumentError) as raised:
        load_document(path)
    assert str(raised.value) == message.replace("{}", str(path))


def test_missing_file_suggests_a_neighbour(tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("x")
    with pytest.raises(DocumentError) as raised:
        load_document(tmp_path / "reprot.txt")
    assert str(raised.value) == (f"{tmp_path / 'reprot.txt'} does not exist: did you mean {tmp_path / 'report.txt'}?")
    with pytest.raises(DocumentError, match=r"does not exist: there is no folder .*nowhere$"):
        load_document(tmp_path / "nowhere" / "a.txt")


def test_folder_device_and_odd_names(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"is a folder: name its files, for example .*\*\.md$"):
        load_document(tmp_path)
    with pytest.raises(DocumentError, match="is a device, not a file"):
        load_document("/dev/null")
    with pytest.raises(DocumentError, match="cannot be read"):
        load_document("a\0b")


def test_a_pipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("through a pipe",))
    writer.start()
    assert load_document(path).text == "through a pipe"
    writer.join()


def test_a_file_beyond_any_context_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_BYTES", 2**20)
    path = tmp_path / "huge.txt"
    path.write_bytes(b"a" * (2**20 + 1))
    with pytest.raises(DocumentError, match="is larger than 1 MiB: cut it up"):
        load_document(path)
