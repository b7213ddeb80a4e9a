"""Measure which KV heads of a model need the whole context, and write a head pattern.

Owns the search behind `duolocal/patterns/*.json`; nothing in the package imports it. It needs
transformers (a development dependency) to read the GGUF; the forward pass is its own, because the
search wants the output of every KV head both with the whole context and with sink + recent only.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

QUERY_BLOCK = 256


@dataclass(frozen=True)
class Shape:
    """The sizes the forward pass needs; llama architecture only."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_base: float
    norm_eps: float


@dataclass(frozen=True)
class Episode:
    """A prompt with a passkey, and what to judge: token ids [n], the digits stand at the end."""

    token_ids: Tensor
    num_digits: int
    needle_at: int


Encode = Callable[[str], list[int]]
# (layer, q [heads, n, d], k [kv_heads, n, d], v) -> [heads, n, d]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def load(path: Path) -> tuple[Shape, dict[str, Tensor], Encode]:
    """Read a GGUF through transformers: shape, float32 weights, encoder."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = model.config
    shape = Shape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rope_base=config.rope_parameters["rope_theta"],
        norm_eps=config.rms_norm_eps,
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # SmolLM splits digits one by one; the GGUF conversion of transformers leaves that out.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    weights = {name: p.detach() for name, p in model.state_dict().items()}
    return shape, weights, lambda text: tokenizer.encode(text, add_special_tokens=False)


# --- the forward pass -------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def hidden_states(shape: Shape, weights: dict[str, Tensor], token_ids: Tensor, attend: Attend) -> Tensor:
    """Run all layers over one sequence: token ids [n] -> [n, hidden_size] after the final norm."""
    n, d = len(token_ids), shape.head_dim
    inv_freq = shape.rope_base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.outer(torch.arange(n, dtype=torch.float64), inv_freq)
    angle = torch.cat((angle, angle), -1)
    cos, sin = angle.cos().float(), angle.sin().float()
    x = weights["model.embed_tokens.weight"][token_ids]
    for layer in range(shape.num_layers):
        w = {k: weights[f"model.layers.{layer}.{k}.weight"] for k in LAYER_WEIGHTS}
        h = rms_norm(x, w["input_layernorm"], shape.norm_eps)
        q, k, v = (  # [heads, n, d]
            linear(h, w[f"self_attn.{p}_proj"]).view(n, -1, d).transpose(0, 1) for p in "qkv"
        )
        out = attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + linear(out.transpose(0, 1).reshape(n, -1), w["self_attn.o_proj"])
        h = rms_norm(x, w["post_attention_layernorm"], shape.norm_eps)
        h = silu(linear(h, w["mlp.gate_proj"])) * linear(h, w["mlp.up_proj"])
        x = x + linear(h, w["mlp.down_proj"])
    return rms_norm(x, weights["model.norm.weight"], shape.norm_eps)


LAYER_WEIGHTS = [
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{p}_proj" for p in "qkvo"),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
]


def log_probs(weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return linear(hidden, head).log_softmax(-1)


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, [heads, n, d] and [kv_heads, n, d] -> [heads, n, d]."""
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


def band_attention(q: Tensor, k: Tensor, v: Tensor, sink: int, recent: int) -> Tensor:
    """Attention of a streaming head (j <= i and (j < sink or i - j < recent)), by blocks of queries."""
    heads, n, d = q.shape
    group = heads // k.shape[0]
    blocks = math.ceil(n / QUERY_BLOCK)
    start = torch.arange(blocks)[:, None] * QUERY_BLOCK
    i = start + torch.arange(QUERY_BLOCK)  # [blocks, QUERY_BLOCK]
    near = start - recent + torch.arange(recent + QUERY_BLOCK)  # the keys a block can see without the sinks
    j = torch.cat((torch.arange(sink).expand(blocks, -1), near), 1)  # [blocks, keys]
    is_sink = torch.arange(j.shape[1]) < sink
    seen = (j[:, None] <= i[..., None]) & (j[:, None] < n)
    seen &= is_sink | ((i[..., None] - j[:, None] < recent) & (j[:, None] >= sink))
    bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    bias[i >= n] = 0.0  # padded queries: anything but an empty row
    j = j.clamp(0, n - 1)
    q = torch.nn.functional.pad(q, (0, 0, 0, blocks * QUERY_BLOCK - n))
    q = q.view(heads, blocks, QUERY_BLOCK, d).transpose(0, 1)
    k, v = (x.repeat_interleave(group, 0)[:, j].transpose(0, 1) for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None])
    return out.transpose(0, 1).reshape(heads, -1, d)[:, :n]


