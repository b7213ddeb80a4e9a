"""Which digest of a block tells a retrieval head best what to read: the measurements behind selected decode.

    .venv/bin/python scripts/measure_selection.py [--model MODEL] [--heads auto|all|...] [--parts passkey,prose-8K,...]
        [--digests few|all] [--json FILE]

A retrieval head that may read only some blocks of 64 tokens behind its window chooses them by a digest of each. The
prompts are read with the whole context; the last tokens (question and answer, or the last 64 of a text) are the decode
steps, whose queries and keys every digest is judged by, all in float32 and on keys as computed. Printed for each
digest, way of combining the query heads of a KV head, and budget:

    lost     attention mass of blocks that were not chosen, of all the mass of the query head, window included
    recall   attention mass of the chosen blocks, of that of all blocks behind the window
    needle   attention mass kept of the block that holds what is asked for, in the heads that look at it most
    age      lost mass when a selection is used again some steps later
    donor    lost mass when a head reads what another head selected
    kl, nll  what comes out when the model really decodes that way: against reading everything, and of the right answer

Blocks that the window covers in part are read whole in any case and belong to the window here. "oracle" chooses by the
true mass of the KV head, "random" and "recent" are the floors.
"""

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_PROC_BIND", "true")  # two threads on one core would take forty times as long

import torch
from selection_digests import BLOCK, DIGESTS, EARLY, Digest, few_digests
from selection_reading import COMBINED, Choice, Step, decode, read
from torch import Tensor

from duolocal.engine.engine import Engine
from duolocal.evaluate.passkey import passkey_prompts
from duolocal.evaluate.prompts import Prompt
from duolocal.evaluate.tasks import variables_prompts
from duolocal.heads import HeadPlan
from duolocal.models.loader import open_model
from duolocal.models.registry import resolve
from duolocal.sample_text import license_text, sample_text
from duolocal.sizes import parse_tokens
from duolocal.tokenizer import Tokenizer, load_tokenizer

BUDGETS = (128, 256, 512, 1024, 2048)  # tokens
AGES = (0, 1, 2, 3, 4, 6, 8)  # steps
TAIL = 48  # tokens of a prompt that are decode steps, before the answer
STEPS = 64  # decode steps at the end of a text
LOOKS = 0.1  # of a query head's attention on the needle: that head is asked whether it found it
BINS = 1000  # of the histogram that quantiles come from


@dataclass
class Tally:
    """Many shares 0 … 1: their mean and quantiles."""

    count: int = 0
    total: float = 0.0
    bins: Tensor = field(default_factory=lambda: torch.zeros(BINS))

    def add(self, values: Tensor) -> None:
        self.count += values.numel()
        self.total += float(values.double().sum())
        self.bins += torch.histc(values.float().clamp(0, 1), BINS, 0, 1)

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)

    def quantile(self, share: float) -> float:
        at = torch.searchsorted(self.bins.cumsum(0), torch.tensor(share * self.count))
        return min(BINS - 1, int(at)) / BINS


Key = tuple[str, ...]


