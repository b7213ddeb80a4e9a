"""One's own document under one's own settings, against dense: what is lost, what is saved, which dial to turn.

Three steps. The document is read by both caches and their predictions compared; passkeys are hidden in it and asked
for; then, as far as the time allowed goes, neighbouring settings (one dial turned by one step each) are compared in the
same way, which gives a curve of memory against loss. The verdict is a rule on the figures of the first two.
"""

import random
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from duolocal.errors import ContextOverflowError, MemoryLimitError, SettingsError
from duolocal.evaluate.compare import Comparison, compare
from duolocal.evaluate.engines import Choice, Lineup
from duolocal.evaluate.grid import Outcome, ask
from duolocal.evaluate.passkey import draw_passkey, passkey_question
from duolocal.evaluate.prompts import Prompt, hide, prompt_ids
from duolocal.heads import HeadPlan, HeadsSpec
from duolocal.tokenizer import Tokenizer

DEPTHS = (0.5, 0.1, 0.9, 0.3, 0.7)  # of the passkeys, in the order in which time is given to them
NEEDLES_SHARE = 0.5  # of the time left after the document, for passkeys; all of it for the first
CLEARLY = 0.9  # a setting loses clearly less when its KL is below so much of another's
RATIOS = (0.25, 0.5, 0.75, 1.0)  # the steps of the dial `--heads`
FORMATS = ("int4", "k8v4", "int8", "16")  # of the dial `--kv`
MIN_TOKENS = 64
STEP = 256  # tokens: neighbours are compared on a multiple of it

Progress = Callable[[str, int, int], None]
MakePlan = Callable[[str, HeadPlan], HeadPlan]  # from what --heads would say, with the window of another plan


@dataclass(frozen=True)
class Limits:
    """The most that may be lost."""

    kl: float  # mean nats per token
    rise: float  # of the perplexity
    lost: float  # share of the passkeys found by dense that are not found

    def met(self, *, kl: float, rise: float, lost: float) -> bool:
        return kl <= self.kl and rise <= self.rise and lost <= self.lost


GOOD = Limits(kl=0.02, rise=0.02, lost=0.0)
SMALL = Limits(kl=0.1, rise=0.1, lost=0.34)
VERDICTS = ("good", "small loss", "do not use")


@dataclass(frozen=True)
class Point:
    """One setting on the curve."""

    name: str
    dial: str | None  # what to type to come here from the chosen setting; None: the chosen setting itself
    kv_bytes: int  # for the whole document
    kl: float
    rise: float
    top1: float


@dataclass(frozen=True)
class CheckResult:
    """What a check found."""

    num_tokens: int  # of the document, as far as it was read
    chosen: Choice
    comparisons: tuple[Comparison, Comparison]  # dense, chosen
    kv_bytes: tuple[int, int]  # of an ordinary 16-bit cache, of the chosen setting's
    needles: dict[str, list[Outcome]]  # by name; empty lists where there was no time
    needle_tokens: int  # of the document around each passkey
    points: tuple[Point, ...]  # the chosen setting first, then its neighbours; by themselves comparable
    point_tokens: int  # over which they were compared; 0 for none
    notes: tuple[str, ...]
    verdict: str  # of VERDICTS
    advice: str

    @property
    def lost(self) -> float:
        """Share of the passkeys found by dense that the chosen setting does not find."""
        return lost_share(*self.needles.values())


def document_tokens(token_ids: Sequence[int], *, context: int, asked: int | None, name: str) -> list[int]:
    """Return the document's tokens, or its first `asked`.

    Raises ContextOverflowError where they do not fit into the context: a document is cut only when that is asked for.
    """
    count = len(token_ids) if asked is None else asked
    if count > len(token_ids):
        raise SettingsError(f"{name} has {len(token_ids):,} tokens, --tokens is {count:,}: leave it out")
    if count > context:
        raise ContextOverflowError(
            f"{name} has {len(token_ids):,} tokens, the context is {context:,}: "
            f"give --context {count}, or --tokens {context} to check its beginning only"
        )
    if count < MIN_TOKENS:
        raise SettingsError(f"{name}: {count} tokens are too few to check; give {MIN_TOKENS} or more")
    return list(token_ids[:count])


def needle_prompts(
    tokenizer: Tokenizer, token_ids: Sequence[int], *, context: int, generator_seed: int
) -> list[Prompt]:
    """Return a prompt for each of DEPTHS: a passkey in the document, or in as much of its beginning as fits."""

    generator = random.Random(generator_seed)
    prompts = []
    for depth in DEPTHS:
        passkey = draw_passkey(generator)
        question, needle = passkey_question(passkey)
        frame, answer_ids = prompt_ids(tokenizer, question, needle)
        room = context - len(frame) - len(answer_ids) - 16  # a few: text that is cut may tokenize a little longer
        if room < MIN_TOKENS:
            return []
        text = hide(tokenizer, token_ids[:room], [(depth, needle)])
        prompt = Prompt(
            "passkey", min(room, len(token_ids)), depth, *prompt_ids(tokenizer, question, text), wanted=(passkey,)
        )
        if prompt.context > context:
            continue
        prompts.append(prompt)
    return prompts


