"""Speculation changes nothing but time: the same ids, the same bytes in the cache, whatever is tried.

Judged against decoding token by token, bit by bit; no tolerance.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from duolocal.cache import DuoCache
from duolocal.engine.engine import Cancelled, Engine
from duolocal.engine.speculation import LOOK_AHEAD, NGRAM, PromptLookup, Speculation
from duolocal.heads import HeadPlan
from duolocal.kernels.cpu import attention
from duolocal.kernels.cpu.operations import CpuKernels
from duolocal.kernels.cpu.structs import MOST_AHEAD
from duolocal.models.config import ModelConfig
from duolocal.models.transformer import Transformer
from duolocal.models.weights import ModelWeights
from duolocal.quant.gguf import GGUFWeight
from duolocal.quant.kv import KV_FORMATS, kv_layout
from duolocal.quant.weight import Linear, Weight
from duolocal.settings import Sampling
from tests.compiled import GGUF_KINDS, compiled, compiled_kernels
from tests.pool_checks import poisoned_cache
from tests.test_cpu_attention import MIXED, feed, tokens
from tests.tiny import random_model, tiny_config, transformer_of

pytestmark = compiled_kernels

VOCAB = 40  # few, so that a random text has matches
PLAN = HeadPlan(((True, False), (False, True)), sink_size=4, recent_size=24, source="test")
GREEDY = Sampling(temperature=0, max_tokens=60)
SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": replace(GREEDY, temperature=0.3, top_p=0.95, seed=3),
    "penalised": replace(GREEDY, temperature=0.3, top_k=10, repetition_penalty=1.02, seed=4),
}


def bytes_of(cache: DuoCache) -> tuple[bytes, bytes]:
    """What the cache holds: ring and blocks."""
    return cache.ring.data.numpy().tobytes(), cache.pool.read(0, cache.pool.num_blocks).numpy().tobytes()


# ---- where a continuation is found ----


@given(st.lists(st.integers(0, 5), max_size=40), st.lists(st.integers(0, 5), max_size=40))
def test_what_is_found_stood_before(before: list[int], after: list[int]) -> None:
    lookup = PromptLookup(before)
    for count in range(len(after) + 1):
        context = before + after[:count]
        length, proposal = lookup.length, lookup.proposal(6)
        assert bool(proposal) == (length > 0)
        if length:
            assert length >= NGRAM
            # Somewhere the last tokens are followed by what is proposed, the proposal itself counted in.
            text, end = context + proposal, context[-length:]
            assert any(
                text[at : at + length] == end and text[at + length : at + length + 6] == proposal
                for at in range(len(context) - length)
            )
        if count < len(after):
            lookup.add(after[count])


def test_a_text_that_comes_again_is_found_at_once_and_followed() -> None:
    text = np.random.default_rng(0).permutation(3000)[:500].tolist()
    lookup = PromptLookup([*text, 9001, *text[:NGRAM]])
    for at in range(NGRAM, 300):
        assert lookup.proposal(4) == text[at : at + 4]
        lookup.add(text[at])
    lookup.add(9002)
    assert lookup.proposal(4) == []


def test_the_index_grows_with_the_answer() -> None:
    lookup = PromptLookup([])
    for token in [*range(200), 0, 1]:
        assert lookup.proposal(1) == []
        lookup.add(token)
    assert lookup.proposal(3) == [2, 3, 4]


# ---- how far to look ----


def test_it_is_off_by_itself_where_nothing_is_accepted_and_on_where_all_is() -> None:
    speculation = Speculation()
    assert speculation.ahead(8, 4) > 0
    for _ in range(200):
        for length in range(NGRAM, 9):
            speculation.drawn(length, as_found=False)
    assert not any(speculation.ahead(length, 4) for length in range(NGRAM, 9))
    for _ in range(200):  # tokens that were not tried count too
        for length in range(NGRAM, 9):
            speculation.drawn(length, as_found=True)
    assert speculation.ahead(NGRAM, 4) == 4
    assert speculation.ahead(NGRAM, 3) == 2
    assert speculation.ahead(NGRAM, 0) == 0


def test_it_is_off_by_itself_where_a_step_that_looks_ahead_costs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    speculation, now = Speculation(), [0.0]
    monkeypatch.setattr("duolocal.engine.speculation.time.perf_counter", lambda: now[0])

    def step(ahead: int, seconds: float) -> None:
        with speculation.timing(ahead):
            now[0] += seconds

    for _ in range(30):
        step(0, 1.0)
        for ahead in LOOK_AHEAD:
            step(ahead, 6.0)
    assert speculation.ahead(8, 4) == 0
    for _ in range(2000):  # is tried again some day
        step(0, 1.0)
    assert speculation.ahead(8, 4) > 0


# ---- attention ----


def decode(cache: DuoCache, q: Tensor, k: Tensor, v: Tensor, ahead: int, taken: int) -> Tensor:
    """Append the next token and the `taken` after it, of `ahead` that are looked at; return what attention gave."""
    at = cache.num_tokens
    span = slice(at, at + 1 + ahead)
    cache.begin(1, decode=True, ahead=ahead)
    out = []
    for layer in range(q.shape[0]):
        cache.append(layer, k[layer, span].contiguous(), v[layer, span].contiguous())
        out.append(cache.attend(layer, q[layer, span].contiguous(), torch.arange(at, at + 1 + ahead)))
    cache.commit()
    for _ in range(taken):
        assert cache.looks_ahead
        cache.advance()
    assert cache.looks_ahead == (taken < ahead)
    return torch.stack(out)[:, : 1 + taken]


def check_attention(
    kv: str, *, before: int, steps: Sequence[tuple[int, int]], threads: int = 2, plan: HeadPlan, block_size: int = 64
) -> None:
    layout = kv_layout(kv, head_dim=16, dtype=torch.float32, block_size=block_size)
    count = before + sum(1 + taken for _, taken in steps) + MOST_AHEAD
    q, k, v = tokens(plan, count, head_dim=16)
    caches = [poisoned_cache(plan, layout, group=2, context=count, kernels=compiled(threads)) for _ in range(2)]
    for cache in caches if before else []:
        feed(cache, q, k, v, [before])
    for ahead, taken in steps:
        wanted = torch.cat([decode(caches[0], q, k, v, 0, 0) for _ in range(1 + taken)], dim=1)
        # The tokens that are not taken are others than those that come.
        factor = torch.ones(1, count, 1, 1)
        factor[:, caches[1].num_tokens + 1 + taken :] = -3.0
        got = decode(caches[1], q * factor, k * factor, v * factor, ahead, taken)
        assert torch.equal(got, wanted), (kv, before, ahead, taken)
        assert bytes_of(caches[0]) == bytes_of(caches[1])
        assert caches[0].num_tokens == caches[1].num_tokens


@pytest.mark.parametrize("kv", KV_FORMATS)
def test_attention_and_cache_are_those_of_single_tokens(kv: str) -> None:
    """From an empty context, and over the ends of the sinks, of blocks, of the window and of the ring."""
    plan = HeadPlan(MIXED, sink_size=4, recent_size=24, source="test")
    for before in (0, 2, 61, 126, 131, 190, 400):
        check_attention(kv, before=before, steps=[(4, 4), (4, 2), (2, 0), (1, 1), (3, 0), (4, 4)], plan=plan)
    check_attention(kv, before=190, steps=[(4, 4)] * 30, plan=plan, block_size=16)


def test_attention_where_the_spans_of_work_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tokens of a step have longer spans than the first, or one span more."""
    monkeypatch.setattr(attention, "_SPANS_PER_THREAD", 1)
    plan = HeadPlan(((True,),), sink_size=0, recent_size=128, source="test")
    for ends in (512, 1024, 1088, 1152):  # tokens in blocks at which that happens with two threads
        for early in range(5):
            check_attention("int8", before=ends + 127 - early, steps=[(4, 4), (4, 1)], plan=plan)


