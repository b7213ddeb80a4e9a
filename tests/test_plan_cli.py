"""`duolocal plan` as people meet it: the picture, the JSON, the exit codes, and what it never loads."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from duolocal import cli
from duolocal.engine.kernels import arrangement
from duolocal.engine.planning import plan_settings
from duolocal.kernels.torch_kernels import TorchKernels
from duolocal.models.names import MODELS
from duolocal.plan.duration import Rates
from duolocal.plan.rates import keep_rates, known_rates, measure_rates, rates_key, sample_model
from duolocal.quant.kv import kv_layout
from duolocal.settings import LoadSettings
from duolocal.terminal import plan_view
from tests.tiny import tiny_config

WORDS = ("plan", "--model", "llama3-8b-awq", "--context", "1M", "--memory", "24GiB")
RATES = Rates(1e11, 1e11, 1e10, 1e10, 1e10, 0.001, None, "measured on this machine", measured=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")


def test_help_loads_no_torch() -> None:
    code = """import sys
from duolocal.cli import main
try:
    main(["plan", "--help"])
finally:
    assert "torch" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for option in ("--memory", "--card", "--host-memory", "--kv-device-memory", "--json", "--no-measure"):
        assert option in done.stdout


def test_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*WORDS, "--card", "rtx4090", "--heads", "0.5", "--host-memory", "0", "--disk", "0"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    text = " ".join(out.split())
    assert text.startswith("llama3-8b-awq on rtx4090: context 1,048,576, KV int4, 128 of 256 KV heads retrieval; 22.")
    (bar,) = (line for line in out.splitlines() if line.startswith("██"))
    assert set(bar.strip()) == {"█", "·"}
    assert "embedding in host memory 0.979 GiB one row per token is read" in text
    assert "KV per token 17,408 bytes; an ordinary 16-bit cache of this context takes 128 GiB" in text
    assert "fits, all blocks on the device: 1.3 GiB of 24 GiB are left" in text
    assert "computed for rtx4090 from published figures (1,008 GB/s, 165 TFLOP/s dense 16-bit)" in text
    assert "is not on this machine: its weights are counted from its shapes" in text


def test_what_does_not_fit_names_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*WORDS, "--card", "rtx4090", "--heads", "all", "--host-memory", "0", "--disk", "0"]) == 1
    out, _ = capsys.readouterr()
    text = " ".join(out.split())
    assert "does not fit: 38.9 GiB are needed, 24 GiB are there These fit; what changes least comes first:" in text
    assert "--heads 0.5 22.7 GiB fewer heads see the whole context" in text and "▒" in out
    assert out.count("--context ") == 1


def test_blocks_beyond_the_device_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*WORDS, "--card", "rtx4090", "--heads", "all", "--host-memory", "64GiB"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "KV blocks of retrieval heads (a cache of them)" in text
    assert "KV blocks in pinned host memory 34 GiB 64 GiB free" in text
    assert "Not all blocks fit on the device (that takes 40 GiB)" in text
    assert "With all of them on the device: --heads 0.5 22.7 GiB" in text


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--card", "h100", "--heads", "all", "--host-memory", "0", "--disk", "0", "--json"]
    assert cli.main(words) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["needed_bytes"] == sum(answer["device_bytes"].values())
    assert (answer["fits"], answer["memory_bytes"], answer["kv_bytes_per_token"]) == (False, 24 * 2**30, 34816)
    assert 1 <= len(answer["nearest"]) <= 3
    assert all(setting["needed_bytes"] <= 24 * 2**30 for setting in answer["nearest"])
    assert answer["time"]["measured"] is False and answer["time"]["prefill_s"] > 100
    # The options that are said are options of this command, and with them it fits.
    assert cli.main([*words, *answer["nearest"][0]["options"]]) == 0
    assert json.loads(capsys.readouterr().out)["needed_bytes"] == answer["nearest"][0]["needed_bytes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "lots"], "--memory is 'lots': give a size such as 24GiB, 500MB or 1073741824"),
        (["--memory", "0"], "--memory is '0': give a size such as 24GiB"),
        (["--card", "voodoo"], "--card 'voodoo' is not in the table: give one of rtx3090, rtx4080"),
        (["--card", "RTX4099"], "--card 'RTX4099' is not in the table: did you mean rtx4090?"),
        (["--measure", "--no-measure"], "--measure and --no-measure were both given: leave one of them out"),
        (["--model", "./nowhere"], "./nowhere: is not on this machine; check the path, or name a folder with its"),
        (["--kv-device-memory", "x"], "--kv-device-memory is 'x': give a size"),
    ],
)
def test_wrong_words_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["plan", "--no-measure", *words] if "--measure" not in words else ["plan", *words]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"duolocal: {message}") and err.count("\n") == 1