def check(
    lineup: Lineup,
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    *,
    minutes: float = 10.0,
    seed: int = 0,
    bos: Sequence[int] = (),
    on_progress: Progress = lambda what, done, total: None,
    now: Callable[[], float] = time.monotonic,
) -> CheckResult:
    """Check a document's tokens under the lineup's one setting; it has been loaded with room for them.

    minutes: for passkeys and neighbours; the document itself is read twice whatever it takes. `on_progress` gets
    (what, tokens done, in all).
    """
    began_s = now()
    (chosen,) = lineup.choices
    dense_engine, engine = lineup.engine(lineup.dense), lineup.engine(chosen)
    pair = [(lineup.dense.name, dense_engine), (chosen.name, engine)]
    window = [*bos, *token_ids]
    dense, ours = compare(pair, [window], on_progress=lambda done, total: on_progress("reading", done, total))
    deadline_s = began_s + 60 * minutes
    notes: list[str] = []
    prompts = needle_prompts(tokenizer, token_ids, context=lineup.transformer.context, generator_seed=seed)
    left_s = deadline_s - now()
    count = _affordable(prompts, [dense, ours], NEEDLES_SHARE * left_s)
    prompts = prompts[: count or min(1, _affordable(prompts, [dense, ours], left_s))]
    if not prompts:
        notes.append("no time or room for passkeys: give more --minutes, or a --context larger than the document")
    needles: dict[str, list[Outcome]] = {name: [] for name, _ in pair}
    total = sum(prompt.num_tokens for prompt in prompts) * len(pair)
    done = 0
    for name, each in pair:
        for event in ask(each, tokenizer, prompts):
            if isinstance(event, Outcome):
                needles[name].append(event)
            else:
                on_progress("looking for passkeys", done + event, total)
        done += total // len(pair)
    del dense_engine, engine, pair, each
    verdict = judge(ours, needles[lineup.dense.name], needles[chosen.name])
    points, point_tokens = _curve(
        lineup,
        window,
        ours,
        dense,
        neighbours(chosen, lineup.plan),
        seconds=deadline_s - now(),
        on_progress=lambda done, total: on_progress("neighbouring settings", done, total),
        notes=notes,
    )
    width = chosen.plan.sink_size + chosen.plan.recent_size
    if len(window) <= width:
        notes.append(f"the document is no longer than the {width} tokens that every head sees: nothing can be lost")
    return CheckResult(
        num_tokens=len(token_ids),
        chosen=chosen,
        comparisons=(dense, ours),
        kv_bytes=(lineup.dense_bytes(len(window)), lineup.kv_bytes(chosen, len(window))),
        needles=needles,
        needle_tokens=prompts[0].length if prompts else 0,
        points=tuple(points),
        point_tokens=point_tokens,
        notes=tuple(notes),
        verdict=verdict,
        advice=advise(verdict, points, whole_kl=ours.kl if point_tokens < len(window) else None),
    )


def lost_share(dense: Sequence[Outcome], ours: Sequence[Outcome]) -> float:
    """Return the share of what dense finds that is not found; 0 where dense finds nothing."""
    pairs = [one.found for one, other in zip(ours, dense, strict=True) if other.found]
    return pairs.count(False) / len(pairs) if pairs else 0.0


def judge(ours: Comparison, dense_needles: Sequence[Outcome], needles: Sequence[Outcome]) -> str:
    """Return the verdict: GOOD, else SMALL, else do not use."""
    figures = {"kl": ours.kl, "rise": ours.rise, "lost": lost_share(dense_needles, needles)}
    for limits, verdict in zip((GOOD, SMALL), VERDICTS, strict=False):
        if limits.met(**figures):
            return verdict
    return VERDICTS[-1]


def advise(verdict: str, points: Sequence[Point], *, whole_kl: float | None = None) -> str:
    """Say which dial to turn, from the figures of the chosen setting (first) and its neighbours.

    whole_kl: the chosen setting's on the whole document, where these were measured on a part of it; then the others are
    taken to grow as it does, since loss grows with length.
    """
    if len(points) < 2:
        return "no other setting was measured"
    scale = whole_kl / points[0].kl if whole_kl is not None and points[0].kl > 0 else 1.0
    here, *others = (replace(point, kl=point.kl * scale, rise=point.rise * scale) for point in points)
    about = "about " if scale != 1 else ""
    good = [point for point in others if GOOD.met(kl=point.kl, rise=point.rise, lost=0)]
    if verdict == VERDICTS[0]:
        smaller = [point for point in good if point.kv_bytes < here.kv_bytes]
        if not smaller:
            return "no dial needs turning: every smaller setting that was measured loses more than a little"
        best = min(smaller, key=lambda point: (point.kv_bytes, point.kl))
        return f"no dial needs turning; {best.dial} would still be good, {_change(here, best, about)}"
    better = [point for point in others if point.kl < CLEARLY * here.kl]
    if not better:
        return "none of the neighbouring settings loses less: use more heads and bits together, or --heads all --kv 16"
    enough = [point for point in better if point in good]
    if enough:
        best = min(enough, key=lambda point: (point.kv_bytes, point.kl))
        return f"turn {best.dial}: {_change(here, best, about)}, which is good"
    best = min(better, key=lambda point: point.kl)
    return f"turn {best.dial} first: {_change(here, best, about)}; one step alone is not enough"


