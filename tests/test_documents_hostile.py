"""Documents that are made to harm: one line, within bounded time and memory, and nothing left running."""

import io
import struct
import threading
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from duolocal.documents import converter as converter_module
from duolocal.documents import decode_document, gather
from duolocal.documents.child import convert_bytes
from duolocal.documents.converted import ConversionError
from duolocal.documents.converter import SPENT_BYTES, Converter
from duolocal.documents.formats import format_of
from duolocal.documents.zipped import MAX_MEMBERS, Archive, ArchiveError
from duolocal.errors import DocumentError
from tests.document_files import docx, epub, paragraph, pdf, pptx, zipped


def refused(kind: str, data: bytes) -> str:
    with pytest.raises(ConversionError) as raised:
        convert_bytes(data, kind)
    message = str(raised.value)
    assert len(message) < 400 and message.isprintable()
    return message


# --- archives ------------------------------------------------------------------------------------------------------


def test_a_zip_bomb_is_stopped_while_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duolocal.documents.docx._MAX_XML_BYTES", 1 << 20)
    bomb = zipped({"word/document.xml": b"<a>" + bytes(30 << 20), "[Content_Types].xml": "<Types/>"})
    assert len(bomb) < 100_000
    assert refused("docx", bomb) == "holds word/document.xml, which unpacks to more than 1 MiB: unpack it and cut it up"
    many = docx("", more=dict.fromkeys(("styles", "numbering"), " " * 900000))
    assert refused("docx", many) == "unpacks to more than 1 MiB of XML: cut it up"


def test_what_an_archive_says_of_sizes_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(zipped({"a.txt": bytes(1 << 20)}))
    at = data.rindex(b"PK\x01\x02") + 24
    assert struct.unpack_from("<I", data, at) == (1 << 20,)
    struct.pack_into("<I", data, at, 10)
    with Archive(bytes(data)) as archive, pytest.raises(ArchiveError, match=r"^is damaged \(a\.txt: "):
        archive.read("a.txt")
    monkeypatch.setattr("duolocal.documents.zipped.MAX_ALL_BYTES", 3 << 20)
    with Archive(zipped({f"{at}.txt": bytes(1 << 20) for at in range(5)})) as archive:
        for name in ("0.txt", "1.txt", "2.txt"):
            assert archive.read(name) == bytes(1 << 20)
        with pytest.raises(ArchiveError, match="unpacks to more than 3 MiB"):
            archive.read("3.txt")


def test_a_directory_of_millions_is_refused_before_it_is_read() -> None:
    entry = b"PK\x01\x02" + bytes(42)
    data = zipped({"a.txt": "x"})[:40] + entry * 10
    for count, size in ((60_000, 10 * 46), (10, 1 << 30)):
        end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count & 0xFFFF, count & 0xFFFF, size, 40, 0)
        with pytest.raises(ArchiveError, match=f"holds more than {MAX_MEMBERS:,} files"):
            Archive(data + end)
    huge = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 10**7, 10**7, 1 << 30, 40)
    place = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(data), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with pytest.raises(ArchiveError, match="holds more than"):
        Archive(data + huge + place + end)


def test_locked_and_damaged_archives(tmp_path: Path) -> None:
    data = bytearray(zipped({"a.txt": "text"}))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(DocumentError, match=r"holds nothing that can be loaded \(a\.zip/a\.txt: is locked with a"):
        gather([tmp_path / "a.zip"])
    (tmp_path / "b.zip").write_bytes(bytes(data)[:40])
    with pytest.raises(DocumentError, match=r"b\.zip is a damaged zip archive \(its directory is missing\): pack it"):
        gather([tmp_path / "b.zip"])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.txt", "packed otherwise")
    (tmp_path / "c.zip").write_bytes(out.getvalue())
    assert gather([tmp_path / "c.zip"]).found[0].load().text == "packed otherwise"


# --- XML -----------------------------------------------------------------------------------------------------------

BOMB = (
    '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY {new} "{f"&{old};" * 10}">' for old, new in zip("abcdefgh", "bcdefghi", strict=True))
    + "]>"
)


def test_entities_are_refused() -> None:
    made = epub({"a.xhtml": "<p>x</p>"}, more={"META-INF/container.xml": BOMB + "<x>&i;</x>"})
    assert "declares entities" in refused("epub", made)
    members = {"ppt/presentation.xml": BOMB + "<x>&i;</x>"}
    assert "declares entities" in refused("pptx", zipped(members))
    for text in ((BOMB + "<x>&i;</x>").encode(), (BOMB + "<x>&i;</x>").encode("utf-16")):
        assert "declares entities" in refused("docx", zipped({"word/document.xml": text}))


