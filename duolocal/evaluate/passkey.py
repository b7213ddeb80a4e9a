"""Passkeys: five digits said twice in real text, and asked for."""

import random
from collections.abc import Sequence

from duolocal.evaluate.prompts import Prompt, Question, hidden_prompt
from duolocal.tokenizer import Tokenizer

INTRODUCTION = "There is a pass key hidden in the text below. Find it and remember it."
QUESTION = "What is the pass key?"
ANSWER_BEGUN = "The pass key is"
NUM_DIGITS = 5


def draw_passkey(generator: random.Random) -> str:
    """Return five digits, the first no zero."""
    return str(generator.randrange(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS))


def passkey_question(passkey: str) -> tuple[Question, str]:
    """Return the question for a passkey, and what to hide."""
    needle = f"\n\nThe pass key is {passkey}. Remember it. {passkey} is the pass key.\n\n"
    return Question(INTRODUCTION, QUESTION, ANSWER_BEGUN, passkey, hidden="the passkey"), needle


def passkey_prompts(
    tokenizer: Tokenizer, text: str, *, num_tokens: int, depths: Sequence[float], seed: int = 0
) -> list[Prompt]:
    """Return one prompt per depth of about `num_tokens` tokens, each with other digits in another part of `text`.

    Raises SettingsError where the length leaves no room for text.
    """
    generator = random.Random(seed)
    haystack = tokenizer.encode(text)
    prompts = []
    for depth in depths:
        passkey = draw_passkey(generator)
        question, needle = passkey_question(passkey)
        token_ids, answer_ids = hidden_prompt(
            tokenizer, haystack, question, [(depth, needle)], num_tokens=num_tokens, generator=generator
        )
        prompts.append(Prompt("passkey", num_tokens, depth, token_ids, answer_ids, (passkey,)))
    return prompts