class Measurement:
    """What is learnt from one group of prompts."""

    def __init__(
        self, digests: Sequence[Digest], combined: Sequence[str], leaders: Sequence[tuple[Digest, str]]
    ) -> None:
        self._digests = digests
        self._combined = combined
        self._leaders = leaders
        self.lost: dict[Key, Tally] = defaultdict(Tally)
        self.behind = Tally()  # mass behind the window
        self.kept: dict[Key, float] = defaultdict(float)
        self.needle: dict[Key, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])  # kept, all, hits, asked
        self.old: dict[Key, Tally] = defaultdict(Tally)
        self.donor: dict[Key, Tally] = defaultdict(Tally)
        self._before: tuple[int, dict[str, Tensor]] | None = None

    def add(self, step: Step, needle: Tensor) -> None:
        """Judge all digests on one layer; needle: bool [blocks], those that hold what is asked for."""
        self.behind.add(step.mass.sum(-1))
        orders: dict[tuple[str, str], Tensor] = {("oracle", "-"): step.order(None, "")}
        noise = torch.rand(step.mass[:, 0].shape, generator=torch.Generator().manual_seed(step.layer))
        orders["random", "-"] = noise.masked_fill(~step.can, -1).argsort(-1, descending=True)
        ages = torch.arange(step.can.shape[-1]).expand(noise.shape)
        orders["recent", "-"] = ages.masked_fill(~step.can, -1).argsort(-1, descending=True)
        for digest in self._digests:
            scores = digest.build(step.keys, step.early)(step.q).masked_fill(~step.can, -torch.inf)
            for combined in self._combined:
                found = COMBINED[combined](scores, step.window).masked_fill(~step.can, -torch.inf)
                orders[digest.name, combined] = found.argsort(-1, descending=True)
        total = step.mass.sum(-1)
        for (name, combined), order in orders.items():
            kept = step.kept(order)
            for budget in BUDGETS:
                key = (name, combined, str(budget))
                held = kept[..., min(budget // BLOCK, kept.shape[-1]) - 1]
                self.lost[key].add(total - held)
                self.kept[key] += float(held.double().sum())
                if bool(needle.any()):
                    self._find(key, step, order[..., : budget // BLOCK], needle)
        leaders = [("oracle", "-"), *((digest.name, combined) for digest, combined in self._leaders)]
        self._age(step, {name: orders[name] for name in leaders})

    def _find(self, key: Key, step: Step, chosen: Tensor, needle: Tensor) -> None:
        """Note what became of the needle in query heads that look at it."""
        there = step.mass.masked_fill(~needle[: step.can.shape[-1]], 0.0)
        looks = there.sum(-1) >= LOOKS  # [heads, group, steps]
        if not bool(looks.any()):
            return
        read = torch.zeros_like(step.mass[:, 0], dtype=torch.bool).scatter_(-1, chosen, True)
        held = (there * read[:, None]).sum(-1)
        best = there.argmax(-1)
        hit = read[:, None].expand_as(there).gather(-1, best[..., None])[..., 0]
        into = self.needle[key]
        into[0] += float(held[looks].sum())
        into[1] += float(there.sum(-1)[looks].sum())
        into[2] += int(hit[looks].sum())
        into[3] += int(looks.sum())

    def _age(self, step: Step, orders: dict[tuple[str, str], Tensor]) -> None:
        steps, num_blocks = step.can.shape
        chosen_before = self._before[1] if self._before and self._before[0] == step.layer - 1 else {}
        chosen_now: dict[str, Tensor] = {}
        for (name, combined), order in orders.items():
            for budget in BUDGETS:
                chosen = torch.zeros_like(step.mass[:, 0], dtype=torch.bool)
                chosen.scatter_(-1, order[..., : budget // BLOCK], True)
                for age in AGES:
                    read = (chosen | ~step.can)[:, : steps - age]
                    lost = step.mass[:, :, age:].masked_fill(read[:, None], 0.0).sum(-1)
                    self.old[name, combined, str(budget), str(age)].add(lost)
                if combined in ("-", self._leaders[0][1]):
                    rank = (
                        torch.zeros(num_blocks)
                        .expand_as(chosen)
                        .scatter(-1, order, -torch.arange(num_blocks, dtype=torch.float32).expand_as(order))
                    )
                    self._borrow(step, (name, combined, str(budget)), rank, chosen, chosen_before, chosen_now)
        self._before = (step.layer, chosen_now)

    def _borrow(
        self, step: Step, key: Key, rank: Tensor, chosen: Tensor, before: dict[str, Tensor], now: dict[str, Tensor]
    ) -> None:
        """Note the lost mass where heads read what others chose; rank: higher is better, [heads, steps, blocks]."""
        count = int(key[-1]) // BLOCK

        def lost(read: Tensor) -> Tensor:
            return step.mass.masked_fill((read | ~step.can)[:, None], 0.0).sum(-1)

        def of(score: Tensor) -> Tensor:
            top = score.masked_fill(~step.can, -torch.inf).topk(min(count, score.shape[-1]), -1).indices
            return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, top, True)

        self.donor[*key, "own"].add(lost(chosen))
        together = of(rank.amax(0)).expand_as(chosen)
        self.donor[*key, "one selection for the layer"].add(lost(together))
        name = "|".join(key)
        if name in before:
            self.donor[*key, "own, layers with a layer before"].add(lost(chosen))
            self.donor[*key, "the selection of the layer before"].add(lost(before[name].expand_as(chosen)))
            self.donor[*key, "the best head of the layer before"].add(
                torch.stack([lost(each.expand_as(chosen)).mean((1, 2)) for each in before[name + "|heads"]]).amin(0)
            )
        now[name], now[name + "|heads"] = together[0], chosen


def needle_blocks(tokenizer: Tokenizer, prompt: Prompt, num_blocks: int) -> Tensor:
    """Return which blocks hold something the answer must say; what a border cuts through is in both."""
    texts = [
        tokenizer.decode(prompt.token_ids[max(0, at * BLOCK - 4) : (at + 1) * BLOCK + 4]) for at in range(num_blocks)
    ]
    return torch.tensor([any(word in text for word in prompt.wanted) for text in texts])


@dataclass
class Outcomes:
    """Of real decoding: KL to reading everything (nats per step); of the answer its loss and whether it is right."""

    kl: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)

    def add(self, found: Tensor, dense: Tensor, token_ids: Sequence[int], answer: int) -> None:
        """Take log probabilities; answer: how many of the last tokens are the right answer."""
        self.kl += (dense.exp() * (dense - found)).sum(-1).tolist()
        wanted = torch.tensor(token_ids[-answer:])
        predicted = found[-answer - 1 : -1]
        self.nll.append(-float(predicted.gather(1, wanted[:, None]).mean()))
        self.right.append(bool((predicted.argmax(-1) == wanted).all()))

    def row(self) -> dict[str, float]:
        ordered = sorted(self.kl)
        return {
            "kl": sum(ordered) / len(ordered),
            "kl_p95": ordered[int(0.95 * (len(ordered) - 1))],
            "nll": sum(self.nll) / len(self.nll),
            "right": sum(self.right) / len(self.right),
        }


def prompts_of(
    part: str, tokenizer: Tokenizer, count: int, seed: int
) -> Iterator[tuple[list[int], int, int, Prompt | None]]:
    """Yield token ids, where decode begins, how many of the last tokens are the answer, and the prompt if it asks."""
    kind, _, length = part.partition("-")
    num_tokens = parse_tokens(length or "4K")
    if kind in ("passkey", "variables"):
        if kind == "passkey":
            depths = [(at + 0.5) / count for at in range(count)]
            made: Sequence[Prompt] = passkey_prompts(
                tokenizer, sample_text(), num_tokens=num_tokens, depths=depths, seed=seed
            )
        else:
            made = variables_prompts(tokenizer, sample_text(), num_tokens=num_tokens, samples=count, seed=seed)
        for prompt in made:
            ids = [*prompt.token_ids, *prompt.answer_ids]
            yield ids, prompt.num_tokens - TAIL, len(prompt.answer_ids), prompt
        return
    ids = tokenizer.encode({"prose": license_text, "help": sample_text}[kind]())
    for at in range(count):
        start = at * (len(ids) - num_tokens) // max(1, count - 1)
        part_ids = ids[start : start + num_tokens]
        yield part_ids, num_tokens - STEPS, STEPS - 1, None


def describe_plan(plan: HeadPlan) -> dict[str, object]:
    return {
        "heads": plan.source,
        "retrieval_heads": plan.num_retrieval,
        "kv_heads": plan.num_layers * plan.num_kv_heads,
        "sink_size": plan.sink_size,
        "recent_size": plan.recent_size,
    }


def report(
    measured: Measurement, outcomes: dict[Choice | None, Outcomes], sizes: dict[str, list[float]]
) -> dict[str, object]:
    """Return what was measured as plain data."""
    behind = measured.behind
    rows = []
    for key, tally in measured.lost.items():
        name, combined, budget = key
        row: dict[str, object] = {"digest": name, "combined": combined, "budget": int(budget)}
        row |= {"bytes_64_128": sizes.get(name), "lost": round(tally.mean, 5), "lost_p95": tally.quantile(0.95)}
        row["recall"] = round(measured.kept[key] / max(1e-9, behind.total), 4)
        if key in measured.needle:
            held, all_of_it, hits, asked = measured.needle[key]
            row |= {"needle_mass": round(held / all_of_it, 4), "needle_hit": round(hits / asked, 4), "asked": asked}
        rows.append(row)
    decoded = [
        {
            "digest": "everything read" if choice is None else choice.digest.name if choice.digest else "oracle",
            "combined": choice.combined if choice and choice.digest else "-",
            "budget": choice.budget if choice else None,
            "reuse": choice.reuse if choice else None,
        }
        | {name: round(value, 5) for name, value in found.row().items()}
        for choice, found in outcomes.items()
    ]
    ages = [
        {"digest": a, "combined": b, "budget": int(c), "age": int(d), "lost": round(tally.mean, 5)}
        for (a, b, c, d), tally in measured.old.items()
    ]
    donors = [
        {"digest": a, "combined": b, "budget": int(c), "donor": d, "lost": round(tally.mean, 5)}
        for (a, b, c, d), tally in measured.donor.items()
    ]
    return {
        "mass_behind_window": {"mean": round(behind.mean, 4), "p95": behind.quantile(0.95)},
        "mass": rows,
        "reuse": ages,
        "donor": donors,
        "decoded": decoded,
    }


def show(part: str, found: dict[str, object], budgets: Sequence[int], combined: Sequence[str]) -> None:
    """Print the tables of one part, the best digest first."""
    rows: list[dict[str, object]] = found["mass"]  # type: ignore[assignment]
    print(f"\n{part}: mass behind the window {found['mass_behind_window']}")
    print("digest | combined | bytes 64/128 | " + " | ".join(f"lost, p95, needle at {budget}" for budget in budgets))
    table: dict[tuple[str, str], dict[int, dict[str, object]]] = defaultdict(dict)
    for row in rows:
        table[str(row["digest"]), str(row["combined"])][int(str(row["budget"]))] = row
    for (name, how), by in sorted(table.items(), key=lambda item: float(str(item[1][budgets[0]]["lost"]))):
        cells = [
            f"{100 * float(str(by[b]['lost'])):.2f}% {100 * float(str(by[b]['lost_p95'])):.1f}%"
            + (f" {100 * float(str(by[b]['needle_hit'])):.0f}%" if "needle_hit" in by[b] else "")
            for b in budgets
        ]
        size = by[budgets[0]]["bytes_64_128"]
        print(f"{name} | {how} | {size if size else '-'} | " + " | ".join(cells))
    for name in ("reuse", "donor", "decoded"):
        for row in found[name]:  # type: ignore[attr-defined]
            if row["budget"] in (None, *budgets):
                print(name, " ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--heads", default="auto", help="which are retrieval heads and measured; all: every head")
    parser.add_argument("--recent", type=int, help="recent tokens that are always read")
    parser.add_argument("--parts", default="passkey-4K,variables-4K,prose-4K,help-8K")
    parser.add_argument("--count", type=int, default=3, help="prompts of each part")
    parser.add_argument("--digests", choices=tuple(DIGESTS), default="few")
    parser.add_argument("--basis", choices=("own", "other"), default="own", help="from the prompt, or from other text")
    parser.add_argument("--decode", action="store_true", help="also decode with the selections")
    parser.add_argument("--decode-budgets", default="256,512,1024,2048")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args()
    source = open_model(resolve(options.model))
    tokenizer = load_tokenizer(source)
    longest = max(parse_tokens(part.partition("-")[2] or "4K") for part in options.parts.split(","))
    engine = Engine.load(
        source, context=max(longest, 2 * EARLY) + 256, heads=options.heads, kv="16", recent_size=options.recent
    )
    digests = DIGESTS[options.digests]()
    dims = (64, 128)
    sizes = {digest.name: [digest.size(dim) for dim in dims] for digest in digests}
    leaders = [(digest, "sum of p") for digest in few_digests() if digest.name in sizes]
    budgets = [int(budget) for budget in options.decode_budgets.split(",")]
    out: dict[str, object] = {}
    other = None
    if options.basis == "other":
        text_ids = tokenizer.encode(sample_text())[-2 * EARLY :]
        other = read(engine, text_ids, len(text_ids))
    for part in options.parts.split(","):
        measured = Measurement(digests, list(COMBINED), leaders)
        choices: list[Choice | None] = [None]
        if options.decode:
            for budget in budgets:
                choices += [Choice(None, "", budget)]
                choices += [Choice(digest, how, budget) for digest, _ in leaders for how in ("sum of p", "mean", "max")]
                choices += [Choice(digest, how, budget, reuse) for digest, how in leaders[-2:] for reuse in (2, 4, 8)]
        outcomes: dict[Choice | None, Outcomes] = defaultdict(Outcomes)
        for ids, cut, answer, prompt in prompts_of(part, tokenizer, options.count, options.seed):
            reading = read(engine, ids, cut)
            blocks = torch.zeros(len(ids) // BLOCK, dtype=torch.bool)
            if prompt is not None:
                blocks = needle_blocks(tokenizer, prompt, len(blocks))
            reading.early = other or reading
            reading.listen = lambda step, blocks=blocks, into=measured: into.add(step, blocks)
            dense = decode(engine, reading, ids, cut)
            reading.listen = None
            for choice in choices:
                reading.choice = choice
                found = dense if choice is None else decode(engine, reading, ids, cut)
                outcomes[choice].add(found, dense, ids, answer)
            print(f"{part}: {len(ids)} tokens", flush=True)
        result = report(measured, outcomes, sizes)
        show(part, result, [256, 1024], list(COMBINED))
        out[part] = result
        if options.json:  # after each part: the whole takes long
            setting = describe_plan(engine.plan) | {"model": options.model, "prompts": options.count}
            options.json.write_text(json.dumps({"setting": setting, "parts": out}), encoding="utf-8")


if __name__ == "__main__":
    main()