def test_deep_nesting_is_refused() -> None:
    deep = "<a>" * 50_000 + "</a>" * 50_000
    assert "nested too deep" in refused("pptx", zipped({"ppt/presentation.xml": deep}))
    tables = "<w:tbl><w:tr><w:tc>" * 3_000 + "<w:p/>" + "</w:tc></w:tr></w:tbl>" * 3_000
    with pytest.raises(DocumentError, match=r"^a\.docx .*(nested deeper|damaged|ended the process)"):
        decode_document(docx(tables), Path("a.docx"))


# --- HTML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "markup",
    [
        "<div>" * 100_000 + "x",
        "<table><tr><td>" * 20_000 + "x",
        "<blockquote><ul><li>" * 20_000 + "x",
        "<table>" + "<tr><td rowspan=65535 colspan=1000>x" * 20_000,
        "<table>" + "<tr><td colspan=1000>x<td>y" * 20_000,
        "<s>x" * 50_000,
        "<svg><text>x" * 20_000,
        "<pre>" * 50_000 + "x" + "</pre>" * 50_000,
        "<svg>" * 50_000 + "</svg>" * 50_000 + "x",
        "<title>" * 20_000 + "x",
        "&" * 100_000 + "x",
        "<" * 20_000 + "x",
        "x" + "<!--" * 10_000,
        "x" + "<a b=" * 5_000,
    ],
)
def test_nested_and_broken_markup_ends(markup: str) -> None:
    began_s = time.process_time()
    text = convert_bytes(markup.encode(), "html").text
    assert "x" in text
    assert len(text) < 4 * len(markup)
    assert time.process_time() - began_s < 30  # quadratic work would take minutes


@pytest.mark.parametrize("head", [b"<!---->" * 1170, b"<!--" * 2000, b"<?xml " + b" " * 8000, b"X-A: b\n" * 1000])
def test_a_misnamed_file_is_judged_at_once(head: bytes) -> None:
    assert format_of(head, "a.xls").kind == "text"  # to try every way to divide it would take years


# --- PDF -----------------------------------------------------------------------------------------------------------


def test_page_trees_that_loop_or_lie() -> None:
    good = pdf(["one", "two"])
    looping = good.replace(b"/Kids [5 0 R 7 0 R]", b"/Kids [2 0 R 2 0 R]")
    assert looping != good
    assert refused("pdf", looping).startswith("is a damaged PDF (no page of it can be read)")
    lying = good.replace(b"/Count 2", b"/Count 999999999")
    assert lying != good
    assert convert_bytes(lying, "pdf").text == "one\n\ntwo"
    converted = convert_bytes(good.replace(b"/Count 2", b"/Count 15000"), "pdf")
    assert (converted.text, converted.notes) == ("one\n\ntwo", ("pages 3-15000 of 15,000 cannot be read: damaged",))
    assert "more than 20,000: cut it up" in refused("pdf", good.replace(b"/Count 2", b"/Count 25000"))


def test_cut_pdfs_are_refused() -> None:
    data = pdf(["some text", None, "more"])
    for length in range(5, len(data) - 100, 61):
        assert "PDF" in refused("pdf", data[:length])


# --- the other process ---------------------------------------------------------------------------------------------


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children() if process.status() != psutil.STATUS_ZOMBIE}


