"""`duolocal heads`: the map, the list, one identification, and what is refused before any work."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from duolocal import cli
from duolocal.commands import heads
from duolocal.heads import HeadPattern, load_pattern, save_pattern
from duolocal.identify import METHODS, IdentifyProgress, IdentifyResult
from duolocal.terminal import heads_identify_view
from duolocal.terminal.heads_view import print_map
from duolocal.terminal.progress import Bar
from tests.tiny import save_checkpoint

PNG = b"\x89PNG\r\n\x1a\n"


def pattern_file(path: Path, layers: int = 4, heads: int = 3) -> Path:
    draw = random.Random(1)
    scores = tuple(tuple(draw.random() for _ in range(heads)) for _ in range(layers))
    return save_pattern(HeadPattern(scores, 16, 128, 0.5, "", method="by hand", seed=7), path)


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(list(words))
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def map_of(pattern: HeadPattern, ratio: float, *, width: int = 80, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding, errors="strict"), width=width)
    print_map(pattern, pattern.cut(ratio), console, title="t")
    console.file.flush()
    return raw.getvalue().decode(encoding).splitlines()


def test_the_map_tells_the_classes_apart_without_colour(tmp_path: Path) -> None:
    pattern = load_pattern(pattern_file(tmp_path / "p.json"))
    lines = map_of(pattern, 0.5, width=200)
    start = next(at for at, line in enumerate(lines) if line.startswith("layer")) + 1
    for layer, row in enumerate(pattern.cut(0.5).retrieval):
        label, *marks, count = lines[start + layer].split()
        assert (int(label), int(count)) == (layer, sum(row))
        assert [mark in "█▆▅▃" for mark in marks] == list(row)
    first = pattern.ranking()[0]
    assert lines[start + first[0]].split()[1 + first[1]] == "█"
    text = "\n".join(lines)
    assert "t: 6 of 12 KV heads are retrieval heads (50%), 4 layers × 3, sink 16, recent 128" in text
    assert "method: by hand; seed 7; scores " in text


def test_a_map_for_a_terminal_that_knows_no_blocks(tmp_path: Path) -> None:
    """Latin-1 has the × of the first line, but no block characters."""
    lines = map_of(load_pattern(pattern_file(tmp_path / "p.json")), 0.5, width=200, encoding="latin-1")
    assert any(set(line.split()[1:-1]) <= {"#", "."} and "#" in line for line in lines if line[:5].strip().isdigit())


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 1), (33, 3), (32, 8), (80, 8), (32, 32), (126, 16)])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_layer_is_in_the_map_whatever_the_width(tmp_path: Path, layers: int, heads: int, width: int) -> None:
    pattern = load_pattern(pattern_file(tmp_path / "p.json", layers, heads))
    lines = map_of(pattern, 0.5, width=width)
    assert max(map(len, lines)) <= width
    marks = "".join(lines[next(at for at, line in enumerate(lines) if line.startswith("layer")) + 1 :])
    marks = marks.split("█▆▅▃")[0]  # before the legend
    assert sum(marks.count(mark) for mark in "█▆▅▃▁·") == layers * heads
    assert max(int(word) for word in marks.split() if word.isdigit()) >= layers - 1


def test_ties_at_the_cut_are_named() -> None:
    lines = " ".join(map_of(HeadPattern(((1.0, 1.0), (1.0, 0.0)), 4, 8, 0.5, "s"), 0.5))
    assert "the last retrieval head has 1 as 2 others" in lines


def test_show_a_file_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pattern_file(tmp_path / "p.json")
    picture = tmp_path / "map.png"
    code, out, err = run("heads", "show", str(path), "--heads", "0.25", "--png", str(picture), capsys=capsys)
    assert (code, err) == (0, "")
    assert out.startswith("p.json: 3 of 12 KV heads are retrieval heads (25%)")
    assert picture.read_bytes().startswith(PNG)
    folder = save_pattern(load_pattern(path), f"{tmp_path}/published/")
    code, out, _ = run("heads", "show", str(folder), "--heads", "ratio=1", capsys=capsys)
    assert code == 0
    assert out.startswith("published: 12 of 12 KV heads")


def test_list_names_source_and_licence(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("heads", "list", capsys=capsys)
    assert code == 0
    assert "meta-llama/Llama-3.1-8B-Instruct" in out
    assert "github.com/mit-han-lab/duo-attention (MIT licence)" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("show x.json --heads half", "--heads is 'half': give a ratio between 0 and 1"),
        ("show x.json", "head pattern x.json: No such file or directory"),
        ("show --model smollm2-135n", None),
        ("identify --method guess", "--method is 'guess': give one of drift, attribution, echo, copy, distill"),
        ("identify --format tsv --out p", "--format is 'tsv': give one of json, published"),
        ("identify --format json", "--format is for a file: give --out FILE too"),
        ("identify --steps 5", "--steps is for --method distill; drift has none: leave it out"),
        ("identify --seed x", "--seed is 'x': give a number"),
        ("identify --default-ratio 2", "--default-ratio is '2': give a ratio between 0 and 1"),
        ("identify --compare x.json", "head pattern x.json: No such file or directory"),
        ("identify --out nowhere/p.json", "--out nowhere/p.json: there is no folder nowhere: make it first"),
        ("identify --out notes.txt", "--out notes.txt exists and is no head pattern: name another file, or remove it"),
        ("identify --out full/", "--out full/ exists and is no head pattern: name another folder, or remove it"),
        ("identify --out full --format json", "--out full is a folder: give a file, or leave out --format json"),
        ("", "`duolocal heads` needs a command after it: give one of show, identify, list"),
    ],
)
def test_refused_before_any_work(
    words: str, message: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("dear diary")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    code, out, err = run("heads", *words.split(), capsys=capsys)
    assert out == ""
    assert err.count("\n") == 1
    if message is None:
        assert code == 1
    else:
        assert code == 2
        assert err.startswith(f"duolocal: {message}")
    assert (tmp_path / "notes.txt").read_text() == "dear diary"


def test_the_methods_of_help_are_those_there_are() -> None:
    assert sorted(heads.METHODS) == sorted(METHODS)


def test_identify_writes_compares_and_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    save_checkpoint(model, "llama", max_position_embeddings=2048, num_hidden_layers=3)
    other = pattern_file(tmp_path / "other.json", 3, 2)
    common = ["heads", "identify", "--model", str(model), "--kernels", "torch", "--tokens", "704", "--method", "echo"]
    out = tmp_path / "found.json"
    capsys.readouterr()  # transformers' own progress
    code, text, err = run(*common, "--out", str(out), "--seed", "3", "--compare", str(other), capsys=capsys)
    assert (code, err) == (0, "")
    assert not (tmp_path / "cache" / "head-patterns").exists()
    found = load_pattern(out)
    assert (found.method, found.seed, found.default_ratio, found.num_layers, found.num_kv_heads) == (
        "echo",
        3,
        0.6667,
        3,
        2,
    )
    assert found.secondary is not None
    assert len(found.fingerprints) == 1
    assert (tmp_path / "found.png").read_bytes().startswith(PNG)
    report = json.loads(text.splitlines()[-1])
    assert (report["retrieval_heads"], report["heads"]) == (4, 6)
    (row,) = report["agreement"]
    assert row["with"] == "other.json"
    assert 0 <= row["overlap"] <= 1
    assert row["chance"] == 0.5
    assert "agreement with" in text
    assert "retrieval heads (67%)" in text

    # Again: the same file, byte for byte; and it may be replaced, being a pattern.
    before = out.read_bytes()
    assert run(*common, "--out", str(out), "--seed", "3", "--png", "none", capsys=capsys)[0] == 0
    assert out.read_bytes() == before

    folder = tmp_path / "published"
    words = ["--out", f"{folder}/", "--seed", "3", "--default-ratio", "0.5"]
    assert run(*common, *words, capsys=capsys)[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "full_attention_heads.tsv", "heads.png"]
    assert load_pattern(folder).ranking() == found.ranking()

    # Without --out it is kept for this model, and show finds it there.
    code, _, err = run("heads", "show", "--model", str(model), capsys=capsys)
    assert (code, "no head pattern is known for" in err) == (2, True)
    code, text, _ = run(*common, capsys=capsys)
    assert code == 0
    assert json.loads(text.splitlines()[-1])["picture"] is None
    code, text, _ = run("heads", "show", "--model", str(model), "--heads", "0.5", capsys=capsys)
    assert code == 0
    assert "3 of 6 KV heads are retrieval heads" in text

    wrong = pattern_file(tmp_path / "wrong.json", 3, 3)
    code, _, err = run(*common, "--out", str(out), "--compare", str(wrong), capsys=capsys)
    assert code == 2
    assert "--compare wrong.json is for 3 layers × 3 KV heads, but the model has 3 × 2" in err


def test_a_distillation_is_shown_interrupted_and_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, state = tmp_path / "model", tmp_path / "p.json", tmp_path / "p.json.state.json"
    save_checkpoint(model, "llama", max_position_embeddings=2048)
    described: list[str] = []
    monkeypatch.setattr(Bar, "describe", lambda self, text: described.append(text))

    def fake(
        source: object, settings: object, *, method: str, steps: int, state_file: Path, **rest: object
    ) -> Iterator[IdentifyProgress | IdentifyResult]:
        assert (method, steps, state_file) == ("distill", 9, state)
        yield IdentifyProgress(1, steps, "steps", "distilling", loss=0.01234, open_share=0.811)
        if not state.exists():
            state.write_text("{}")
            raise KeyboardInterrupt
        table = ((1.0, 1.0), (0.5, 0.25))
        yield IdentifyResult("distill", table, table[::-1], 128, 256, 0, "f00d", 61.0, {"steps": steps})
        assert out.exists()  # written before the state is let go
        state.unlink()

    monkeypatch.setattr(heads_identify_view, "identify", fake)
    words = ["heads", "identify", "--model", str(model), "--method", "distill", "--steps", "9", "--out", str(out)]
    code, text, _ = run(*words, capsys=capsys)
    assert code == 130
    assert text == f"interrupted; the same command goes on from {state}\n"
    assert not out.exists()
    code, text, _ = run(*words, capsys=capsys)
    assert code == 0
    assert text.startswith(f"going on from {state}\n")
    assert "distill: distilling, loss 0.0123, 81% of gates open" in described
    pattern = load_pattern(out)
    assert (pattern.method, pattern.sink_size, pattern.details) == ("distill", 128, {"steps": 9})
    assert "written in 1:01 min" in text
    assert not state.exists()


def test_the_shipped_pattern_is_shown(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("heads", "show", "--model", str(smollm2_path), capsys=capsys)
    assert code == 0
    assert "of 90 KV heads are retrieval heads" in " ".join(out.split())
    assert "from shipped pattern smollm2-135m" in " ".join(out.split())
    # What ships is not overridden by the way.
    code, _, err = run("heads", "identify", "--model", str(smollm2_path), capsys=capsys)
    assert code == 2
    assert "a pattern ships for" in err
