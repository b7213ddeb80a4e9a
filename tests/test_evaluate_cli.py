"""`duolocal eval …` on a tiny model: tables, pictures, one JSON object at the end, and what is refused before work."""

import json
from pathlib import Path
from typing import Any

import pytest

from duolocal import cli
from duolocal.evaluate import engines
from duolocal.heads import HeadPattern, save_pattern
from duolocal.sample_text import sample_text
from duolocal.terminal.eval_parts import bars, picture_for, shaded
from tests.tiny import save_checkpoint
from tests.tokenizer_files import chatml, write

PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, "llama", vocab_size=1024, max_position_embeddings=4096)
    write(folder, chatml())
    save_pattern(HeadPattern(((0.9, 0.1), (0.4, 0.6)), 4, 48, 0.5, "test"), folder / "heads.json")
    (folder / "text.txt").write_text(sample_text()[:12_000])
    return folder


class Eval:
    """Runs `duolocal eval` in this process."""

    def __init__(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self._capsys = model, capsys

    def __call__(self, what: str, *words: str) -> tuple[int, str, str]:
        heads = [] if "--heads" in words else ["--heads", str(self.model / "heads.json")]
        text = [] if what == "check" or "--text" in words else ["--text", str(self.model / "text.txt")]
        code = cli.main(["eval", what, "--model", str(self.model), "--kernels", "torch", *heads, *text, *words])
        out, err = self._capsys.readouterr()
        return code, out, err

    def report(self, what: str, *words: str) -> tuple[dict[str, Any], str]:
        code, out, err = self(what, *words)
        assert (code, err) == (0, "")
        *shown, last = out.splitlines()
        return json.loads(last), "\n".join(shown)


@pytest.fixture
def evaluate(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Eval:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("duolocal.terminal.progress._SAY_AFTER_S", float("inf"))  # however slow the machine is
    return Eval(model, capsys)


def test_kl_of_several_settings_beside_one_dense_pass(evaluate: Eval, tmp_path: Path) -> None:
    heads = f"all,{evaluate.model / 'heads.json'}"
    words = [
        "--tokens",
        "1K",
        "--context",
        "512",
        "--heads",
        heads,
        "--kv",
        "16,int4",
        "--png",
        str(tmp_path / "a.png"),
    ]
    report, shown = evaluate.report("kl", *words)
    assert list(report["results"]) == ["dense", "all 16", "all int4", "heads 16", "heads int4"]
    kl = {name: result["kl"] for name, result in report["results"].items()}
    assert kl["dense"] == 0 and kl["all 16"] == 0
    assert 0 < kl["all int4"] < kl["heads int4"] and 0 < kl["heads 16"] < kl["heads int4"]
    assert report["results"]["heads int4"]["predictions"] == 2 * 511
    assert len(report["results"]["heads int4"]["windows"]) == report["windows"] == 2
    assert report["settings"]["heads int4"]["retrieval_heads"] == 2
    assert report["settings"]["heads int4"]["kv_bytes"] < report["settings"]["all 16"]["kv_bytes"]
    assert report["text"] == "text.txt"
    assert f"{kl['heads int4']:.5f}" in shown and "2 x 512 tokens" in shown
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert evaluate.report("kl", *words)[0]["results"]["heads int4"]["kl"] == kl["heads int4"]


def test_unknown_heads_are_ranked_once_for_all_settings(evaluate: Eval) -> None:
    words = ["--tokens", "600", "--context", "600", "--heads", "all,0.5,0.25", "--kv", "auto"]
    report, shown = evaluate.report("kl", *words)
    settings = report["settings"]
    assert [setting["retrieval_heads"] for setting in settings.values()] == [4, 2, 1]
    assert len({setting["kv"] for setting in settings.values()}) == 1  # auto is measured once
    assert shown.count("retrieval heads found by drift") == 1
    again, shown = evaluate.report("kl", *words)
    assert again["results"]["dense"]["perplexity"] == report["results"]["dense"]["perplexity"]
    assert [result["kl"] for result in again["results"].values()] == [r["kl"] for r in report["results"].values()]
    assert "found by echo in" not in shown


def test_ppl(evaluate: Eval) -> None:
    report, shown = evaluate.report("ppl", "--tokens", "600", "--context", "300", "--kv", "int4")
    dense, chosen = report["results"].values()
    assert chosen["perplexity_rise"] == pytest.approx(chosen["perplexity"] / dense["perplexity"] - 1)
    assert f"{dense['perplexity']:.3f}" in shown and f"{chosen['perplexity_rise']:+.2%}" in shown


def test_niah_grid_with_heat_maps(evaluate: Eval, tmp_path: Path) -> None:
    words = ["--tokens", "300,400", "--depths", "3", "--kv", "int4", "--png", str(tmp_path / "niah.png"), "--seed", "7"]
    report, shown = evaluate.report("niah", *words)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["niah-dense.png", "niah-heads-int4.png"]
    rows = report["results"]["heads int4"]
    assert [(row["length"], row["depth"]) for row in rows] == [(n, d) for n in (300, 400) for d in (0.0, 0.5, 1.0)]
    assert report["prompts"] == 6 and report["found"] == {"heads int4": 0, "dense": 0}
    assert "··" in shown and "✗" in shown and "heads int4: 0 of 6 found" in shown
    assert rows != report["results"]["dense"]

    def untimed(report: dict[str, Any]) -> Any:
        return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in report["results"]["heads int4"]]

    assert untimed(evaluate.report("niah", *words)[0]) == untimed(report)


def test_passkey_of_one_length_shows_the_answers(evaluate: Eval) -> None:
    report, shown = evaluate.report("passkey", "--tokens", "300", "--depths", "2", "--no-dense", "--kv", "16")
    assert list(report["results"]) == ["heads 16"]
    for row in report["results"]["heads 16"]:
        assert row["wanted"][0] in shown
    assert "MISSED" in shown and "heads 16: 0 of 2 found, mean NLL" in shown


def test_multihop_tasks(evaluate: Eval, tmp_path: Path) -> None:
    words = ["--tokens", "600,700", "--samples", "2", "--kv", "int4", "--png", str(tmp_path / "hop.png")]
    report, shown = evaluate.report("multihop", *words)
    assert report["prompts"] == 3 * 2 * 2
    tasks = [row["task"] for row in report["results"]["dense"]]
    assert tasks == ["needles"] * 4 + ["variables"] * 4 + ["recall"] * 4
    assert "variables" in shown and "0/2" in shown
    assert (tmp_path / "hop.png").read_bytes().startswith(PNG)
    some, _ = evaluate.report("multihop", *words[:4], "--tasks", "recall", "--kv", "int4")
    assert some["prompts"] == 4


def test_check_ends_in_one_verdict(evaluate: Eval, tmp_path: Path) -> None:
    doc = ["--doc", str(evaluate.model / "text.txt"), "--kv", "int4", "--png", str(tmp_path / "check.png")]
    report, shown = evaluate.report("check", *doc, "--tokens", "800", "--minutes", "5")
    assert report["tokens"] == 800 < report["document_tokens"]
    assert report["dense_kv_bytes"] == 2 * 2 * 2 * 16 * 2 * 800
    assert report["verdict"] in ("good", "small loss", "do not use")
    assert f"verdict: {report['verdict']}: KL" in shown.replace("\n", " ")
    assert "◀ yours" in shown and "the first of" in shown
    assert {point["dial"] for point in report["neighbours"]} >= {None, "--kv k8v4", "--recent-size 96"}
    assert any(str(point["dial"]).endswith("heads.json@0.75") for point in report["neighbours"])
    assert len(report["passkeys"]["dense"]) == 5
    assert (tmp_path / "check.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("what", "words", "message"),
    [
        ("kl", ["--tokens", "1000", "--context", "300"], "no whole number of windows of 300: use --tokens 900 or 1200"),
        ("kl", ["--tokens", "1M"], "give a longer text, or --tokens 3814"),
        ("kl", ["--tokens", "1K", "--kv", "int5"], "unknown KV format 'int5'"),
        ("kl", ["--kv", "16,,int4"], "--kv is '16,,int4': a value is missing"),
        ("kl", ["--text", "nothing.txt"], "nothing.txt does not exist"),
        ("kl", ["--png", "/nowhere/a.png"], "there is no folder /nowhere"),
        ("niah", ["--tokens", "60"], "60 tokens leave no room for text around what is hidden: use more"),
        ("passkey", ["--depths", "0"], "--depths is '0'"),
        ("multihop", ["--tasks", "hops"], "--tasks has 'hops': give a list of needles, variables, recall"),
        ("check", ["--doc", "TEXT", "--context", "512"], "the context is 512: give --context"),
        ("check", ["--doc", "TEXT", "--kv", "16,int4"], "eval check takes one setting"),
        ("check", ["--doc", "TEXT", "--minutes", "soon"], "--minutes is 'soon'"),
        ("check", [], "the following arguments are required: --doc"),
    ],
)
def test_refused_before_the_model_is_loaded(
    evaluate: Eval, what: str, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded before it was refused")

    monkeypatch.setattr(engines.Engine, "load", loaded)
    words = [str(evaluate.model / "text.txt") if word == "TEXT" else word for word in words]
    code, out, err = evaluate(what, *words)
    assert code in (1, 2)
    assert out == ""
    assert message in err and err.count("\n") == 1


def test_caches_that_do_not_fit_are_refused_with_the_numbers(evaluate: Eval, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "available_bytes", lambda device: 2**20)
    code, _, err = evaluate("kl", "--tokens", "1K", "--context", "1K", "--kv", "16,int4")
    assert code == 1
    assert "3 caches of 1,024 tokens, one of them dense, need" in err and "measure fewer tokens at a time" in err


def test_shades_survive_a_pipe() -> None:
    assert [shaded(nll, found=True).plain.strip() for nll in (0.0, 0.5, 3.0)] == ["██ 0.00", "▓▓ 0.50", "·· 3.00"]
    assert shaded(1.0, found=False).plain == "░░ 1.00 ✗"
    assert shaded(float("nan"), found=False).plain.startswith("··")
    assert (bars(1, 1, 4), bars(0.5, 1, 4), bars(0, 1, 4), bars(1, 0)) == ("████", "██", "", "")
    assert bars(0.53, 1, 4) == "██▏"


def test_pictures_have_names_of_their_own() -> None:
    path = Path("out/heat.png")
    assert picture_for(path, "0.5 k8v4", alone=True) == path
    assert picture_for(path, "0.5 k8v4 16+auto", alone=False) == Path("out/heat-0.5-k8v4-16+auto.png")
    assert picture_for(Path("heat"), "a/b", alone=False) == Path("heat-a-b.png")
