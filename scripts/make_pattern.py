"""Measure which KV heads of a model need the whole context, and write a head pattern.

Owns the search behind `duolocal/patterns/*.json`; nothing in the package imports it. The model's
forward pass, the texts and the measures are in head_probe.py beside it.

Method, after DuoAttention (arXiv 2410.10819, section 2.2) with hard gates: each step draws a plan of
exactly `ratio` retrieval heads (Gumbel top-k over the scores), runs a text with a passkey in it, and
compares with the dense model: KL on the text plus a weight times KL on the passkey's digits. The
derivative of that loss by every head's gate (straight through the hard choice) moves the scores.
A head's score says how much it is missed beside the other heads that are missing, which the
single-head scores (attention mass, induction, copying) cannot see.

    python scripts/make_pattern.py model.gguf --name smollm2-135m --out duolocal/patterns/smollm2-135m.json
    python scripts/make_pattern.py model.gguf --evaluate duolocal/patterns/smollm2-135m.json
"""

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from head_probe import (
    NEEDLES,
    QUESTIONS,
    Attend,
    Encode,
    Shape,
    attend_by_gates,
    attend_by_plan,
    full_attention,
    generator,
    held_out_episodes,
    hidden_states,
    judge_passkeys,
    judge_text,
    load,
    log_probs,
    passkey_episode,
    plan_at,
    random_key,
    texts,
    window,
)
from torch import Tensor

from duolocal.models.loader import open_model

EVALUATION_SEED = 42


# --- single-head scores: where the search starts ----------------------------------------------------


@torch.no_grad()
def attention_scores(
    shape: Shape, weights: dict[str, Tensor], encode: Encode, text: str, *, sink: int, recent: int, seed: int
) -> dict[str, Tensor]:
    """Return what heads attend to beyond the window, one [num_layers, num_kv_heads] per kind.

    induction: on random tokens repeated once, weight on the same token's first copy and on its successor;
    copy: weight of the answer's digits on the needle; mass: weight beyond the window on a real text.
    """
    rng = random.Random(seed)
    half = 2 * recent
    some = torch.randint(0, weights["model.embed_tokens.weight"].shape[0], (half,), generator=generator(seed))
    twice = torch.cat((some, some))
    late = torch.arange(half, 2 * half - 1, 2)
    earlier = torch.zeros(len(late), 2 * half)
    earlier[torch.arange(len(late)), late - half] = 1
    earlier[torch.arange(len(late)), late - half + 1] = 1
    size = 1400
    episode = passkey_episode(encode, window(rng, encode(text), size), size, depth=0.3, key=random_key(rng), form=1)
    n, digits = len(episode.token_ids), episode.num_digits
    answer = torch.arange(n - digits - 1, n - 1)
    on_needle = torch.zeros(digits, n)
    on_needle[:, episode.needle_at : episode.needle_at + 20] = 1
    spread = torch.arange(sink + recent, n, 4)
    j = torch.arange(n)
    beyond = ((j >= sink) & (spread[:, None] - j >= recent)).float()
    scores = {}
    for kind, ids, rows, wanted in (
        ("induction", twice, late, earlier),
        ("copy", episode.token_ids, answer, on_needle),
        ("mass", episode.token_ids, spread, beyond),
    ):
        scores[kind] = torch.zeros(shape.num_layers, shape.num_kv_heads)

        def attend(
            layer: int,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            rows: Tensor = rows,
            wanted: Tensor = wanted,
            out: Tensor = scores[kind],
        ) -> Tensor:
            group = shape.num_heads // shape.num_kv_heads
            logits = q[:, rows] @ k.repeat_interleave(group, 0).transpose(1, 2) / math.sqrt(shape.head_dim)
            future = torch.arange(k.shape[1]) > rows[:, None]
            weight = logits.masked_fill(future, float("-inf")).softmax(-1)
            out[layer] = (weight * wanted).sum(-1).mean(-1).view(-1, group).mean(-1)
            return full_attention(q, k, v)

        hidden_states(shape, weights, ids, attend)
    return scores


def standardised_sum(scores: dict[str, Tensor]) -> Tensor:
    total = sum(((s - s.mean()) / s.std() for s in scores.values()), torch.zeros(()))
    return total / total.std()


