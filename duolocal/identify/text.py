"""The texts that heads are identified with: real text with several passkeys in it, which the end asks for and answers.

After the multi-passkey data of DuoAttention (arXiv 2410.10819, section 2.3), in words of our own: each passkey is a
row of random words, so that nothing but looking back gives the answer. The answers are part of the text
(teacher-forced). Owns the wording and where the answers and their sources stand; not what is measured on them.
"""

import random
from dataclasses import dataclass

from duolocal.errors import SettingsError
from duolocal.tokenizer import Tokenizer

# The spelling alphabet: common words of one or two tokens.
# fmt: off
WORDS = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima", "mike",
    "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray",
    "yankee", "zulu",
)
# fmt: on
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
OPENING = "There are passkeys hidden in the text below. Remember them.\n\n"
NEEDLE = "\n\nThis is the {ordinal} passkey. Remember it. The {ordinal} passkey is:"
GAP = "\n\n"  # between a needle and the text after it
QUESTION = "\n\nWhat is the {ordinal} passkey? The {ordinal} passkey is:"
LEAST_AROUND = 16  # tokens of other text per passkey
FIRST_DEPTH, LAST_DEPTH = 0.05, 0.95  # of the text around the passkeys


@dataclass(frozen=True)
class PasskeyShape:
    """How passkeys are made."""

    num_passkeys: int
    num_words: int  # of each

    def __post_init__(self) -> None:
        if not 1 <= self.num_passkeys <= len(ORDINALS):
            raise SettingsError(f"the number of passkeys is {self.num_passkeys}: give 1 to {len(ORDINALS)}")
        if self.num_words < 1:
            raise SettingsError(f"the words of a passkey are {self.num_words}: give 1 or more")


@dataclass(frozen=True)
class PasskeyText:
    """Token ids, and for every token of an answer: where it is predicted, and the passkey that it repeats.

    The token after `predicted_at[i]` is a copy of one in `sources[i]` (start, stop).
    """

    token_ids: list[int]
    predicted_at: list[int]
    sources: list[tuple[int, int]]


class PasskeyTexts:
    """Draws texts: equal seeds give equal texts, whatever was drawn before.

    tokenizer: of the model; text: what stands around the passkeys. `least_tokens` is the shortest possible text.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, shape: PasskeyShape) -> None:
        self.shape = shape
        self._tokenizer = tokenizer
        self._haystack = tokenizer.encode(text)
        self._opening = tokenizer.encode(OPENING, bos=True)
        self._gap = tokenizer.encode(GAP, continues=True)
        longest = max(len(tokenizer.encode(f" {word}", continues=True)) for word in WORDS)
        frames = [self._parts(ordinal, "") for ordinal in ORDINALS[: shape.num_passkeys]]
        each = 2 * shape.num_words * longest + len(self._gap) + LEAST_AROUND
        self.least_tokens = len(self._opening) + sum(len(part.needle) + len(part.question) + each for part in frames)

    def draw(self, num_tokens: int, seed: str) -> PasskeyText:
        """Return a text of exactly `num_tokens` tokens; raises SettingsError for fewer than `least_tokens`."""
        if num_tokens < self.least_tokens:
            raise SettingsError(
                f"{num_tokens} tokens leave no room for text around {self.shape.num_passkeys} passkeys of "
                f"{self.shape.num_words} words: use {self.least_tokens} or more"
            )
        generator = random.Random(seed)  # a string is hashed the same in every process
        passkeys = [
            " " + " ".join(generator.choices(WORDS, k=self.shape.num_words)) for _ in range(self.shape.num_passkeys)
        ]
        parts = [self._parts(ordinal, passkey) for ordinal, passkey in zip(ORDINALS, passkeys, strict=False)]
        answers = sum(len(part.question) + len(part.passkey) for part in parts)
        needles = sum(len(part.needle) + len(part.passkey) + len(self._gap) for part in parts)
        room = num_tokens - len(self._opening) - needles - answers
        if room >= len(self._haystack):
            raise SettingsError(
                f"the text around the passkeys has {len(self._haystack):,} tokens, too few for {num_tokens:,}: "
                "use fewer tokens or a longer text"
            )
        start = generator.randrange(len(self._haystack) - room)
        around = self._haystack[start : start + room]
        cuts = sorted(round(generator.uniform(FIRST_DEPTH, LAST_DEPTH) * room) for _ in parts)
        ids, spans = list(self._opening), []
        for part, begin, end in zip(parts, [0, *cuts], [*cuts, room], strict=False):
            ids += around[begin:end] + part.needle
            spans.append((len(ids), len(ids) + len(part.passkey)))
            ids += part.passkey + self._gap
        ids += around[cuts[-1] :]
        predicted_at: list[int] = []
        sources: list[tuple[int, int]] = []
        for part, span in zip(parts, spans, strict=True):
            ids += part.question
            predicted_at += range(len(ids) - 1, len(ids) - 1 + len(part.passkey))
            sources += [span] * len(part.passkey)
            ids += part.passkey
        assert len(ids) == num_tokens
        return PasskeyText(ids, predicted_at, sources)

    def _parts(self, ordinal: str, passkey: str) -> "_Parts":
        # Encoded apart from what stands around them, so that needle and answer have the very same tokens.
        needle, question, key = (
            self._tokenizer.encode(text, continues=True)
            for text in (NEEDLE.format(ordinal=ordinal), QUESTION.format(ordinal=ordinal), passkey)
        )
        return _Parts(needle, question, key)


@dataclass(frozen=True)
class _Parts:
    """The ids that belong to one passkey."""

    needle: list[int]
    question: list[int]
    passkey: list[int]
