"""What a way to choose blocks costs in answers: the measurements behind the digest, the heads' vote and the reuse.

    .venv/bin/python scripts/measure_answers.py [--model MODEL] [--parts passkey-4K,...] [--budgets 1024]
        [--count N] [--seed N] [--json FILE]

Prompts are read with the whole context; then each right answer, or the last 64 tokens of a text ("prose"), is decoded
once per way, reading what that way chooses of the blocks behind the window. Everything is in float32 and on keys as
computed. Printed for each way: how many answers are right token by token; the negative log-likelihood per token, mean
and of each prompt; the KL divergence from reading everything, nats per token; and the share of all attention, window
included, on blocks that are not read. Prompts that the model fails with everything read (more than 2 nats per token)
say nothing and are left out.

"oracle" chooses by the true attention. "a, then b" ranks by a and chooses by the true attention among the first b times
as many blocks.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_PROC_BIND", "true")  # two threads on one core would take forty times as long

import torch
from selection_digests import BLOCK, CHANNELS, EARLY, PLAIN, Digest, boxes, means
from selection_reading import COMBINED, Step, decode, read
from torch import Tensor

from duolocal.engine.engine import Engine
from duolocal.evaluate.passkey import passkey_prompts
from duolocal.evaluate.tasks import TASKS
from duolocal.models.loader import open_model
from duolocal.models.registry import resolve
from duolocal.sample_text import license_text, sample_text
from duolocal.sizes import parse_tokens
from duolocal.tokenizer import Tokenizer, load_tokenizer

MOST_NLL = 2.0  # nats per token, everything read
REUSES = (1, 2, 4)  # steps
PROSE_STEPS = 64  # tokens


@dataclass(frozen=True)
class Way:
    """How blocks are chosen: by a digest (None: the true mass), how query heads vote, among how many times as many."""

    name: str
    digest: Digest | None
    combined: str = "max"
    among: int | None = None
    reuses: tuple[int, ...] = (1,)


def ways() -> list[Way]:
    """Return what is compared; the built one has all reuses."""
    old = boxes(16, 4, CHANNELS, reach=0.5, width_bits=4, together=True)
    half = boxes(16, 4, CHANNELS, reach=0.5, width_bits=4)
    built = boxes(8, 4, CHANNELS, width_bits=4)
    return [
        Way("oracle", None, reuses=REUSES),
        Way("16 tokens, reach 0.5, queries added up", old, "mean", reuses=REUSES),
        Way("16 tokens, reach 0.5, sum of p", half, "sum of p"),
        Way("16 tokens, reach 0.5", half),
        Way("16 tokens", boxes(16, 4, CHANNELS, width_bits=4)),
        Way("16 tokens, all channels, 16 bits, sum of p", boxes(16, 16), "sum of p"),
        Way("16 tokens, all channels", boxes(16, 4, PLAIN, width_bits=4)),
        Way("8 tokens, reach 0.75", boxes(8, 4, CHANNELS, reach=0.75, width_bits=4)),
        Way("8 tokens, sum of p", built, "sum of p"),
        Way("8 tokens", built, reuses=REUSES),
        Way("8 tokens, then 2", built, among=2, reuses=(2,)),
        Way("8 tokens, then 3", built, among=3, reuses=REUSES),
        Way("8 tokens, sum of p, then 3", built, "sum of p", among=3, reuses=(2,)),
        Way("4 tokens", boxes(4, 4, CHANNELS, width_bits=4)),
        Way("every key", means(1, 4, CHANNELS)),
    ]


class Chooser:
    """Reads by one way, for a prompt; what digests hold is made once for all ways."""

    def __init__(self, made: dict[tuple[str, int], Callable[[Tensor], Tensor]], way: Way, budget: int, reuse: int):
        self._made, self._way, self._budget, self._reuse = made, way, budget, reuse
        self.lost: list[float] = []  # per layer

    def __call__(self, step: Step) -> Tensor:
        """Return which blocks each KV head reads: bool [heads, steps, blocks]."""
        count, way = self._budget // BLOCK, self._way
        rank = step.mass.sum(1)
        if way.digest is not None:
            key = (way.digest.name, step.layer)
            if key not in self._made:
                self._made[key] = way.digest.build(step.keys, step.early)
            scores = self._made[key](step.q).masked_fill(~step.can, -torch.inf)
            found = COMBINED[way.combined](scores, step.window).masked_fill(~step.can, -torch.inf)
            if way.among is None:
                rank = found
            else:
                rank = rank.masked_fill(~_first(found, way.among * count), -1.0)
        made = torch.arange(step.can.shape[0])
        reads = (_first(rank, count) | ~step.can)[:, made - made % self._reuse]
        self.lost.append(float(step.mass.masked_fill(reads[:, None], 0.0).sum(-1).mean()))
        return reads


def _first(rank: Tensor, count: int) -> Tensor:
    best = rank.topk(min(count, rank.shape[-1]), -1).indices
    return torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, best, True)


@dataclass
class Outcomes:
    """What came of one way, per prompt; lost: per layer of each."""

    right: int = 0
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)

    def row(self) -> dict[str, object]:
        means = {name: sum(x) / len(x) if x else 0.0 for name, x in vars(self).items() if name != "right"}
        return {"right": self.right, "prompts": len(self.nll)} | {name: round(x, 5) for name, x in means.items()}


def prompts_of(part: str, tokenizer: Tokenizer, count: int, seed: int) -> list[tuple[list[int], int]]:
    """Return token ids, and how many of the last ones are decoded."""
    kind, _, length = part.partition("-")
    size = parse_tokens(length)
    if kind == "prose":
        ids = tokenizer.encode(license_text())
        starts = [at * (len(ids) - size) // max(1, count - 1) for at in range(count)]
        return [(ids[start : start + size], PROSE_STEPS) for start in starts]
    if kind == "passkey":
        depths = [(at + 0.5) / count for at in range(count)]
        made = passkey_prompts(tokenizer, sample_text(), num_tokens=size, depths=depths, seed=seed)
    else:
        made = TASKS[kind](tokenizer, sample_text(), num_tokens=size, samples=count, seed=seed)
    return [([*prompt.token_ids, *prompt.answer_ids], len(prompt.answer_ids)) for prompt in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--heads", default="auto", help="which are retrieval heads")
    parser.add_argument("--parts", default="passkey-4K")
    parser.add_argument("--budgets", default="1024", help="tokens")
    parser.add_argument("--count", type=int, default=10, help="prompts of each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args()
    parts, budgets = options.parts.split(","), [parse_tokens(budget) for budget in options.budgets.split(",")]
    source = open_model(resolve(options.model))
    tokenizer = load_tokenizer(source)
    longest = max(parse_tokens(part.partition("-")[2]) for part in parts)
    engine = Engine.load(source, context=max(longest, EARLY) + 256, heads=options.heads, kv="16")
    out: dict[str, object] = {}
    for part in parts:
        tried = [(way, budget, reuse) for budget in budgets for way in ways() for reuse in way.reuses]
        names = [f"{budget} {way.name}, {reuse} steps" for way, budget, reuse in tried]
        outcomes = {name: Outcomes() for name in ("everything read", *names)}
        for number, (ids, answer) in enumerate(prompts_of(part, tokenizer, options.count, options.seed)):
            cut, wanted = len(ids) - answer - 1, torch.tensor(ids[-answer:])
            reading = read(engine, ids, cut)
            made: dict[tuple[str, int], Callable[[Tensor], Tensor]] = {}
            choosers = [None, *(Chooser(made, *each) for each in tried)]
            dense = torch.empty(0)
            for outcome, chooser in zip(outcomes.values(), choosers, strict=True):
                reading.choice = chooser
                found = decode(engine, reading, ids, cut)[:answer]
                dense = found if chooser is None else dense
                loss = -float(found.gather(1, wanted[:, None]).mean())
                if chooser is None and loss > MOST_NLL and not part.startswith("prose"):
                    break
                outcome.nll.append(loss)
                outcome.kl.append(float((dense.exp() * (dense - found)).sum(-1).mean()))
                outcome.right += bool((found.argmax(-1) == wanted).all())
                outcome.lost += [] if chooser is None else chooser.lost
            print(f"{part}: prompt {number + 1}", flush=True)
        for name, outcome in outcomes.items():
            print(f"{name}: {outcome.row()}: " + " ".join(f"{x:.2f}" for x in outcome.nll), flush=True)
        out[part] = {name: outcome.row() | {"nlls": outcome.nll} for name, outcome in outcomes.items()}
        if options.json:  # after each part: the whole takes long
            setting = {"model": options.model, "heads": engine.plan.source, "seed": options.seed, "parts": out}
            options.json.write_text(json.dumps(setting), encoding="utf-8")


if __name__ == "__main__":
    main()
