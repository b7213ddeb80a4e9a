"""`duolocal docs tokens`, `/load` and `/docs`, and what is said where documents do not fit."""

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from duolocal import cli
from duolocal.documents import Document, Part, gather
from duolocal.documents.tokens import count_document
from duolocal.engine.fitting import Fit
from duolocal.engine.session import ChatSession, document_content
from duolocal.terminal import docs_tokens
from duolocal.terminal.docs_load import load_paths
from duolocal.tokenizer import ChatPiece, Message
from tests.document_files import epub, pdf, zipped
from tests.summarize_models import tiny_engine
from tests.terminal_fakes import make_chat


def shown(output: io.StringIO) -> str:
    """Return what was printed since the last call."""
    text = output.getvalue()
    output.seek(0)
    output.truncate()
    return text.strip()


class Words:
    """A tokenizer whose tokens are words."""

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        return [0] * len(text.split())

    def chat_pieces(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[ChatPiece]:
        return [ChatPiece(message.content, message=at) for at, message in enumerate(messages)]

    def encode_pieces(self, pieces: Sequence[ChatPiece], *, continues: bool) -> list[int]:
        return [token for piece in pieces for token in self.encode(piece.text)]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs_tokens, "_open", lambda model, progress: (Words(), 100, 2048))


def run(*arguments: str, columns: int = 100, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(["docs", "tokens", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fill(folder: Path) -> Path:
    (folder / "r").mkdir()
    (folder / "r/a.txt").write_text("word " * 46)
    (folder / "r/b.pdf").write_bytes(pdf(["one two", None, "three"]))
    (folder / "r/c.epub").write_bytes(epub({"a.xhtml": "<p>first</p>"}))
    (folder / "r/d.png").write_bytes(b"\x89PNG")
    (folder / "r/e.txt").write_bytes("naïve".encode("cp1252"))
    return folder / "r"


def test_the_table(tmp_path: Path, words: None, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    code, out, err = run(str(fill(tmp_path)), "--context", "1000", capsys=capsys)
    assert (code, err) == (0, "")
    assert [line.rstrip() for line in out.splitlines()] == [
        "name      kind  pages  tokens  share  of 1000",
        "r/a.txt   text             49   4.9%  █",
        "r/b.pdf   pdf       3       6   0.6%  ▏",
        "r/c.epub  epub      1       4   0.4%  ▏",
        "r/e.txt   text              4   0.4%  ▏",
        "* r/b.pdf: page 2 of 3 yields no text (blank, or a picture: run OCR over it to have that",
        "too)",
        "* r/e.txt: not UTF-8: read as cp1252, a guess; look at its accents before you rely on it",
        "left out: 1",
        "  r/d.png: an image",
        "4 documents, 63 tokens: 6.3% of a context of 1000",
    ]


def test_without_a_context_it_is_that_of_the_chat(tmp_path: Path, words: None, capsys) -> None:
    code, out, _ = run(str(fill(tmp_path)), "--json", capsys=capsys)
    report = json.loads(out)
    assert (code, report["context"], report["total_tokens"], report["fits"]) == (0, 100, 63, False)  # 128 are kept
    assert report["kept_for_a_question"] == 128 and report["context_needed"] == "1K"
    assert [(item["name"], item["kind"], item["pages"], item["num_tokens"]) for item in report["documents"]] == [
        ("r/a.txt", "text", None, 49),
        ("r/b.pdf", "pdf", 3, 6),
        ("r/c.epub", "epub", 1, 4),
        ("r/e.txt", "text", None, 4),
    ]
    assert report["documents"][0]["share"] == 0.49
    assert report["skipped"] == [{"name": "r/d.png", "reason": "an image"}]
    assert report["documents"][1]["notes"] and len(report["documents"][1]["digest"]) == 64


def test_what_does_not_fit_is_told_with_the_choices(tmp_path: Path, words: None, capsys) -> None:
    for name, count in (("big", 900), ("middle", 300), ("small", 60)):
        (tmp_path / f"{name}.txt").write_text("word " * (count - 3))
    code, out, _ = run(*(str(path) for path in sorted(tmp_path.iterdir())), "--context", "600", capsys=capsys)
    assert code == 0
    assert " ".join(out.split()).endswith(
        "1,260 tokens of documents do not fit, big.txt (900), middle.txt (300) and small.txt (60): the context is 600, "
        "0 are in use and 128 are kept for a question; leave out big.txt (900), start with --context 2K, start with "
        "--reader retrieve, which reads them for each question, or summarise first with `duolocal summarize`"
    )


def test_wrong_usage(tmp_path: Path, capsys) -> None:
    for arguments, message in (
        ([], "the following arguments are required: PATH"),
        (["a", "--context", "x"], "--context is 'x': give a number of tokens such as 131072, 32K or 1M"),
        ([str(tmp_path)], f"{tmp_path} holds no file: name one that does"),
        ([str(tmp_path / "*.md")], f"no file matches {tmp_path / '*.md'}: check the pattern and the folder"),
    ):
        code, out, err = run(*arguments, capsys=capsys)
        assert (code, out, err) == (2 if "--context" in arguments or not arguments else 1, "", f"duolocal: {message}\n")


def test_names_cannot_steer_the_terminal(tmp_path: Path, words: None, capsys) -> None:
    (tmp_path / "evil\x1b[2J[red].txt").write_text("x")
    _, out, _ = run(str(tmp_path), capsys=capsys)
    assert "\x1b" not in out and "[2J[red].txt" in out


def test_help_loads_no_torch() -> None:
    script = (
        "import sys\nfrom duolocal.cli import main\n"
        "try: main(['docs', 'tokens', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'rich', 'pypdfium2', 'pathspec'} & set(sys.modules), set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert "zip archive" in result.stdout


def test_the_tokens_are_those_of_the_real_model(smollm2_path: Path, capsys) -> None:
    from duolocal.models.loader import open_model
    from duolocal.tokenizer import load_tokenizer

    readme = Path(__file__).parents[1] / "README.md"
    code, out, _ = run(str(readme), "--json", "--model", str(smollm2_path), capsys=capsys)
    report = json.loads(out)
    tokenizer = load_tokenizer(open_model(smollm2_path))
    message = Message("user", document_content("README.md", readme.read_text(encoding="utf-8")))
    pieces = tokenizer.chat_pieces([message], add_generation_prompt=False)
    expected = len(tokenizer.encode_pieces(pieces)) - len(tokenizer.encode("<|im_end|>\n", special=True))
    assert (code, report["context"], report["documents"][0]["num_tokens"]) == (0, 8192, expected)


# --- in the chat ---------------------------------------------------------------------------------------------------


def test_docs_in_the_chat_show_source_pages_and_share(tmp_path: Path) -> None:
    chat, output = make_chat(columns=400)  # no path is wrapped
    chat.handle("/docs")
    assert shown(output) == "no documents in the context; /load PATH adds some"
    (tmp_path / "a.pdf").write_bytes(pdf(["\n".join(["one two three four"] * 25), None]))
    (tmp_path / "b.zip").write_bytes(zipped({"c.txt": "one two"}))
    chat.handle(f"/load {tmp_path}/a.pdf {tmp_path}/b.zip")
    said = shown(output)
    assert "a.pdf: page 2 of 2 yields no text" in said and "898 tokens are free" in said
    chat.handle("/docs")
    lines = [" ".join(line.split()) for line in shown(output).splitlines()]
    assert lines[0] == "document pages tokens share of 1000 source"
    assert lines[1].startswith(f"a.pdf 2 100 10.0% ██ {tmp_path}/a.pdf (pdf, ")
    assert lines[2] == f"b.zip/c.txt 2 0.2% ▏ {tmp_path}/b.zip (text, 7 B, utf-8)"
    assert lines[3].startswith("* a.pdf: page 2 of 2 yields no text")


def test_loading_shows_its_progress_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duolocal.terminal.progress._SHOW_AFTER_S", 0.0)
    for at in range(3):
        (tmp_path / f"{at}.txt").write_text("x")
    output = io.StringIO()
    loaded = load_paths([tmp_path], Console(file=output, force_terminal=True, width=80))
    assert len(loaded.documents) == 3
    assert "looking for files" in output.getvalue() and "reading" in output.getvalue()
    quiet = io.StringIO()
    load_paths([tmp_path], Console(file=quiet, width=80))
    assert quiet.getvalue() == ""


def test_left_out_files_are_told_when_the_chat_begins(tmp_path: Path) -> None:
    chat, output = make_chat()
    chat.state.leaving = True
    chat.run([Document("a", Path("a"), "word", "utf-8", 4, parts=(Part("page 1", 0),))], left_out="3 files left out")
    assert "3 files left out\nloaded a: 1 token\n" in output.getvalue()


# --- the choices ---------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=7),
    st.integers(1, 1500),
    st.integers(0, 100),
    st.integers(0, 128),
)
def test_what_to_drop_is_enough_and_as_few_as_can_be(sizes: list[int], context: int, used: int, kept: int) -> None:
    fit = Fit(tuple((f"f{at}", size) for at, size in enumerate(sizes)), context, used=used, kept=kept)
    assert fit.fits == (sum(sizes) + used + kept <= context)
    dropped = fit.to_drop()
    names = [name for name, _ in dropped]
    assert len(set(names)) == len(names)
    room = context - used - kept
    assert sum(sizes) - sum(size for _, size in dropped) <= max(0, room)
    # By counting all ways for so few files: no smaller number of them would do.
    from itertools import combinations

    fewer = len(dropped) - 1
    if room >= 0 and fewer >= 0:
        assert all(sum(sizes) - sum(chosen) > room for chosen in combinations(sizes, fewer))
    if not fit.fits:
        message = fit.refusal()
        assert message.isprintable() and f"start with --context {fit.needed}" in message
        assert int(fit.needed[:-1]) * 1024 >= sum(sizes) + used + kept


def test_docs_tokens_and_the_chat_count_alike(tmp_path: Path) -> None:
    engine, tokenizer = tiny_engine(tmp_path / "model", context=4096)
    texts = [("a.txt", "One mill."), ("b.txt", "Two ponds,\nand a ship.")]
    session = ChatSession(engine, tokenizer)
    for _ in session.add_documents(texts):
        pass
    sizes = [item.num_tokens for item in session.context_items() if item.kind == "document"]
    counted = [
        count_document(Document(name, Path(name), text, "", 0), tokenizer, first=not at).num_tokens
        for at, (name, text) in enumerate(texts)
    ]
    assert counted == sizes and sum(counted) == engine.position


def test_a_context_beyond_the_trained_one_is_marked() -> None:
    fit = Fit((("a.txt", 9000),), 8192, kept=128, trained=8192)
    assert "start with --context 9K (beyond the 8,192 tokens that the model was trained for), start" in fit.refusal()
    assert "beyond" not in replace(fit, trained=16384).refusal()


def test_a_refusal_names_the_largest_and_counts_the_rest() -> None:
    sizes = tuple((f"folder/{'x' * 200}/file{at}.txt", 100 + at) for at in range(300))
    message = Fit(sizes, 8192, kept=128).refusal()
    assert len(message) < 1000 and "and 296 more (" in message
    assert "leave out" in message and message.endswith("or summarise first with `duolocal summarize`")
    alone = Fit((("a.txt", 9000),), 8192, used=5, kept=128).refusal()
    assert "; start with --context 9K, start with --reader retrieve, which reads it for each" in alone
    assert "; /reset all, start with" in Fit((("a.txt", 8000),), 8192, used=500, kept=128).refusal()
    assert "/reset all" not in alone  # it would not make room enough


def test_gather_is_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf(["x"]))
    monkeypatch.setattr("duolocal.documents.converter.Converter.convert", lambda *_, **__: pytest.fail("converted"))
    assert [found.name for found in gather([tmp_path]).found] == [f"{tmp_path.name}/a.pdf"]