# --- learning the scores ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Learning:
    sink: int
    recent: int
    ratio: float
    steps: int
    num_tokens: int
    seed: int
    digit_weight: float = 0.2
    rate: float = 0.2
    stride: int = 3  # every how many text positions the KL is taken
    averaged: int = 6  # how many of the last steps' scores are averaged
    trust: float = 0.25  # how far the result goes from the start towards that average


def learn(
    shape: Shape,
    weights: dict[str, Tensor],
    encode: Encode,
    text: str,
    how: Learning,
    *,
    start: Tensor,
) -> Tensor:
    """Return scores [num_layers, num_kv_heads], higher for a head that misses the whole context more."""
    rng = random.Random(how.seed)
    noise = generator(how.seed)
    ids = encode(text)
    num_gates = shape.num_layers * shape.num_kv_heads
    keep = round(how.ratio * num_gates)
    scores = start.flatten().clone()
    visited: list[Tensor] = []
    for step in range(how.steps):
        began = time.time()
        size = rng.randrange(how.num_tokens * 3 // 4, how.num_tokens + 1)
        episode = passkey_episode(
            encode,
            window(rng, ids, size),
            size,
            depth=rng.uniform(0.05, 1 - (how.recent + 120) / size),
            key=random_key(rng),
            form=rng.randrange(len(NEEDLES)),
            ask=rng.randrange(len(QUESTIONS)),
        )
        n, digits = len(episode.token_ids), episode.num_digits
        at_text = torch.arange(how.sink + how.recent + step % how.stride, n - digits - 1, how.stride)
        at = torch.cat((at_text, torch.arange(n - digits - 1, n - 1)))  # the predictions judged
        with torch.no_grad():
            hidden = hidden_states(shape, weights, episode.token_ids, lambda _, q, k, v: full_attention(q, k, v))
            dense = log_probs(weights, hidden[at])
        gumbel = -torch.log(-torch.log(torch.rand(num_gates, generator=noise)))
        # The noise shrinks: first all heads are tried, later the cut between the best and the rest.
        heat = max(0.2, 0.6 - 0.016 * step)
        chosen = torch.zeros(num_gates)
        chosen[(scores + heat * gumbel).topk(keep).indices] = 1.0
        gates = chosen.clone().requires_grad_()
        attend = attend_by_gates(shape, gates.view(shape.num_layers, -1), how.sink, how.recent)
        mine = log_probs(weights, hidden_states(shape, weights, episode.token_ids, attend)[at])
        kl = (dense.exp() * (dense - mine)).sum(-1)
        text_kl, digit_kl = kl[:-digits].mean(), kl[-digits:].mean()
        (text_kl + how.digit_weight * digit_kl).backward()
        assert gates.grad is not None
        # The number of retrieval heads is fixed: only what a gate gains over the others counts. The
        # clip keeps one lost needle from deciding everything.
        grad = gates.grad - gates.grad.mean()
        scores -= how.rate * (grad / grad.pow(2).mean().sqrt()).clamp(-3, 3)
        visited.append(scores.clone())
        print(  # noqa: T201
            f"step {step:3d}  {n} tokens  text KL {text_kl.item():.4f}  digit KL {digit_kl.item():.3f}  "
            f"{time.time() - began:.1f} s",
            flush=True,
        )
    # These are few tokens of one kind of text. All the way, the plan is better on such texts and worse where
    # a text repeats itself at length (licences); a quarter keeps most of the gain and little of the loss.
    average = torch.stack(visited[-how.averaged :]).mean(0).view_as(start)
    return start + how.trust * (average - start)


def evaluate(
    shape: Shape,
    weights: dict[str, Tensor],
    encode: Encode,
    pattern: dict[str, Any],
    *,
    ratio: float,
    sizes: list[int],
    said_twice: bool,
) -> None:
    """Print how the pattern, random heads and the dense model do on held-out texts and passkeys."""
    _, held_out = texts()
    scores = torch.tensor(pattern["scores"])
    random_scores = torch.rand(scores.shape, generator=generator(100))
    sink, recent = pattern["sink_size"], pattern["recent_size"]
    methods: dict[str, Attend] = {
        "dense": lambda _, q, k, v: full_attention(q, k, v),
        "pattern": attend_by_plan(shape, plan_at(scores, ratio), sink, recent),
        "random": attend_by_plan(shape, plan_at(random_scores, ratio), sink, recent),
    }
    rng = random.Random(EVALUATION_SEED)
    windows = {name: torch.tensor(window(rng, encode(text), 3073)) for name, text in held_out.items()}
    dense: dict[str, Tensor] = {}
    for method, attend in methods.items():
        for name, ids in windows.items():
            with torch.no_grad():
                mine = hidden_states(shape, weights, ids, attend)
            dense.setdefault(name, mine)
            judged = judge_text(weights, ids, dense[name], mine)
            print(  # noqa: T201
                f"{method}  {name}: KL {judged.kl:.4f}, perplexity {judged.perplexity:.2f} ({judged.change:+.2%})",
                flush=True,
            )
        for size in sizes:
            episodes = held_out_episodes(encode, held_out, size, form=0 if said_twice else 1, seed=EVALUATION_SEED)
            hits, mean, worst = judge_passkeys(shape, weights, attend, episodes)
            print(  # noqa: T201
                f"{method}  passkeys at {size}: {hits} of 10, NLL per digit {mean:.3f}, worst {worst:.3f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the retrieval heads of a model.")
    parser.add_argument("model", type=Path, help="a GGUF file of the llama architecture")
    parser.add_argument("--evaluate", type=Path, metavar="PATTERN", help="judge this pattern, learn nothing")
    parser.add_argument("--out", type=Path, help="where to write the pattern")
    parser.add_argument("--name", default="smollm2-135m")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of retrieval heads to learn or judge at")
    parser.add_argument("--default-ratio", type=float, default=0.6667, help="share that `--heads auto` takes")
    parser.add_argument("--sink", type=int, default=64)
    parser.add_argument("--recent", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 3500])
    parser.add_argument("--twice", action="store_true", help="say the passkey twice (default: once)")
    args = parser.parse_args()
    if (args.evaluate is None) == (args.out is None):
        parser.error("give either --out (to learn) or --evaluate")
    shape, weights, encode = load(args.model)
    if args.evaluate is not None:
        pattern = json.loads(args.evaluate.read_text("utf-8"))
        evaluate(shape, weights, encode, pattern, ratio=args.ratio, sizes=args.sizes, said_twice=args.twice)
        return
    text, _ = texts()
    start = standardised_sum(attention_scores(shape, weights, encode, text, sink=args.sink, recent=args.recent, seed=7))
    how = Learning(
        sink=args.sink,
        recent=args.recent,
        ratio=args.ratio,
        steps=args.steps,
        num_tokens=args.tokens,
        seed=args.seed,
    )
    scores = learn(shape, weights, encode, text, how, start=start)
    fingerprint = open_model(args.model).fingerprint
    pattern = describe(name=args.name, fingerprint=fingerprint, how=how, shape=shape)
    pattern["default_ratio"] = args.default_ratio
    write_pattern(args.out, pattern, scores)


def describe(*, name: str, fingerprint: str, how: Learning, shape: Shape) -> dict[str, object]:
    return {
        "format": "duolocal-head-pattern",
        "version": 1,
        "model": name,
        "fingerprints": [fingerprint],
        "num_layers": shape.num_layers,
        "num_kv_heads": shape.num_kv_heads,
        "sink_size": how.sink,
        "recent_size": how.recent,
        "method": METHOD.format(how=how),
    }


def write_pattern(path: Path, pattern: dict[str, object], scores: Tensor) -> None:
    """Write the pattern with one line of scores per layer."""
    rows = [[round(float(s), 4) for s in row] for row in scores]
    head = json.dumps(pattern, indent=2).removesuffix("\n}")
    body = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    path.write_text(f'{head},\n  "scores": [\n{body}\n  ]\n}}\n', "utf-8")


METHOD = (
    "hard gates, straight-through gradient of KL to the dense model on text and passkey digits, started from "
    "induction + copy + mass; {how.steps} steps of up to {how.num_tokens} tokens, seed {how.seed}, "
    "a quarter of the way"
)


if __name__ == "__main__":
    main()
