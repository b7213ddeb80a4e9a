"""Tasks beyond the passkey: a fact in a text, several needles, chains of variables, recall among many pairs.

After RULER (arXiv 2404.06654), whose point is that a model which finds every single needle may still lose what needs
several places of the text at once. Sentences, names and numbers are drawn from a seed; the text around them is real.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

from duolocal.errors import SettingsError
from duolocal.evaluate.prompts import Prompt, Question, hidden_prompt, prompt_ids
from duolocal.tokenizer import Tokenizer

HIDDEN_NEEDLES, ASKED_NEEDLES = 8, 2
NUM_CHAINS, NUM_HOPS = 2, 4  # chains of variables; assignments of one variable to the next in each
MIN_PAIRS = 4


def _words(text: str) -> list[str]:
    return text.split()


_CITIES = _words("Lisbon Tromsø Kyoto Quito Dakar Perth Oslo Cusco Riga Malmö Turin Ghent Bergen Porto Leeds Nantes")
_DISHES = _words("plum lemon ginger almond walnut cherry pepper barley cinnamon apricot saffron chestnut")
_FORMS = _words("cake soup bread pie salad stew pudding tart")
_PLACES = _words("harbour library lighthouse garden museum station castle market orchard theatre windmill cathedral")
_ADJECTIVES = _words(
    "amber brave calm dusty eager faint gentle hollow icy jolly keen lively mellow narrow olive proud quiet rapid "
    "silent tidy urban vivid warm young"
)
_NOUNS = _words(
    "anchor basket candle desert engine feather garden hammer island jacket kettle ladder mirror needle orchard "
    "pencil quarry ribbon saddle teapot umbrella valley window yard"
)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Maker = Callable[..., list[Prompt]]


def niah_prompts(
    tokenizer: Tokenizer, text: str, *, num_tokens: int, depths: Sequence[float], seed: int = 0
) -> list[Prompt]:
    """Return one prompt per depth: a made-up fact in a part of `text`, about `num_tokens` tokens in all.

    Raises SettingsError where the length leaves no room for text.
    """
    generator = random.Random(seed)
    haystack = tokenizer.encode(text)
    prompts = []
    for depth in depths:
        city, dish, form, place = map(generator.choice, (_CITIES, _DISHES, _FORMS, _PLACES))
        begun, answer = f"The best thing to do in {city} is to", f"eat {dish} {form} in the {place}"
        question = Question(
            introduction="Read the text below. You will be asked about one thing that it says.",
            question=f"What is the best thing to do in {city}, according to the text?",
            begun=begun,
            answer=answer,
        )
        inserts = [(depth, f"\n\n{begun} {answer}.\n\n")]
        ids = hidden_prompt(tokenizer, haystack, question, inserts, num_tokens=num_tokens, generator=generator)
        prompts.append(Prompt("niah", num_tokens, depth, *ids, wanted=(dish, form, place)))
    return prompts


def needles_prompts(tokenizer: Tokenizer, text: str, *, num_tokens: int, samples: int, seed: int = 0) -> list[Prompt]:
    """Return prompts with eight keys and their numbers spread over the text, of which two are asked for."""
    generator = random.Random(seed)
    haystack = tokenizer.encode(text)
    prompts = []
    for _ in range(samples):
        keys = _distinct(_key, HIDDEN_NEEDLES, generator)
        numbers = _distinct(_number, HIDDEN_NEEDLES, generator)
        inserts = [
            ((at + 0.5) / HIDDEN_NEEDLES, f"\n\nThe magic number of {key} is {number}.\n\n")
            for at, (key, number) in enumerate(zip(keys, numbers, strict=True))
        ]
        asked = sorted(generator.sample(range(HIDDEN_NEEDLES), ASKED_NEEDLES))
        both, wanted = " and ".join(keys[at] for at in asked), tuple(numbers[at] for at in asked)
        question = Question(
            introduction="The text below mentions magic numbers. Remember them.",
            question=f"What are the magic numbers of {both}?",
            begun=f"The magic numbers of {both} are",
            answer=" and ".join(wanted),
        )
        ids = hidden_prompt(tokenizer, haystack, question, inserts, num_tokens=num_tokens, generator=generator)
        prompts.append(Prompt("needles", num_tokens, None, *ids, wanted=wanted))
    return prompts


def variables_prompts(tokenizer: Tokenizer, text: str, *, num_tokens: int, samples: int, seed: int = 0) -> list[Prompt]:
    """Return prompts with chains of assignments; asked is which variables hold the first value of one chain.

    A chain is X1 = 12345, X2 = X1, … in the order of the text, with other things between; another chain, of another
    value, must be left out.
    """
    generator = random.Random(seed)
    haystack = tokenizer.encode(text)
    length = NUM_HOPS + 1
    prompts = []
    for _ in range(samples):
        names = _distinct(_variable, NUM_CHAINS * length, generator)
        chains = [names[at * length : (at + 1) * length] for at in range(NUM_CHAINS)]
        values = _distinct(_number, NUM_CHAINS, generator)
        statements: list[Iterator[str]] = [
            iter([f"VAR {chain[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(chain))])
            for chain, value in zip(chains, values, strict=True)
        ]
        turns = [at for at in range(NUM_CHAINS) for _ in range(length)]
        generator.shuffle(turns)
        depths = sorted(generator.random() for _ in turns)
        inserts = [(depth, f"\n\n{next(statements[turn])}\n\n") for depth, turn in zip(depths, turns, strict=True)]
        question = Question(
            introduction="Memorise and track the chains of variable assignments that are hidden in the text below.",
            question=f"Find all variables that are assigned the value {values[0]} in the text above.",
            begun=f"According to the text, {length} variables are assigned the value {values[0]}; they are:",
            answer=" ".join(chains[0]),
        )
        ids = hidden_prompt(tokenizer, haystack, question, inserts, num_tokens=num_tokens, generator=generator)
        others = tuple(name for chain in chains[1:] for name in chain)
        prompts.append(Prompt("variables", num_tokens, None, *ids, wanted=tuple(chains[0]), unwanted=others))
    return prompts


def recall_prompts(tokenizer: Tokenizer, text: str, *, num_tokens: int, samples: int, seed: int = 0) -> list[Prompt]:
    """Return prompts that are nothing but pairs of a key and a number, of which one is asked for (`text` is not used).

    The pairs asked for lie evenly from the beginning to the end. Raises SettingsError where few pairs fit.
    """
    del text
    generator = random.Random(seed)
    prompts = []
    for sample in range(samples):
        depth = (sample + 0.5) / samples
        pairs: dict[str, str] = {}
        first = (_pair_key(generator), _number(generator))
        frame = len(prompt_ids(tokenizer, _recall_question(*first), "")[0])
        room = num_tokens - frame
        while room > 0 and len(pairs) < len(_ADJECTIVES) ** 2 * len(_NOUNS) // 2:
            key, number = _pair_key(generator), _number(generator)
            room -= len(tokenizer.encode(f"{key}: {number}\n", continues=True))
            if room >= 0 and key not in pairs:
                pairs[key] = number
        if len(pairs) < MIN_PAIRS:
            raise SettingsError(f"{num_tokens} tokens leave room for {len(pairs)} pairs to recall: use more")
        asked = round(depth * (len(pairs) - 1))
        key = list(pairs)[asked]
        lines = "\n".join(f"{key}: {number}" for key, number in pairs.items())
        ids = prompt_ids(tokenizer, _recall_question(key, pairs[key]), lines)
        prompts.append(Prompt("recall", num_tokens, asked / (len(pairs) - 1), *ids, wanted=(pairs[key],)))
    return prompts


TASKS: dict[str, Maker] = {"needles": needles_prompts, "variables": variables_prompts, "recall": recall_prompts}


def _recall_question(key: str, number: str) -> Question:
    return Question(
        introduction="Below is a list of keys, each with its number. Remember them.",
        question=f"What is the number of {key}?",
        begun=f"In the list it says\n{key}:",
        answer=number,
    )


def _key(generator: random.Random) -> str:
    return f"{generator.choice(_ADJECTIVES)}-{generator.choice(_NOUNS)}"


def _pair_key(generator: random.Random) -> str:
    # 13,824 keys: as many pairs take some 200K tokens. No digits: a small model would answer with those of the key.
    return f"{generator.choice(_ADJECTIVES)}-{_key(generator)}"


def _number(generator: random.Random) -> str:
    return str(generator.randrange(10_000, 100_000))


def _variable(generator: random.Random) -> str:
    return "".join(generator.choices(_LETTERS, k=5))


def _distinct(draw: Callable[[random.Random], str], count: int, generator: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(generator)] = None
    return list(found)
