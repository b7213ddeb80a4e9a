import codecs
import hashlib
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duolocal.documents import Document, Part, decode_document, gather, load, load_document
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
    assert (document.name, document.path, document.kind, document.parts) == ("a.txt", path, "text", ())
    assert (document.text, document.encoding, document.num_bytes) == (TEXT, encoding, len(data))
    assert document.digest == hashlib.sha256(data).hexdigest()
    assert (document.note is None) == (encoding != "cp1252")


def test_latin_1_is_the_last_resort() -> None:
    document = decode_document(b"caf\xe9 \x81 la cr\xe8me, d\xe9j\xe0 \xe0 No\xebl br\xfbl\xe9", Path("a.txt"))
    assert document.encoding == "latin-1"
    assert document.note == ("a.txt: not UTF-8: read as latin-1, a guess; look at its accents before you rely on it")


def test_a_stray_byte_does_not_spoil_utf_8() -> None:
    document = decode_document(("é" * 50).encode() + b"\xff" + "ü".encode(), Path("a.txt"))
    assert document.text == "é" * 50 + "\ufffd" + "ü"
    assert document.num_replaced == 1
    assert document.note == "a.txt: not quite UTF-8: 1 times U+FFFD stands for what was unreadable"


# The beginning of the Universal Declaration of Human Rights (public domain), twice: a guess needs a few words.
LANGUAGES = {
    "cs": "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv. Jsou nadáni rozumem a svědomím a mají "
    "spolu jednat v duchu bratrství. Příliš žluťoučký kůň.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem i "
    "sumieniem i powinni postępować wobec innych w duchu braterstwa. Źródło, łąka.",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve "
    "birbirlerine karşı kardeşlik zihniyeti ile hareket etmelidirler.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
    "conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и "
    "должны поступать в отношении друг друга в духе братства.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι προικισμένοι με "
    "λογική και συνείδηση.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。"
    "人間は、理性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない。",
    "zh": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. "
    "인간은 천부적으로 이성과 양심을 부여받았다.",
}


@pytest.mark.parametrize(
    ("language", "codec"),
    [
        ("cs", "cp1250"),
        ("cs", "iso8859-2"),
        ("pl", "cp1250"),
        ("pl", "iso8859-2"),
        ("tr", "cp1254"),
        ("fr", "cp1252"),
        ("ru", "cp1251"),
        ("ru", "koi8-r"),
        ("ru", "cp866"),
        ("ru", "utf-16-le"),
        ("el", "cp1253"),
        ("ja", "shift_jis"),
        ("ja", "euc-jp"),
        ("ja", "iso2022_jp"),
        ("ja", "utf-16-be"),
        ("zh", "gb18030"),
        ("zh", "utf-16-le"),
        ("ko", "cp949"),
    ],
)
def test_guessed_encodings_give_the_text_back_and_say_so(language: str, codec: str) -> None:
    text = f"{LANGUAGES[language]}\nPlain words, and code: x = f(1) + 2;\n{LANGUAGES[language]}\n"
    document = decode_document(text.encode(codec), Path("a.txt"))
    assert document.text == text
    if not codec.startswith("utf-16"):
        assert f"read as {document.encoding}, a guess" in (document.note or "")


def test_what_a_source_file_says_of_its_encoding_is_believed() -> None:
    for name, head, codec in (
        ("a.py", "#!/usr/bin/python\n# -*- coding: {} -*-\n", "iso8859-15"),
        ("a.rb", "# coding: {}\n", "koi8-r"),
        ("a.xml", '<?xml version="1.0" encoding="{}"?>\n', "cp866"),
    ):
        text = head.format(codec) + ("# Œuvre: 5 €\n" if codec == "iso8859-15" else "# да\n")
        document = decode_document(text.encode(codec), Path(name))
        assert (document.text, document.encoding, document.note) == (text, codecs.lookup(codec).name, None)
    assert decode_document("# coding: nonsense\n# é".encode("cp1252"), Path("a.py")).text.endswith("é")
    assert decode_document("# coding: cp1252\n# é".encode(), Path("a.py")).text.endswith("é")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_utf_8_is_read_back(text: str) -> None:
    text = "x" + text
    assert decode_document(text.encode(), Path("a.txt")).text == text