def with_child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the converting process run `code`, after the imports."""
    script = "import sys, time, os, json; sys.path.insert(0, sys.argv[1]); from duolocal.documents import child\n"
    monkeypatch.setattr(converter_module, "_START", script + code)


def test_a_process_that_falls_silent_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()
    with_child(monkeypatch, "child.convert_bytes = lambda *_: time.sleep(1000)\nchild.main()")
    with (
        Converter(silence_s=1.0) as converter,
        pytest.raises(ConversionError, match=r"^took longer than 1 s to convert and was given up: .*elsewhere"),
    ):
        converter.convert(b"x", "html")
    assert children() == before


def test_a_process_that_is_never_done_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def busy(data, kind, report):\n  while True: report(1, 2); time.sleep(0.05)\n"
    with_child(monkeypatch, code + "child.convert_bytes = busy\nchild.main()")
    seen = []
    with (
        Converter(silence_s=60.0, limit_s=2.0) as converter,
        pytest.raises(ConversionError, match="took longer than 2 s"),
    ):
        converter.convert(b"x", "html", on_progress=lambda done, total: seen.append((done, total)))
    assert seen and set(seen) == {(1, 2)}


def test_a_process_that_closes_its_ends_and_goes_on_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with_child(monkeypatch, "os.close(0); os.close(1); time.sleep(1000)")
    with Converter(silence_s=1.0) as converter, pytest.raises(ConversionError, match="took longer than 1 s"):
        converter.convert(b"x" * 1_000_000, "html")


@pytest.mark.parametrize(
    "code",
    ["sys.stdin.buffer.readline(); os._exit(7)", "sys.exit(7)", "import os; os.close(1); os.close(0); os._exit(7)"],
)
def test_a_process_that_dies_is_one_line_and_the_next_file_gets_another(
    monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    start = converter_module._START
    with Converter() as converter:
        with_child(monkeypatch, code)
        with pytest.raises(ConversionError, match=r"^ended the process that converts it \(exit code 7\): "):
            converter.convert(b"x" * 1_000_000, "html")
        monkeypatch.setattr(converter_module, "_START", start)
        assert converter.convert(b"<p>fine", "html").text == "fine"


def test_a_process_that_dies_within_its_answer_is_no_shorter_text(monkeypatch: pytest.MonkeyPatch) -> None:
    answer: dict[str, object] = {
        "parts": [],
        "notes": [],
        "encoding": None,
        "num_replaced": 0,
        "text_bytes": 9,
        "peak_bytes": 1,
    }
    with_child(monkeypatch, f"os.write(1, json.dumps({answer}).encode() + b'\\nhalf'); os._exit(7)")
    with Converter() as converter, pytest.raises(ConversionError, match=r"\(exit code 7\)"):
        converter.convert(b"x", "html")


def test_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    with_child(monkeypatch, "child.convert_bytes = lambda *_: bytearray(3 << 30)\nchild.main()")
    with Converter() as converter, pytest.raises(ConversionError, match="needs more than 2 GiB of memory"):
        converter.convert(b"x", "html")


def test_the_converting_process_writes_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    code = f"def write(*_): os.write(os.open({path!r}, os.O_WRONLY | os.O_CREAT), b'x')\nchild.convert_bytes = write\n"
    catching = "try: child.main()\nexcept OSError as error: os._exit(error.errno)\n"
    with_child(monkeypatch, code + catching)
    with Converter() as converter, pytest.raises(ConversionError, match="exit code 27"):  # EFBIG
        converter.convert(b"x", "html")


def test_ctrl_c_ends_the_converting_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    converter = Converter()
    with pytest.raises(KeyboardInterrupt):
        converter.convert(pdf(["x"] * 3), "pdf", on_progress=interrupt)
    assert children() == before


def test_a_converter_that_is_forgotten_leaves_no_process() -> None:
    before = children()
    converter = Converter()
    converter.convert(b"<p>x", "html")
    assert len(children() - before) == 1
    del converter
    assert children() == before


def test_the_memory_of_who_starts_it_does_not_count() -> None:
    """A loaded model is no reason to begin a new process for every file."""
    held = bytearray(b"x") * (SPENT_BYTES + (64 << 20))  # written to, so that it is there
    with Converter() as converter:
        converter.convert(b"<p>x", "html")
        first = converter._process
        converter.convert(b"<p>y", "html")
        assert converter._process is first is not None
    assert len(held) > SPENT_BYTES


def test_one_process_serves_many_files_and_threads(tmp_path: Path) -> None:
    for at in range(12):
        (tmp_path / f"{at}.pdf").write_bytes(pdf([f"file {at}", None]))
        (tmp_path / f"{at}.html").write_text(f"<p>page {at}")
    before = children()
    gathered = gather([tmp_path])
    texts: dict[str, str] = {}

    def load(first: int) -> None:
        for found in gathered.found[first::3]:
            texts[found.name.split("/")[-1]] = found.load().text

    threads = [threading.Thread(target=load, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {f"{at}.pdf": f"file {at}" for at in range(12)} | {f"{at}.html": f"page {at}" for at in range(12)}
    assert len(children() - before) == 1


def test_a_library_that_raises_anything_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("no\nsuch\x1b[2J")

    monkeypatch.setattr("duolocal.documents.docx.Styles", broken)
    assert refused("docx", docx(paragraph("x"))) == (
        "cannot be read as a Word document (KeyError: 'no\\nsuch\\x1b[2J'): it may be damaged; open it elsewhere and "
        "save it anew"
    )
    assert "damaged" in refused("pptx", pptx(["x"])[:-30])
