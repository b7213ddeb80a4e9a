"""`eval needle`: a long text without repeats, needles where they are said to be, readings that can be taken up."""

import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from duolocal.cli import main
from duolocal.commands.eval import NEEDLE_NAMES
from duolocal.engine.session import Prefilled
from duolocal.errors import SettingsError
from duolocal.evaluate.documentation import documentation
from duolocal.evaluate.needle import KINDS, MOST, NeedleResult, make_task, run_task
from duolocal.reader import Retriever
from duolocal.reader.retrieve import MIN_CHUNK
from duolocal.settings import LoadSettings
from duolocal.terminal import needle_view
from duolocal.terminal.needle_view import _print_counts, _read_state, _write_state
from tests.session_models import tiny_session, tiny_tokenizer
from tests.test_reader import read, text_of

DEPTHS = [0.0, 0.5, 1.0]


def test_the_documentation_is_as_long_as_asked_and_never_repeats() -> None:
    found = documentation(900_000)
    assert 0 <= 900_000 - len(found.text) <= 200
    assert found.text.startswith(documentation(30_000).text[:29_000])
    pieces = [" ".join(piece.split()) for piece in found.text.split("\n\n")]
    long = [piece for piece in pieces if len(piece) >= 80]
    assert len(long) > 2000 and len(set(long)) == len(long)
    assert list(found.sources)[:2] == ["Python's help", "docstrings of the standard library"]


def test_too_little_documentation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duolocal.evaluate.documentation._docstrings", lambda _root: iter(()))
    with pytest.raises(SettingsError, match="and 10,000,000 are needed: ask for fewer tokens"):
        documentation(10_000_000)


def test_needles_stand_at_their_depths_and_some_are_left_out(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    text = "\n\n".join(text_of(6, seed) for seed in range(150))
    task = make_task(tokenizer, text, num_tokens=8000, depths=DEPTHS, kinds=list(KINDS), absent=2, seed=1)
    assert abs(len(tokenizer.encode(task.text)) - 8000) < 700  # the needles, and up to a paragraph less
    assert task.depths == (*DEPTHS, None, None) * len(KINDS)
    for needle, depth in zip(task.needles, task.depths, strict=True):
        count = task.text.count(needle.sentence)
        assert count == (0 if depth is None else 1)
        if depth is not None:
            assert abs(task.text.index(needle.sentence) / len(task.text) - depth) < 0.15
            assert f"\n\n{needle.sentence}" in task.text
        assert all(word in needle.sentence for word in needle.wanted)
        assert not any(word in needle.question.question for word in needle.wanted)
    assert len({needle.question.question for needle in task.needles}) == len(task.needles)
    without = task.text
    for needle in task.needles:
        without = without.replace(f"\n\n{needle.sentence}", "")
    assert text.startswith(without)
    again = make_task(tokenizer, text, num_tokens=8000, depths=DEPTHS, kinds=list(KINDS), absent=2, seed=1)
    other = make_task(tokenizer, text, num_tokens=8000, depths=DEPTHS, kinds=list(KINDS), absent=2, seed=2)
    assert again == task and other.digest != task.digest
    assert MOST >= 20 and tuple(KINDS) == NEEDLE_NAMES


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="too few for 8,000: give a longer one"):
        make_task(tiny_tokenizer(tmp_path), text_of(20), num_tokens=8000, depths=DEPTHS, kinds=["fact"], absent=0)


def test_a_result_for_every_question(tmp_path: Path) -> None:
    session = tiny_session(tmp_path, context=1024)
    retriever = Retriever(session.engine, session.tokenizer, chunk_tokens=MIN_CHUNK, passage_tokens=200)
    text = "\n\n".join(text_of(6, seed) for seed in range(20))
    task = make_task(session.tokenizer, text, num_tokens=1000, depths=DEPTHS, kinds=["fact"], absent=1)
    events = list(run_task(session, retriever, task))
    results = [event for event in events if isinstance(event, NeedleResult)]
    assert [result.depth for result in results] == [*DEPTHS, None]
    for needle, result in zip(task.needles, results, strict=True):
        assert result.begun.wanted == needle.wanted and result.length == 1000
        assert result.held == (result.rank is not None) and result.num_passages > 0
    assert not results[-1].held  # what was not hidden cannot be held
    *_, last = run_task(session, retriever, task, resume=retriever.state(), answered=3)
    assert isinstance(last, NeedleResult) and last.kind == results[-1].kind and last.answer == results[-1].answer


