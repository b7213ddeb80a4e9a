"""Excel workbooks that other readers get wrong: what is filled, computed, dated, struck or broken."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from duolocal.documents import Document, decode_document
from duolocal.errors import DocumentError
from tests.document_files import xlsx, zipped


def read(data: bytes) -> Document:
    return decode_document(data, Path("a.xlsx"))


def text_of(sheet: Sequence[Sequence[str]] | str, *, more: Mapping[str, str] | None = None) -> str:
    """Return the text of the only sheet."""
    document = read(xlsx({"S": sheet}, more=more))
    assert document.text.startswith("# S\n\n")
    return document.text.removeprefix("# S\n\n")


TABLE = (
    '<sheetData><row r="1"><c r="A1"><v>1</v></c><c r="C1"><v>2</v></c></row>'
    '<row r="{}"><c r="B{}"><v>3</v></c></row></sheetData>'
)


@pytest.mark.parametrize("dimension", ["A1", "A1:B1", "nonsense", "A1:XFD1048576", "C3"])
@pytest.mark.parametrize("last", [2, 1_048_576])
def test_all_filled_cells_are_read_whatever_the_sheet_says_of_its_size(dimension: str, last: int) -> None:
    sheet = f'<dimension ref="{dimension}"/>' + TABLE.format(last, last)
    assert text_of(sheet) == "1,,2\n,3"


def test_rows_and_cells_need_no_address() -> None:
    assert text_of("<sheetData><row><c><v>1</v></c><c><v>2</v></c></row><row><c><v>3</v></c></row></sheetData>") == (
        "1,2\n3"
    )


def test_the_limit_counts_filled_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    from duolocal.documents import xlsx as module
    from duolocal.documents.child import convert_bytes
    from duolocal.documents.converted import ConversionError

    monkeypatch.setattr(module, "_MAX_CELLS", 3)
    sheet = '<dimension ref="A1:XFD1048576"/>' + TABLE.format(9, 9)
    assert convert_bytes(xlsx({"S": sheet}), "xlsx").text.endswith("1,,2\n,3")
    with pytest.raises(ConversionError, match="more than 3 cells: cut it up"):
        convert_bytes(xlsx({"S": sheet, "T": sheet}), "xlsx")


def test_a_row_with_a_far_gap_names_its_cells() -> None:
    document = read(
        xlsx({"S": '<sheetData><row r="7"><c r="A7"><v>1</v></c><c r="XFD7"><v>2</v></c></row></sheetData>'})
    )
    assert document.text == "# S\n\nA7: 1,XFD7: 2"
    assert document.notes == ("1 row with far gaps written cell by cell, each with its address",)


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ('t="str"><f>IF(B1,"","x")</f><v></v>', ""),
        ('t="str"><f>IF(B1,"","x")</f><v/>', ""),
        ('t="str"><f>B1&amp;C1</f><v>ab</v>', "ab"),
        ("><f>B1*2</f><v>10</v>", "10"),
        ("><f>B1*2</f><v></v>", "=B1*2"),
        ("><f>B1*2</f><v/>", "=B1*2"),
        ("><f>B1*2</f>", "=B1*2"),
        ('t="str"><f>B1&amp;C1</f>', "=B1&C1"),
        ('t="b"><f>B1=2</f><v>0</v>', "FALSE"),
        ('t="e"><f>1/0</f><v>#DIV/0!</v>', "#DIV/0!"),
        ('><f t="array" ref="A1:A2">SUM(B1:B2*2)</f>', "=SUM(B1:B2*2)"),
    ],
)
def test_a_formula_is_its_value_and_only_without_one_a_formula(cell: str, shown: str) -> None:
    document = read(xlsx({"S": f'<sheetData><row r="1"><c r="A1" {cell}</c><c r="B1"><v>5</v></c></row></sheetData>'}))
    assert document.text == f"# S\n\n{shown},5"
    assert any("never computed" in note for note in document.notes) == shown.startswith("=")


def test_tags_with_a_prefix_and_strict_files_are_read() -> None:
    for root in ("http://schemas.openxmlformats.org/{}/2006/{}", "http://purl.oclc.org/ooxml/{}/{}"):
        space, kind = root.format("spreadsheetml", "main"), root.format("officeDocument", "relationships")
        relation = '<Relationships><Relationship Id="a" Type="{}/{}" Target="{}"/></Relationships>'
        members = {
            "[Content_Types].xml": "<Types/>",
            "_rels/.rels": relation.format(kind, "officeDocument", "/xl/book.xml"),
            "xl/book.xml": f'<x:workbook xmlns:x="{space}" xmlns:r="{kind}"><x:sheets>'
            '<x:sheet name="S" sheetId="1" r:id="a"/></x:sheets></x:workbook>',
            "xl/_rels/book.xml.rels": relation.format(kind, "worksheet", "Sheets/One.xml"),
            "xl/sheets/one.xml": f'<x:worksheet xmlns:x="{space}"><x:sheetData><x:row r="1"><x:c r="A1"><x:f>2*3</x:f>'
            '</x:c><x:c r="B1"><x:f>1+1</x:f><x:v>2</x:v></x:c><x:c r="C1" t="d"><x:v>2024-05-03</x:v></x:c></x:row>'
            "</x:sheetData></x:worksheet>",
        }
        assert read(zipped(members)).text == "# S\n\n=2*3,2,2024-05-03"


def test_shared_formulas_without_values_are_written_out() -> None:
    sheet = (
        '<sheetData><row r="2"><c r="B2"><f t="shared" ref="B2:C3" si="0">A1*$A$1+A$1&amp;"A1"</f></c>'
        '<c r="C2"><f t="shared" si="0"/></c></row><row r="3"><c r="B3"><f t="shared" si="0"/></c></row></sheetData>'
    )
    assert text_of(sheet) == ',"=A1*$A$1+A$1&""A1""","=B1*$A$1+B$1&""A1"""\n,"=A2*$A$1+A$1&""A1"""'


