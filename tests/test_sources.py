"""Sources: the attention that is listened to is that of a dense float64 model, and listening changes nothing."""

import pytest
import torch
from torch import Tensor

from duolocal.engine.engine import Engine
from duolocal.heads import HeadPlan
from duolocal.kernels.torch_kernels import TorchKernels
from duolocal.models.config import ModelConfig
from duolocal.models.transformer import Transformer
from duolocal.sampling import Sampling
from duolocal.sources import QUERY_CHUNK, Passage, attended, passages
from tests.compiled import compiled
from tests.oracle import OracleCache
from tests.tiny import random_model, tiny_config

PLANS = {
    "mixed": HeadPlan(((True, False), (False, True)), sink_size=4, recent_size=24, source="test"),
    "all": HeadPlan(((True, True),) * 2, sink_size=0, recent_size=24, source="test"),
    "one layer": HeadPlan(((True, True), (False, False)), sink_size=4, recent_size=24, source="test"),
}
CONTEXT = 512


class Noting(OracleCache):
    """The oracle, keeping the weights of retrieval heads: per layer [num_heads, q_len, kv_len]."""

    def __init__(self, config: ModelConfig, plan: HeadPlan) -> None:
        super().__init__(config, plan.retrieval, sink_size=plan.sink_size, recent_size=plan.recent_size)
        self.weights: list[Tensor] = []

    def attend(self, layer: int, q: Tensor, positions: Tensor, rotation: object = None) -> Tensor:
        keys = self.k[layer].repeat_interleave(q.shape[1] // self.k[layer].shape[1], dim=1)
        scores = torch.einsum("qhd,khd->hqk", q.double(), keys) / q.shape[2] ** 0.5
        scores.masked_fill_(torch.arange(keys.shape[0]) > positions[:, None], float("-inf"))
        kept = torch.tensor(self.plan_retrieval[layer]).repeat_interleave(q.shape[1] // self.k[layer].shape[1])
        self.weights.append(scores.softmax(-1)[kept])
        return super().attend(layer, q, positions, rotation)


def make(plan: HeadPlan, kv: str, kernels: str) -> Engine:
    config, weights = random_model(tiny_config(max_positions=CONTEXT))
    transformer = Transformer(
        config,
        weights,
        context=CONTEXT,
        device=torch.device("cpu"),
        dtype=torch.float32,
        kernels=TorchKernels(torch.float32) if kernels == "torch" else compiled(1),
    )
    return Engine.build(transformer, plan, kv=kv, chunk_size=50)


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("kernels", ["torch", "compiled"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("kv", "tolerance"), [("32", 2e-5), ("k8v4", 2e-3)])
@pytest.mark.parametrize(("before", "asked"), [(330, 7), (40, 3), (290, QUERY_CHUNK + 90), (0, 200)])
def test_scores_are_the_attention_of_the_dense_model(
    plan: str, kv: str, tolerance: float, before: int, asked: int, kernels: str
) -> None:
    engine = make(PLANS[plan], kv, kernels)
    list(engine.prefill(tokens(before, 1)))
    snapshot = engine.snapshot()
    answer = list(engine.generate(tokens(asked, 2), Sampling(temperature=0, max_tokens=12), eos_ids=frozenset()))
    list(engine.prefill(answer[-1:]))
    assert engine.position == before + asked + 12
    oracle = Noting(engine.config, PLANS[plan])
    ids = torch.tensor(engine.token_ids)
    engine.transformer.hidden(ids, torch.arange(len(ids)), oracle)
    first = before + asked - 1
    weights = torch.cat(oracle.weights)[:, first : first + 12]  # queries whose next token is the answer
    spans = [range(3, min(90, before + asked)), range(min(100, before), before)]
    wanted = {
        (each.start, each.stop): float(weights[:, :, each.start : each.stop].amax((0, 2)).mean())
        for each in passages([span for span in spans if span])
    }

    found = attended(engine, snapshot, [span for span in spans if span], num_answer=12)

    assert [passage.score for passage in found] == sorted((passage.score for passage in found), reverse=True)
    assert {(each.start, each.stop) for each in found} == set(wanted)
    for passage in found:
        assert passage.score == pytest.approx(wanted[passage.start, passage.stop], abs=tolerance)
    assert max(wanted.values()) > 10 * tolerance  # there is something to tell apart


def test_listening_leaves_the_engine_as_it_was() -> None:
    engine = make(PLANS["mixed"], "k8v4", "torch")
    list(engine.prefill(tokens(300, 1)))
    snapshot = engine.snapshot()
    list(engine.generate(tokens(20, 2), Sampling(temperature=0, max_tokens=8), eos_ids=frozenset()))
    cache = engine.cache
    records, ring, table = (x.clone() for x in (cache.pool.records, cache.ring.data, cache.pool.table))
    ids = list(engine.token_ids)
    attended(engine, snapshot, [range(300)], num_answer=7)
    assert torch.equal(cache.ring.data, ring) and torch.equal(cache.pool.table, table)
    assert torch.equal(cache.pool.records, records) and engine.token_ids == ids


def test_passages_cover_every_span_once() -> None:
    spans = [range(5, 5), range(10, 200), range(300, 301)]
    cut = passages(spans, size=64)
    assert [position for each in cut for position in each] == [position for span in spans for position in span]
    assert all(1 <= len(each) <= 64 for each in cut)


def test_nothing_to_look_at() -> None:
    engine = make(PLANS["mixed"], "32", "torch")
    snapshot = engine.snapshot()
    list(engine.prefill(tokens(30, 1)))
    assert attended(engine, snapshot, [], num_answer=3) == []
    assert all(isinstance(each, Passage) for each in attended(engine, snapshot, [range(20)], num_answer=3))