def attend_by_plan(shape: Shape, retrieval: Tensor, sink: int, recent: int) -> Attend:
    """Return the attention of a hard plan: retrieval [num_layers, num_kv_heads] bool."""
    group = shape.num_heads // shape.num_kv_heads

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        far = retrieval[layer]
        far_q = far.repeat_interleave(group)
        out = torch.empty_like(q)
        if far.any():
            out[far_q] = full_attention(q[far_q], k[far], v[far])
        if not far.all():
            out[~far_q] = band_attention(q[~far_q], k[~far], v[~far], sink, recent)
        return out

    return attend


def attend_by_gates(shape: Shape, gates: Tensor, sink: int, recent: int) -> Attend:
    """Return attention mixed by gates [num_layers, num_kv_heads], differentiable in them."""
    group = shape.num_heads // shape.num_kv_heads

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gate = gates[layer].repeat_interleave(group)[:, None, None]
        return gate * full_attention(q, k, v) + (1 - gate) * band_attention(q, k, v, sink, recent)

    return attend


# --- texts ------------------------------------------------------------------------------------------


def texts() -> tuple[str, dict[str, str]]:
    """Return the text to learn from and the held-out ones, all from what an installation has."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = {
        "topics": "\n\n".join(topics[n] for n in names[1::2]),
        "licences": distribution_text("torch", "LICENSE") + distribution_text("numpy", "LICENSE"),
        "docstrings": "\n\n".join(doc for doc in docstrings()),
    }
    return "\n\n".join(topics[n] for n in names[::2]), held_out


def distribution_text(name: str, stem: str) -> str:
    """Join the texts of an installed distribution whose file name starts with stem."""
    files = [f for f in metadata.files(name) or [] if f.name.startswith(stem) and ".dist-info" in str(f)]
    return "\n\n".join(Path(str(f.locate())).read_text("utf-8", "replace") for f in sorted(files))


def docstrings() -> Iterator[str]:
    """Yield long docstrings of the standard library."""
    import argparse as a
    import asyncio
    import decimal
    import logging.config
    import optparse
    import typing
    import unittest.mock as mock

    for module in (asyncio, decimal, optparse, typing, mock, logging.config, a):
        for name in sorted(vars(module)):
            doc = getattr(vars(module)[name], "__doc__", None)
            if isinstance(doc, str) and len(doc) > 400:
                yield doc


NEEDLES = (
    "The pass key is {key}. Remember it. {key} is the pass key.",
    "The pass key is {key}. Remember it.",
    "Please note that the pass key for this document is {key}.",
)
QUESTIONS = ("What is the pass key?", "What is the pass key mentioned in the text?")


def passkey_episode(
    encode: Encode, filler: list[int], num_tokens: int, *, depth: float, key: str, form: int = 1, ask: int = 0
) -> Episode:
    """Hide a passkey in filler; the answer is begun, so the digits measure retrieval alone."""
    head = encode(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nThere is a pass key hidden in the text below. Find it and remember it.\n\n"
    )
    needle = encode("\n\n" + NEEDLES[form].format(key=key) + "\n\n")
    tail = encode(f"\n\n{QUESTIONS[ask]}<|im_end|>\n<|im_start|>assistant\nThe pass key is ")
    digits = encode(key)
    room = num_tokens - len(head) - len(needle) - len(tail) - len(digits)
    cut = round(depth * room)
    body = filler[:cut] + needle + filler[cut:room]
    return Episode(torch.tensor(head + body + tail + digits), len(digits), len(head) + cut)


def window(rng: random.Random, ids: list[int], size: int) -> list[int]:
    start = rng.randrange(0, len(ids) - size)
    return ids[start : start + size]


def random_key(rng: random.Random) -> str:
    return str(rng.randrange(10000, 100000))


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
    episode = passkey_episode(
        encode, window(rng, encode(text), size), size, depth=0.3, key=random_key(rng), form=1
    )
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


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def learn(
    shape: Shape, weights: dict[str, Tensor], encode: Encode, text: str, how: Learning, *, start: Tensor,
    on_step=None) -> Tensor:
    """Return scores [num_layers, num_kv_heads], higher for a head that misses the whole context more."""
    rng = random.Random(how.seed)
    noise = generator(how.seed)
    ids = encode(text)
    num_gates = shape.num_layers * shape.num_kv_heads
    keep = round(how.ratio * num_gates)
    scores = start.flatten().clone()
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
        heat = 0.6 - 0.4 * step / max(1, how.steps - 1)
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
        if on_step is not None:
            on_step(step, scores)
        print(
            f"step {step:3d}  {n} tokens  text KL {text_kl.item():.4f}  digit KL {digit_kl.item():.3f}  "
            f"{time.time() - began:.1f} s",
            flush=True,
        )
    return scores.view(shape.num_layers, -1)


# --- judging a plan ---------------------------------------------------------------------------------


def plan_at(scores: Tensor, ratio: float) -> Tensor:
    """Return the top round(ratio * heads) by score as bool; ties go to the lower layer, then head."""
    order = sorted(range(scores.numel()), key=lambda i: (-float(scores.flatten()[i]), i))
    retrieval = torch.zeros(scores.numel(), dtype=torch.bool)
    retrieval[order[: round(ratio * scores.numel())]] = True
    return retrieval.view_as(scores)


@torch.no_grad()
def judge_passkeys(
    shape: Shape, weights: dict[str, Tensor], attend: Attend, episodes: list[Episode]
) -> tuple[int, float, float]:
    """Return hits (every digit the most likely, so greedy finds it), mean and worst NLL per digit."""
    hits, losses = 0, []
    for episode in episodes:
        n, digits = len(episode.token_ids), episode.num_digits
        hidden = hidden_states(shape, weights, episode.token_ids, attend)
        mine = log_probs(weights, hidden[n - digits - 1 : n - 1])
        wanted = episode.token_ids[-digits:]
        hits += bool((mine.argmax(-1) == wanted).all())
        losses.append(float(-mine.gather(1, wanted[:, None]).mean()))
    return hits, sum(losses) / len(losses), max(losses)


@dataclass(frozen=True)
class TextJudgement:
    """How far a plan strays from the dense model on one text; KL in nats per token."""

    kl: float
    perplexity: float
    dense_perplexity: float

    @property
    def change(self) -> float:
        return self.perplexity / self.dense_perplexity - 1


@torch.no_grad()
def judge_text(weights: dict[str, Tensor], token_ids: Tensor, dense: Tensor, mine: Tensor) -> TextJudgement:
    """Compare final hidden states [n, hidden_size] of a plan with those of the dense model."""
    kl = loss = dense_loss = 0.0
    last = len(token_ids) - 1
    for at in range(0, last, QUERY_BLOCK):
        rows = slice(at, min(at + QUERY_BLOCK, last))
        wanted = token_ids[rows.start + 1 : rows.stop + 1, None]
        p, q = log_probs(weights, dense[rows]), log_probs(weights, mine[rows])
        kl += float((p.exp() * (p - q)).sum())
        loss -= float(q.gather(1, wanted).sum())
        dense_loss -= float(p.gather(1, wanted).sum())
    return TextJudgement(kl / last, math.exp(loss / last), math.exp(dense_loss / last))


def held_out_episodes(encode: Encode, held_out: dict[str, str], size: int, *, form: int, seed: int) -> list[Episode]:
    """Return ten passkeys at ten depths, in turn in each held-out text."""
    rng = random.Random(1000 * seed + size + form)
    ids = [encode(text) for text in held_out.values()]
    return [
        passkey_episode(
            encode,
            window(rng, ids[i % len(ids)], size),
            size,
            depth=0.05 + 0.1 * i,
            key=random_key(rng),
            form=form,
        )
        for i in range(10)
    ]


def evaluate(
    shape: Shape, weights: dict[str, Tensor], encode: Encode, pattern: dict[str, Any], *, ratio: float, sizes: list[int]
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
    dense = {}
    for method, attend in methods.items():
        for name, ids in windows.items():
            with torch.no_grad():
                mine = hidden_states(shape, weights, ids, attend)
            dense.setdefault(name, mine)
            judged = judge_text(weights, ids, dense[name], mine)
            print(
                f"{method}  {name}: KL {judged.kl:.4f}, perplexity {judged.perplexity:.2f} "
                f"({judged.change:+.2%})",
                flush=True,
            )
        for size in sizes:
            episodes = held_out_episodes(encode, held_out, size, form=0, seed=EVALUATION_SEED)
            hits, mean, worst = judge_passkeys(shape, weights, attend, episodes)
            print(
                f"{method}  passkeys at {size}: {hits} of 10, NLL per digit {mean:.3f}, worst {worst:.3f}",
                flush=True,
            )


EVALUATION_SEED = 42


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the retrieval heads of a model.")
    parser.add_argument("model", type=Path, help="a GGUF file of the llama architecture")
    parser.add_argument("--evaluate", type=Path, metavar="PATTERN", help="judge this pattern, learn nothing")
    parser.add_argument("--out", type=Path, help="where to write the pattern")
    parser.add_argument("--name", default="smollm2-135m")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--sink", type=int, default=64)
    parser.add_argument("--recent", type=int, default=256)
    parser.add_argument("--steps", type=int, default=26)
    parser.add_argument("--tokens", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 3500])
    args = parser.parse_args()
    if (args.evaluate is None) == (args.out is None):
        parser.error("give either --out (to learn) or --evaluate")
    shape, weights, encode = load(args.model)
    if args.evaluate is not None:
        pattern = json.loads(args.evaluate.read_text("utf-8"))
        evaluate(shape, weights, encode, pattern, ratio=args.ratio, sizes=args.sizes)
        return
    text, _ = texts()
    start = standardised_sum(
        attention_scores(shape, weights, encode, text, sink=args.sink, recent=args.recent, seed=7)
    )
    how = Learning(
        sink=args.sink,
        recent=args.recent,
        ratio=args.ratio,
        steps=args.steps,
        num_tokens=args.tokens,
        seed=args.seed,
    )
    scores = learn(shape, weights, encode, text, how, start=start)
    write_pattern(args.out, scores, name=args.name, how=how, shape=shape)


def write_pattern(path: Path, scores: Tensor, *, name: str, how: Learning, shape: Shape) -> None:
    rows = [[round(float(s), 4) for s in row] for row in scores]
    pattern = {
        "format": "duolocal-head-pattern",
        "version": 1,
        "model": name,
        "num_layers": shape.num_layers,
        "num_kv_heads": shape.num_kv_heads,
        "sink_size": how.sink,
        "recent_size": how.recent,
        "default_ratio": how.ratio,
        "method": METHOD.format(how=how),
    }
    head = json.dumps(pattern, indent=2).removesuffix("\n}")
    body = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    path.write_text(f'{head},\n  "scores": [\n{body}\n  ]\n}}\n', "utf-8")


METHOD = (
    "hard gates, straight-through gradient of KL to the dense model on text and passkey digits, started from "
    "induction + copy + mass; {how.steps} steps of up to {how.num_tokens} tokens, seed {how.seed}"
)


if __name__ == "__main__":
    main()
