"""A conversation's tokens: what is fed turn by turn is what the template makes of the whole, and undo is exact."""

import json
from pathlib import Path

import pytest

from duolocal.engine.session import ChatSession, Finished, Prefilled, Text
from duolocal.errors import ContextOverflowError, SettingsError, TokenizerError
from duolocal.settings import Sampling
from duolocal.tokenizer import Message
from tests.session_models import finish, in_context, tiny_session
from tests.tokenizer_files import TEMPLATES

GREEDY = Sampling(temperature=0, max_tokens=6)
DOCUMENT = "The mill stood by the river. " * 12


def rendered(session: ChatSession, messages: list[Message]) -> str:
    """The whole conversation as the template writes it, up to the end of the last content."""
    pieces = session.tokenizer.chat_pieces(messages, add_generation_prompt=False)
    last = max(i for i, piece in enumerate(pieces) if piece.message == len(messages) - 1)
    return "".join(piece.text for piece in pieces[: last + 1])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Answer in verse."])
def test_turn_by_turn_equals_the_whole_template(tmp_path: Path, template: str, system: str | None) -> None:
    session = tiny_session(tmp_path, template, system=system)
    finish(session.add_document("mill.txt", DOCUMENT))
    finish(session.ask("Where did it stand?", GREEDY))
    finish(session.ask("And why <|im_end|> there?", GREEDY))
    finish(session.add_documents([("a.txt", "Alpha."), ("b.txt", "Beta.")]))
    finish(session.ask("Compare them.", GREEDY))
    text = session.tokenizer.decode(in_context(session), skip_special=False)
    # Llama-2's tokenizer writes a space after BOS that is not in the template's text.
    assert text.replace("<s> ", "<s>") == rendered(session, session.messages)
    assert sum(item.num_tokens for item in session.context_items()) == len(in_context(session))
    assert [item.name for item in session.context_items() if item.kind == "document"] == ["mill.txt", "a.txt", "b.txt"]