@given(st.binary(max_size=300))
def test_any_bytes_are_text_or_refused(data: bytes) -> None:
    document, message = None, "a.txt "
    try:
        document = decode_document(data, Path("a.txt"))
    except DocumentError as error:
        message = str(error)
    assert message.startswith("a.txt ") and message.isprintable()
    if document is not None:
        assert document.text.strip() and document.num_bytes == len(data)
        document.text.encode()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.zip", b"PK\x03\x04..", "{} is a zip archive: unpack it and load the text inside"),
        ("a.odt", b"PK\x03\x04..", "{} is a damaged zip archive (its directory is missing): pack it anew"),
        ("a.msg", b"\xd0\xcf\x11\xe0", "{} is an Outlook message: save it as eml or plain text and load that"),
        (
            "a.doc",
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
            "{} is an old Office file: save it in its new format (docx, xlsx, pptx) or as plain text",
        ),
        (
            "a.docx",
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
            "{} is locked with a password, or an old Office file: save it without one, in its new format",
        ),
        ("a.gz", b"\x1f\x8b\x08", "{} is a damaged gzip file (it breaks off): pack it anew"),
        ("a.tgz", b"\x1f\x8b\x08", "{} is a tar archive in gzip: unpack it and load the text inside"),
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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.md", "markdown"),
        ("a.py", "code"),
        ("a.csv", "csv"),
        ("a.jsonl", "json"),
        ("Makefile", "text"),
        ("a.unknown", "text"),
    ],
)
def test_kinds_by_name(name: str, kind: str) -> None:
    assert decode_document(b"GGUF, BZh, ID3 and Rar! are words here", Path(name)).kind == kind


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
    monkeypatch.setattr(load, "MAX_BYTES", 2**20)
    path = tmp_path / "huge.txt"
    path.write_bytes(b"a" * (2**20 + 1))
    with pytest.raises(DocumentError, match="is larger than 1 MiB: cut it up"):
        load_document(path)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_the_part_of_a_position(lengths: list[int]) -> None:
    starts = [sum(lengths[:at]) for at in range(len(lengths))]
    owners = [at for at, length in enumerate(lengths) for _ in range(length)]  # by position
    parts = tuple(Part(f"page {at}", start) for at, start in enumerate(starts))
    document = Document("a", Path("a"), "x" * sum(lengths), "", 1, parts=parts)
    assert [document.part_at(at) for at in range(len(owners))] == [parts[owner] for owner in owners]
    assert document.part_at(-1) is None
    assert Document("a", Path("a"), "x", "", 1).part_at(0) is None


SHORT = {
    "gb18030": ("你好，世界。\n", "合同编号：48，单位：元\n", "姓名,地址\n张三,北京市\n"),
    "big5": ("這是一個測試的檔案，請您說明。\n",),
    "cp932": ("会議は東京で行う。\n",),
    "cp949": ("안녕하세요. 계약서입니다.\n",),
    "cp1251": ("Привет, мир\n", "Договор и отчет\n"),
    "koi8_r": ("Привет, мир\n",),
    "cp866": ("Привет, мир\n",),
    "cp850": ("Größe: 5 m, Maße und Gewicht für die Bestellung\n", "le café est près de la forêt, où l’été dure\n"),
    "mac_roman": (
        "Größe: 5 m, Maße und Gewicht für die Bestellung\n",
        "le café est près de la forêt, où il a été reçu\n",
    ),
    "cp1252": ("Größe: 5 m, Maße und Gewicht\n", "le café est près de la forêt, où l’été dure… 5 €\n"),
    "cp852": ("Příliš žluťoučký kůň úpěl ďábelské ódy\n",),
}


@pytest.mark.parametrize(("codec", "text"), [(codec, text) for codec, texts in SHORT.items() for text in texts])
def test_short_texts_in_old_encodings(codec: str, text: str) -> None:
    document = decode_document(text.replace("’", "'").encode(codec), Path("a.txt"))
    assert document.text == text.replace("’", "'")
    assert "a guess" in (document.note or "")


def test_a_few_zero_bytes_make_no_binary_file(tmp_path: Path) -> None:
    rows = "name,city,sum\nÄgid,Köln,5\nBert,Bonn,7\n"
    for codec in ("utf-8", "cp1252"):
        for place in ("Bert", "\n", ","):
            for zeros in (b"\0", bytes(9000)):
                data = rows.encode(codec).replace(place.encode(), place.encode() + zeros, 1)
                document = decode_document(data, Path("a.csv"))
                assert document.text == rows.replace(place, f"{place}\ufffd", 1)
                assert document.notes[0] == "1 run of zero bytes stands as U+FFFD"
                (tmp_path / "a.csv").write_bytes(data)
                assert [found.name for found in gather([tmp_path]).found] == [f"{tmp_path.name}/a.csv"]
    assert decode_document("a,b\n".encode("utf-16-le") * 9, Path("a.csv")).encoding == "utf-16-le"
