"""Folders, patterns and zip archives: what is found, what is left out and why, in which order and under which names."""

import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from duolocal.documents import gather, load_all
from duolocal.documents.finding import natural_key
from duolocal.documents.ignore import without_backtracking
from duolocal.documents.loading import summary
from duolocal.errors import DocumentError
from tests.document_files import pdf, zipped

BINARY = bytes(range(256))


def make(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def names(*paths: str | Path) -> list[str]:
    return [found.name for found in gather(paths).found]


def left_out(*paths: str | Path) -> dict[str, str]:
    return {item.name: item.reason for item in gather(paths).skipped}


def test_a_folder_is_read_with_all_that_is_in_it(tmp_path: Path) -> None:
    root = make(
        tmp_path / "proj",
        {
            "b.md": "b",
            "a10.txt": "a",
            "a9.txt": "a",
            "src/x/deep.py": "deep",
            "src/y.c": "y",
            ".hidden/x.txt": "x",
            ".env": "x",
            "picture.png": b"\x89PNG\r\n\x1a\n",
            "program": b"\x7fELF" + BINARY,
            "data.bin": BINARY,
            "drawing.svg": "<svg/>",
            "empty.py": "",
            "src/__pycache__/y.txt": "made",
            "blank.txt": " \n\n",
            "x.zip": zipped({"a.txt": "a"}),
            "scan.doc": b"\xd0\xcf\x11\xe0\xa1\xb1",
        },
    )
    assert names(root) == ["proj/a9.txt", "proj/a10.txt", "proj/b.md", "proj/src/x/deep.py", "proj/src/y.c"]
    assert left_out(root) == {
        "proj/.env": "hidden",
        "proj/.hidden/": "hidden",
        "proj/blank.txt": "empty",
        "proj/data.bin": "a binary file",
        "proj/drawing.svg": "a drawing (SVG): name it itself to load its code",
        "proj/empty.py": "empty",
        "proj/picture.png": "an image",
        "proj/program": "a program",
        "proj/scan.doc": "an old Office file",
        "proj/src/__pycache__/": "made by a program",
        "proj/x.zip": "a zip archive: name it itself to load what is in it",
    }
    line = summary(gather([root]).skipped)
    assert line is not None and line.startswith("11 files or folders left out (hidden ×2, empty ×2, ")


def test_names_are_relative_to_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, {"a.txt": "a", "sub/b.txt": "b"})
    monkeypatch.chdir(tmp_path)
    assert names(".") == ["a.txt", "sub/b.txt"]
    assert names("sub", "a.txt") == ["sub/b.txt", "a.txt"]
    monkeypatch.chdir(tmp_path / "sub")
    assert names("..") == [f"{tmp_path.name}/a.txt", f"{tmp_path.name}/sub/b.txt"]


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path) -> None:
    make(tmp_path, {".config/a.txt": "a"})
    assert names(tmp_path / ".config") == [".config/a.txt"]


def test_gitignore_is_respected(tmp_path: Path) -> None:
    root = make(
        tmp_path / "r",
        {
            ".gitignore": "*.log\nbuild/\n/only-here.txt\n!keep.log\n# comment\n\\",
            "a.log": "x",
            "keep.log": "x",
            "build/x.txt": "x",
            "sub/build/y.txt": "x",
            "only-here.txt": "x",
            "sub/only-here.txt": "x",
            "sub/.gitignore": "!*.log\nlocal.txt\n",
            "sub/b.log": "x",
            "sub/local.txt": "x",
        },
    )
    assert names(root) == ["r/keep.log", "r/sub/b.log", "r/sub/only-here.txt"]
    reasons = left_out(root)
    assert {name for name, reason in reasons.items() if reason == "ignored by .gitignore"} == {
        "r/a.log",
        "r/build/",
        "r/only-here.txt",
        "r/sub/build/",
        "r/sub/local.txt",
    }


