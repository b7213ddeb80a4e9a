"""Identification on the real model: texts say what they should, and the methods find the same heads."""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from duolocal.engine.events import QUIET
from duolocal.engine.loading import loader_for_ranking
from duolocal.errors import SettingsError
from duolocal.heads import shipped_pattern
from duolocal.identify import IdentifyProgress, IdentifyResult, agreement, identify
from duolocal.identify.text import PasskeyShape, PasskeyTexts
from duolocal.models.loader import ModelSource, open_model
from duolocal.sample_text import sample_text
from duolocal.settings import LoadSettings
from duolocal.tokenizer import load_tokenizer

pytestmark = pytest.mark.real
SMALL = {"sink_size": 16, "recent_size": 64}


def ranking(source: ModelSource, **settings: object) -> Iterator[IdentifyProgress | IdentifyResult]:
    load = loader_for_ranking(source, LoadSettings(), QUIET)
    return identify(source, load, device=torch.device("cpu"), **settings)  # type: ignore[arg-type]


def result(source: ModelSource, **settings: object) -> IdentifyResult:
    *_, last = ranking(source, **settings)
    assert isinstance(last, IdentifyResult)
    return last


def test_texts_ask_for_every_passkey_they_hide(smollm2_path: Path) -> None:
    tokenizer = load_tokenizer(open_model(smollm2_path))
    texts = PasskeyTexts(tokenizer, sample_text(), PasskeyShape(num_passkeys=3, num_words=4))
    text = texts.draw(700, "a")
    ids = text.token_ids
    assert len(ids) == 700 and text == texts.draw(700, "a") and text != texts.draw(700, "b")
    said = tokenizer.decode(ids)
    for ordinal in ("first", "second", "third"):
        _, needle, answer = said.rsplit(f"The {ordinal} passkey is:", 2)
        passkey = needle[: needle.index("\n")]
        assert len(passkey.split()) == 4 and answer.startswith(passkey)
    assert len(text.sources) == len(text.predicted_at) > 12
    for span in set(text.sources):
        copied = [ids[at + 1] for at, source in zip(text.predicted_at, text.sources, strict=True) if source == span]
        assert copied == ids[slice(*span)]
    with pytest.raises(SettingsError, match="leave no room for text around 3 passkeys of 4 words: use 2"):
        texts.draw(150, "a")
    short = PasskeyTexts(tokenizer, "word " * 200, PasskeyShape(num_passkeys=1, num_words=1))
    with pytest.raises(SettingsError, match="too few for 700"):
        short.draw(700, "a")


@pytest.mark.full
def test_echo_and_copy_agree_far_above_chance(smollm2_path: Path) -> None:
    source = open_model(smollm2_path)
    echo = result(source, method="echo", num_tokens=200, **SMALL)
    copied = result(source, method="copy", num_tokens=600)
    assert (echo.num_layers, echo.num_kv_heads, echo.fingerprint) == (30, 3, source.fingerprint)
    assert echo.scores == result(source, method="echo", num_tokens=200, **SMALL).scores
    # Of unrelated rankings the halves share 45 ± 2.4 of 90 heads, so 0.5 ± 0.05.
    assert agreement(echo.scores, copied.scores, secondary_b=copied.secondary).overlap > 0.7


@pytest.mark.full
def test_drift_and_attribution_agree_with_the_pattern_that_ships(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duolocal.identify.run.ATTRIBUTION_TEXTS", 1)
    source = open_model(smollm2_path)
    shipped = shipped_pattern(source.fingerprint)
    assert shipped is not None and shipped.method == "attribution"
    drift = result(source, method="drift", num_tokens=800)
    attribution = result(source, method="attribution", num_tokens=800)
    # Rank correlations: 0 ± 0.11 by chance. The pattern was made with 5 texts of 3,072 tokens.
    assert agreement(drift.scores, shipped.scores).spearman > 0.45
    assert agreement(attribution.scores, shipped.scores).spearman > 0.45
    assert attribution.details["kl_at_answers"] > attribution.details["kl_at_text"] > 0
    assert drift.scores != attribution.scores


@pytest.mark.full
def test_distill_goes_on_from_its_file(smollm2_path: Path, tmp_path: Path) -> None:
    source, file = open_model(smollm2_path), tmp_path / "heads.state.json"
    settings = {"method": "distill", "num_tokens": 520, "steps": 2, "state_file": file, **SMALL}
    events = ranking(source, **settings)
    assert [next(events).done for _ in range(2)] == [0, 1]  # type: ignore[union-attr]
    assert isinstance(events, Generator)
    events.close()
    assert file.exists()
    with pytest.raises(SettingsError, match="other settings"):
        next(ranking(source, **settings | {"seed": 1}))
    rest = list(ranking(source, **settings))
    assert len(rest) == 3 and isinstance(rest[-1], IdentifyResult)
    assert not file.exists()
    assert rest[-1].details["loss"] > 0 and rest[-1].details["steps"] == 2


def test_wrong_settings_are_refused_before_anything_is_loaded(smollm2_path: Path) -> None:
    source = open_model(smollm2_path)
    for settings, message in (
        ({"method": "mass"}, "method 'mass' is unknown: use distill, copy, echo"),
        ({"method": "echo", "steps": 3}, "leave them out with echo"),
        ({"method": "copy", "text_share": 0.5}, "leave them out with copy"),
        ({"method": "distill", "pressure": -1.0}, "pressure is -1.0: give 0 or more"),
        ({"method": "distill", "text_share": 1.5}, "text_share is 1.5: give a number from 0 to 1"),
        ({"method": "distill", "steps": 0}, "steps is 0; it must be 1 or more"),
        ({"method": "echo", "num_tokens": 100}, "echo needs 644 tokens or more"),
        ({"method": "copy", "num_tokens": 9000}, "this model reaches 8,192: use fewer"),
        ({"method": "copy", "num_tokens": 100}, "leave no room"),
        ({"method": "distill", "num_tokens": 100}, "leave no room"),
        ({"method": "drift", "num_tokens": 700}, "drift needs 726 tokens or more with this window, not 700: use more"),
        ({"method": "echo", "recent_size": 0}, "recent_size is 0; it must be 1 or more"),
    ):
        with pytest.raises(SettingsError, match=message):
            next(ranking(source, **settings))