def neighbours(chosen: Choice, make_plan: MakePlan) -> list[tuple[str, Choice]]:
    """Return (what to type, choice) for one step on each dial: heads, bits and the recent window, either way."""
    plan, found = chosen.plan, []
    ratio = plan.num_retrieval / (plan.num_retrieval + plan.num_streaming)
    more = [step for step in RATIOS if step > ratio + 0.05]
    fewer = [step for step in RATIOS if step < ratio - 0.05]
    for step in (*more[:1], *fewer[-1:]):
        heads = str(HeadsSpec.parse(chosen.setting.heads).at(step))
        with suppress(SettingsError):  # without a ranking of heads there is no other ratio
            at_step = make_plan(heads, plan)
            if at_step.num_retrieval != plan.num_retrieval:
                name = "--heads " + re.split(r"[/\\]", heads)[-1]  # a file without its folder
                found.append((f"--heads {heads}", replace(chosen, name=name, plan=at_step)))
    size = FORMATS.index({"fp8": "int8", "32": "16"}.get(chosen.kv, chosen.kv))
    for kv in (*FORMATS[size + 1 : size + 2], *FORMATS[max(0, size - 1) : size]):
        found.append((f"--kv {kv}", replace(chosen, name=f"--kv {kv}", kv=kv)))
    if plan.num_streaming:
        for recent in (2 * plan.recent_size, plan.recent_size // 2):
            if recent >= 16:
                dial = f"--recent-size {recent}"
                found.append((dial, replace(chosen, name=dial, plan=replace(plan, recent_size=recent))))
    return found


def _curve(
    lineup: Lineup,
    window: Sequence[int],
    ours: Comparison,
    dense: Comparison,
    others: Sequence[tuple[str, Choice]],
    *,
    seconds: float,
    on_progress: Callable[[int, int], None],
    notes: list[str],
) -> tuple[list[Point], int]:
    """Compare the neighbours, and the chosen setting again, on as many first tokens as time and memory allow."""
    (chosen,) = lineup.choices
    here = _point(lineup, chosen, None, ours, len(window))
    caches = len(others) + 2
    per_token_s = max(dense.elapsed_s, ours.elapsed_s) / len(window) * 1.2  # with the comparing
    count = min(len(window), int(seconds / (caches * per_token_s)) // STEP * STEP if seconds > 0 else 0)
    least = min(len(window), 2 * (chosen.plan.sink_size + chosen.plan.recent_size) + STEP)
    while count >= least:
        try:
            lineup.check_memory(context=count, choices=[chosen, *(choice for _, choice in others)])
            break
        except MemoryLimitError:
            count = count // 2 // STEP * STEP
    if count < least or not others:
        notes.append("no time or memory for neighbouring settings: give more --minutes, or fewer --tokens")
        return [here], 0
    choices = [lineup.dense, chosen, *(choice for _, choice in others)]
    engines = [(choice.name, lineup.engine(choice, context=count)) for choice in choices]
    results = compare(engines, [window[:count]], on_progress=on_progress)
    dials = [None, *(dial for dial, _ in others)]
    return [
        _point(lineup, choice, dial, result, len(window))
        for choice, dial, result in zip(choices[1:], dials, results[1:], strict=True)
    ], count


def _point(lineup: Lineup, choice: Choice, dial: str | None, result: Comparison, num_tokens: int) -> Point:
    size = lineup.kv_bytes(choice, num_tokens)
    return Point(choice.name, dial, size, kl=result.kl, rise=result.rise, top1=result.top1)


def _affordable(prompts: Sequence[Prompt], sides: Sequence[Comparison], seconds: float) -> int:
    """Return how many prompts both sides can read in the time; the speed is that of the document."""
    per_token_s = sum(side.elapsed_s / side.count for side in sides)
    left, count = seconds, 0
    for prompt in prompts:
        left -= prompt.context * per_token_s
        if left < 0:
            break
        count += 1
    return count


def _change(here: Point, there: Point, about: str) -> str:
    factor = there.kv_bytes / here.kv_bytes
    memory = f"{factor - 1:.0%} more" if factor >= 1 else f"{1 - factor:.0%} less"
    kl = f"KL {about}{there.kl:.4f} instead of {here.kl:.4f}"
    if f"{there.kl:.4f}" == f"{here.kl:.4f}":
        kl = f"the same KL of {about}{there.kl:.4f}"
    return f"{kl}, perplexity {about}{there.rise:+.1%}, {memory} KV memory"