def test_gitignore_of_the_folders_above_counts_inside_a_repository(tmp_path: Path) -> None:
    make(tmp_path, {".gitignore": "*.txt\n", "sub/a.txt": "a", "sub/a.md": "a", "sub/b.md": "a"})
    assert names(tmp_path / "sub") == ["sub/a.md", "sub/a.txt", "sub/b.md"]  # it is no repository
    make(tmp_path, {".git/info/exclude": "b.md\n"})
    assert names(tmp_path / "sub") == ["sub/a.md"]
    assert names(tmp_path / "sub/a.txt") == ["a.txt"]  # what is named is read
    make(
        tmp_path, {".gitignore": "*.txt\n/out\n", "out/deep/a.txt": "a", "out/.gitignore": "b.md", "out/deep/b.md": "b"}
    )
    assert names(tmp_path / "out") == ["out/deep/a.txt"]  # a folder that is named although it is ignored
    assert names(tmp_path / "out/deep") == ["deep/a.txt", "deep/b.md"]


@pytest.mark.skipif(shutil.which("git") is None, reason="asks git")
def test_gitignore_as_git_reads_it(tmp_path: Path) -> None:
    rng = random.Random(3)
    words = ["a", "b", "c", "doc", "x.log", "y.log", "z.txt"]
    for attempt in range(12):
        root = tmp_path / f"r{attempt}"
        files = {"/".join(rng.choices(words, k=rng.randrange(1, 4))) + ".t" for _ in range(30)}
        make(root, dict.fromkeys(files, "x"))
        patterns = [
            "*.log.t",
            "!x.log.t",
            "/a",
            "doc/",
            "**/b/c.t",
            "a/**",
            "c/*.t",
            "!/a/b",
            "b*",
            "[xy].log.t",
            "z.txt.t",
        ]
        make(root, {".gitignore": "\n".join(rng.sample(patterns, 4))})
        environment = os.environ | {"HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1"}
        subprocess.run(["git", "init", "-q", str(root)], check=True, env=environment)
        listed = subprocess.run(
            ["git", "-C", str(root), "ls-files", "--others", "--exclude-standard"],
            capture_output=True,
            check=True,
            text=True,
            env=environment,
        )
        expected = {f"r{attempt}/{name}" for name in listed.stdout.split("\n") if name and not name.startswith(".")}
        make(root, {"kept.md": "x"})  # no pattern names it
        assert set(names(root)) == expected | {f"r{attempt}/kept.md"}


@given(
    st.text(alphabet="ab*?/[]!\\.(+", min_size=1, max_size=10),
    st.lists(st.text(alphabet="ab/.*(", max_size=8), min_size=1),
)
@settings(max_examples=300)
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_patterns_without_backtracking_match_the_same(line: str, paths: list[str]) -> None:
    try:
        pattern = GitIgnoreSpecPattern(line)
    except ValueError:
        return
    if pattern.include is None or pattern.regex is None:
        return
    regex = re.compile(without_backtracking(pattern.regex.pattern))
    for path in paths:
        for name in (path, f"a/{path}b", f"{path}/a*(b"):
            assert bool(regex.match(name)) == bool(pattern.regex.match(name)), (line, name)


def test_a_gitignore_made_to_harm_takes_no_time(tmp_path: Path) -> None:
    root = make(
        tmp_path / "r", {"a" * 200 + "c": "x", ".gitignore": f"{'*a' * 20}b\n{'**/a*/' * 20}b\n{'*a**' * 9}b\n"}
    )
    began_s = time.process_time()
    assert names(root) == ["r/" + "a" * 200 + "c"]
    assert time.process_time() - began_s < 10  # without the rewriting: years


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, {"b.md": "b", "a.md": "a", "sub/c.md": "c", "x[1].md": "x", "d.md/e.txt": "e"})
    monkeypatch.chdir(tmp_path)
    assert names("*.md") == ["a.md", "b.md", "x[1].md"]
    assert left_out("*.md") == {
        "d.md/": "a folder: a pattern picks files; name the folder to load all in it",
    }
    make(tmp_path, {"p.png": b"\x89PNG", "z.zip": zipped({"in.md": "in"}), "e.txt": ""})
    assert names("?.*") == ["a.md", "b.md", "z.zip/in.md"]
    assert left_out("?.*") == {
        "d.md/": "a folder: a pattern picks files; name the folder to load all in it",
        "e.txt": "empty",
        "p.png": "an image",
    }
    assert names("**/*.md") == ["a.md", "b.md", "c.md", "x[1].md"]
    assert names("x[1].md") == ["x[1].md"]  # a file of that name comes before the pattern
    with pytest.raises(DocumentError, match=r"^no file matches \*\.rst: check the pattern and the folder$"):
        gather(["*.rst"])


