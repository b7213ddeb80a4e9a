"""Asking and checking on tiny models: what counts as found, the verdict, the advice, and the neighbours."""

import math
from dataclasses import replace

import pytest
import torch

from duolocal.errors import ContextOverflowError, SettingsError
from duolocal.evaluate import Choice, Lineup, Outcome, Prompt, Setting, ask, passkey_prompts, score
from duolocal.evaluate.check import (
    DEPTHS,
    FORMATS,
    Point,
    advise,
    check,
    document_tokens,
    judge,
    lost_share,
    needle_prompts,
    neighbours,
)
from duolocal.evaluate.compare import Comparison, WindowFigures
from duolocal.evaluate.grid import cells
from duolocal.heads import HeadPattern, HeadPlan, HeadsSpec
from duolocal.models.loader import open_model
from duolocal.sample_text import sample_text
from duolocal.tokenizer import Tokenizer, load_tokenizer
from tests.oracle import OracleCache
from tests.tiny import random_model, save_checkpoint, tiny_config, transformer_of
from tests.tokenizer_files import chatml, write

CPU = torch.device("cpu")
TEXT = sample_text()[:30_000]
SPLIT = HeadPlan(((True, False), (False, True)), sink_size=4, recent_size=48, source="test")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, "llama", vocab_size=1024, num_hidden_layers=1)
    return load_tokenizer(open_model(write(folder, chatml())))


YOURS = Choice("yours", SPLIT, "k8v4", Setting("0.5", "k8v4"))


def lineup(choice: Choice = YOURS, *, context: int = 900) -> Lineup:
    transformer = transformer_of(random_model(tiny_config(vocab_size=1024, max_positions=4096)), context=context)
    return Lineup(transformer, [choice], chunk_size=128)


def ranked(heads: str, like: HeadPlan) -> HeadPlan:
    """Stand in for the ranking that ships with a model."""
    pattern = HeadPattern(((0.9, 0.1), (0.4, 0.6)), 4, 48, 0.5, "test")
    return pattern.cut(float(heads), sink_size=like.sink_size, recent_size=like.recent_size)


def outcome(found: bool, *, length: int = 100, depth: float = 0.5, nll: float = 1.0) -> Outcome:
    return Outcome("passkey", length, depth, length, ("1",), "1" if found else "", float(found), found, nll, 0.0, 0.0)


def comparison(kl: float, rise: float = 0.0) -> Comparison:
    window = WindowFigures(100, kl, 2.0 + math.log1p(rise), 2.0, 0.9)
    return Comparison("x", (window,), kl, kl, kl, (kl,) * 4, 1.0)


