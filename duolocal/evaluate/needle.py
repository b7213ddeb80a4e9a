"""Needles in texts of any length, for the reader that retrieves: hidden, asked for in one pass, counted three ways.

`held`: the passages that the reader picked hold the needle. `begun`: the model, given those passages and the beginning
of the answer, goes on with the right one (as in `grid`, so that retrieval is measured and not whether a small model
follows instructions). `said`: its free answer, as a user of the chat gets it, says it. Some questions have no needle:
what is "found" for them was guessed.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from duolocal.engine.session import ChatSession, Prefilled, Text
from duolocal.errors import SettingsError
from duolocal.evaluate.grid import Outcome, ask
from duolocal.evaluate.prompts import Prompt, Question, prompt_ids
from duolocal.reader import Found, Retriever
from duolocal.reader.retrieve import State
from duolocal.reader.session import ELLIPSIS, ReadingSession
from duolocal.settings import Sampling
from duolocal.tokenizer import Tokenizer

INTRODUCTION = "Read the text below. You will be asked about one thing that it says."
MAX_SAID = 40  # tokens of a free answer


def _words(text: str) -> list[str]:
    return text.split()


_PLACES = _words(
    "harbour library lighthouse garden museum station castle market orchard theatre windmill cathedral brewery bakery "
    "monastery laundry sawmill tannery foundry granary chapel palace tavern stable"
)
_COLOURS = _words("red blue green white black brown grey golden silver purple")
_CITIES = _words(
    "Lisbon Kyoto Quito Dakar Perth Oslo Cusco Riga Turin Ghent Bergen Porto Leeds Nantes Vigo Split Tartu Graz Basel "
    "Gdansk Palermo Seville Toulouse Aarhus Tampere Utrecht Zadar Cork Bilbao Bremen Ostend Parma"
)
_DISHES = _words("plum lemon ginger almond walnut cherry pepper barley cinnamon apricot saffron chestnut")
_FORMS = _words("cake soup bread pie salad stew pudding tart")
_SURNAMES = _words(
    "Halloran Marsh Abernathy Lindqvist Okafor Petrov Yamada Delacroix Fontaine Novak Brandt Castellan Dunmore Eriksen "
    "Falconer Grieve Hargrave Ibarra Jessop Kowalski Lockwood Merriweather Nightingale Osborne"
)
_THINGS = _words("basket candle lantern kettle ladder mirror ribbon saddle teapot umbrella barrel cushion")


@dataclass(frozen=True)
class Needle:
    """Something to hide, the question for it, and the right answer."""

    kind: str
    sentence: str
    question: Question
    wanted: tuple[str, ...]


def _passkey(generator: random.Random, at: int) -> Needle:
    owner = f"{generator.choice(_COLOURS)} {_PLACES[at]}"
    number = str(generator.randrange(10_000, 100_000))
    sentence = f"The pass key of the {owner} is {number}. Remember it. {number} is the pass key of the {owner}."
    question = Question(
        INTRODUCTION, f"What is the pass key of the {owner}?", f"The pass key of the {owner} is", number
    )
    return Needle("passkey", sentence, question, (number,))


def _fact(generator: random.Random, at: int) -> Needle:
    city, dish, form = _CITIES[at], generator.choice(_DISHES), generator.choice(_FORMS)
    place = generator.choice(_PLACES)
    begun, answer = f"The best thing to do in {city} is to", f"eat {dish} {form} in the {place}"
    asked = f"What is the best thing to do in {city}?"
    return Needle("fact", f"{begun} {answer}.", Question(INTRODUCTION, asked, begun, answer), (dish, form, place))


def _paraphrase(generator: random.Random, at: int) -> Needle:
    """Return a needle whose question says it in other words."""
    name, colour, thing = _SURNAMES[at], generator.choice(_COLOURS), generator.choice(_THINGS)
    sentence = f"Whenever Dr {name} goes out, the spare key lies under a {colour} {thing} beside the steps."
    question = Question(
        INTRODUCTION, f"How can I get into the house of Dr {name}?", "The spare key lies under a", f"{colour} {thing}"
    )
    return Needle("paraphrase", sentence, question, (colour, thing))


KINDS: dict[str, Callable[[random.Random, int], Needle]] = {
    "passkey": _passkey,
    "fact": _fact,
    "paraphrase": _paraphrase,
}
MOST = min(len(_PLACES), len(_CITIES), len(_SURNAMES))  # needles of one kind in a text


@dataclass(frozen=True)
class Task:
    """A text with needles in it, and the questions: for the needles by depth, and for some that are not there."""

    length: int  # tokens asked for
    text: str
    needles: tuple[Needle, ...]
    depths: tuple[float | None, ...]  # None: not hidden

    @property
    def digest(self) -> str:
        """What the task is, as a hex digest."""
        content = "\0".join([self.text, *(needle.question.question for needle in self.needles)])
        return hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True)
class NeedleResult:
    """One question: what the reader gave the model, and what that said."""

    kind: str
    length: int
    depth: float | None
    held: bool  # one of the passages is the needle
    rank: int | None  # of the passage with the needle, by score
    num_passages: int
    score: float  # of the passage with the needle, or else of the best one
    begun: Outcome
    said: bool
    answer: str


def make_task(
    tokenizer: Tokenizer,
    text: str,
    *,
    num_tokens: int,
    depths: Sequence[float],
    kinds: Sequence[str],
    absent: int,
    seed: int = 0,
) -> Task:
    """Hide one needle of each kind at every depth of the first `num_tokens` tokens of `text`.

    absent: questions of each kind whose needle is left out. A needle stands between two paragraphs or lines near its
    depth, those of one depth a few paragraphs apart. Raises SettingsError where the text is too short.
    """
    generator = random.Random(seed)
    text = _first_tokens(tokenizer, text, num_tokens)
    hidden: list[tuple[int, str]] = []
    needles, places = [], []
    for kind in kinds:
        numbers = generator.sample(range(MOST), len(depths) + absent)
        for at, number in enumerate(numbers):
            needle = KINDS[kind](generator, number)
            needles.append(needle)
            depth = depths[at] if at < len(depths) else None
            places.append(depth)
            if depth is not None:
                hidden.append((round(depth * len(text)), needle.sentence))
    parts, done = [], 0
    for wished, sentence in sorted(hidden):
        cut = text.find("\n\n", max(done, min(wished, len(text) - 2000)))
        cut = len(text) if cut < 0 else cut
        # The next paragraph but some: several needles of one depth do not stand beside each other.
        parts += [text[done:cut], f"\n\n{sentence}"]
        done = min(cut + 2, len(text))
        after = text.find("\n\n", done)
        if after >= 0:
            parts.append("\n\n" + text[done:after])
            done = after
    return Task(num_tokens, "".join([*parts, text[done:]]), tuple(needles), tuple(places))


def _first_tokens(tokenizer: Tokenizer, text: str, num_tokens: int) -> str:
    """Return the beginning of `text` that has about `num_tokens` tokens, cut at a paragraph."""
    step, count, at = 65_536, 0, 0
    while at < len(text) and count < num_tokens:
        ids = tokenizer.encode(text[at : at + step], continues=True)
        if count + len(ids) >= num_tokens:
            end = at + len(tokenizer.decode(ids[: num_tokens - count], continues=True))
            cut = text.rfind("\n\n", 0, end)
            return text[: cut if cut > 0 else end]
        count, at = count + len(ids), at + step
    raise SettingsError(f"the text has {count:,} tokens, too few for {num_tokens:,}: give a longer one (--text)")


def run_task(
    session: ChatSession, retriever: Retriever, task: Task, *, resume: State | None = None, answered: int = 0
) -> Iterator[Prefilled | NeedleResult]:
    """Read the text once for all questions, then answer them; yields progress, then a result for each needle.

    resume, answered: how far an earlier run came, with the reading and with the answers.
    """
    found: list[Found] = []
    questions = [needle.question.question for needle in task.needles]
    for event in retriever.read([task.text], questions, resume=resume):
        if isinstance(event, Prefilled):
            yield event
        else:
            found = event
    for needle, depth, one in list(zip(task.needles, task.depths, found, strict=True))[answered:]:
        yield _answer(session, retriever, task, needle, depth, one)
    session.reset()


def _answer(
    session: ChatSession, retriever: Retriever, task: Task, needle: Needle, depth: float | None, found: Found
) -> NeedleResult:
    tokenizer = session.tokenizer
    ranked = sorted(found.passages, key=lambda one: -one.score)
    texts = [task.text[one.start : one.stop] for one in ranked]
    holding = next((at for at, text in enumerate(texts) if needle.sentence in text), None)
    passages = ELLIPSIS.join(text.strip("\n") for text in texts[::-1])
    session.reset()
    token_ids, answer_ids = prompt_ids(tokenizer, needle.question, passages)
    prompt = Prompt(needle.kind, task.length, depth, token_ids, answer_ids, needle.wanted)
    begun = next(event for event in ask(session.engine, tokenizer, [prompt]) if isinstance(event, Outcome))
    session.reset()
    reader = ReadingSession(session, retriever)
    reader.add("text.txt", task.text)
    said = ""
    for event in reader.answer(needle.question.question, found, Sampling(temperature=0, max_tokens=MAX_SAID)):
        if isinstance(event, Text):
            said += event.text
    return NeedleResult(
        kind=needle.kind,
        length=task.length,
        depth=depth,
        held=holding is not None,
        rank=None if holding is None else holding + 1,
        num_passages=len(ranked),
        score=ranked[holding or 0].score if ranked else 0.0,
        begun=begun,
        said=all(word.lower() in said.lower() for word in needle.wanted),
        answer=said,
    )
