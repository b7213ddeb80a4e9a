"""The file of summaries: torn lines, locks, csv and md, what a resume takes over, and kill -9 at any moment."""

import csv
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duolocal.documents import Document
from duolocal.errors import SettingsError, SummaryFileError
from duolocal.summarize import Began, Ended, Output, Record, Summarizer, Timings
from duolocal.summarize.inputs import Input, inputs_of, with_digests
from duolocal.summarize.records import parse_line
from duolocal.summarize.render import to_csv, to_markdown
from duolocal.summarize.resume import stand
from tests import document_files
from tests.summarize_models import GREEDY, text_of, tiny_engine

ROOT = Path(__file__).parents[1]
SETTINGS = {"fingerprint": "f", "kv": "int8", "length": "medium", "model": "tiny"}


def record(index: int, *, name: str | None = None, summary: str | None = "It is.", **changes: object) -> Record:
    base = Record(
        index=index,
        name=name or f"{index}.txt",
        source=f"in/{name or f'{index}.txt'}",
        digest=f"d{index}",
        occurrence=0,
        kind="text",
        tokens=10,
        parts=1,
        levels=0,
        summary=summary,
        finish_reason="stop" if summary is not None else None,
        parts_cut=0,
        prompt_tokens=12,
        completion_tokens=3,
        timings=Timings(0.1, 0.2, 0.3, 0.6),
        notes=(),
        error=None if summary is not None else "it is damaged",
        settings=SETTINGS,
        settings_digest="s",
        finished_at="2026-01-01T00:00:00+00:00",
        version="0.1.0",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def inputs(*digests: str, names: str = "") -> list[Input]:
    """One letter of `names` per input, or its place."""
    seen: Counter[str] = Counter()
    found = []
    for index, digest in enumerate(digests):
        name = f"{names[index] if names else index}.txt"
        item = Document(name, Path("in") / name, "x", "utf-8", 1)
        found.append(Input(index, name, f"in/{name}", item, digest, seen[digest]))
        seen[digest] += 1
    return found


def test_digests_are_those_of_the_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"Alpha.\r\n")
    (tmp_path / "b.zip").write_bytes(document_files.zipped({"c/d.txt": "Delta.", "e.md": "# E"}))
    (tmp_path / "f.pdf").write_bytes(b"%PDF-1.4 broken")
    looked = list(with_digests(inputs_of([tmp_path / name for name in ("a.txt", "b.zip", "f.pdf")])[0]))
    assert [item.name for item in looked] == ["a.txt", "b.zip/c/d.txt", "b.zip/e.md", "f.pdf"]
    assert looked[1].source == str(tmp_path / "b.zip") + "/c/d.txt"
    for item in looked[:3]:
        assert item.digest == item.load().digest
    assert looked[0].digest == hashlib.sha256(b"Alpha.\r\n").hexdigest()
    assert looked[3].digest == hashlib.sha256(b"%PDF-1.4 broken").hexdigest()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("From a pipe.",))
    writer.start()
    (item,) = with_digests(inputs_of([tmp_path / "pipe"])[0])
    assert item.digest is None and item.load().text == "From a pipe."
    writer.join()


texts = st.text(st.characters(codec=None), max_size=40)


@given(texts, texts.filter(bool), st.lists(texts, max_size=2).map(tuple))
def test_a_line_is_its_record(name: str, summary: str, notes: tuple[str, ...]) -> None:
    made = record(3, name=name, summary=summary, notes=notes)
    line = made.to_line()
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    json.loads(line.decode("utf-8"))  # as any other reader sees it
    assert parse_line(line[:-1]) == made


