"""`duolocal quantize` and `duolocal eval weights` from the command line."""

import json
from pathlib import Path

import pytest

from duolocal import cli
from duolocal.commands import quantize as quantize_options
from duolocal.quantize import QuantizeSettings, results
from duolocal.quantize.work_area import NAME as WORK_AREA
from duolocal.terminal import quantize_view
from tests import tokenizer_files
from tests.test_quantize_run import TEXT, tiny_folder

WIDE = {"num_attention_heads": 4, "head_dim": 32, "max_position_embeddings": 256}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "140")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "long.txt").write_text(tokenizer_files.CORPUS[6000:16000])
    tiny_folder(tmp_path / "model", seed=2, max_position_embeddings=256)
    return tmp_path


def run(*words: str | Path) -> int:
    return cli.main([str(word) for word in words])


def quantize(folder: Path, out: str, *more: str) -> int:
    small = [] if "rtn" in more else ["--samples", "3", "--tokens", "48", "--text", str(folder / "text.txt")]
    place = ["--model", str(folder / "model"), "--out", str(folder / out)]
    return run("quantize", *place, *small, "--device", "cpu", "--threads", "1", *more)


def last_json(text: str) -> dict[str, object]:
    return json.loads(text.strip().splitlines()[-1])


def test_a_model_is_written_and_reported(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert quantize(folder, "out") == 0
    out = capsys.readouterr().out
    report = last_json(out)
    assert report["quantization"] == "awq" and report["group_size"] == 32 and report["calibration_tokens"] == 144
    assert report["bits_per_quantized_weight"] == 4.625
    assert report["bytes_after"] == (folder / "out" / "model.safetensors").stat().st_size
    assert isinstance(report["layers"], list) and len(report["layers"]) == 2
    assert "gate, up" in out and "4.62 bits per quantized weight" in out and f"--model {folder / 'out'}" in out
    assert quantize(folder, "out") == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_models_are_compared_with_their_source(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert quantize(folder, "awq") == quantize(folder, "rtn", "--method", "rtn") == 0
    capsys.readouterr()
    code = run(
        *("eval", "weights", "--model", folder / "model", "--against", f"{folder / 'awq'},{folder / 'rtn'}"),
        *(
            "--tokens",
            "600",
            "--context",
            "200",
            "--text",
            folder / "long.txt",
            "--kernels",
            "torch",
            "--device",
            "cpu",
        ),
    )
    assert code == 0
    report = last_json(capsys.readouterr().out)
    results = report["results"]
    assert isinstance(results, dict)
    source, awq, rtn = (results[str(folder / name)] for name in ("model", "awq", "rtn"))
    assert source["kl"] == 0 and source["weights"] == "F32" and awq["weights"] == "AWQ int4 g32"
    assert 0 < awq["kl"] < 0.6 * rtn["kl"]
    assert awq["predictions"] == 3 * 199


def test_models_with_other_tokens_are_not_compared(folder: Path, capsys: pytest.CaptureFixture[str]):
    tiny_folder(folder / "other")
    tokenizer_files.write(folder / "other", tokenizer_files.llama3())
    tiny_folder(folder / "smaller")
    config = json.loads((folder / "smaller" / "config.json").read_text())
    for name, said in (("other", "other tokens"), ("smaller", "vocabulary")):
        if name == "smaller":
            from tests.tiny import save_checkpoint

            save_checkpoint(folder / "smaller", vocab_size=config["vocab_size"] - 8)
        code = run("eval", "weights", "--model", folder / "model", "--against", folder / name, "--tokens", "64")
        assert code == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "gptq"], "--method is 'gptq'"),
        (["--group-size", "48"], "--group-size is '48': give one of 128, 64, 32"),
        (["--group-size", "64"], "use 32"),
        (["--samples", "0"], "--samples"),
        (["--seed", "x"], "--seed"),
        (["--kernels", "torch"], "--kernels is not for quantize"),
        (["--method", "rtn", "--tokens", "5"], "--tokens is for --method awq"),
        (["--methd", "rtn"], "did you mean --method?"),
        (["--text", "/nowhere/at/all.txt"], "all.txt"),
    ],
)
def test_wrong_options_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str):
    assert quantize(folder, "out", *words) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.startswith("duolocal: ") and error.count("\n") == 1
    assert not (folder / "out").exists()


def test_an_interruption_says_how_to_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    show = quantize_view._show

    def interrupt(event: results.QuantizeProgress, *more: object) -> None:
        show(event, *more)  # type: ignore[arg-type]
        if event.done == 1 and event.losses is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(quantize_view, "_show", interrupt)
    assert quantize(folder, "out") == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().out
    assert (folder / "out" / WORK_AREA).is_dir()
    monkeypatch.setattr(quantize_view, "_show", show)
    assert quantize(folder, "out", "--seed", "4") == 2
    assert "seed 0, not 4" in capsys.readouterr().err
    assert quantize(folder, "out") == 0
    out = capsys.readouterr().out
    assert "going on in" in out and "(1 layers were there already)" in out
    assert last_json(out)["resumed_layers"] == 1


def test_options_say_what_the_package_does():
    assert quantize_options.METHODS == results.METHODS
    assert quantize_options.GROUP_SIZES == results.GROUP_SIZES
    defaults = QuantizeSettings()
    assert (defaults.num_samples, defaults.num_tokens) == (
        quantize_options.SAMPLES,
        quantize_options.TOKENS_PER_SAMPLE,
    )


@pytest.mark.full
@pytest.mark.real
def test_smollm2_in_four_bits_still_answers(
    tmp_path: Path, smollm2_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    assert (
        run("quantize", "--model", smollm2_path, "--out", tmp_path / "out", "--method", "rtn", "--group-size", "32")
        == 0
    )
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", None)  # nothing is piped in
    code = run(
        *("chat", "--model", tmp_path / "out", "--prompt", "What is the capital of France?", "--heads", "all"),
        *("--kv", "16", "--context", "512", "--temperature", "0", "--max-tokens", "12", "--device", "cpu"),
    )
    assert "Paris" in capsys.readouterr().out
    assert code in (0, 3)