# ---- whole models ----


def q8_0(weight: Weight) -> GGUFWeight:
    values = weight.dequantize(torch.float32).unflatten(1, (-1, 32))
    scales = (values.abs().amax(-1, keepdim=True) / 127).half()
    codes = (values / scales.float()).round().clamp(-127, 127).to(torch.int8)
    raw = torch.cat((scales.view(torch.uint8), codes.view(torch.uint8)), -1).flatten(1).contiguous()
    return GGUFWeight(raw, GGUF_KINDS["Q8_0"], weight.in_features)


def integer_model() -> tuple[ModelConfig, ModelWeights]:
    config, weights = random_model(tiny_config(max_positions=4096, vocab_size=VOCAB))

    def packed(linear: Linear) -> Linear:
        return Linear(q8_0(linear.weight), linear.bias)

    layers = tuple(
        replace(
            layer,
            q_proj=packed(layer.q_proj),
            k_proj=packed(layer.k_proj),
            v_proj=packed(layer.v_proj),
            o_proj=packed(layer.o_proj),
            gate_proj=packed(layer.gate_proj),
            up_proj=packed(layer.up_proj),
            down_proj=packed(layer.down_proj),
        )
        for layer in weights.layers
    )
    embedding = q8_0(weights.embedding)
    head = embedding if weights.lm_head is weights.embedding else q8_0(weights.lm_head)
    return config, ModelWeights(embedding, layers, weights.norm, head)


