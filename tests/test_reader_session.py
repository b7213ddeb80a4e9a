"""Questions about documents that are read for each of them: the conversation, the chat, the command line."""

import json
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from duolocal.cli import main
from duolocal.documents import Document, Part
from duolocal.documents.loading import beside
from duolocal.engine.engine import Engine
from duolocal.engine.session import ChatSession, Event, Finished, Prefilled, Text
from duolocal.errors import ContextOverflowError, SettingsError
from duolocal.models.loader import open_model
from duolocal.reader import Retriever
from duolocal.reader.retrieve import MIN_CHUNK
from duolocal.reader.session import ELLIPSIS, Picked, ReadingSession
from duolocal.sample_text import sample_text
from duolocal.settings import Sampling
from duolocal.sources import Source
from duolocal.terminal.chat import Chat
from duolocal.terminal.docs_chat import add_documents
from duolocal.terminal.reader_view import picked_report, picked_view, place
from duolocal.tokenizer import load_tokenizer
from tests.session_models import GREEDY, tiny_session
from tests.terminal_fakes import make_chat
from tests.test_reader import text_of


def reading(folder: Path, *, context: int = 2048, passages: int = 200) -> ReadingSession:
    session = tiny_session(folder, context=context)
    retriever = Retriever(session.engine, session.tokenizer, chunk_tokens=MIN_CHUNK, passage_tokens=passages)
    return ReadingSession(session, retriever)


def parts(events: Iterable[Event | Picked]) -> tuple[list[Prefilled], Picked, str, Finished]:
    events = list(events)
    (picked,) = (event for event in events if isinstance(event, Picked))
    last = events[-1]
    assert isinstance(last, Finished)
    text = "".join(event.text for event in events if isinstance(event, Text))
    return [event for event in events if isinstance(event, Prefilled)], picked, text, last


def test_a_question_is_answered_from_passages_of_documents_that_do_not_fit(tmp_path: Path) -> None:
    reader = reading(tmp_path, context=1024)
    texts = {"a.txt": text_of(80, 1), "b.txt": text_of(90, 2)}
    for name, text in texts.items():
        reader.add(name, text)
    session = reader.session
    with pytest.raises(ContextOverflowError, match="--reader retrieve, which reads them for each question"):
        session.add_documents(list(texts.items()))

    progress, picked, answer, last = parts(reader.ask("Where is the boat?", GREEDY))

    assert picked.tokens_read > 1024 and picked.num_tokens <= 200
    assert [each.done for each in progress] == sorted(each.done for each in progress)
    assert last.prompt_tokens > picked.tokens_read and last.completion_tokens and answer
    assert picked == reader.last and picked.passages
    given = dict(session.texts)
    for name, text in texts.items():
        best_last = sorted(picked.passages, key=lambda each: each.score)
        mine = [each.text[each.start : each.stop].strip("\n") for each in best_last if each.document == name]
        assert given.get(f"{name} (passages)") == (ELLIPSIS.join(mine) if mine else None)
        assert all(each.text == text for each in picked.passages if each.document == name)
    assert session.engine.position < 1024


def test_every_question_has_passages_of_its_own_and_what_was_undone_leaves_none(tmp_path: Path) -> None:
    reader = reading(tmp_path)
    reader.add("a.txt", text_of(60))
    parts(reader.ask("Where is the boat?", GREEDY))
    after_first = reader.session.engine.position
    parts(reader.ask("Who slept?", GREEDY))
    kinds = [turn.kind for turn in reader.session.tree.current.way()]
    assert kinds == ["start", "document", "exchange", "document", "exchange"]
    reader.session.undo()
    reader.tidy()
    assert reader.session.engine.position == after_first
    reader.session.undo()
    reader.tidy()
    assert reader.session.engine.position == 0
    # Documents that were loaded the ordinary way are left alone.
    *_, loaded = reader.session.add_document("b.txt", text_of(3))
    assert isinstance(loaded, Finished)
    reader.tidy()
    assert reader.session.documents == ["b.txt"]


@pytest.mark.parametrize("after", ["reading", "picked", "passages"])
def test_stopping_leaves_the_conversation_as_it_was(tmp_path: Path, after: str) -> None:
    reader = reading(tmp_path)
    reader.add("a.txt", text_of(60))
    parts(reader.ask("Where is the boat?", GREEDY))
    before = list(reader.session.engine.token_ids)
    picked, last = False, None
    for event in reader.ask("Who slept?", GREEDY):
        picked = picked or isinstance(event, Picked)
        stop = {
            "reading": True,
            "picked": isinstance(event, Picked),
            "passages": picked and isinstance(event, Prefilled),
        }
        if stop[after]:
            reader.cancel()
        last = event
    assert isinstance(last, Finished) and last.reason == "cancelled" and last.completion_tokens == 0
    assert reader.session.engine.token_ids == before
    _, again, _, _ = parts(reader.ask("Who slept?", GREEDY))
    assert again.passages