@given(data=st.data())
def test_whatever_is_left_of_the_last_line_is_found_and_cut(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = [record(index, summary=f"Résumé {index}.") for index in range(3)]
    lines = [item.to_line() for item in made]
    whole = b"".join(lines)
    at = data.draw(st.integers(0, len(whole)))
    zeros = data.draw(st.sampled_from([b"", b"\0" * 7]))
    path = tmp_path_factory.mktemp("torn") / "out.jsonl"
    path.write_bytes(whole[:at] + zeros)
    kept = [item for index, item in enumerate(made) if at >= len(b"".join(lines[: index + 1]))]
    is_whole_but_for_its_end = at + 1 in {len(b"".join(lines[: index + 1])) for index in range(3)} and not zeros
    if is_whole_but_for_its_end:
        kept = made[: len(kept) + 1]
    with Output(path, resume=True) as output:
        assert output.records == kept
        output.append(record(9))
    data_after = path.read_bytes()
    assert data_after == b"".join(item.to_line() for item in [*kept, record(9)])


@pytest.mark.parametrize(
    "data", [b"a note\n", b'{"text": 1}\n', b'{"format": "duolocal-summary-9", "index": 0}\n', b"{}", b"\n\nx\n"]
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(data)
    with pytest.raises(SummaryFileError, match=r"line \d is no record"):
        Output(path, resume=True)
    assert path.read_bytes() == data


def test_a_damaged_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    lines = [record(index).to_line() for index in range(3)]
    path.write_bytes(lines[0] + lines[1][:50] + b"\n" + lines[2])
    with pytest.raises(SummaryFileError, match="line 2 is no record"):
        Output(path, resume=True)


@given(at=st.integers(0, 5000), byte=st.integers(0, 255), drop=st.booleans())
def test_a_mutated_file_is_refused_or_read_and_never_lost(
    at: int, byte: int, drop: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = [record(index, notes=("one", "two")) for index in range(4)]
    whole = b"".join(item.to_line() for item in made)
    at %= len(whole)
    data = whole[:at] + (b"" if drop else bytes([byte])) + whole[at + 1 :]
    path = tmp_path_factory.mktemp("mutated") / "out.csv"
    journal = path.with_name("out.csv.jsonl")
    journal.write_bytes(data)
    try:
        with Output(path, format="csv", resume=True) as output:
            read = output.records
    except SummaryFileError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "line" in refused and "\n" not in refused and journal.read_bytes() == data
        return
    hurt = whole[:at].count(b"\n")
    kept = [item for index, item in enumerate(made) if index != hurt]
    assert [item for item in read if item in kept] == kept
    assert len(read) - len(kept) in (0, 1)  # a change inside a text is a text; a torn last line is cut


@pytest.mark.parametrize("field", ["index", "name", "tokens", "notes", "settings", "timings", "prompt_tokens"])
def test_a_field_of_another_type_makes_no_record(field: str) -> None:
    value = json.loads(record(0).to_line())
    for wrong in (1.5, [1], "x", {"a": "b"}, None):
        changed = json.dumps({**value, field: wrong}).encode()
        if isinstance(wrong, type(value[field])) and field not in ("notes", "timings"):
            continue
        if field == "tokens" and wrong is None:
            continue
        assert parse_line(changed) is None, (field, wrong)
    assert parse_line(json.dumps(value).encode()) == record(0)


@pytest.mark.parametrize("format", ["jsonl", "csv", "md"])
def test_what_exists_is_refused_without_resume_and_locked_while_open(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"out.{format}"
    with Output(path, format=format) as output:  # type: ignore[arg-type]
        with pytest.raises(SettingsError, match="another process is writing"):
            Output(path, format=format, resume=True)  # type: ignore[arg-type]
        output.append(record(0))
    with pytest.raises(SettingsError, match="exists: add --resume to go on with it, or name another"):
        Output(path, format=format)  # type: ignore[arg-type]
    with Output(path, format=format, resume=True) as output:  # type: ignore[arg-type]
        assert output.records == [record(0)]


def test_nothing_is_left_of_a_job_that_never_began(tmp_path: Path) -> None:
    for format in ("jsonl", "csv", "md"):
        with Output(tmp_path / f"out.{format}", format=format):
            pass
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no folder"):
        Output(tmp_path / "no" / "out.jsonl")
    with pytest.raises(SettingsError, match="is not a file"):
        Output(tmp_path)
    with pytest.raises(SettingsError, match="--format is 'xml'"):
        Output(tmp_path / "out.xml", format="xml")  # type: ignore[arg-type]


def test_a_full_disk_leaves_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    with Output(path) as output:
        output.append(record(0))
        write = os.write

        def full(handle: int, data: bytes) -> int:
            if len(data) < 100:
                raise OSError(28, "No space left on device")
            return write(handle, data[: len(data) // 2])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(SummaryFileError, match=r"No space left.*1 records in it are kept.*--resume"):
            output.append(record(1))
        monkeypatch.setattr(os, "write", write)
        assert path.read_bytes() == record(0).to_line()
        output.append(record(2))
    assert path.read_bytes() == record(0).to_line() + record(2).to_line()


def test_csv_is_a_table_of_whole_records() -> None:
    evil = ["=1+1", "+2", "@SUM(A1)", "-2+3", "\t=x", "- a point", 'say "a,\nb"']
    made = [record(index, summary=text) for index, text in enumerate(evil)] + [record(8, summary=None)]
    rows = list(csv.DictReader(io.StringIO(to_csv(made).decode("utf-8"), newline="")))
    assert [row["summary"] for row in rows] == ["'=1+1", "'+2", "'@SUM(A1)", "'-2+3", "'\t=x", *evil[5:], ""]
    assert rows[-1]["error"] == "it is damaged" and rows[0]["seconds"] == "0.6"


def test_markdown_says_what_failed_and_what_was_cut() -> None:
    made = [
        record(0, name="a_b<c>.txt", finish_reason="length"),
        record(1, parts=5, levels=2, tokens=12345),
        record(2, summary=None),
        record(3, finish_reason="repeat", notes=("page 7 yields no text",)),
    ]
    text = to_markdown(made).decode()
    assert text.count("\n## ") == 4
    assert "## a\\_b\\<c\\>.txt" in text and "cut off" in text
    assert "12,345 tokens; read in 5 parts, merged in 2 levels" in text
    assert "**Not summarised:** it is damaged" in text
    assert "ended where it began to repeat itself; page 7 yields no text" in text


# --- what a resume takes over -----------------------------------------------------------------------------------------


def test_records_stand_by_bytes_and_occurrence_whatever_the_names() -> None:
    before = [
        record(0, digest="A", name="a.txt"),
        record(1, digest="B", name="b.txt"),
        record(2, digest="A", occurrence=1, name="c.txt"),
    ]
    standing = stand(before, inputs("N", "A", "B", "A", names="nxbc"), SETTINGS)
    assert {index: (item.name, item.index) for index, item in standing.done.items()} == {
        1: ("x.txt", 1),
        2: ("b.txt", 2),
        3: ("c.txt", 3),
    }
    assert [item.source for item in standing.in_order()] == ["in/x.txt", "in/b.txt", "in/c.txt"]
    assert (standing.num_failed, standing.num_changed, standing.others) == (0, 0, ())


def test_changed_failed_and_foreign_records_are_told_apart() -> None:
    before = [
        record(0, digest="OLD", name="a.txt"),
        record(1, digest="B", name="b.txt", summary=None),
        record(2, digest="C", name="c.txt"),
        record(3, digest="GONE", name="gone.txt"),
    ]
    standing = stand(before, inputs("NEW", "B", "C", names="abc"), SETTINGS)
    assert list(standing.done) == [2]
    assert (standing.num_failed, standing.num_changed, standing.others) == (1, 1, (before[3],))
    made = [record(1, digest="B", name="b.txt"), record(0, digest="NEW", name="a.txt")]
    assert [item.digest for item in standing.in_order(made)] == ["NEW", "B", "C", "GONE"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kv": "int4"}, "kv int8, not int4"),
        ({"fingerprint": "g"}, "another model"),
        ({"length": "200 words"}, "length medium, not 200 words"),
        ({"new": 1}, "new None, not 1"),
    ],
)
def test_other_settings_are_refused_with_what_differs(change: dict[str, object], said: str) -> None:
    with pytest.raises(SettingsError, match=f"holds summaries made with {said}"):
        stand([record(0)], inputs("d0"), {**SETTINGS, **change})
    assert stand([record(0)], inputs("d0"), {**SETTINGS, "model": "elsewhere"}).done


def run(summarizer: Summarizer, documents: list[Document], out: Path) -> tuple[list[Record], Began]:
    with Output(out, resume=True) as output:
        events = list(summarizer.run(documents, output=output))
        assert output.records == [parse_line(line) for line in out.read_bytes().splitlines()]
    assert isinstance(events[-1], Ended)
    (began,) = [event for event in events if isinstance(event, Began)]
    return [event for event in events if isinstance(event, Record)], began


def test_only_what_is_new_is_done_and_the_order_is_that_of_the_inputs(tmp_path: Path) -> None:
    engine, tokenizer = tiny_engine(tmp_path / "model")
    summarizer = Summarizer(engine, tokenizer, sampling=GREEDY)
    out = tmp_path / "out.jsonl"

    def documents(**texts: str) -> list[Document]:
        return [Document(name, Path(name), text, "utf-8", 1) for name, text in texts.items()]

    same = text_of(5)
    first = documents(a=text_of(1), b=same, c=same, d=text_of(4))
    made, _ = run(summarizer, first, out)
    assert [(item.name, item.occurrence) for item in made] == [("a", 0), ("b", 0), ("c", 1), ("d", 0)]
    before = {item.name: item.finished_at for item in made} | {"summaries": [item.summary for item in made]}
    # Nothing to do, then one more in the middle, one changed and one gone.
    assert run(summarizer, first, out)[0] == []
    made, began = run(summarizer, documents(new=text_of(9), a=text_of(1), b=same, c=same, d="changed " + same), out)
    assert [item.name for item in made] == ["new", "d"]
    assert (began.done, began.changed, began.others) == (3, 1, 0)
    kept = [parse_line(line) for line in out.read_bytes().splitlines()]
    assert [item.name for item in kept if item] == ["new", "a", "b", "c", "d"]
    assert [item.index for item in kept if item] == [0, 1, 2, 3, 4]
    assert [item.summary for item in kept if item][1:4] == before["summaries"][:3]
    made, began = run(summarizer, documents(a=text_of(1)), out)
    assert made == [] and began.others == 4
    assert len(out.read_bytes().splitlines()) == 5  # nothing that was done is thrown away
    with pytest.raises(SettingsError, match="made with the prompt summary, not bullets"):
        run(Summarizer(engine, tokenizer, prompt="bullets", sampling=GREEDY), first, out)


# --- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jsonl", pytest.param("csv", marks=pytest.mark.full)])
def test_killed_at_any_moment_nothing_is_lost_and_nothing_done_twice(tmp_path: Path, ending: str) -> None:
    """A job over 24 files, killed 6 times after a seeded number of events plus a seeded moment, then left to end."""
    model, folder = tmp_path / "model", tmp_path / "in"
    tiny_engine(model)
    folder.mkdir()
    for index in range(24):
        # Two of the same bytes, one that is broken, one that needs parts.
        seed, num_words = (7 if index in (7, 15) else index), (900 if index == 11 else 30)
        (folder / f"{index:02d}.txt").write_text(text_of(seed, num_words))
    (folder / "20.txt").rename(folder / "20.pdf")
    (folder / "20.pdf").write_bytes(b"%PDF-1.7\nbroken")
    out, log = tmp_path / f"out.{ending}", tmp_path / "log"
    command = [sys.executable, "-m", "tests.summarize_models", str(model), str(folder), str(out), str(log)]
    environment = {**os.environ, "DUOLOCAL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    chance = random.Random(5)
    kills = 0
    while True:
        child = subprocess.Popen(command, cwd=ROOT, env=environment)
        if kills == 6:
            assert child.wait(timeout=600) == 0
            break
        before = log.read_text().count("\n") if log.exists() else 0
        events = 1 + chance.randrange(8)
        while child.poll() is None and (log.read_text().count("\n") if log.exists() else 0) < before + events:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.15)
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
        if child.returncode == 0:
            break
    assert kills >= 4, "the job ended before it was killed often enough"
    journal = out if ending == "jsonl" else out.with_name(out.name + ".jsonl")
    found = [parse_line(line) for line in journal.read_bytes().splitlines()]
    names = [item.name for item in found if item is not None]
    assert len(found) == 24 and len(set(names)) == 24 and names == sorted(names)
    assert [item.name for item in found if item and item.error] == ["in/20.pdf"]
    assert next(item for item in found if item and item.name == "in/11.txt").parts > 1
    assert [item.occurrence for item in found if item and item.name in ("in/07.txt", "in/15.txt")] == [0, 1]
    check_log(log.read_text().splitlines())
    if ending == "csv":
        rows = list(csv.DictReader(io.StringIO(out.read_text(encoding="utf-8"), newline="")))
        assert [row["name"] for row in rows] == names


def check_log(lines: list[str]) -> None:
    """See that what was done was never begun again, and that only what was in hand at a kill was begun twice."""
    runs = sum(line.startswith("run ") for line in lines)
    done: set[str] = set()
    in_hand: list[str] = []
    begun: Counter[str] = Counter()
    current = None
    for line in lines:
        word, _, name = line.partition(" ")
        if word == "run":
            if current is not None:
                in_hand.append(current)
            current = None
        elif word == "begin":
            assert name not in done or name.endswith(".pdf"), f"{name} was done and is begun again"
            begun[name] += 1
            current = name
        else:
            done.add(name)
            current = None
    again = sum((Counter(in_hand)[name] + 1 < count) for name, count in begun.items() if not name.endswith(".pdf"))
    assert not again, begun
    assert sum(begun.values()) - len(begun) <= 2 * (runs - 1)  # what was in hand, and the broken file
