"""Asking: prompts with one right answer, the answer written and the right one scored, and what comes of many.

Two figures for each prompt. `found`: the answer, decoded greedily, says what is wanted. `nll`: the mean negative
log-likelihood of the right answer, token by token, given that what came before was right; a small model that fails
every task still shows in it what a cache loses.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from duolocal.engine.engine import Engine
from duolocal.evaluate.prompts import Prompt
from duolocal.predictions import negative_log_likelihood
from duolocal.settings import Sampling
from duolocal.tokenizer import Tokenizer


@dataclass(frozen=True)
class Outcome:
    """One prompt answered."""

    task: str
    length: int  # tokens asked for
    depth: float | None
    num_tokens: int  # of the whole prompt
    wanted: tuple[str, ...]
    answer: str
    share: float  # of what is wanted, that the answer says
    found: bool  # all of it, and nothing that must not be said
    nll: float  # of the right answer, nats per token
    prefill_s: float = field(compare=False)
    decode_s: float = field(compare=False)  # per token of the answer


@dataclass(frozen=True)
class Score:
    """Several outcomes together."""

    count: int
    found: int
    share: float  # mean
    nll: float  # mean of the prompts' means
    worst_nll: float


def ask(engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> Iterator[Outcome | int]:
    """Answer every prompt, greedily, yielding tokens read on the way and an Outcome after each prompt."""
    done = 0
    for prompt in prompts:
        engine.reset()
        began_s = clock(engine)
        for count in engine.iter_prefill(prompt.token_ids[:-1]):
            yield done + count
        read_s = clock(engine)
        before = engine.snapshot()
        sampling = Sampling(temperature=0, max_tokens=prompt.max_answer)
        answer_ids = list(engine.generate(prompt.token_ids[-1:], sampling, eos_ids=tokenizer.eos_ids))
        answered_s = clock(engine)
        engine.restore(before)
        fed = [prompt.token_ids[-1], *prompt.answer_ids[:-1]]
        # The prompt's last token reads everything, those of an answer read selected blocks.
        selects = engine.cache.selection is not None
        logits = torch.cat([engine.logits(fed[:1]), *engine.iter_logits(fed[1:], decode=selects)])
        right = torch.tensor(prompt.answer_ids, device=logits.device)
        nll = negative_log_likelihood(logits.log_softmax(-1), right)
        answer = tokenizer.decode(answer_ids, continues=True)
        said = [wanted.lower() in answer.lower() for wanted in prompt.wanted]
        done += prompt.num_tokens
        yield Outcome(
            task=prompt.task,
            length=prompt.length,
            depth=prompt.depth,
            num_tokens=prompt.num_tokens,
            wanted=prompt.wanted,
            answer=answer,
            share=sum(said) / len(said),
            found=all(said) and not any(word.lower() in answer.lower() for word in prompt.unwanted),
            nll=float(nll.mean()),
            prefill_s=read_s - began_s,
            decode_s=(answered_s - read_s) / max(1, len(answer_ids)),
        )
    engine.reset()


def score(outcomes: Sequence[Outcome]) -> Score:
    """Return what one or more outcomes come to."""
    count = len(outcomes)
    return Score(
        count=count,
        found=sum(outcome.found for outcome in outcomes),
        share=sum(outcome.share for outcome in outcomes) / count,
        nll=sum(outcome.nll for outcome in outcomes) / count,
        worst_nll=max(outcome.nll for outcome in outcomes),
    )


def cells(outcomes: Sequence[Outcome]) -> dict[tuple[int, float | None], Score]:
    """Return the score of every (length, depth), in the order in which they were asked."""
    groups: dict[tuple[int, float | None], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.length, outcome.depth), []).append(outcome)
    return {place: score(group) for place, group in groups.items()}


def places(count: int) -> list[float]:
    """Return `count` depths from the beginning to the end; the beginning for one."""
    return [place / max(1, count - 1) for place in range(count)]


def clock(engine: Engine) -> float:
    """Return the time in seconds, once the device has done what it was given."""
    if engine.transformer.device.type == "cuda":
        torch.cuda.synchronize(engine.transformer.device)
    return time.perf_counter()