def test_an_answer_is_scored_by_its_words_and_by_teacher_forcing(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = lineup()
    engine = this.engine(replace(this.dense, kv="32"))
    prompts: list[Prompt] = [*passkey_prompts(tokenizer, TEXT, num_tokens=300, depths=[0.2, 0.8])]
    first = [event for event in ask(engine, tokenizer, prompts) if isinstance(event, Outcome)]
    assert first == [event for event in ask(engine, tokenizer, prompts) if isinstance(event, Outcome)]
    assert not any(result.found for result in first)  # random weights know nothing
    for prompt, result in zip(prompts, first, strict=True):
        ids = [*prompt.token_ids, *prompt.answer_ids]
        cache = OracleCache(this.transformer.config)
        hidden = this.transformer.hidden(torch.tensor(ids[:-1]), torch.arange(len(ids) - 1), cache)
        log_probs = this.transformer.logits(hidden).double().log_softmax(-1)[prompt.num_tokens - 1 :]
        expected = -log_probs.gather(1, torch.tensor(prompt.answer_ids)[:, None]).mean().item()
        assert result.nll == pytest.approx(expected, abs=1e-4)  # float32 against float64 attention
    counted = [event for event in ask(engine, tokenizer, prompts) if isinstance(event, int)]
    assert counted[-1] == sum(prompt.num_tokens for prompt in prompts) - 1
    assert engine.position == 0

    several = replace(prompts[0], wanted=("ab", "cd"), unwanted=("xy",))
    for said, share, found in (("..CD ab", 1.0, True), ("ab", 0.5, False), ("ab cd xy", 1.0, False), ("", 0.0, False)):
        ids = tokenizer.encode(said, continues=True)
        monkeypatch.setattr(engine, "generate", lambda *_, ids=ids, **__: iter(ids))
        (result,) = (event for event in ask(engine, tokenizer, [several]) if isinstance(event, Outcome))
        assert (result.answer, result.share, result.found) == (said, share, found)


def test_scores_and_cells() -> None:
    outcomes = [outcome(True, nll=1.0), outcome(False, nll=2.0), outcome(True, depth=0.0, nll=0.5)]
    total = score(outcomes)
    assert (total.count, total.found, total.share, total.worst_nll) == (3, 2, pytest.approx(2 / 3), 2.0)
    assert {place: cell.found for place, cell in cells(outcomes).items()} == {(100, 0.5): 1, (100, 0.0): 1}


@pytest.mark.parametrize(
    ("kl", "rise", "dense", "ours", "verdict"),
    [
        (0.019, 0.019, "11", "11", "good"),
        (0.021, 0.0, "11", "11", "small loss"),
        (0.0, 0.021, "11", "11", "small loss"),
        (0.0, 0.0, "111", "110", "small loss"),
        (0.0, 0.0, "100", "111", "good"),
        (0.0, 0.0, "110", "101", "do not use"),
        (0.11, 0.0, "", "", "do not use"),
        (0.0, 0.11, "", "", "do not use"),
        (float("nan"), 0.0, "", "", "do not use"),
    ],
)
def test_the_verdict_is_a_rule(kl: float, rise: float, dense: str, ours: str, verdict: str) -> None:
    sides = [[outcome(digit == "1") for digit in side] for side in (dense, ours)]
    assert judge(comparison(kl, rise), *sides) == verdict


def test_only_what_dense_finds_can_be_lost() -> None:
    assert lost_share([outcome(False)], [outcome(False)]) == 0
    assert lost_share([outcome(True), outcome(True)], [outcome(True), outcome(False)]) == 0.5


def test_the_advice_names_the_cheapest_dial_that_is_enough() -> None:
    here = Point("yours", None, 1000, 0.05, 0.03, 0.9)
    heads = Point("a", "--heads 0.75", 1500, 0.010, 0.01, 0.95)
    bits = Point("b", "--kv int8", 1300, 0.015, 0.01, 0.95)
    window = Point("c", "--recent-size 512", 1100, 0.04, 0.02, 0.92)
    worse = Point("d", "--heads 0.25", 500, 0.2, 0.2, 0.8)
    assert advise("small loss", [here, heads, bits, window, worse]).startswith(
        "turn --kv int8: KL 0.0150 instead of 0.0500, perplexity +1.0%, 30% more KV memory, which is good"
    )
    assert "turn --recent-size 512 first" in advise("small loss", [here, window, worse])
    assert "--heads all --kv 16" in advise("do not use", [here, worse])
    assert advise("good", [here, worse]).startswith("no dial needs turning: every smaller")
    small = replace(worse, kl=0.01, rise=0.01)
    assert "--heads 0.25 would still be good" in advise("good", [replace(here, kl=0.001), heads, small])
    assert "50% less" in advise("good", [replace(here, kl=0.001), heads, small])
    # Measured on a part of the document, where less was lost than on the whole: what is enough there may not be.
    part = [
        replace(here, kl=0.025, rise=0.01),
        replace(heads, kl=0.005, rise=0.005),
        replace(bits, kl=0.024, rise=0.01),
    ]
    same = [replace(point, kl=0.00001, rise=0.0) for point in part]
    assert "the same KL of 0.0000, " in advise("good", [replace(same[0], kv_bytes=5000), *same[1:]])
    assert advise("small loss", part, whole_kl=0.05).startswith("turn --heads 0.75: KL about 0.0100 instead of 0.0500")
    assert "--heads all --kv 16" in advise("small loss", [part[0], part[2]], whole_kl=0.05)
    assert advise("good", [here]) == "no other setting was measured"


def test_neighbours_turn_one_dial_by_one_step() -> None:
    found = dict(neighbours(YOURS, ranked))
    assert list(found) == [
        "--heads 0.75",
        "--heads 0.25",
        "--kv int8",
        "--kv int4",
        "--recent-size 96",
        "--recent-size 24",
    ]
    assert [choice.plan.num_retrieval for choice in found.values()] == [3, 1, 2, 2, 2, 2]
    assert all(choice.plan.sink_size == 4 for choice in found.values())
    assert [choice.kv for choice in found.values()] == ["k8v4", "k8v4", "int8", "int4", "k8v4", "k8v4"]
    assert found["--recent-size 96"].plan.recent_size == 96
    assert len({choice.name for choice in found.values()}) == len(found)

    def unranked(heads: str, like: HeadPlan) -> HeadPlan:
        raise SettingsError("no ranking")

    assert [dial for dial, _ in neighbours(YOURS, unranked)] == list(found)[2:]
    everything = replace(YOURS, plan=replace(SPLIT, retrieval=((True, True),) * 2), kv=FORMATS[-1])
    assert [dial for dial, _ in neighbours(everything, unranked)] == ["--kv int8"]


def test_the_same_ranking_at_another_ratio() -> None:
    for heads, at_step in (
        *((heads, "0.75") for heads in ("auto", "all", "0.5", "ratio=0.5", "5e-1")),
        *((heads, "my.json@0.75") for heads in ("my.json", "my.json@0.5", "my.json@5e-1")),
        ("published", "published@0.75"),
    ):
        assert str(HeadsSpec.parse(heads).at(0.75)) == at_step


def test_a_document_is_cut_only_when_asked() -> None:
    ids = list(range(1000))
    assert document_tokens(ids, context=1000, asked=None, name="d") == ids
    assert document_tokens(ids, context=500, asked=400, name="d") == ids[:400]
    with pytest.raises(ContextOverflowError, match=r"^d has 1,000 tokens, the context is 500: give --context 1000, or"):
        document_tokens(ids, context=500, asked=None, name="d")
    with pytest.raises(SettingsError, match="d has 1,000 tokens, --tokens is 2,000: leave it out"):
        document_tokens(ids, context=4000, asked=2000, name="d")
    with pytest.raises(SettingsError, match="too few to check"):
        document_tokens(ids, context=4000, asked=8, name="d")


def test_needles_in_the_document_fit_the_context(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)[:600]
    for context, whole in ((900, True), (600, False)):
        prompts = needle_prompts(tokenizer, ids, context=context, generator_seed=0)
        assert [prompt.depth for prompt in prompts] == list(DEPTHS)
        assert all(prompt.context <= context for prompt in prompts)
        assert all((prompt.length == 600) == whole for prompt in prompts)
        for prompt in prompts:
            said = tokenizer.decode(prompt.token_ids)
            assert said.count(prompt.wanted[0]) == 2
            assert (tokenizer.decode(ids[300:310], continues=True) in said) or prompt.depth == 0.5
            assert (tokenizer.decode(ids[-9:], continues=True) in said) == whole
    assert needle_prompts(tokenizer, ids, context=100, generator_seed=0) == []


class Clock:
    """Seconds as a test wants them."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.now_s, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


def test_a_whole_check(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    this = lineup()
    monkeypatch.setattr(this, "plan", ranked)
    ids = tokenizer.encode(TEXT)[:700]
    events: list[str] = []
    result = check(this, tokenizer, ids, on_progress=lambda what, done, total: events.append(what), now=Clock())
    assert list(dict.fromkeys(events)) == ["reading", "looking for passkeys", "neighbouring settings"]
    dense, ours = result.comparisons
    assert (dense.name, ours.name) == ("dense", "yours")
    assert ours.count == 699 and ours.kl > 1e-4
    assert result.num_tokens == 700
    assert result.kv_bytes == (2 * 2 * 2 * 16 * 2 * 700, this.kv_bytes(this.choices[0], 700))
    assert {name: len(run) for name, run in result.needles.items()} == {"dense": 5, "yours": 5}
    assert result.needle_tokens == 700
    # The chosen setting is compared again with its neighbours, here on the whole document.
    assert result.point_tokens == 700
    assert result.points[0].dial is None and result.points[0].kl == pytest.approx(ours.kl, abs=1e-7)
    by_dial = {point.dial: point for point in result.points}
    assert set(by_dial) == {None, *dict(neighbours(this.choices[0], ranked))}
    assert by_dial["--heads 0.75"].kl < ours.kl < by_dial["--heads 0.25"].kl
    assert by_dial["--kv int4"].kv_bytes < result.points[0].kv_bytes < by_dial["--kv int8"].kv_bytes
    assert result.verdict in ("small loss", "do not use")
    again = check(this, tokenizer, ids, now=Clock())
    assert [replace(point) for point in again.points] == list(result.points)
    assert again.needles == result.needles


def test_without_time_the_document_is_still_compared(tokenizer: Tokenizer) -> None:
    this = lineup()
    ids = tokenizer.encode(TEXT)[:500]
    result = check(this, tokenizer, ids, minutes=0, now=Clock(step_s=1.0))
    assert result.comparisons[1].count == 499
    assert result.needles == {"dense": [], "yours": []}
    assert result.point_tokens == 0 and len(result.points) == 1
    assert len(result.notes) == 2
    assert result.advice == "no other setting was measured"


def test_a_document_inside_the_window_loses_nothing_and_it_is_said(tokenizer: Tokenizer) -> None:
    wide = HeadPlan(((True, False), (False, True)), sink_size=64, recent_size=256, source="test")
    this = lineup(Choice("yours", wide, "int4"))
    result = check(this, tokenizer, tokenizer.encode(TEXT)[:100], minutes=0)
    assert result.verdict == "good" and abs(result.comparisons[1].kl) < 1e-6
    assert any("nothing can be lost" in note for note in result.notes)
