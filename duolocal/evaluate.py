"""Does it still find things? Passkeys hidden in real text, under the user's settings and beside the dense model.

Yields results; printing them is the command line's business.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from duolocal.engine.engine import Engine
from duolocal.errors import SettingsError
from duolocal.sampling import Sampling
from duolocal.tokenizer import ChatPiece, Message, Tokenizer

INTRODUCTION = "There is a pass key hidden in the text below. Find it and remember it."
QUESTION = "What is the pass key?"
ANSWER_BEGUN = "The pass key is"  # measures retrieval, not whether a small model follows instructions
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
class Needle:
    """A prompt with a passkey in it, the answer begun."""

    token_ids: list[int]
    depth: float
    passkey: str
    passkey_ids: list[int]


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
        passkey = str(generator.randrange(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS))
        needle = f"\n\nThe pass key is {passkey}. Remember it. {passkey} is the pass key.\n\n"
        frame, _ = _prompt(tokenizer, needle, passkey)
        room = num_tokens - len(frame)
        if room < 16:
            raise SettingsError(f"{num_tokens} tokens leave no room for text around the passkey: use more")
        if room >= len(haystack):
            raise SettingsError(f"the text has {len(haystack):,} tokens, too few for {num_tokens:,}: give a longer one")
        start = generator.randrange(len(haystack) - room)
        cut = start + round(depth * room)
        before, after = tokenizer.decode(haystack[start:cut]), tokenizer.decode(haystack[cut : start + room])
        token_ids, passkey_ids = _prompt(tokenizer, f"{before}{needle}{after}", passkey)
        needles.append(Needle(token_ids, depth, passkey, passkey_ids))
    return needles


def passkey(engine: Engine, tokenizer: Tokenizer, needles: Sequence[Needle]) -> Iterator[PasskeyResult | int]:
    """Ask for every passkey, greedily, yielding tokens read on the way and a PasskeyResult after each prompt."""
    sampling = Sampling(temperature=0, max_tokens=NUM_DIGITS + 5)
    done = 0
    for needle in needles:
        engine.reset()
        for count in engine.prefill(needle.token_ids[:-1]):
            yield done + count
        before = engine.snapshot()
        answer = tokenizer.decode(
            engine.generate(needle.token_ids[-1:], sampling, eos_ids=tokenizer.eos_ids), continues=True
        )
        engine.restore(before)
        logits = engine.logits([needle.token_ids[-1], *needle.passkey_ids[:-1]])
        log_probs = logits.log_softmax(-1).gather(1, torch.tensor(needle.passkey_ids, device=logits.device)[:, None])
        done += len(needle.token_ids)
        yield PasskeyResult(len(needle.token_ids), needle.depth, needle.passkey, answer, -float(log_probs.mean()))
    engine.reset()


def _prompt(tokenizer: Tokenizer, text: str, passkey: str) -> tuple[list[int], list[int]]:
    """Return the ids up to where the passkey has to follow, and the ids of the passkey there.

    In some vocabularies the space before a number is a token of its own. It belongs to the answer that is begun: a
    model asked for a bare space says a word instead, and what it can retrieve is not seen.
    """
    question = Message("user", f"{INTRODUCTION}\n\n{text}\n\n{QUESTION}")
    pieces = tokenizer.chat_pieces([question], add_generation_prompt=True)
    token_ids = tokenizer.encode_pieces([*pieces, ChatPiece(f"{ANSWER_BEGUN} {passkey}")])
    cut = next(
        cut
        for cut in range(len(token_ids) - 1, 0, -1)
        if tokenizer.decode(token_ids[cut:], continues=True).strip() == passkey
    )
    return token_ids[:cut], token_ids[cut:]