def test_zip_archives(tmp_path: Path) -> None:
    data = zipped(
        {
            "b/2.txt": "two",
            "b/10.txt": "ten",
            "a.pdf": pdf(["a page"]),
            "../../etc/passwd": "up",
            "/abs/olute.txt": "absolute",
            "c\\windows.txt": "back",
            "inner.zip": zipped({"x.txt": "x"}),
            "image.png": b"\x89PNG....",
            "__MACOSX/._b": "x",
            ".DS_Store": "x",
            "empty.txt": "",
            "..": "nothing but dots",
        }
    )
    (tmp_path / "x.zip").write_bytes(data)
    gathered = gather([tmp_path / "x.zip"])
    loaded = load_all(gathered)
    assert {document.name: document.text for document in loaded.documents} == {
        "x.zip/etc/passwd": "up",
        "x.zip/abs/olute.txt": "absolute",
        "x.zip/a.pdf": "a page",
        "x.zip/b/2.txt": "two",
        "x.zip/b/10.txt": "ten",
        "x.zip/c/windows.txt": "back",
    }
    assert [name.split("/")[-1] for name in names(tmp_path / "x.zip")].index("2.txt") == 3
    assert left_out(tmp_path / "x.zip") == {
        "x.zip": "a member without a name",
        "x.zip/.DS_Store": "hidden",
        "x.zip/__MACOSX/._b": "hidden",
        "x.zip/empty.txt": "empty",
        "x.zip/image.png": "an image",
        "x.zip/inner.zip": "a zip archive inside another: unpack it first",
    }
    assert {document.path for document in loaded.documents} == {tmp_path / "x.zip"}


def test_a_member_without_a_name_is_listed(tmp_path: Path) -> None:
    data = bytearray(zipped({"a.txt": "a", "z": "no name"}))
    for mark, length in ((b"PK\x03\x04", 26), (b"PK\x01\x02", 28)):
        at = data.rindex(mark)
        place = data.index(b"z", at + length)
        data[at + length] = 0
        data[place : place + 1] = b""
    end = data.rindex(b"PK\x05\x06")
    for field, less in ((12, 1), (16, 1)):  # the directory is a byte shorter, and begins a byte earlier
        data[end + field : end + field + 4] = (
            int.from_bytes(data[end + field : end + field + 4], "little") - less
        ).to_bytes(4, "little")
    (tmp_path / "x.zip").write_bytes(data)
    assert names(tmp_path / "x.zip") == ["x.zip/a.txt"]
    assert left_out(tmp_path / "x.zip") == {"x.zip": "a member without a name"}


def test_an_office_file_is_no_archive(tmp_path: Path) -> None:
    make(tmp_path, {"a.docx": zipped({"x": "y"})})
    assert [(found.name, found.member) for found in gather([tmp_path / "a.docx"]).found] == [("a.docx", None)]


def test_names_are_unique_and_as_short_as_can_be(tmp_path: Path) -> None:
    make(tmp_path, {"one/a.md": "1", "two/a.md": "2", "two/b.md": "3", "one/sub/a.md": "4", "two/sub/a.md": "5"})
    assert names(tmp_path / "one/a.md", tmp_path / "two/a.md", tmp_path / "two/b.md") == [
        "one/a.md",
        "two/a.md",
        "b.md",
    ]
    assert names(tmp_path / "one/sub", tmp_path / "two/sub") == ["one/sub/a.md", "two/sub/a.md"]


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    make(tmp_path, {"d/a.md": "1", "d/b.md": "1"})
    (tmp_path / "d/link.md").symlink_to(tmp_path / "d/a.md")
    gathered = gather([tmp_path / "d/b.md", tmp_path / "d", tmp_path / "d" / ".." / "d" / "a.md"])
    assert [found.name for found in gathered.found] == ["b.md", "d/a.md"]  # the same content elsewhere is another file
    assert [(item.name, item.reason) for item in gathered.skipped] == [
        ("d/b.md", "the same file as b.md"),
        ("d/link.md", "the same file as d/a.md"),
        ("a.md", "the same file as d/a.md"),
    ]