FORMATS = ("dd\\.mm\\.yyyy", "[h]:mm", '0.0 "days"', "[Red]0")
STYLES = (
    "<styleSheet><numFmts>"
    + "".join(f"<numFmt numFmtId='{at}' formatCode='{code}'/>" for at, code in enumerate(FORMATS, 200))
    + "</numFmts><fonts><font/><font><strike/></font></fonts><fills><fill/></fills><cellXfs>"
    + "".join(f'<xf numFmtId="{number}"/>' for number in (0, 14, 200, 22, 201, 202, 203))
    + '<xf numFmtId="0" fontId="1"/><xf numFmtId="20"/></cellXfs></styleSheet>'
)


@pytest.mark.parametrize(
    ("style", "value", "shown"),
    [
        (0, "45000.5", "45000.5"),
        (1, "45000", "2023-03-15"),
        (1, "59", "1900-02-28"),
        (1, "61", "1900-03-01"),
        (2, "45000", "2023-03-15"),
        (3, "45000.75", "2023-03-15 18:00:00"),
        (4, "1.5", "36:00:00"),
        (5, "3.5", "3.5"),
        (6, "45000", "45000"),
        (7, "100", "~~100~~"),
        (8, "0.375", "09:00:00"),
        (1, "-5", "-5"),
        (1, "1e300", "1e+300"),
    ],
)
def test_formats_tell_dates_from_numbers(style: int, value: str, shown: str) -> None:
    sheet = f'<sheetData><row r="1"><c r="A1" s="{style}"><v>{value}</v></c></row></sheetData>'
    assert text_of(sheet, more={"styles": STYLES}) == shown


@pytest.mark.parametrize(
    ("styles", "note"),
    [
        (
            "<styleSheet><numFmts/><fills><fill/></fills><cellXfs><xf fillId='7'/><xf/></cellXfs></styleSheet>",
            "",
        ),
        (
            "<styleSheet><cellXfs><xf numFmtId='x' fontId='99'/></cellXfs></styleSheet>",
            "the format is broken, a date may stand as a number: S!A1",
        ),
        ("<styleSheet><cellXfs>", "its formats cannot be read, dates stand as numbers"),
    ],
)
def test_broken_formats_lose_no_value(styles: str, note: str) -> None:
    document = read(
        xlsx({"S": '<sheetData><row r="1"><c r="A1" s="1"><v>5</v></c></row></sheetData>'}, more={"styles": styles})
    )
    assert document.text == "# S\n\n5"
    assert document.notes == () if not note else document.notes[0].startswith(note)


def test_texts_by_number() -> None:
    strings = (
        "<sst><si><t>plain</t></si><si><r><t>10</t></r><r><rPr><vertAlign val='superscript'/></rPr><t>6</t></r><r>"
        "<t> N</t></r></si><si><r><rPr><strike/></rPr><t>old</t></r><r><t> new</t></r></si>"
        "<si><t>東京</t><rPh sb='0' eb='2'><t>とうきょう</t></rPh></si>"
        "<si><t>a_x000D_\nb</t></si></sst>"
    )
    cells = "".join(f'<c t="s"><v>{number}</v></c>' for number in (0, 1, 2, 3, 4, 99, "x"))
    document = read(xlsx({"S": f'<sheetData><row r="1">{cells}</row></sheetData>'}, more={"sharedStrings": strings}))
    assert document.text == '# S\n\nplain,10^6 N,~~old~~ new,東京,"a\nb",\ufffd,\ufffd'
    assert document.notes == ("U+FFFD stands for text that the file has lost: S!F1, S!G1",)


def test_damage_is_told_and_costs_no_other_cell() -> None:
    good = '<sheetData><row r="1"><c r="A1"><v>1</v></c></row>'
    document = read(xlsx({"A": good, "B": good + "</sheetData>"}))
    assert document.text == "# A\n\n1\n\n# B\n\n1"
    assert [note[:31] for note in document.notes] == ["sheet A is read only up to row "]
    hidden = '<cols><col min="2" max="3" hidden="1"/></cols>' + good + "</sheetData>"
    assert read(xlsx({"A": hidden})).notes == ("hidden rows or columns are read too, in A",)


def test_binary_workbooks_are_named() -> None:
    with pytest.raises(DocumentError, match=r"binary Excel workbook \(xlsb\): save it as xlsx and load that"):
        read(
            zipped(
                {
                    "_rels/.rels": '<R><Relationship Id="a" Type="x/officeDocument" Target="xl/workbook.bin"/></R>',
                    "xl/workbook.bin": b"\x83\1",
                }
            )
        )
