"""Files in files: what a zip is, by its directory; packed texts; names that say something else."""

import bz2
import gzip
import io
import lzma
import warnings
import zipfile
from pathlib import Path

import pytest

from duolocal.documents import decode_document, gather, load_all
from duolocal.documents.finding import Skipped
from duolocal.documents.formats import format_of
from duolocal.documents.zipped import Archive
from duolocal.errors import DocumentError
from tests.document_files import docx, epub, paragraph, pdf, pptx, xlsx, zipped


def kind_of(data: bytes, name: str) -> str | None:
    found = format_of(data[:8192], name, lambda: Archive(data))
    return found.kind if found.how in ("convert", "archive") else None


def types_last(data: bytes) -> bytes:
    """Return an Office file with so much before what says its type that its first bytes are no help."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    types = members.pop("[Content_Types].xml")
    return zipped({"docProps/large.bin": bytes(range(256)) * 99} | members | {"[Content_Types].xml": types})


@pytest.mark.parametrize(
    ("data", "suffixes", "kind"),
    [
        (docx(paragraph("x")), ("docx", "docm", "dotx", "dotm", "zip", "bin", ""), "docx"),
        (xlsx({"A": [["x"]]}), ("xlsx", "xlsm", "xltx", "xltm", "xlam", "zip", "docx"), "xlsx"),
        (pptx(["x"]), ("pptx", "pptm", "potx", "potm", "ppsx", "ppsm", "zip"), "pptx"),
    ],
)
def test_office_files_are_known_by_their_directory(data: bytes, suffixes: tuple[str, ...], kind: str) -> None:
    for suffix in suffixes:
        for content in (data, types_last(data)):
            assert kind_of(content, f"a.{suffix}") == kind
            assert decode_document(content, Path(f"a.{suffix}")).kind == kind


def test_slashes_of_either_kind() -> None:
    for data, kind in (
        (docx(paragraph("x")), "docx"),
        (xlsx({"A": [["x"]]}), "xlsx"),
        (epub({"a.xhtml": "x"}), "epub"),
    ):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name.replace("/", "\\"): archive.read(name) for name in archive.namelist()}
        document = decode_document(zipped(members), Path("a.zip"))
        assert (document.kind, document.text[-1]) == (kind, "x")


def test_an_archive_that_holds_office_files_is_an_archive(tmp_path: Path) -> None:
    inner: dict[str, str | bytes] = {
        "report.docx": docx(paragraph("in the report")),
        "note.md": "a note",
        "b.epub": epub({"a": "<p>book"}),
    }
    path = tmp_path / "a.zip"
    path.write_bytes(
        zipped(inner | {"odd": docx(paragraph("odd")), "c.zip": zipped({"x.txt": "x"})}, stored=list(inner))
    )
    gathered = gather([path])
    loaded = load_all(gathered)
    assert [(document.name, document.kind, document.text) for document in loaded.documents] == [
        ("a.zip/b.epub", "epub", "book"),
        ("a.zip/note.md", "markdown", "a note"),
        ("a.zip/odd", "docx", "odd"),
        ("a.zip/report.docx", "docx", "in the report"),
    ]
    assert loaded.skipped == (Skipped("a.zip/c.zip", "a zip archive inside another: unpack it first"),)


@pytest.mark.parametrize(
    ("members", "name", "what"),
    [
        (
            {"[Content_Types].xml": "", "xl/workbook.bin": "x"},
            "a.xlsb",
            r"a binary Excel workbook \(xlsb\): save it as",
        ),
        (
            {"[Content_Types].xml": "", "xl/workbook.bin": "x"},
            "a.xlsx",
            r"a binary Excel workbook \(xlsb\): save it as",
        ),
        ({"[Content_Types].xml": "", "visio/document.xml": "x"}, "a.vsdx", "a Visio drawing: save it as PDF"),
        ({"Index/Document.iwa": "x"}, "a", "a Pages, Numbers or Keynote file: save it as docx"),
        ({"FixedDocSeq.fdseq": "x"}, "a.xps", "an XPS document: save it as PDF"),
    ],
)
def test_what_no_reader_takes_is_named(members: dict[str, str], name: str, what: str) -> None:
    with pytest.raises(DocumentError, match=f"^{name} is {what}"):
        decode_document(zipped(members), Path(name))


@pytest.mark.parametrize("head", [b"MZ\x90\0" + bytes(600), b"\x7fELF" + bytes(600), b"#!/usr/bin/env python\n"])
def test_a_program_with_an_archive_behind_it_is_one(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "a.exe"
    path.write_bytes(head + zipped({"a.txt": "text"}))
    assert [document.text for document in load_all(gather([path])).documents] == ["text"]
    path.write_bytes(head * 3)
    if not head.startswith(b"#!"):
        with pytest.raises(DocumentError, match=r"a program|a binary file"):
            decode_document(path.read_bytes(), path)


def renamed(members: dict[bytes, str]) -> bytes:
    """Return an archive whose names are these bytes, in whatever encoding."""
    stand_ins = {"ABC"[at] * len(name): text for at, (name, text) in enumerate(members.items())}
    data = zipped(stand_ins)
    for stand_in, name in zip(stand_ins, members, strict=True):
        data = data.replace(stand_in.encode(), name)
    return data


@pytest.mark.parametrize(
    ("codec", "names"),
    [
        ("gbk", ["合同/会议纪要.txt", "合同/报告.txt"]),
        ("gbk", ["测试.txt"]),
        ("utf-8", ["合同.txt", "Größe.txt"]),
        ("cp437", ["Größe.txt", "été.txt"]),
        ("cp932", ["資料/テスト.txt"]),
        ("cp949", ["보고서.txt"]),
        ("cp866", ["Договор.txt", "отчет за год.txt"]),
    ],
)
def test_names_in_old_encodings(tmp_path: Path, codec: str, names: list[str]) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(renamed({name.encode(codec): "text" for name in names}))
    assert sorted(found.name for found in gather([path]).found) == sorted(f"a.zip/{name}" for name in names)


def test_members_with_one_name_are_all_read(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as archive:
        for text in ("first", "second", "last", "last"):
            archive.writestr("d/a.txt", text)
    loaded = load_all(gather([path]))
    assert {document.name: document.text for document in loaded.documents} == {
        "a.zip/d/a.txt": "last",
        "a.zip/d/a (2).txt": "first",
        "a.zip/d/a (3).txt": "second",
    }
    assert loaded.skipped == (Skipped("a.zip/d/a.txt", "stands in the archive twice, with the same content"),)


def test_an_archive_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(zipped({f"{at}.txt": f"text {at}" for at in range(30)}))
    opened = []
    start = Archive.__init__

    def counted(self: Archive, source: Path | bytes) -> None:
        opened.append(source)
        start(self, source)

    monkeypatch.setattr(Archive, "__init__", counted)
    assert len(load_all(gather([path])).documents) == 30
    assert len(opened) <= 2  # to see what it is, and to read it


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, "gz"), (bz2.compress, "bz2"), (lzma.compress, "xz")])
def test_packed_texts_are_read(tmp_path: Path, pack: object, suffix: str) -> None:
    assert callable(pack)
    packed = pack(b"a,b\n1,2\n" * 3000) + pack(b"end,\n")  # two members that follow each other
    document = decode_document(packed, Path(f"a.csv.{suffix}"))
    assert (document.kind, document.num_bytes, document.text[-9:]) == ("csv", len(packed), "1,2\nend,\n")
    assert document.notes[0].startswith("unpacked from ")
    page = decode_document(pack(pdf(["a page"])), Path(f"a.pdf.{suffix}"))
    assert (page.kind, page.text) == ("pdf", "a page")
    with pytest.raises(DocumentError, match=r"damaged .* file .*: pack it anew"):
        decode_document(packed[:40], Path(f"a.csv.{suffix}"))
    for inner, reason in (
        (bytes(257) + b"ustar" + bytes(99), "a tar archive"),
        (b"\x89PNG\r\n", "an image, packed in"),
    ):
        with pytest.raises(DocumentError, match=reason):
            decode_document(pack(inner), Path(f"a.{suffix}"))
    (tmp_path / f"a.csv.{suffix}").write_bytes(packed)
    (tmp_path / f"b.png.{suffix}").write_bytes(pack(b"\x89PNG\r\n"))
    assert [found.name for found in gather([tmp_path]).found] == [f"{tmp_path.name}/a.csv.{suffix}"]


def test_a_packed_bomb_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duolocal.documents.packed._MAX_BYTES", 1 << 20)
    for pack in (gzip.compress, bz2.compress, lzma.compress):
        with pytest.raises(DocumentError, match="unpacks to more than 1 MiB: unpack it and cut it up"):
            decode_document(pack(bytes(30 << 20)), Path("a.txt.gz"))


@pytest.mark.parametrize("name", ["a.xls", "a.doc", "a.pdf", "a.csv", "a.docx"])
@pytest.mark.parametrize(
    "head",
    ["<html><head><meta charset=utf-8>", "\ufeff<!DOCTYPE html>", "<!-- made -->\n<", '<?xml version="1.0"?><html><'],
)
def test_a_web_page_under_another_name_is_read_as_one(name: str, head: str) -> None:
    table = "table><tr><td>Item<td>Price<tr><td>Pen<td>3</table>"
    page = head + ("" if head.endswith("<") else "<") + table
    for data in (page.encode(), page.encode("utf-16")):
        document = decode_document(data, Path(name))
        assert (document.kind, document.text) == ("html", "| Item | Price |\n| --- | --- |\n| Pen | 3 |")
        assert document.notes[0] == f"named {Path(name).suffix}, but by its content a web page: read as that"


def test_other_contents_under_office_names() -> None:
    assert decode_document(b"{\\rtf1 Rich}", Path("a.doc")).text == "Rich"
    assert decode_document(b"a\tb\n1\t2\n", Path("a.xls")).text == "a\tb\n1\t2\n"
    workbook = (
        '<?xml version="1.0"?><?mso-application progid="Excel.Sheet"?><Workbook '
        'xmlns="urn:schemas-microsoft-com:office:spreadsheet" xmlns:ss="urn:schemas-microsoft-com:office:spreadsheet">'
        '<Worksheet ss:Name="S"><Table><Row><Cell ss:MergeAcross="1"><Data ss:Type="String">a</Data></Cell><Cell>'
        '<Data ss:Type="Number">1</Data></Cell></Row><Row ss:Index="5"><Cell ss:Index="2"><Data ss:Type="DateTime">'
        "2024-05-03T00:00:00.000</Data></Cell></Row></Table></Worksheet></Workbook>"
    )
    document = decode_document(workbook.encode(), Path("a.xls"))
    assert (document.kind, document.text) == ("xlsx", "# S\n\na,,1\n,2024-05-03")
    assert document.notes == ("named .xls, but by its content an Office file as XML: read as that",)


def test_office_files_that_were_saved_as_one_xml_file() -> None:
    for data, program, kind in (
        (docx(paragraph("Grüße")), "Word.Document", "docx"),
        (xlsx({"A": [["Grüße"]]}), "Excel.Sheet", "xlsx"),
        (pptx(["Grüße"]), "PowerPoint.Show", "pptx"),
    ):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = {name: archive.read(name).decode().rpartition("?>")[2] for name in archive.namelist()}
        inner = "".join(
            f'<pkg:part pkg:name="/{name}"><pkg:xmlData>{content}</pkg:xmlData></pkg:part>'
            for name, content in parts.items()
        )
        flat = (
            f'<?xml version="1.0"?><?mso-application progid="{program}"?><pkg:package '
            f'xmlns:pkg="http://schemas.microsoft.com/office/2006/xmlPackage">{inner}</pkg:package>'
        )
        document = decode_document(flat.encode(), Path("a.xml"))
        assert (document.kind, document.text.split()[-1]) == (kind, "Grüße")
        assert document.notes == ("named .xml, but by its content an Office file as XML: read as that",)