def test_without_speeds_it_says_how_to_get_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "llama3-8b-awq", "--no-measure", "--device", "cpu", "--memory", "64GiB"]) == 0
    assert "not known: leave out --no-measure" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_any_terminal(columns: int) -> None:
    found = plan_settings(LoadSettings("llama3-8b-awq", context=2**20, heads="all"), memory=20 * 2**30, card="rtx3090")
    buffer = io.StringIO()
    Console(file=buffer, width=columns, force_terminal=False).print(plan_view.plan_view(found, None, columns))
    assert all(len(line) <= columns for line in buffer.getvalue().splitlines())


def test_the_bar_is_to_scale() -> None:
    bar = plan_view.memory_bar([("a", 30, ""), ("b", 20, "")], 100, 74).plain
    assert (bar.count("█"), bar.count("·"), len(bar)) == (36, 36, 72)
    over = plan_view.memory_bar([("a", 150, ""), ("b", 50, "")], 100, 74).plain
    assert (over.count("█"), over.count("▒"), over.count("·")) == (36, 36, 0) and over.endswith("100 B too much")


# --- speeds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AWQ", "Q4_1", "Q8_0", "BF16", "F32"])
def test_speeds_are_measured_with_weights_like_the_models(name: str) -> None:
    """Counted against the clock: what was done in the time that was taken, for every format."""
    config = replace(tiny_config(), hidden_size=128, intermediate_size=256, num_heads=4, head_dim=32)
    device, dtype = torch.device("cpu"), torch.float32
    kernels = TorchKernels(dtype)
    sample = sample_model(
        config,
        None,
        layer_format=name,
        outer_format="F16",
        layer_bytes=10**9,
        device=device,
        dtype=dtype,
        arrange=arrangement(kernels, dtype),
    )
    assert sample.config.num_layers == 1  # one layer of such a model is more than a processor's caches hold
    assert sample.layer_elements == 128 * (2 * 128 + 2 * 64 + 3 * 256)
    steps: list[tuple[int, int]] = []
    rates = measure_rates(
        sample,
        kv_layout("int4", head_dim=32, dtype=dtype),
        kernels=kernels,
        device=device,
        dtype=dtype,
        on_progress=lambda done, total: steps.append((done, total)),
    )
    assert all(value > 0 for value in (rates.products, rates.attention, rates.weights, rates.blocks, rates.output))
    assert rates.measured and steps == [(at + 1, len(steps)) for at in range(len(steps))]


def test_speeds_are_remembered_for_what_they_depend_on(tmp_path: Path) -> None:
    key, other = rates_key(kv="int4", threads=2), rates_key(kv="int4", threads=4)
    assert key != other and key == rates_key(threads=2, kv="int4")
    assert known_rates(key) is None
    keep_rates(key, RATES)
    keep_rates(other, replace(RATES, products=2.0))
    assert known_rates(key) == RATES
    file = tmp_path / "cache" / "rates.json"
    for damage in (
        json.dumps({key: {"products": 1}}),
        file.read_text().replace("1e11", '"fast"').replace("100000000000.0", '"x"'),
    ):
        file.write_text(damage)
        assert known_rates(key) is None


def test_a_busy_machine_is_said_and_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures beside other work would be taken for the machine's."""
    found = plan_settings(LoadSettings("llama3-8b-awq", context=4096, device="cpu", kernels="torch"))
    monkeypatch.setattr(plan_view, "sample_model", lambda *_, **__: None)
    monkeypatch.setattr(plan_view, "measure_rates", lambda *_, **__: RATES)
    settings, quiet = LoadSettings("llama3-8b-awq", kernels="torch"), Console(file=io.StringIO(), quiet=True)

    def ask(load: float, measure: bool | None = False) -> Any:
        monkeypatch.setattr("psutil.cpu_percent", lambda _s: load)
        return plan_view.rates_for(found, settings, quiet, measure=measure)

    assert "beside other work" in ask(90.0).source
    assert ask(90.0, None) is None  # nothing was kept
    assert ask(1.0) == RATES
    assert ask(90.0) == RATES  # known by now
    assert "beside other work" in ask(90.0, True).source


def test_the_named_models_are_all_in_help_of_a_wrong_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "org/nothing-here", "--no-measure"]) == 1
    err = capsys.readouterr().err
    assert all(name in err for name in MODELS)
