"""`models convert`, `bench forms`, the chat's first prompt, and a start without garbage collection."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from duolocal import cli
from duolocal.bench.first_prompt import can_measure, first_prompt_s
from duolocal.bench.forms import FORMS, disk_bytes, form_command
from duolocal.bench.load import measure_loads
from duolocal.commands import bench, models
from duolocal.errors import DuoLocalError
from duolocal.models.loader import open_model
from duolocal.settings import LoadSettings
from duolocal.startup import without_collection
from tests.loading import loaded_state
from tests.tiny import huggingface_model, save_checkpoint
from tests.tokenizer_files import LLAMA3_SPLIT, byte_level


def chat_model(folder: Path) -> None:
    huggingface_model("llama", vocab_size=1024).half().save_pretrained(folder)  # more than the tokenizer has
    (folder / "tokenizer.json").write_text(json.dumps(byte_level(LLAMA3_SPLIT, ["<|end_of_text|>"])))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


def test_convert_writes_a_model_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_model(tmp_path / "a")
    source = open_model(tmp_path / "a")
    for words, form in (([], "native"), (["--device", "cuda"], "native"), (["--to", "f16"], "safetensors")):
        out = tmp_path / "-".join(["out", *words])
        assert cli.main(["models", "convert", "--model", str(tmp_path / "a"), "--out", str(out), *words]) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        made = open_model(out)
        assert made.kind == form and report["to"] == ("f16" if form == "safetensors" else "native")
        assert report["bytes"] <= disk_bytes(out)
        ours, theirs = loaded_state(made.load()), loaded_state(source.load())
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)  # the source is float16 already
        if form == "native":
            assert report["fingerprint"] == made.fingerprint == source.fingerprint
            assert report["arrangement"] == ("planes" if words else "rows")


def test_convert_says_what_became_of_the_outer_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_model(tmp_path / "a")
    words = ["--model", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--outer-weights", "int8"]
    assert cli.main(["models", "convert", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "embedding Q8_0 made of f16" in lines[0]
    assert json.loads(lines[-1])["outer_note"] in lines[0]
    assert open_model(tmp_path / "b").load().embedding.format == "Q8_0"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x", "--to", "gguf"], "--to is 'gguf': give one of native, f16"),
        (["--out", " "], "--out is empty: give the folder to write"),
        (["--out", "x", "--to", "f16", "--device", "cpu"], "--device is for --to native: leave it out"),
        (["--out", "x", "--to", "f16", "--outer-weights", "int4"], "--outer-weights is for --to native: leave it out"),
        (["--out", "x", "--outer-weights", "int3"], "--outer-weights is 'int3': give one of auto, int8, int4"),
        (["--out", "x", "--device", "tpu"], "device 'tpu' is unknown: use auto, cpu or cuda"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "a")
    capsys.readouterr()
    assert cli.main(["models", "convert", "--model", str(tmp_path / "a"), *words]) == 2
    assert capsys.readouterr().err == f"duolocal: {message}\n"


def test_the_options_know_the_forms() -> None:
    assert bench.FORM_NAMES == FORMS
    assert {form for form in FORMS if form != "awq"} == set(models.FORMS)
    assert form_command("native", "m", Path("o"), device="cpu")[-2:] == ["--device", "cpu"]
    assert form_command("awq", "m", Path("o"))[0] == "quantize"


def test_forms_take_turns_in_fresh_processes(tmp_path: Path) -> None:
    chat_model(tmp_path / "a")
    paths = {"one": tmp_path / "a", "two": tmp_path / "a"}
    steps: list[str] = []
    settings = LoadSettings("tiny", context=48, kv="32", heads="all", threads=1)
    found = measure_loads(paths, [5, 6], settings, repeats=2, on_step=steps.append)
    assert steps == ["one: run 1 of 2", "two: run 1 of 2", "one: run 2 of 2", "two: run 2 of 2"]
    for speed in found.values():
        assert speed.steps_s["total"].runs == 2 and speed.prompt_s is None
        assert 0 < speed.imported_bytes < speed.peak_bytes


@pytest.mark.full
@pytest.mark.slow
def test_the_table_of_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_model(tmp_path / "a")
    work = tmp_path / "work"
    work.mkdir()
    words = ["--model", str(tmp_path / "a"), "--work", str(work), "--repeats", "1", "--context", "48", "--threads", "1"]
    assert cli.main(["bench", "forms", *words, "--also", str(tmp_path / "a"), "--kv", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert (report["benchmark"], report["kv"], report["heads"]) == ("forms", "32", "all")
    names = [result["form"] for result in report["results"]]
    assert names[0] == "safetensors F16" and names[-1] == "native F16" and any(name.startswith("awq") for name in names)
    assert [line.split("  ")[0] for line in lines[1 : 1 + len(names)]] == names
    assert all(result["disk_bytes"] > 0 and result["ms"]["total"]["runs"] == 1 for result in report["results"])
    assert list(work.iterdir()) == []


needs_terminals = pytest.mark.skipif(not can_measure(), reason="no pseudo-terminals here")


@needs_terminals
def test_a_chat_is_timed_to_its_first_prompt(tmp_path: Path) -> None:
    chat_model(tmp_path)
    words = ["--model", str(tmp_path), "--context", "48", "--kv", "32", "--heads", "all"]
    assert first_prompt_s(words, threads=1) > 0.1


@needs_terminals
def test_a_chat_that_ends_before_says_why(tmp_path: Path) -> None:
    with pytest.raises(DuoLocalError, match=r"the chat ended before its first prompt: .*no file or folder"):
        first_prompt_s(["--model", str(tmp_path / "none.gguf")], threads=1)


def test_no_garbage_is_collected_while_starting() -> None:
    collected: list[str] = []

    def note(phase: str, _: dict) -> None:
        collected.append(phase)

    frozen = gc.get_freeze_count()
    gc.callbacks.append(note)
    try:
        with without_collection():
            assert not gc.isenabled()
            kept = [[index] for index in range(100_000)]
        assert collected == [] and gc.isenabled()
        assert gc.get_freeze_count() - frozen > len(kept)
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()
    gc.disable()
    try:
        with pytest.raises(RuntimeError), without_collection():
            raise RuntimeError
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()
        gc.unfreeze()


def test_what_makes_a_start_quick_loads_nothing() -> None:
    program = "import sys, duolocal.startup; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
