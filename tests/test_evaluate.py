"""The quality suite on the real model: prompts are what they say, the default settings find what is hidden."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from duolocal.engine.engine import Engine
from duolocal.errors import SettingsError
from duolocal.evaluate import Lineup, Outcome, Setting, ask, passkey_prompts
from duolocal.evaluate.compare import compare, cut_windows
from duolocal.evaluate.tasks import TASKS
from duolocal.models.loader import open_model
from duolocal.sample_text import license_text, sample_text
from duolocal.tokenizer import load_tokenizer

pytestmark = pytest.mark.real


def test_prompts_hide_the_passkey_where_they_say(smollm2_path: Path) -> None:
    tokenizer = load_tokenizer(open_model(smollm2_path))
    needles = passkey_prompts(tokenizer, sample_text(), num_tokens=1000, depths=[0, 0.5, 1])
    assert len({needle.wanted for needle in needles}) == 3
    for needle in needles:
        text = tokenizer.decode(needle.token_ids, skip_special=False)
        (passkey,) = needle.wanted
        assert text.count(passkey) == 2
        assert text.endswith("What is the pass key?<|im_end|>\n<|im_start|>assistant\nThe pass key is ")
        assert tokenizer.decode(needle.answer_ids, continues=True) == passkey
        assert abs(len(needle.token_ids) - 1000) <= 10  # text cut out of its surroundings may tokenize a little longer
        body = text.partition("remember it.")[2]
        assert abs(body.index(passkey) / len(body) - (needle.depth or 0)) < 0.1
    with pytest.raises(SettingsError, match="60 tokens leave no room for text around the passkey: use more"):
        passkey_prompts(tokenizer, sample_text(), num_tokens=60, depths=[0])
    with pytest.raises(SettingsError, match="too few for 1,000: give a longer one"):
        passkey_prompts(tokenizer, "word " * 300, num_tokens=1000, depths=[0])


@pytest.mark.parametrize("depths", [[0.5], pytest.param([0.3, 0.7], marks=pytest.mark.full)])
def test_the_default_settings_find_a_passkey_and_streaming_alone_does_not(
    depths: list[float], smollm2_path: Path
) -> None:
    tokenizer = load_tokenizer(open_model(smollm2_path))
    needles = passkey_prompts(tokenizer, license_text(), num_tokens=1500, depths=depths)
    found = {}
    for heads in ("auto", "0"):
        engine = Engine.load(str(smollm2_path), context=1600, heads=heads)
        results = [event for event in ask(engine, tokenizer, needles) if isinstance(event, Outcome)]
        found[heads] = [result.found for result in results]
        assert [result.wanted for result in results] == [needle.wanted for needle in needles]
    # Without retrieval heads a passkey beyond the window cannot be seen at all.
    assert found == {"auto": [True] * len(depths), "0": [False] * len(depths)}


@pytest.mark.full
def test_losses_are_small_and_in_order_on_real_text(smollm2_path: Path) -> None:
    source = open_model(smollm2_path)
    tokenizer = load_tokenizer(source)
    windows = cut_windows(tokenizer.encode(license_text()), num_tokens=768, context=768)
    settings = [Setting("all", "k8v4"), Setting("0.5", "k8v4"), Setting("0", "k8v4")]
    lineup = Lineup.load(source, settings, context=800)
    dense, *results = compare([(choice.name, lineup.engine(choice)) for choice in lineup.everyone], windows)
    assert dense.kl == 0 and dense.perplexity < 30
    kl = [result.kl for result in results]
    assert 0 < kl[0] < 0.003 and kl[0] < kl[1] < 0.05 and kl[1] < 0.5 * kl[2]
    assert results[0].top1 > 0.98 and abs(results[0].rise) < 0.01

    # Two numbers among eight: the split keeps them, streaming heads alone do not see them.
    prompts = TASKS["needles"](tokenizer, license_text(), num_tokens=700, samples=1)
    nll = []
    for choice in (lineup.dense, *lineup.choices[1:]):
        (outcome,) = (e for e in ask(lineup.engine(choice), tokenizer, prompts) if isinstance(e, Outcome))
        nll.append(outcome.nll)
    assert nll[1] < nll[0] + 0.3 and nll[2] > nll[0] + 0.3


def test_memory_is_really_taken_and_much_less_than_dense(smollm2_path: Path) -> None:
    # In a process of its own: this one could reuse memory that an earlier test gave back.
    command = [sys.executable, "-m", "duolocal", "bench", "memory", "--model", str(smollm2_path), "--context", "16K"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads(output.splitlines()[-1])
    counted, grown, dense = report["kv_bytes"], report["resident_growth_bytes"], report["dense_16bit_bytes"]
    assert dense == 2 * 2 * 30 * 3 * 64 * 16384
    assert abs(grown - counted) < 0.05 * counted + 2**22  # pages and the allocator's own
    assert counted < 0.5 * dense
    assert report["streaming_windows_bytes"] == 45 * 2 * 64 * (64 + 256) * 4
