"""Prompts of the quality suite: they contain what they say where they say, whole text around it, exact counts."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from duolocal.errors import SettingsError
from duolocal.evaluate import Prompt, passkey_prompts
from duolocal.evaluate.grid import places
from duolocal.evaluate.prompts import hide
from duolocal.evaluate.tasks import needles_prompts, niah_prompts, recall_prompts, variables_prompts
from duolocal.models.loader import open_model
from duolocal.sample_text import sample_text
from duolocal.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import save_checkpoint
from tests.tokenizer_files import chatml, llama2, llama3, write

TEXT = sample_text()[:40_000]
DEPTHS = (0.0, 0.25, 0.5, 1.0)


@pytest.fixture(scope="module", params=["chatml", "llama3", "llama2", "plain"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, "llama", vocab_size=1200, num_hidden_layers=1)
    files = {"chatml": chatml, "llama3": llama3, "llama2": llama2, "plain": chatml}[request.param]()
    if request.param == "plain":
        del files["tokenizer_config.json"]["chat_template"]
    return load_tokenizer(open_model(write(folder, files)))


def text_of(tokenizer: Tokenizer, prompt: Prompt) -> str:
    return tokenizer.decode(prompt.token_ids)


def check_common(tokenizer: Tokenizer, prompts: list[Any], num_tokens: int) -> None:
    for prompt in prompts:
        assert prompt.length == num_tokens
        assert prompt.num_tokens == len(prompt.token_ids)
        assert abs(prompt.num_tokens - num_tokens) <= 48  # cut text tokenizes anew; pairs are whole
        assert prompt.context == prompt.num_tokens + len(prompt.answer_ids) + 5
        answer = tokenizer.decode(prompt.answer_ids, continues=True).strip()
        assert all(wanted in answer for wanted in prompt.wanted)
        assert not any(word in answer for word in prompt.unwanted)


MAKERS: list[Callable[..., Any]] = [
    lambda t, **k: passkey_prompts(t, TEXT, depths=DEPTHS, **k),
    lambda t, **k: niah_prompts(t, TEXT, depths=DEPTHS, **k),
    lambda t, **k: needles_prompts(t, TEXT, samples=3, **k),
    lambda t, **k: variables_prompts(t, TEXT, samples=3, **k),
    lambda t, **k: recall_prompts(t, TEXT, samples=3, **k),
]


@pytest.mark.parametrize("make", MAKERS, ids=["passkey", "niah", "needles", "variables", "recall"])
def test_the_seed_decides(tokenizer: Tokenizer, make: Callable[..., Any]) -> None:
    first = make(tokenizer, num_tokens=800, seed=3)
    check_common(tokenizer, first, 800)
    assert first == make(tokenizer, num_tokens=800, seed=3)
    other = make(tokenizer, num_tokens=800, seed=4)
    assert [prompt.wanted for prompt in first] != [prompt.wanted for prompt in other]
    assert len({prompt.wanted for prompt in first}) == len(first)
    with pytest.raises(SettingsError, match=r"use more$"):
        make(tokenizer, num_tokens=60, seed=3)


@pytest.mark.parametrize("task", ["passkey", "niah"])
def test_one_needle_at_its_depth_and_the_text_around_it_whole(tokenizer: Tokenizer, task: str) -> None:
    make: Any = passkey_prompts if task == "passkey" else niah_prompts
    for prompt in make(tokenizer, TEXT, num_tokens=900, depths=DEPTHS, seed=1):
        said = text_of(tokenizer, prompt)
        if task == "passkey":
            body, (key,) = said.partition("remember it.\n\n")[2].rpartition("\n\nWhat is")[0], prompt.wanted
            needle = f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
            assert said.rstrip().endswith("The pass key is")
        else:
            body = said.partition("thing that it says.\n\n")[2].rpartition("\n\nWhat is")[0]
            found = re.search(r"\n\nThe best thing to do in \S+ is to eat \w+ \w+ in the \w+\.\n\n", body)
            assert found
            needle = found[0]
            assert all(word in needle for word in prompt.wanted)
        before, _, after = body.partition(needle)
        assert needle not in after
        # A template may strip a content, the text around the needle is otherwise one piece of the haystack.
        assert (before + after).strip() in TEXT
        share = len(before) / len(before + after)
        assert abs(share - prompt.depth) < 0.05, (share, prompt.depth)


def test_eight_needles_in_order_of_which_two_are_asked_for(tokenizer: Tokenizer) -> None:
    for prompt in needles_prompts(tokenizer, TEXT, num_tokens=1500, samples=3, seed=2):
        said = text_of(tokenizer, prompt)
        pairs = re.findall(r"The magic number of ([a-z-]+) is (\d{5})\.", said)
        assert len(dict(pairs)) == 8
        asked = re.findall(r"What are the magic numbers of ([a-z-]+) and ([a-z-]+)\?", said)[0]
        assert tuple(dict(pairs)[key] for key in asked) == prompt.wanted
        places_of = [said.index(f"of {key} is") / len(said) for key, _ in pairs]
        assert all(abs(place - (at + 0.5) / 8) < 0.12 for at, place in enumerate(places_of)), places_of


def test_chains_of_variables_hold_what_is_asked(tokenizer: Tokenizer) -> None:
    prompts = variables_prompts(tokenizer, TEXT, num_tokens=1500, samples=4, seed=5)
    assert (
        max(text_of(tokenizer, prompt).rindex("\n\nVAR") / len(text_of(tokenizer, prompt)) for prompt in prompts) > 0.7
    )
    for prompt in prompts:
        said = text_of(tokenizer, prompt)
        value = re.findall(r"assigned the value (\d{5}) in the text above", said)[0]
        held: dict[str, str] = {}
        for name, right in re.findall(r"\n\nVAR ([A-Z]{5}) = (\d{5}|VAR [A-Z]{5})\n\n", said):
            assert name not in held
            held[name] = held[right[4:]] if right.startswith("VAR") else right  # KeyError: used before it is assigned
        assert len(held) == 10 and len(set(held.values())) == 2
        assert {name for name in held if held[name] == value} == set(prompt.wanted)
        assert {name for name in held if held[name] != value} == set(prompt.unwanted)


def test_recall_is_all_pairs_with_the_one_asked_for_at_its_depth(tokenizer: Tokenizer) -> None:
    prompts = recall_prompts(tokenizer, "", num_tokens=1000, samples=4, seed=6)
    assert [round(prompt.depth or 0, 1) for prompt in prompts] == [0.1, 0.4, 0.6, 0.9]
    for prompt in prompts:
        said = text_of(tokenizer, prompt)
        pairs = re.findall(r"^([a-z]+-[a-z]+-[a-z]+): (\d{5})$", said, re.MULTILINE)
        assert len(dict(pairs)) == len(pairs) > 10
        key = re.findall(r"What is the number of (\S+)\?", said)[0]
        assert dict(pairs)[key] == prompt.wanted[0]
        assert list(dict(pairs)).index(key) / (len(pairs) - 1) == prompt.depth


def test_hiding_keeps_every_token_and_the_order(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT[:2000])
    assert hide(tokenizer, ids, []) == tokenizer.decode(ids)
    hidden = hide(tokenizer, ids, [(0.0, "<A>"), (0.5, "<B>"), (0.5, "<C>"), (1.0, "<D>")])
    assert re.findall("<[A-D]>", hidden) == ["<A>", "<B>", "<C>", "<D>"]
    assert re.sub("<[A-D]>", "", hidden) == tokenizer.decode(ids)
    assert hidden.startswith("<A>") and hidden.endswith("<D>") and "<B><C>" in hidden


def test_a_text_that_is_too_short_is_refused_and_not_repeated(tokenizer: Tokenizer) -> None:
    with pytest.raises(SettingsError, match="too few for 1,000: give a longer one"):
        niah_prompts(tokenizer, "word " * 100, num_tokens=1000, depths=[0.5])


def test_places() -> None:
    assert places(1) == [0.0]
    assert places(3) == [0.0, 0.5, 1.0]
