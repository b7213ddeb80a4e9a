"""Passkeys: five digits said twice in real text, and asked for."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from duolocal.engine.engine import Engine
from duolocal.evaluate.grid import ask
from duolocal.evaluate.prompts import Prompt, Question, hidden_prompt
from duolocal.tokenizer import Tokenizer

INTRODUCTION = "There is a pass key hidden in the text below. Find it and remember it."
QUESTION = "What is the pass key?"
ANSWER_BEGUN = "The pass key is"
NUM_DIGITS = 5


@dataclass(frozen=True)
class PasskeyResult:
    """One passkey at one depth of one length."""

    num_tokens: int  # of the whole prompt
    depth: float  # 0: at the beginning, 1: at the end
    passkey: str
    answer: str
    nll: float  # mean negative log-likelihood of the passkey's tokens, nats

    @property
    def found(self) -> bool:
        return self.passkey in self.answer


@dataclass(frozen=True)
class Needle(Prompt):
    """A prompt with a passkey in it, the answer begun."""

    depth: float

    @property
    def passkey(self) -> str:
        return self.wanted[0]

    @property
    def passkey_ids(self) -> list[int]:
        return self.answer_ids


def draw_passkey(generator: random.Random) -> str:
    """Return five digits, the first no zero."""
    return str(generator.randrange(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS))


def passkey_question(passkey: str) -> tuple[Question, str]:
    """Return the question for a passkey, and what to hide."""
    needle = f"\n\nThe pass key is {passkey}. Remember it. {passkey} is the pass key.\n\n"
    return Question(INTRODUCTION, QUESTION, ANSWER_BEGUN, passkey, hidden="the passkey"), needle


def passkey_prompts(
    tokenizer: Tokenizer, text: str, *, num_tokens: int, depths: Sequence[float], seed: int = 0
) -> list[Needle]:
    """Return one prompt per depth of about `num_tokens` tokens, each with other digits in another part of `text`.

    Raises SettingsError where the length leaves no room for text.
    """
    generator = random.Random(seed)
    haystack = tokenizer.encode(text)
    needles = []
    for depth in depths:
        passkey = draw_passkey(generator)
        question, needle = passkey_question(passkey)
        token_ids, answer_ids = hidden_prompt(
            tokenizer, haystack, question, [(depth, needle)], num_tokens=num_tokens, generator=generator
        )
        needles.append(Needle("passkey", num_tokens, depth, token_ids, answer_ids, (passkey,)))
    return needles


def passkey(engine: Engine, tokenizer: Tokenizer, needles: Sequence[Needle]) -> Iterator[PasskeyResult | int]:
    """Ask for every passkey, greedily, yielding tokens read on the way and a PasskeyResult after each prompt."""
    for event in ask(engine, tokenizer, needles):
        if isinstance(event, int):
            yield event
        else:
            assert event.depth is not None
            yield PasskeyResult(event.num_tokens, event.depth, event.wanted[0], event.answer, event.nll)