def engine_of(*, kv: str = "int8", context: int = 640, activations: str = "int8") -> Engine:
    kernels = CpuKernels(1, activations=activations)
    transformer = transformer_of(integer_model(), context=context, kernels=kernels)
    return Engine.build(transformer, PLAN, kv=kv, chunk_size=64)


class Always(Speculation):
    """Tries as many tokens as it may, wherever something is found."""

    def ahead(self, length: int, most: int) -> int:
        return max((ahead for ahead in LOOK_AHEAD if ahead <= most), default=0)


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def answer(engine: Engine, speculation: Speculation | None, sampling: Sampling, *, prompt: list[int]) -> list[int]:
    engine.reset()
    engine.speculation = speculation
    return list(engine.generate(prompt, sampling, eos_ids=frozenset()))


@pytest.mark.parametrize("kv", ["32", "int8", "int4"])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_answers_and_cache_are_the_same(sampling: Sampling, kv: str) -> None:
    engine, tried = engine_of(kv=kv), []
    for seed in range(3):
        prompt = ids(150 + 17 * seed, seed)
        wanted = answer(engine, None, sampling, prompt=prompt)
        held, position = bytes_of(engine.cache), engine.position
        for speculation in (Always(), Speculation()):
            assert answer(engine, speculation, sampling, prompt=prompt) == wanted
            assert (bytes_of(engine.cache), engine.position, engine.token_ids) == (
                held,
                position,
                [*prompt, *wanted[:-1]],
            )
            tried.append(speculation.counts)
    accepted = sum(counts.accepted for counts in tried)
    rejected = sum(counts.tried for counts in tried) - accepted
    assert min(accepted, rejected) > 20, ("too few for this to say much", accepted, rejected)


def test_an_answer_that_is_left_or_cancelled_leaves_nothing_of_what_was_tried() -> None:
    engine, prompt = engine_of(), ids(150)
    wanted = answer(engine, None, GREEDY, prompt=prompt)
    for count in range(1, 24):
        engine.reset()
        engine.speculation = Always()
        going = engine.generate(prompt, GREEDY, eos_ids=frozenset())
        made = [next(going) for _ in range(count)]
        assert made == wanted[:count]
        assert engine.token_ids == [*prompt, *made[:-1]] and engine.position == len(engine.token_ids)
        if count % 2:
            engine.cancel()
            with pytest.raises(Cancelled):
                next(going)
        del going
        held = bytes_of(engine.cache)
        engine.reset()
        engine.speculation = None
        list(engine.generate(prompt, replace(GREEDY, max_tokens=count), eos_ids=frozenset()))
        assert bytes_of(engine.cache) == held
        # What comes next is not taken for one of the tokens that were tried.
        engine.speculation = Always()
        rest = list(engine.generate(made[-1:], replace(GREEDY, max_tokens=8), eos_ids=frozenset()))
        assert rest == wanted[count : count + 8]


def test_an_end_token_a_full_context_and_a_snapshot_in_the_middle() -> None:
    engine, prompt = engine_of(context=200), ids(150)
    endless = replace(GREEDY, max_tokens=None)
    for eos in (frozenset[int](), frozenset(answer(engine, None, GREEDY, prompt=prompt)[20:21])):
        ends = []
        for speculation in (None, Always()):
            engine.reset()
            engine.speculation = speculation
            made = list(engine.generate(prompt, endless, eos_ids=eos))
            ends.append((made, engine.finish_reason, engine.position, bytes_of(engine.cache)))
        assert ends[0] == ends[1]
    assert engine.finish_reason == "stop"
    engine.reset()
    going = engine.generate(prompt, GREEDY, eos_ids=frozenset())
    made = [next(going) for _ in range(12)]
    moment = engine.snapshot()
    rest = list(going)
    engine.restore(moment)
    assert list(engine.generate(made[-1:], endless, eos_ids=frozenset()))[: len(rest)] == rest


@pytest.mark.parametrize(
    ("transformer", "speculate", "on"),
    [
        (lambda: transformer_of(integer_model(), kernels=CpuKernels(1, activations="int8")), True, True),
        (lambda: transformer_of(integer_model(), kernels=CpuKernels(1, activations="int8")), False, False),
        (lambda: transformer_of(integer_model(), kernels=CpuKernels(1)), True, False),
        (lambda: transformer_of(random_model(), kernels=CpuKernels(1, activations="int8")), True, False),
        (lambda: transformer_of(integer_model()), True, False),
    ],
    ids=["on", "set to off", "activations in float32", "weights in float32", "torch"],
)
def test_it_is_on_where_steps_that_look_ahead_give_the_same_bits(
    transformer: Callable[[], Transformer], speculate: bool, on: bool
) -> None:
    engine = Engine.build(transformer(), PLAN, kv="int8", chunk_size=64, speculate=speculate)
    assert (engine.speculation is not None) == on
