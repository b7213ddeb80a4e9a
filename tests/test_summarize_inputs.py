"""A record for every input: copies, near-empty texts, a long document that goes on at its part."""

from pathlib import Path

import pytest

from duolocal.cli import main
from duolocal.documents import Document
from duolocal.errors import SettingsError
from duolocal.summarize import Output, Progress, Record, Summarizer
from duolocal.summarize.plan import MIN_PART
from duolocal.summarize.prompts import whole_sentences
from duolocal.summarize.resume import check_same
from tests.summarize_models import GREEDY, text_of, tiny_engine


def document(name: str, text: str) -> Document:
    return Document(name, Path(name), text, "utf-8", len(text))


def test_a_copy_gets_the_summary_of_the_first_and_says_so(tmp_path: Path) -> None:
    engine, tokenizer = tiny_engine(tmp_path / "model")
    documents = [document(name, text_of(1)) for name in ("a.txt", "b.txt")]
    events = list(Summarizer(engine, tokenizer, sampling=GREEDY).run(documents))
    first, copy = (event for event in events if isinstance(event, Record))
    assert copy.summary == first.summary and copy.prompt_tokens == copy.completion_tokens == 0
    assert (copy.name, copy.occurrence, copy.notes) == ("b.txt", 1, ("the same bytes as a.txt: its summary",))
    assert not any(isinstance(event, Progress) and event.index == 1 for event in events)


def test_a_near_empty_text_is_marked_and_stands_for_itself(tmp_path: Path) -> None:
    engine, tokenizer = tiny_engine(tmp_path / "model")
    events = Summarizer(engine, tokenizer, sampling=GREEDY).run([document("a.txt", "\nrye\n")])
    (made,) = (event for event in events if isinstance(event, Record))
    assert (made.summary, made.finish_reason, made.completion_tokens) == ("rye", "near-empty", 0)
    assert "near-empty" in made.notes[-1]


def test_a_long_document_goes_on_at_its_part(tmp_path: Path) -> None:
    engine, tokenizer = tiny_engine(tmp_path / "model")
    summarizer = Summarizer(engine, tokenizer, sampling=GREEDY, part_tokens=MIN_PART)
    documents = [document("book.txt", "\n\n".join(text_of(seed, 40) for seed in range(4)))]
    whole = next(event for event in summarizer.run(documents) if isinstance(event, Record))
    out = tmp_path / "out.jsonl"
    with Output(out) as output:
        for event in summarizer.run(documents, output=output):
            if isinstance(event, Progress) and event.part == 3:
                summarizer.cancel()
    assert not out.exists() and (tmp_path / "out.jsonl.parts").read_bytes().count(b"\n") == 2
    with (tmp_path / "out.jsonl.parts").open("ab") as file:
        file.write(b'\n["torn", {"te')
    with Output(out, resume=True) as output:
        events = list(summarizer.run(documents, output=output))
    (made,) = (event for event in events if isinstance(event, Record))
    assert made.summary == whole.summary and made.completion_tokens == whole.completion_tokens
    assert min(event.part for event in events if isinstance(event, Progress) and not event.level) == 3
    assert not (tmp_path / "out.jsonl.parts").exists()


def test_where_the_length_ends_a_summary_ends_whole() -> None:
    assert whole_sentences("It cost 2.50 pounds. The mill was") == "It cost 2.50 pounds."
    assert whole_sentences("- the mill\n- the whe") == "- the mill"
    assert whole_sentences("水车坏了。磨坊") == "水车坏了。"
    assert whole_sentences("no end at all") == "no end at all"


def test_our_own_limit_never_cuts_inside_a_sentence(tmp_path: Path) -> None:
    engine, tokenizer = tiny_engine(tmp_path / "model")
    sampling = GREEDY.__class__(temperature=0, seed=0)
    summarizer = Summarizer(engine, tokenizer, sampling=sampling, length="short", stop_repeats=False)
    (made,) = (event for event in summarizer.run([document("a.txt", text_of(1))]) if isinstance(event, Record))
    assert made.completion_tokens == 160 and not made.cut_off and made.finish_reason == "sentence"


def test_another_prompt_is_named() -> None:
    there = {"prompt": "summary", "prompt_digest": "a"}
    with pytest.raises(SettingsError, match="made with the prompt summary, not bullets: give the same"):
        check_same(there, {"prompt": "bullets", "prompt_digest": "b"}, out="x")
    with pytest.raises(SettingsError, match="made with other words of the prompt summary: give"):
        check_same(there, {"prompt": "summary", "prompt_digest": "b"}, out="x")


def test_an_ending_that_tells_no_format_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summarize", "a.pdf", "--out", "x.txt"]) == 2
    assert (
        "--out x.txt: .txt tells no format: end it in .jsonl, .md or .csv, or give --format" in capsys.readouterr().err
    )