def test_what_cannot_be_asked_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reading(tmp_path, context=560, passages=300)
    monkeypatch.setattr(Retriever, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(SettingsError, match="there are no documents to read"):
        reader.ask("Who?", GREEDY)
    with pytest.raises(SettingsError, match=r"empty\.txt has no text to read"):
        reader.add("empty.txt", " \n ")
    reader.add("a.txt", text_of(10))
    with pytest.raises(SettingsError, match="the question is empty"):
        reader.ask("  ", GREEDY)
    list(reader.session.ask("Who are you and what is this about? " * 5, GREEDY))
    with pytest.raises(
        ContextOverflowError, match=r"passages \(300\), question and answer, and .* of 560 are free: /res"
    ):
        reader.ask("Where is the boat?", GREEDY)


# --- the chat ---


def chat_over(reader: ReadingSession) -> tuple[Chat, StringIO]:
    chat, output = make_chat()
    chat.state.session, chat.state.reader, chat.state.sampling = reader.session, reader, GREEDY
    return chat, output


def document(name: str, text: str, **fields: object) -> Document:
    return Document(name, Path(name), text, "utf-8", len(text), **fields)  # type: ignore[arg-type]


def test_a_chat_shows_what_the_answer_was_made_of(tmp_path: Path) -> None:
    reader = reading(tmp_path)
    chat, output = chat_over(reader)
    text = text_of(60)
    add_documents(chat, [document("a.txt", text, parts=(Part("page 1", 0), Part("page 2", 600)))])
    assert f"a.txt: {len(text):,} characters, read for each question" in output.getvalue()
    assert reader.session.engine.position == 0
    chat.handle("Where is the boat?")
    shown = " ".join(output.getvalue().split())
    assert reader.last is not None and len(reader.last.passages) > 0
    assert f"the answer is made of {len(reader.last.passages)} passage" in shown
    for source in reader.last.passages:
        page = 1 if source.start < 600 else 2
        assert f"a.txt, page {page}, line {source.line}: {' '.join(source.excerpt.split()[:3])}" in shown
    chat.handle("/retry")
    assert len(reader.session.texts) == 1
    chat.handle("/undo")
    assert reader.session.engine.position == 0
    chat.handle("Who slept?")
    chat.handle("/reset")
    assert reader.session.engine.position == 0 and list(reader.documents) == ["a.txt"]
    chat.handle("/docs")
    assert output.getvalue().count("read for each question") == 2
    with pytest.raises(SettingsError, match=r"--reader retrieve --doc a\.txt"):
        chat.handle("/set context 4K")
    chat.handle("/reset all")
    assert not reader.documents
    chat.handle("Hello")  # without documents it is an ordinary question
    assert len(reader.session.messages) == 2


def test_documents_of_one_name_are_told_apart() -> None:
    documents = [document("a.txt", "1"), document("a.txt", "2"), document("a.txt", "3"), document("b.txt", "4")]
    found, notes = beside([*documents, document("a.txt", "2")], {})
    assert notes == ["a.txt is in the context already"]
    assert list(found) == ["a.txt", "a.txt (2)", "a.txt (3)", "b.txt"]
    assert [each.text for each in found.values()] == ["1", "2", "3", "4"]


def test_passages_are_listed_for_people_and_for_programs() -> None:
    text = "First line.\nSecond line, of the mill.\nThird \x1b[31mline."
    picked = Picked((Source("a.txt", text, 11, 38, 0.5), Source("a.txt", text, 38, 58, 0.125)), 20, 131072)
    files = {"a.txt": document("a.txt", text, parts=(Part("page 1", 0), Part("page 2", 30)))}
    shown = StringIO()
    Console(file=shown, width=100).print(picked_view(picked, files))
    lines = shown.getvalue().splitlines()
    assert lines[0].startswith("read 131,072 tokens; the answer is made of 2 passages (20 tokens)")
    assert lines[1].startswith("████████  a.txt, page 1, line 2: Second line") and "\x1b" not in shown.getvalue()
    assert lines[2].startswith("██        a.txt, page 2, line 3: Third")
    report = json.loads(json.dumps(picked_report(picked, files)))
    assert report["tokens_read"] == 131072 and report["passages"][0]["text"] == text[11:38]
    assert [(each["part"], each["line"]) for each in report["passages"]] == [("page 1", 2), ("page 2", 3)]


def test_a_passage_is_where_a_person_finds_it() -> None:
    text = "# One\n\nA mill.\n\n## Two\nA pond.\n\nA ship."
    at = text.index("A ship")
    ship, head = Source("a.docx", text, at, len(text), 0.5), Source("a.docx", text, 0, 5, 0.5)
    chapters = (Part("chapter 1", 0), Part("chapter 2", text.index("A pond")))
    for kind, parts, wanted in (
        ("docx", (), "a.docx, “Two”"),
        ("html", (), "a.docx, “Two”"),
        ("epub", chapters, "a.docx, chapter 2"),  # the heading is of the chapter before
        ("pdf", (Part("page 1", 0),), "a.docx, page 1, “Two”"),
        ("markdown", (), "a.docx, line 8"),
        ("code", (), "a.docx, line 8"),
    ):
        files = {"a.docx": document("a.docx", text, kind=kind, parts=parts)}
        assert place(ship, files) == wanted, kind
    assert place(head, {}) == "a.docx, “One”"  # of a session whose file is gone: by its name
    rows = picked_report(Picked((ship,), 3, 9), {"a.docx": document("a.docx", text, kind="docx")})["passages"]
    assert (rows[0]["heading"], rows[0]["line"]) == ("Two", None)


# --- the command line ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reader", "quick"], "--reader is 'quick': give one of full, retrieve"),
        (["--passages", "1K"], "--passages is for --reader retrieve: add that, or leave it out"),
        (["--reader", "retrieve", "--passages", "x"], "--passages is 'x': give a number of tokens"),
        (["--reader", "retrieve", "--session", "s"], "--session keeps what is in the context"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", *words, "--prompt", "x"]) == 2
    assert message in capsys.readouterr().err


# --- a real model ---

NEEDLE = "Dr Halloran keeps the spare key of the observatory under a blue flower pot."


@pytest.mark.full
@pytest.mark.real
def test_a_real_model_finds_a_needle_in_a_text_three_times_its_reach(
    tmp_path: Path, smollm2_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    text = sample_text()[100_000:145_000]
    at = text.index("\n\n", 30_000)
    path = tmp_path / "help.txt"
    path.write_text(f"{text[:at]}\n\n{NEEDLE}{text[at:]}", encoding="utf-8")
    question = "Where does Dr Halloran keep the spare key of the observatory?"
    options = ["--context", "2K", "--kv", "k8v4", "--keep", "off", "--temperature", "0", "--max-tokens", "24"]
    asked = ["chat", "--model", str(smollm2_path), *options, "--doc", str(path), "--prompt", question, "--json"]
    assert main(asked) == 1
    assert "start with --reader retrieve, which reads it for each question" in capsys.readouterr().err
    assert main([*asked, "--reader", "retrieve"]) in (0, 3)
    report = json.loads(capsys.readouterr().out)
    assert "flower pot" in report["text"]
    assert report["reader"]["tokens_read"] > 10_000 and report["tokens"]["context"] < 2048
    best = max(report["reader"]["passages"], key=lambda each: each["score"])
    assert NEEDLE in best["text"] and best["document"] == "help.txt"


@pytest.mark.full
@pytest.mark.real
def test_a_real_model_is_given_nothing_that_is_not_there(smollm2_path: Path) -> None:
    source = open_model(smollm2_path)
    session = ChatSession(Engine.load(source, context=2048, kv="k8v4"), load_tokenizer(source))
    reader = ReadingSession(session, Retriever(session.engine, session.tokenizer))
    reader.add("help.txt", sample_text()[:12_000])
    question = "Where does Dr Halloran keep the spare key of the observatory?"
    _, without, answer, _ = parts(reader.ask(question, Sampling(temperature=0, max_tokens=24)))
    assert "flower" not in answer
    reader.session.reset()
    at = sample_text().index("\n\n", 6000)
    reader.add("help.txt", f"{sample_text()[:at]}\n\n{NEEDLE}{sample_text()[at:12_000]}")
    _, within, answer, _ = parts(reader.ask(question, Sampling(temperature=0, max_tokens=24)))
    assert "flower pot" in answer
    # What a question looks at most where the answer is nowhere stays far below the answer.
    highest = max((each.score for each in without.passages), default=0.0)
    assert max(each.score for each in within.passages) > 2 * highest
