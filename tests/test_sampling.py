"""The sampler against transformers' logits processors, and stop strings against a plain search."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from duolocal.errors import DuoLocalError, SettingsError
from duolocal.sampling import Sampler, StopStrings, filter_logits
from duolocal.settings import Sampling


def random_logits(seed: int, size: int = 300, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def transformers_filter(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return transformers' scores [vocab_size] in float64, -inf where an id is ruled out."""
    scores = logits.double()[None]
    ids = torch.zeros((1, 1), dtype=torch.int64)
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    for warper in warpers:
        scores = warper(ids, scores)
    return scores[0]


@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.05, 5.0),
    top_k=st.sampled_from([0, 1, 5, 50, 299, 300, 1000]),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 0.999), st.floats(0.999, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_filters_are_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, scale: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(seed, scale=scale)
    values, ids = filter_logits(logits, sampling)
    expected = transformers_filter(logits, sampling)
    ours = torch.full_like(expected, -math.inf)
    ours[torch.arange(len(logits)) if ids is None else ids] = values
    # Thresholds next to 0 or 1 are a matter of rounding: ids as unlikely as float64's epsilon may differ.
    differing = ours.isfinite() != expected.isfinite()
    assert float((logits.double() / temperature).softmax(0)[differing].sum()) < 1e-13
    torch.testing.assert_close(ours.softmax(0), expected.softmax(0))


def test_a_flat_distribution_is_sorted_whole() -> None:
    logits = random_logits(1, size=5000, scale=0.1)
    sampling = Sampling(temperature=1.0, top_p=0.9)
    _, ids = filter_logits(logits, sampling)
    assert ids is not None
    expected = transformers_filter(logits, sampling).isfinite().nonzero()[:, 0]
    assert torch.equal(ids.sort().values, expected)
    assert len(ids) > 4000


@given(
    seed=st.integers(0, 10**6),
    penalty=st.floats(0.3, 3.0),
    history=st.lists(st.integers(0, 299), min_size=1, max_size=30),
)
def test_repetition_penalty_is_transformers(seed: int, penalty: float, history: list[int]) -> None:
    logits = random_logits(seed)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=penalty))
    for length in range(len(history) + 1):  # a history that grows
        expected = logits.double()[None].clone()
        if length:
            expected = processor(torch.tensor([history[:length]]), expected)
        assert sampler(logits, history[:length]) == int(expected[0].argmax())


def test_another_history_is_noticed() -> None:
    logits = torch.tensor([1.0, 0.9, 0.8])
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0))
    assert sampler(logits, [0]) == 1
    assert sampler(logits, [0, 1]) == 2
    assert sampler(logits, [1]) == 0
    assert sampler(logits, []) == 0
    assert sampler(logits, [2, 0]) == 1


def test_greedy_ignores_the_filters() -> None:
    logits = random_logits(3)
    assert Sampler(Sampling(temperature=0, top_k=7, top_p=0.1, min_p=0.5))(logits, []) == int(logits.argmax())


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, -math.inf])
    sampler = Sampler(Sampling(temperature=1.3, top_p=1.0, top_k=4, seed=5))
    draws = 4000
    counts = torch.zeros(6)
    for _ in range(draws):
        counts[sampler(logits, [])] += 1
    assert counts[3] == counts[5] == 0, "top_k keeps four"
    expected = draws * torch.tensor([2.0, 1.0, 0.0, 3.0]).div(1.3).softmax(0)
    chi_square = float(((counts[[0, 1, 2, 4]] - expected) ** 2 / expected).sum())
    assert chi_square < 16.27, "99.9% quantile with 3 degrees of freedom"
    assert chi_square > 0


def test_draws_over_everything_reach_everything() -> None:
    sampler = Sampler(Sampling(temperature=1.0, top_p=1.0, seed=1))
    assert {sampler(torch.zeros(5), []) for _ in range(200)} == set(range(5))


def test_a_seed_repeats_and_none_can_be_told() -> None:
    logits = random_logits(9)

    def draw(sampler: Sampler) -> list[int]:
        return [sampler(logits, []) for _ in range(30)]

    first = draw(Sampler(Sampling(seed=4)))
    assert first == draw(Sampler(Sampling(seed=4)))
    assert first != draw(Sampler(Sampling(seed=5)))
    unknown = Sampler(Sampling())
    ids = draw(unknown)
    assert ids == draw(Sampler(Sampling(seed=unknown.seed)))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draw(Sampler(Sampling(seed=4)))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"


@pytest.mark.parametrize("settings", [{"top_p": 1e-12}, {"min_p": 1.0}, {"top_k": 1}, {"temperature": 1e-300}])
def test_one_id_is_always_left(settings: dict[str, Any]) -> None:
    logits = random_logits(2)
    assert Sampler(Sampling(**settings))(logits, []) == int(logits.argmax())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    logits = random_logits(2).to(dtype)
    assert Sampler(Sampling(temperature=0))(logits, []) == int(logits.argmax())
    assert 0 <= Sampler(Sampling(seed=1))(logits, []) < len(logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[1.0, math.nan], [1.0, math.inf], [-math.inf, -math.inf], []])
def test_logits_that_cannot_be_sampled(bad: list[float], temperature: float) -> None:
    with pytest.raises(DuoLocalError, match="cannot be sampled"):
        Sampler(Sampling(temperature=temperature))(torch.tensor(bad), [])


def test_huge_logits() -> None:
    logits = torch.tensor([3e38, -3e38, 2.9e38])
    assert Sampler(Sampling(temperature=0.01, seed=1))(logits, []) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"top_k": -1},
        {"top_k": 1.5},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": True},
        {"max_tokens": 0},
        {"stop": "END"},
        {"stop": ("",)},
        {"stop": ["a"]},
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        Sampling(**settings)
    message = str(caught.value)
    name, value = next(iter(settings.items()))
    assert name in message
    assert repr(value) in message or str(value) in message
    assert "\n" not in message


def expected_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Return what may be shown of `text`: grow it by one character until a stop string is at its end."""
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            return text[: end - max(map(len, matching))], True
    return text, False


pieces = st.lists(st.text(alphabet="abc", max_size=4), max_size=12)


@given(pieces=pieces, stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4))
def test_stop_strings(pieces: list[str], stops: list[str]) -> None:
    watcher = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += watcher.push(piece)
        assert not any(stop in shown for stop in stops)
    text, stopped = expected_stop("".join(pieces), stops)
    assert watcher.stopped == stopped
    assert shown + watcher.flush() == text
    if stopped:
        assert watcher.push("c") == watcher.flush() == ""


def test_stop_strings_hold_back_no_more_than_they_must() -> None:
    watcher = StopStrings(["\n\nUser:"])
    assert watcher.push("Hello\n") == "Hello"
    assert watcher.push("x\n\nUs") == "\nx"
    assert watcher.push("a") == "\n\nUsa"
    assert watcher.push("\n\nUser: hi") == ""
    assert watcher.stopped
    assert watcher.push("more") == ""
    assert watcher.flush() == ""
