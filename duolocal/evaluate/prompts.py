"""Prompts with one right answer: something hidden in real text, a question about it, and the answer begun.

The answer is begun ("The pass key is") so that retrieval is measured, and not whether a small model follows
instructions; what is scored is the rest of it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from duolocal.errors import SettingsError
from duolocal.tokenizer import ChatPiece, Message, Tokenizer

MIN_ROOM = 16  # tokens of text around what is hidden


@dataclass(frozen=True)
class Question:
    """What is said before the text, what is asked after it, and the answer: the part given and the part wanted."""

    introduction: str
    question: str
    begun: str
    answer: str
    hidden: str = "what is hidden"  # for people


@dataclass(frozen=True)
class Prompt:
    """Token ids up to where the answer has to follow, and the right answer."""

    task: str
    length: int  # tokens asked for; there are a few more or less
    depth: float | None  # 0: at the beginning, 1: at the end; None where several things are hidden
    token_ids: list[int]
    answer_ids: list[int]
    wanted: tuple[str, ...]  # what the answer has to say, in any order
    unwanted: tuple[str, ...] = ()  # what it must not say

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, the right answer not among them."""
        return len(self.token_ids)

    @property
    def max_answer(self) -> int:
        """Tokens that an answer may take: the right one's and a few."""
        return len(self.answer_ids) + 5

    @property
    def context(self) -> int:
        """Tokens that a cache has to hold to read the prompt and answer."""
        return self.num_tokens + self.max_answer


def prompt_ids(tokenizer: Tokenizer, question: Question, text: str) -> tuple[list[int], list[int]]:
    """Return the ids up to where the answer has to follow, and the ids of the answer there.

    In some vocabularies the space before a number is a token of its own. It belongs to the answer that is begun: a
    model asked for a bare space says a word instead, and what it can retrieve is not seen. A model without a chat
    template gets the same as plain text. Raises SettingsError where the answer has no tokens of its own.
    """
    asked = f"{question.introduction}\n\n{text}\n\n{question.question}"
    begun = f"{question.begun} {question.answer}"
    if tokenizer.has_chat_template:
        pieces = tokenizer.chat_pieces([Message("user", asked)], add_generation_prompt=True)
        token_ids = tokenizer.encode_pieces([*pieces, ChatPiece(begun)])
    else:
        token_ids = tokenizer.encode(f"{asked}\n\n{begun}", bos=True)
    for cut in range(len(token_ids) - 1, 0, -1):
        tail = tokenizer.decode(token_ids[cut:], continues=True)
        if tail.strip() == question.answer:
            return token_ids[:cut], token_ids[cut:]
        if len(tail) > 2 * len(question.answer) + 64:
            break
    raise SettingsError(f"this model's tokenizer has no tokens that begin with the answer {question.answer!r}")


def hide(tokenizer: Tokenizer, text_ids: Sequence[int], inserts: Sequence[tuple[float, str]]) -> str:
    """Return the text of `text_ids` with every insert at its depth, 0 to 1 of the tokens; depths must not fall."""
    parts, at = [], 0
    for depth, insert in inserts:
        cut = round(depth * len(text_ids))
        assert cut >= at, inserts
        parts += [tokenizer.decode(text_ids[at:cut], continues=at > 0), insert]
        at = cut
    return "".join([*parts, tokenizer.decode(text_ids[at:], continues=at > 0)])


def hidden_prompt(
    tokenizer: Tokenizer,
    haystack: Sequence[int],
    question: Question,
    inserts: Sequence[tuple[float, str]],
    *,
    num_tokens: int,
    generator: random.Random,
) -> tuple[list[int], list[int]]:
    """Return prompt and answer ids: inserts hidden in a part of `haystack`, about `num_tokens` tokens in all.

    The part is drawn from `generator`; a text cut out of its surroundings may tokenize a little longer or shorter.
    Raises SettingsError where the length leaves no room for text, or the haystack is too short for it.
    """
    frame, _ = prompt_ids(tokenizer, question, "".join(insert for _, insert in inserts))
    room = num_tokens - len(frame)
    if room < MIN_ROOM:
        raise SettingsError(f"{num_tokens} tokens leave no room for text around {question.hidden}: use more")
    if room >= len(haystack):
        raise SettingsError(f"the text has {len(haystack):,} tokens, too few for {num_tokens:,}: give a longer one")
    start = generator.randrange(len(haystack) - room)
    return prompt_ids(tokenizer, question, hide(tokenizer, haystack[start : start + room], inserts))
