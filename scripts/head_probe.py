"""Run a llama model with its KV heads one by one full or streaming, and judge what that costs.

Owns the forward pass, the texts and passkeys, and the measures that make_pattern.py searches with.
It is not the engine: plain torch in float32 with transformers' reading of the GGUF (a development
dependency), so that a pattern is not measured with the code that will run it.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

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


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