def test_links_that_loop_or_lead_out(tmp_path: Path) -> None:
    root = make(tmp_path / "r", {"a.txt": "a", "sub/b.txt": "b"})
    make(tmp_path, {"secret.txt": "s"})
    (root / "sub/up").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "out.txt").symlink_to(tmp_path / "secret.txt")
    (root / "gone.txt").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    assert names(root) == ["r/a.txt", "r/sub/b.txt"]
    reasons = left_out(root)
    assert reasons.pop("r/self").startswith("cannot be read: ")
    assert reasons == {
        "r/gone.txt": "cannot be read: No such file or directory",
        "r/out.txt": "a link that leads out of the folder: name the file itself",
        "r/pipe": "a device, not a file",
        "r/sub/up/": "a link to a folder: name it itself",
    }


def test_a_named_file_must_work_and_one_in_a_folder_may_not(tmp_path: Path) -> None:
    root = make(tmp_path / "r", {"a.txt": "a", "scan.pdf": pdf([None])})
    loaded = load_all(gather([root]))
    assert [document.name for document in loaded.documents] == ["r/a.txt"]
    assert [(item.name, item.reason) for item in loaded.skipped] == [
        (
            "r/scan.pdf",
            "is a PDF of which 1 of 1 pages yield no text: it holds pictures of pages; run OCR over it first",
        )
    ]
    with pytest.raises(DocumentError, match="yield no text"):
        load_all(gather([root / "a.txt", root / "scan.pdf"]))
    (root / "a.txt").unlink()
    with pytest.raises(
        DocumentError, match=r"^none of 1 files could be read \(the last, r/scan.pdf, is a PDF of which"
    ):
        load_all(gather([root]))


def test_nothing_found_is_an_error_that_says_why(tmp_path: Path) -> None:
    root = make(tmp_path / "r", {"a.png": b"\x89PNG"})
    with pytest.raises(DocumentError) as raised:
        gather([root])
    assert str(raised.value) == (
        f"{root} holds nothing that can be loaded (r/a.png: an image): name the files themselves"
    )
    (tmp_path / "none").mkdir()
    with pytest.raises(DocumentError, match=r"none holds no file: name one that does$"):
        gather([tmp_path / "none"])
    with pytest.raises(DocumentError, match=r"does not exist: did you mean .*none"):
        gather([tmp_path / "nune"])
    assert gather([]).found == ()


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duolocal.documents.finding.MAX_FILES", 5)
    make(tmp_path, {f"{at}.txt": "x" for at in range(6)})
    with pytest.raises(DocumentError, match="there are more than 5 files in what was named"):
        gather([tmp_path])


def test_odd_names_can_be_shown_and_tokenized(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/bad\xff\n.txt"
    with open(raw, "w") as file:
        file.write("x")
    (name,) = names(tmp_path)
    assert name.endswith("/bad\ufffd\ufffd.txt")
    name.encode()
    assert load_all(gather([tmp_path])).documents[0].text == "x"


def test_a_folder_that_may_not_be_read_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "r", {"a.txt": "a", "locked/b.txt": "b"})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert names(root) == ["r/a.txt"]
    assert left_out(root) == {"r/locked/": "cannot be read: Permission denied"}


@given(st.lists(st.text(alphabet="ab1290 /.", min_size=1, max_size=6), max_size=8))
def test_the_order_is_natural_and_total(words: list[str]) -> None:
    assert sorted(words, key=natural_key) == sorted(sorted(words), key=natural_key)
    numbers = [f"chapter {number}.txt" for number in (2, 10, 1, 33)]
    assert sorted(numbers, key=natural_key) == [f"chapter {number}.txt" for number in (1, 2, 10, 33)]


def test_the_order_does_not_depend_on_the_disk(tmp_path: Path) -> None:
    rng = random.Random(1)
    orders = []
    for attempt in range(3):
        words = [f"f{at}.txt" for at in range(15)] + [f"d{at % 3}/f{at}.txt" for at in range(9)]
        rng.shuffle(words)
        orders.append(names(make(tmp_path / str(attempt) / "r", dict.fromkeys(words, "x"))))
    assert orders[0] == orders[1] == orders[2]
    assert orders[0][:2] == ["r/d0/f0.txt", "r/d0/f3.txt"]
