"""`duolocal summarize` from the command line, with tiny models and once with the real one."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from duolocal import cli
from duolocal.engine import first_use
from duolocal.summarize import Began, Looked, Opened, Planned, Progress, Summarizer
from duolocal.summarize.records import parse_line
from duolocal.terminal import summarize_view
from tests.summarize_models import text_of
from tests.test_quantize_run import tiny_folder
from tests.test_summarize_output import record

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "140")
    tiny_folder(tmp_path / "model", seed=2, max_position_embeddings=1024)
    inputs = tmp_path / "in"
    inputs.mkdir()
    for index in range(3):
        (inputs / f"{index}.txt").write_text(text_of(index, 30))
    return tmp_path


def words(folder: Path, *more: str | Path, inputs: str | Path = "in", out: str | None = "out.jsonl") -> list[str]:
    place = [] if out is None else ["--out", out if out == "-" else str(folder / out)]
    model = ["--model", str(folder / "model"), "--heads", "all", "--kv", "16", "--device", "cpu", "--kernels", "torch"]
    given = ["summarize", str(folder / inputs), *map(str, more), *place, *model]
    return given if "--max-tokens" in given else [*given, "--max-tokens", "8"]


def run(folder: Path, *more: str | Path, **where: Any) -> int:
    return cli.main(words(folder, *more, **where))


def test_a_folder_is_summarised_and_gone_on_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "duolocal: 2 of 3 in/1.txt: " in said.err and "3 of 3 summarised" in said.err
    lines = (folder / "out.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["in/0.txt", "in/1.txt", "in/2.txt"]
    assert run(folder) == 2
    assert "exists: add --resume to go on with it, or name another" in capsys.readouterr().err
    (folder / "in" / "9.txt").write_text(text_of(9))
    assert run(folder, "--resume") == 0
    assert "going on: 3 done already; 1 of 4 to do" in capsys.readouterr().err
    assert (folder / "out.jsonl").read_bytes().splitlines()[:3] == lines
    assert run(folder, "--resume", "--length", "short") == 2
    error = capsys.readouterr().err
    assert "holds summaries made with length medium, not short" in error and error.count("\n") == 1


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_what_is_being_written_is_no_input(folder: Path, ending: str) -> None:
    for more in ((), ("--resume",), ("--resume",)):
        assert run(folder, *more, out=f"in/out.{ending}") == 0
    journal = folder / "in" / ("out.jsonl" if ending == "jsonl" else "out.csv.jsonl")
    names = [json.loads(line)["name"] for line in journal.read_bytes().splitlines()]
    assert names == ["in/0.txt", "in/1.txt", "in/2.txt"]
    assert not list((folder / "in").glob("*.tmp"))


@pytest.mark.parametrize(("broken", "code"), [([1], 3), ([0, 1, 2], 1)])
def test_exit_codes_tell_some_from_none(
    folder: Path, capsys: pytest.CaptureFixture[str], broken: list[int], code: int
) -> None:
    for index in broken:
        (folder / "in" / f"{index}.txt").rename(folder / "in" / f"{index}.pdf")
        (folder / "in" / f"{index}.pdf").write_bytes(b"%PDF-1.4 broken")
    assert run(folder) == code
    assert f"{3 - len(broken)} of 3 summarised, {len(broken)} failed" in capsys.readouterr().err
    found = [parse_line(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]
    assert [item is not None and item.error is not None for item in found] == [index in broken for index in range(3)]
    assert run(folder, "--resume") == code  # a failed one is tried again, and has one record
    assert len((folder / "out.jsonl").read_bytes().splitlines()) == 3


def test_stdout_gets_whole_lines_and_nothing_else(folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run(folder, out="-") == 0
    lines = capfdbinary.readouterr().out.splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize("ending", ["md", "csv"])
def test_the_ending_of_out_chooses_the_format(folder: Path, ending: str) -> None:
    assert run(folder, out=f"out.{ending}") == 0
    text = (folder / f"out.{ending}").read_text(encoding="utf-8")
    assert text.startswith("# Summaries" if ending == "md" else "name,source,")
    assert all(f"in/{index}.txt" in text for index in range(3))
    assert len((folder / f"out.{ending}.jsonl").read_bytes().splitlines()) == 3
    # Made again from the journal, whatever became of it.
    (folder / f"out.{ending}").write_text("gone")
    assert run(folder, "--resume", out=f"out.{ending}") == 0
    assert (folder / f"out.{ending}").read_text(encoding="utf-8") == text


def test_a_dry_run_counts_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "in" / "long.txt").write_text(text_of(8, 3000))
    (folder / "in" / "z.pdf").write_bytes(b"%PDF-1.4 broken")
    before = sorted(path.name for path in folder.rglob("*"))
    assert run(folder, "--dry-run", out=None) == 3
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("in/")}
    assert rows["in/0.txt"][2] == "1" and int(rows["in/long.txt"][2]) > 2
    assert int(rows["in/long.txt"][1].replace(",", "")) > 3000
    assert "in/z.pdf:" in rows and "An estimate, by a short measurement" in out and "1 cannot be read" in out
    assert not [name for name in sorted(path.name for path in folder.rglob("*")) if name.startswith("out")]
    assert set(before) <= {path.name for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--format", "xml"], "--format is 'xml': give one of jsonl, md, csv"),
        (["--prompt", "sumary"], "--prompt is 'sumary', and there is no such file"),
        (["--length", "huge"], "--length is 'huge'"),
        (["--part-tokens", "x"], "--part-tokens"),
        (["--part-tokens", "12"], "give 128 or more"),
        (["--max-tokens", "1000"], "give --context"),
        (["--temperature", "hot"], "--temperature is 'hot'"),
        (["--resme"], "did you mean --resume?"),
        (["/nowhere/at/all.txt"], "all.txt does not exist"),
    ],
)
def test_wrong_options_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert run(folder, *more) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.startswith("duolocal: ") and error.count("\n") == 1
    assert not (folder / "out.jsonl").exists()


def test_out_is_needed_and_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, out, said in (
        ([], None, "--out is missing"),
        (["--resume"], "-", "--resume needs a file"),
        (["--format", "md"], "-", "--out - writes JSON lines"),
        ([], "no/out.jsonl", "there is no folder"),
    ):
        assert run(folder, *more, out=out) == 2
        assert said in capsys.readouterr().err


def test_a_system_message_and_a_prompt_file_reach_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "ask.txt").write_text("What is {document} about?")
    seen: list[str] = []
    init = Summarizer.__init__

    def spy(self: Summarizer, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        seen.append(self.frame.tokenizer.decode([*self.frame.prefix, *self.frame.ids("IT")], skip_special=False))

    monkeypatch.setattr(Summarizer, "__init__", spy)
    assert run(folder, "--prompt", folder / "ask.txt", "--system", "Be brief.") == 0
    assert seen == [
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is IT about?<|im_end|>\n<|im_start|>assistant\n"
    ]


@pytest.mark.skipif(os.name != "posix", reason="signals to a child")
def test_ctrl_c_leaves_a_whole_file_and_says_how_to_go_on(folder: Path) -> None:
    for index in range(40):
        (folder / "in" / f"{index}.txt").write_text(text_of(index, 60))
    program = "import sys; from duolocal.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *words(folder)]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    said = [child.stderr.readline() for _ in range(3)]
    child.send_signal(signal.SIGINT)
    said += child.stderr.readlines()
    assert child.wait(timeout=120) == 130
    assert "is whole: the same command with --resume goes on" in said[-1]
    assert " left, " in said[-2]
    found = [parse_line(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]
    assert 3 <= len(found) < 40 and None not in found


def test_bars_show_files_and_tokens() -> None:
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=True, highlight=False, color_system=None)
    with summarize_view._Shown(console) as shown:
        shown.show(Looked(3, 10))
        shown.show(Began(total=10, done=4))
        shown.show(Opened(4, "a.pdf", 1, 6))
        shown.show(Planned(4, "a.pdf", 900, 2))
        shown.show(Progress(4, "a.pdf", "reading", 1, 2, 0, 0, 450))
        time.sleep(0.4)  # a bar that is gone sooner is not shown at all
        shown.show(Progress(4, "a.pdf", "reading", 1, 2, 0, 300, 450))
        time.sleep(0.3)
        reading = output.getvalue()
        shown.show(Progress(4, "a.pdf", "writing", 1, 1, 1, 5, 256))
        shown.show(record(4, name="a.pdf"))
        time.sleep(0.3)
    assert "reading a.pdf, part 1 of 2" in reading and "300/450 tokens" in reading and "4/10 files" in reading
    later = output.getvalue()[len(reading) :]
    assert "writing the merged summary of a.pdf" in later and "5/256 tokens" in later and "5/10 files" in later


@pytest.mark.real
def test_smollm2_summarises_a_report(
    tmp_path: Path, smollm2_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    report = (
        "The Harbour Trust handled 1,240 ships between July and September, 8% more than in the same quarter of last "
        "year. The north quay was closed for three weeks in August because divers found cracks in two of its piles. "
        "The board will decide in November whether to buy a second crane for 1.6 million euros."
    )
    (tmp_path / "report.txt").write_text(report)
    options = ["--model", str(smollm2_path), "--context", "2K", "--kv", "int8", "--heads", "all", "--length", "short"]
    code = cli.main(["summarize", str(tmp_path / "report.txt"), "--out", "-", *options])
    made = parse_line(capfdbinary.readouterr().out.strip())
    assert code == 0 and made is not None and made.summary
    assert "Harbour Trust" in made.summary and len(made.summary) < 2 * len(report)
    assert made.settings["fingerprint"] and made.prompt_tokens < 200


def test_the_example_summarises_a_folder_and_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_use, "LONGEST_S", 1e9)  # measured at once, however busy the machine is
    path = ROOT / "examples" / "summarize_folder.py"
    spec = importlib.util.spec_from_file_location("summarize_folder", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(str(folder / "in"), str(folder / "out.jsonl"), str(folder / "model"))
    assert capsys.readouterr().out.count("in/") == 3
    example.main(str(folder / "in"), str(folder / "out.jsonl"), str(folder / "model"))
    assert capsys.readouterr().out == ""
    assert len((folder / "out.jsonl").read_bytes().splitlines()) == 3