def test_the_first_turn_has_the_ids_of_the_whole_template(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    finish(session.ask("Where?", GREEDY))
    pieces = session.tokenizer.chat_pieces([Message("user", "Where?")], add_generation_prompt=True)
    ids = session.tokenizer.encode_pieces(pieces)
    assert session.engine.token_ids[: len(ids)] == ids


def test_a_document_is_prefilled_before_the_question_and_only_once(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    events = list(session.add_document("mill.txt", DOCUMENT))
    progress = [event for event in events if isinstance(event, Prefilled)]
    assert len(progress) > 1
    assert progress[-1].done == progress[-1].total == session.engine.position
    done = finish(session.ask("Where?", GREEDY))
    assert done.prompt_tokens < 30
    assert done.completion_tokens == 6
    assert done.reason == "length"


def test_undo_returns_to_the_same_answer(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    finish(session.add_document("mill.txt", DOCUMENT))
    finish(session.ask("Where?", GREEDY))
    before = (in_context(session), session.messages, session.context_items())
    finish(session.ask("Why?", GREEDY))
    after = (in_context(session), session.messages, session.context_items())
    assert session.undo()
    assert (in_context(session), session.messages, session.context_items()) == before
    finish(session.ask("Why?", GREEDY))
    assert (in_context(session), session.messages, session.context_items()) == after
    finish(session.retry(GREEDY))
    assert (in_context(session), session.messages, session.context_items()) == after


def test_retry_after_a_document_asks_the_question_alone_again(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    finish(session.add_document("mill.txt", DOCUMENT))
    finish(session.ask("Where\n\nand when?", GREEDY))
    first = in_context(session)
    finish(session.retry(GREEDY))
    assert in_context(session) == first


def test_undo_takes_documents_back_and_ends(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    assert not session.undo()
    finish(session.add_document("mill.txt", DOCUMENT))
    assert session.documents == ["mill.txt"]
    assert session.undo()
    assert (session.engine.position, session.documents, session.messages) == (0, [], [])
    assert not session.undo()


def test_every_turn_can_be_undone_and_the_documents_stay(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    finish(session.add_document("mill.txt", DOCUMENT))
    loaded = in_context(session)
    for turn in range(12):
        finish(session.ask(f"Question {turn}?", GREEDY))
    assert [session.undo() for _ in range(12)] == [True] * 12
    assert in_context(session) == loaded
    finish(session.ask("Question?", GREEDY))
    assert not session.undo(3)
    session.forget_conversation()
    assert in_context(session) == loaded
    assert session.documents == ["mill.txt"]
    assert len(session.tree.turns) == 2


def test_cancelling_a_document_leaves_no_trace(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    finish(session.ask("Hello?", GREEDY))
    before = (in_context(session), session.messages)
    events = session.add_document("mill.txt", DOCUMENT)
    next(events)
    session.cancel()
    assert finish(events).reason == "cancelled"
    assert (in_context(session), session.messages) == before
    assert session.documents == []
    assert finish(session.add_document("mill.txt", DOCUMENT)).reason == "loaded"


def test_cancelling_an_answer_keeps_what_was_said(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    events = session.ask("Hello?", Sampling(temperature=0))
    said = []
    for event in events:
        if isinstance(event, Text):
            said.append(event.text)
            if len(said) == 3:
                session.cancel()
        last = event
    assert isinstance(last, Finished)
    assert last.reason == "cancelled"
    assert session.messages[-1] == Message("assistant", "".join(said))
    finish(session.ask("Go on.", GREEDY))
    text = session.tokenizer.decode(in_context(session), skip_special=False)
    assert text == rendered(session, session.messages)


def test_cancelling_before_the_answer_leaves_no_trace(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    events = session.ask("Hello? " * 60, GREEDY)
    next(events)
    session.cancel()
    assert finish(events).reason == "cancelled"
    assert (in_context(session), session.messages) == ([], [])


def test_an_abandoned_answer_is_as_good_as_a_cancelled_one(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    for event in session.ask("Hello?", Sampling(temperature=0)):
        if isinstance(event, Text):
            break
    assert session.messages[-1].role == "assistant"
    finish(session.ask("Go on.", GREEDY))
    assert session.tokenizer.decode(in_context(session), skip_special=False) == rendered(session, session.messages)


def test_a_blank_answer_can_be_followed_by_a_question(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    session.tokenizer.eos_ids = frozenset(range(session.tokenizer.vocab_size))
    assert finish(session.ask("Hello?", GREEDY)).completion_tokens == 0
    session.tokenizer.eos_ids = frozenset()
    finish(session.ask("Still there?", GREEDY))
    assert session.tokenizer.decode(in_context(session), skip_special=False) == rendered(session, session.messages)


def test_stop_strings_end_the_answer_and_are_not_shown(tmp_path: Path) -> None:
    whole = tiny_session(tmp_path)
    finish(whole.ask("Hello?", Sampling(temperature=0, max_tokens=30)))
    answer = whole.messages[-1].content
    stop = answer[8:10]
    session = tiny_session(tmp_path)
    done = finish(session.ask("Hello?", Sampling(temperature=0, max_tokens=30, stop=(stop,))))
    assert done.reason == "stop"
    assert session.messages[-1].content == answer[: answer.index(stop)]


def test_documents_that_do_not_fit_are_refused_whole_before_any_is_read(tmp_path: Path) -> None:
    session = tiny_session(tmp_path, context=512)
    sizes = []
    for name, text in (("a.txt", "Alpha."), ("b.txt", "word " * 600)):
        probe = tiny_session(tmp_path, context=4096)
        finish(probe.add_document(name, text))
        sizes.append(probe.engine.position)
    with pytest.raises(ContextOverflowError) as caught:
        session.add_documents([("a.txt", "Alpha."), ("b.txt", "word " * 600)])
    message = str(caught.value)
    assert f"a.txt ({sizes[0]:,})" in message
    assert "the context is 512, 0 are in use and 128 are kept for a question" in message
    assert session.engine.position == 0
    suggested = int(message.rsplit("--context ", 1)[1].partition("K")[0]) * 1024
    bigger = tiny_session(tmp_path, context=suggested)
    assert finish(bigger.add_documents([("a.txt", "Alpha."), ("b.txt", "word " * 600)])).reason == "loaded"


def test_a_question_that_does_not_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    session = tiny_session(tmp_path, context=128)
    with pytest.raises(ContextOverflowError, match="128 of 128 are free: shorten it, /reset, or start with --context"):
        session.ask("word " * 400, GREEDY)
    with pytest.raises(SettingsError, match="the question is empty"):
        session.ask("  \n", GREEDY)
    assert session.engine.position == 0


def test_an_answer_ends_when_the_context_is_full(tmp_path: Path) -> None:
    session = tiny_session(tmp_path, context=64)
    done = finish(session.ask("Hello?", Sampling(temperature=0)))
    assert done.reason == "context"
    assert session.engine.position == 64
    with pytest.raises(ContextOverflowError):
        session.ask("More?", GREEDY)
    assert session.undo()
    assert finish(session.ask("Hi?", GREEDY)).reason in ("length", "stop")


def test_another_system_prompt_reads_the_documents_again(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    finish(session.add_document("mill.txt", DOCUMENT))
    finish(session.ask("Where?", GREEDY))
    finish(session.set_system("Be brief."))
    assert session.documents == ["mill.txt"]
    assert [message.role for message in session.messages] == ["system", "user"]
    fresh = tiny_session(tmp_path, system="Be brief.")
    finish(fresh.add_document("mill.txt", DOCUMENT))
    assert in_context(session) == in_context(fresh)
    finish(session.set_system(None))
    assert [message.role for message in session.messages] == ["user"]


def test_a_system_prompt_that_leaves_no_room_changes_nothing(tmp_path: Path) -> None:
    session = tiny_session(tmp_path, context=512)
    finish(session.add_document("mill.txt", DOCUMENT))
    before = (in_context(session), session.messages)
    with pytest.raises(ContextOverflowError):
        session.set_system("word " * 400)
    assert (in_context(session), session.messages, session.system) == (*before, None)


def test_a_system_prompt_longer_than_the_context_is_refused_without_documents_too(tmp_path: Path) -> None:
    session = tiny_session(tmp_path, context=256)
    with pytest.raises(ContextOverflowError, match=r"the shortest question has .* and the context 256: shorten it"):
        session.set_system("word " * 400)
    assert session.system is None


def test_a_template_that_leaves_the_question_out_is_told(tmp_path: Path) -> None:
    tiny_session(tmp_path)  # writes the tokenizer
    file = tmp_path / "chatml" / "tokenizer_config.json"
    raw = json.loads(file.read_text())
    raw["chat_template"] = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}Answer:"
    file.write_text(json.dumps(raw))
    session = tiny_session(tmp_path)
    for refused in (lambda: session.ask("Where?", GREEDY), lambda: session.add_document("mill.txt", DOCUMENT)):
        with pytest.raises(TokenizerError, match="leaves a message of the user out"):
            finish(refused())
    assert in_context(session) == []


def test_reset_forgets_everything(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    finish(session.add_document("mill.txt", DOCUMENT))
    finish(session.ask("Where?", GREEDY))
    session.reset()
    assert (in_context(session), session.messages, session.documents) == ([], [], [])
    assert session.engine.cache.pool.num_blocks == 0
