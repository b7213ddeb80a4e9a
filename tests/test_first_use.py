"""The first use of an unknown model: started safely at once, measured where that is quick, needed or asked for."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from duolocal import cli
from duolocal.engine import first_use
from duolocal.engine.automatic import choose
from duolocal.engine.engine import Engine
from duolocal.engine.events import QUIET, LoadEvents
from duolocal.engine.first_use import Estimate, estimate, settle_first_use
from duolocal.engine.known_model import OpenedModel
from duolocal.engine.loading import decide, load_weights
from duolocal.engine.resolve import Resolved, resolve
from duolocal.errors import SettingsError
from duolocal.models.loader import open_model
from duolocal.models.transformer import Transformer
from duolocal.plan.dials import with_kept_back
from duolocal.plan.fitting import Free
from duolocal.plan.memory import plan_memory
from duolocal.settings import FirstUse, LoadSettings
from tests.tiny import save_checkpoint
from tests.tokenizer_files import chatml, write

PLENTY = Free(2**50)


class Heard(LoadEvents):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def announce(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Resolved, Transformer]:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    save_checkpoint(tmp_path / "model", "llama", max_position_embeddings=2048, num_hidden_layers=3)
    source = open_model(tmp_path / "model")
    resolved = resolve(LoadSettings("m", context=2048, kernels="torch"), OpenedModel(source))
    assert resolved.heads.unranked and resolved.unmeasured
    return resolved, load_weights(resolved, QUIET)


def settle(
    resolved: Resolved,
    transformer: Transformer,
    *,
    free: Free = PLENTY,
    wish: FirstUse = FirstUse(),  # noqa: B008  frozen
    reading: int = 0,
    events: LoadEvents = QUIET,
) -> Resolved:
    fitted = choose(resolved, free).resolved
    return settle_first_use(resolved, fitted, transformer, free, wish, reading=reading, events=events)


def takes(monkeypatch: pytest.MonkeyPatch, seconds: float, token_s: float = 0.01) -> None:
    monkeypatch.setattr(first_use, "estimate", lambda *_: Estimate(seconds / 2, seconds / 2, token_s))


@pytest.mark.parametrize(
    ("seconds", "reading", "wish", "measured"),
    [
        (19.0, 0, FirstUse(), True),
        (21.0, 0, FirstUse(), False),
        (21.0, 20_000, FirstUse(), False),  # read in 200 s
        (21.0, 22_000, FirstUse(), True),
        (2.0, 22_000, FirstUse(quick=True), False),
        (9999.0, 0, FirstUse(tune=True), True),
    ],
)
def test_when_it_is_measured_first(
    unknown: tuple[Resolved, Transformer],
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    reading: int,
    wish: FirstUse,
    measured: bool,
) -> None:
    resolved, transformer = unknown
    takes(monkeypatch, seconds)
    heard = Heard()
    found = settle(resolved, transformer, wish=wish, reading=reading, events=heard)
    if measured:
        assert found is resolved and heard.lines == []
        return
    assert (found.kv, found.heads.plan.num_streaming, found.undecided) == ("int8", 0, False)
    (line,) = heard.lines
    assert "`duolocal tune --model m` (about " in line and line not in found.notes  # it is said once
    assert " measures it" in line


def test_what_memory_makes_necessary_is_done_and_said(
    unknown: tuple[Resolved, Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, transformer = unknown
    takes(monkeypatch, 600.0)
    heard = Heard()
    smaller = replace(resolved, heads=replace(resolved.heads, plan=resolved.cut(2 / 3)), chunk_size=64)
    free = Free(with_kept_back(plan_memory(smaller.request()).total))
    found = settle(resolved, transformer, free=free, events=heard)
    assert found == resolved
    (line,) = heard.lines
    assert line.startswith("all heads and int8 KV need") and line.endswith("measured first, about 10 min, once")


def test_what_was_asked_for_stays(unknown: tuple[Resolved, Transformer], monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, transformer = unknown
    takes(monkeypatch, 600.0)
    settings = replace(resolved.settings, heads="0.5")
    asked = resolve(settings, resolved.model)
    found = settle(asked, transformer)
    assert found.heads is asked.heads and found.kv == "int8"  # the ranking that a ratio needs is still to be made
    asked = resolve(replace(settings, kv="int4"), resolved.model)
    heard = Heard()
    assert settle(asked, transformer, events=heard) == asked
    assert heard.lines == ["--heads 0.5 needs a ranking of the heads: about 10 min, once"]


def test_both_at_once_are_refused() -> None:
    with pytest.raises(SettingsError, match="--quick and --tune"):
        FirstUse(quick=True, tune=True)


def test_started_quickly_then_tuned_then_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("duolocal.engine.kv_choice.FIRST_USE_TOKENS", 300)
    folder = tmp_path / "model"
    save_checkpoint(folder, "llama", vocab_size=1024, max_position_embeddings=2048, num_hidden_layers=3)
    write(folder, chatml())
    asked = LoadSettings(str(folder), context=1024, kernels="torch")
    quick = Engine.load(str(folder), asked, first_use=FirstUse(quick=True))
    assert (quick.kv, quick.plan.num_streaming) == ("int8", 0)
    tuned = Engine.load(str(folder), asked, first_use=FirstUse(tune=True))
    assert tuned.plan.num_streaming == 2
    heard = Heard()
    again = Engine.load(str(folder), asked, first_use=FirstUse(quick=True), events=heard)
    assert (again.kv, again.plan.retrieval, heard.lines) == (tuned.kv, tuned.plan.retrieval, [])


def test_tune_says_what_it_found_and_finds_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("duolocal.engine.kv_choice.FIRST_USE_TOKENS", 300)
    folder = tmp_path / "model"
    save_checkpoint(folder, "llama", vocab_size=1024, max_position_embeddings=2048, num_hidden_layers=3)
    write(folder, chatml())
    words = ["tune", "--model", str(folder), "--kernels", "torch"]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    assert "4 of 6 KV heads retrieval" in first and "found by echo in" in first
    assert cli.main(words) == 0
    assert "as found on this machine by echo" in capsys.readouterr().out


@pytest.mark.real
@pytest.mark.full  # it compares times, which another process beside it changes
def test_the_estimate_is_what_it_takes(smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a factor of two of both measurements, on the real model under another name."""
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    data = bytearray(smollm2_path.read_bytes())
    at = data.index(b"Smollm2 135M 8k")
    data[at : at + 15] = b"Smollm2 135M 9k"
    path = tmp_path / "unknown.gguf"
    path.write_bytes(data)
    resolved = resolve(LoadSettings(str(path)), OpenedModel(open_model(path)))
    transformer = load_weights(resolved, QUIET)
    expected = estimate(resolved, transformer).total_s
    began_s = time.perf_counter()
    decide(resolved, transformer, QUIET)
    assert 0.5 < expected / (time.perf_counter() - began_s) < 2