def test_a_reading_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    retriever = Retriever(session.engine, session.tokenizer, chunk_tokens=MIN_CHUNK, passage_tokens=200)
    texts, questions = [text_of(50, 1), text_of(30, 2)], ["Where is the boat?", "Who slept?"]
    whole = read(retriever, texts, questions)
    path = tmp_path / "point.part"
    identity = {"model": "m", "task": "t"}
    for at, event in enumerate(retriever.read(texts, questions), 1):
        if at == 3:
            assert isinstance(event, Prefilled)
            done = event.done
            _write_state(path, retriever.state(), 12.5, identity, [{"kind": "fact"}])
            break
    state, elapsed_s, results = _read_state(path, identity)
    assert (
        results == [{"kind": "fact"}]
        and state is not None
        and elapsed_s == 12.5
        and (state.chunks, state.tokens) == (3, done)
    )
    *progress, found = retriever.read(texts, questions, resume=state)
    assert found == whole
    assert isinstance(progress[-1], Prefilled) and progress[-1].done == whole[0].tokens_read - done
    assert _read_state(path, {**identity, "task": "another"}) == (None, 0.0, [])
    assert path.stat().st_size < 20_000


def test_counts_are_told_by_kind_and_what_was_guessed_beside_them() -> None:
    def row(depth: float | None, held: bool, begun: bool, said: bool) -> dict[str, object]:
        return {"kind": "fact", "depth": depth, "held": held, "begun": {"found": begun}, "said": said}

    rows = [
        row(0.0, True, True, False),
        row(1.0, True, False, False),
        row(None, False, False, True),
        row(None, *[False] * 3),
    ]
    shown = StringIO()
    _print_counts([{"length": 131072, "results": rows}], ["fact"], Console(file=shown, width=100))
    assert shown.getvalue().splitlines()[-1].split("  ")[-1].strip() == "1 of 2"
    assert " ".join(shown.getvalue().split()).endswith("128K fact 2 of 2 1 of 2 0 of 2 1 of 2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kinds", "fact,poem"], "--kinds has 'poem': give a list of passkey, fact, paraphrase"),
        (["--absent", "x"], "--absent is 'x'"),
        (["--out", "no-such-folder"], "is no folder: make it first"),
        (["--depths", "25"], "25 depths and 3 absent needles of a kind"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "needle", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.real
def test_a_real_model_finds_needles_in_documentation(
    tmp_path: Path, smollm2_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tokens", "4K", "--depths", "2", "--absent", "1", "--kinds", "fact", "--out", str(tmp_path)]
    words = ["eval", "needle", "--model", str(smollm2_path), "--kv", "k8v4", "--heads", "0.5", *options]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    (point,) = report["points"]
    here, gone = point["results"][:2], point["results"][2]
    assert all(row["held"] and row["begun"]["found"] for row in here)
    assert not (gone["held"] or gone["begun"]["found"] or gone["said"])
    assert main(words) == 0  # from the folder: nothing is read again
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["points"] == [point]


def test_every_setting_of_the_command_line_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[LoadSettings] = []

    def load(source: object, settings: LoadSettings, **more: object) -> None:
        loaded.append(settings)
        raise SettingsError("enough is known")

    source = SimpleNamespace(config=SimpleNamespace(max_positions=4096))
    monkeypatch.setattr(needle_view, "open_source", lambda settings, progress: source)
    monkeypatch.setattr(needle_view, "load_tokenizer", lambda source: None)
    monkeypatch.setattr(needle_view.Engine, "load", load)
    words = [
        "--model",
        "m",
        "--kv",
        "int8",
        "--heads",
        "0.5",
        "--sink-size",
        "4",
        "--recent-size",
        "64",
        "--select",
        "512",
    ]
    assert main(["eval", "needle", *words]) == 2
    assert loaded == [LoadSettings("m", kv="int8", heads="0.5", sink_size=4, recent_size=64, select="512")]
