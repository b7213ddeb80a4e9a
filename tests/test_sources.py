"""Sources: the attention that is listened to is that of a dense float64 model, and listening changes nothing."""

import itertools
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from duolocal import sources
from duolocal.documents import Document, Part
from duolocal.engine.engine import Engine
from duolocal.engine.session import ChatSession, Event, Text
from duolocal.errors import SettingsError
from duolocal.heads import HeadPlan
from duolocal.kernels.torch_kernels import TorchKernels
from duolocal.models.loader import open_model
from duolocal.settings import Sampling
from duolocal.sources import QUERY_CHUNK, STANDS_OUT, Passage, Source, attended, find_sources, passages
from duolocal.terminal.docs_chat import sources as show_sources
from duolocal.terminal.sources_view import sources_view
from duolocal.tokenizer import load_tokenizer
from tests.compiled import compiled
from tests.oracle import OracleCache
from tests.session_models import DOCUMENT, GREEDY, finish, tiny_session
from tests.tiny import random_model, tensor_bytes, tiny_config, transformer_of

PLANS = {
    "mixed": HeadPlan(((True, False), (False, True)), sink_size=4, recent_size=24, source="test"),
    "all": HeadPlan(((True, True),) * 2, sink_size=0, recent_size=24, source="test"),
    "one layer": HeadPlan(((True, True), (False, False)), sink_size=4, recent_size=24, source="test"),
}
CONTEXT = 512


def make(plan: HeadPlan, kv: str, kernels: str) -> Engine:
    model = random_model(tiny_config(max_positions=CONTEXT))
    transformer = transformer_of(model, kernels=TorchKernels(torch.float32) if kernels == "torch" else compiled(1))
    return Engine.build(transformer, plan, kv=kv, chunk_size=50)


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.cover(2)
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
    heads = PLANS[plan]
    oracle = OracleCache(engine.config, heads.retrieval, sink_size=heads.sink_size, recent_size=heads.recent_size)
    ids = torch.tensor(engine.token_ids)
    engine.transformer.hidden(ids, torch.arange(len(ids)), oracle)
    first = before + asked - 1
    group = engine.cache.query_group
    retrieval = torch.tensor(heads.retrieval).flatten().repeat_interleave(group)
    weights = torch.cat(oracle.weights)[retrieval, first : first + 12]  # queries whose next token is the answer
    spans = [range(3, min(90, before + asked)), range(min(100, before), before)]
    wanted = {
        (each.start, each.stop): float(weights[:, :, each.start : each.stop].amax((0, 2)).mean())
        for each in passages([span for span in spans if span])
    }

    again = range(before, engine.position - 1)
    found = attended(engine, snapshot.ring, again, [span for span in spans if span], num_queries=12)

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
    attended(engine, snapshot.ring, range(300, 327), [range(300)], num_queries=8)
    assert torch.equal(cache.ring.data, ring) and torch.equal(cache.pool.table, table)
    assert torch.equal(cache.pool.records, records) and engine.token_ids == ids


def grown_bytes(num_layers: int) -> int:
    """Return by how much tensors have grown when the last chunk of the last layer is read again."""
    plan = HeadPlan(((True, False),) * num_layers, sink_size=4, recent_size=24, source="test")
    model = transformer_of(random_model(tiny_config(num_layers=num_layers, max_positions=CONTEXT)))
    engine = Engine.build(model, plan, kv="32", chunk_size=50)
    list(engine.prefill(tokens(500, 1)))
    held: list[int] = []
    calls, last, whole = itertools.count(1), num_layers * -(-500 // QUERY_CHUNK), sources.window_attention

    def measured(*args: Any, **sizes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if next(calls) == last:
            held.append(tensor_bytes())
        return whole(*args, **sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "window_attention", measured)
        before = tensor_bytes()
        attended(engine, engine.cache.ring.data, range(500), [range(500)], num_queries=8)
    return held[0] - before


def test_keys_and_values_are_held_of_one_layer_at_a_time() -> None:
    """As where no ring was kept and a whole context is read again: what that takes must not grow with the layers."""
    few, many = grown_bytes(2), grown_bytes(10)
    assert 0 < many < 1.2 * few, (few, many)


def test_passages_cover_every_span_once() -> None:
    spans = [range(5, 5), range(10, 200), range(300, 301)]
    cut = passages(spans, size=64)
    assert [position for each in cut for position in each] == [position for span in spans for position in span]
    assert all(1 <= len(each) <= 64 for each in cut)


def test_nothing_to_look_at() -> None:
    engine = make(PLANS["mixed"], "32", "torch")
    snapshot = engine.snapshot()
    list(engine.prefill(tokens(30, 1)))
    assert attended(engine, snapshot.ring, range(30), [], num_queries=3) == []
    assert all(
        isinstance(each, Passage) for each in attended(engine, snapshot.ring, range(30), [range(20)], num_queries=3)
    )


# --- in a conversation ---


@pytest.mark.parametrize("template", ["chatml", "llama3", "llama2"])
@pytest.mark.parametrize("kept", [True, False], ids=["rings kept", "rings given up"])
def test_every_passage_is_where_it_says(tmp_path: Path, template: str, kept: bool) -> None:
    """The passages of all documents together are their texts, whatever template and names stand around them."""
    session = tiny_session(tmp_path, template, system="Be brief.")
    texts = {
        "a & b.txt": "".join(f"Line {n} of the first, ünïcödé.\n" for n in range(40)),
        "two": f'It says <document name="two">\n itself. {DOCUMENT}',
    }
    finish(session.add_documents(list(texts.items())))
    finish(session.ask("Which?", GREEDY))
    finish(session.add_document("three", DOCUMENT))
    finish(session.ask("And now?", GREEDY))
    if not kept:
        for turn in session.tree.current.way()[:-1]:
            turn.ring = None

    found = find_sources(session, count=1000)

    assert len({(source.document, source.start) for source in found}) == len(found) > 10
    for name, text in {**texts, "three": DOCUMENT}.items():
        mine = sorted((source for source in found if source.document == name), key=lambda source: source.start)
        assert "".join(source.text[source.start : source.stop] for source in mine) == text
        for source in mine:
            assert text.splitlines()[source.line - 1].split()[:1] != []
            assert source.excerpt in " ".join(text.split())


def test_what_has_no_sources_is_said(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    with pytest.raises(SettingsError, match="there is no answer to look up"):
        find_sources(session)
    finish(session.ask("Which?", GREEDY))
    with pytest.raises(SettingsError, match="there are no documents in the context"):
        find_sources(session)
    finish(session.add_document("three", DOCUMENT))
    with pytest.raises(SettingsError, match="there is no answer to look up"):
        find_sources(session)


def test_an_empty_answer_has_no_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = tiny_session(tmp_path)
    finish(session.add_document("three", DOCUMENT))
    everything = frozenset(range(session.tokenizer.vocab_size))
    monkeypatch.setattr(session.tokenizer, "eos_ids", everything)
    assert finish(session.ask("Which?", GREEDY)).completion_tokens == 0
    with pytest.raises(SettingsError, match="the last answer is empty"):
        find_sources(session)


@pytest.mark.real
def test_the_answer_of_a_real_model_leads_to_the_place_it_was_read(smollm2_path: Path) -> None:
    source = open_model(smollm2_path)
    session = ChatSession(Engine.load(source, context=2048, kv="k8v4"), load_tokenizer(source))
    plain = [f"On day {n} of the journey they walked {n + 3} miles and slept beside the road.\n" for n in range(1, 41)]
    story = "".join([*plain[:25], "The secret word of the gatekeeper is marmalade.\n", *plain[25:]])
    finish(session.add_documents([("other.txt", "".join(plain[:10])), ("story.txt", story)]))
    question = "What is the secret word of the gatekeeper?"
    answer = finish_text(session.ask(question, Sampling(temperature=0, max_tokens=20)))
    assert "marmalade" in answer
    best = find_sources(session)[0]
    assert best.document == "story.txt" and "marmalade" in best.excerpt and abs(best.line - 26) <= 3
    assert best.score >= STANDS_OUT

    shown = StringIO()
    pages = (Part("page 1", 0), Part("page 2", 900))
    paged = Document("story.txt", Path("story.txt"), story, "utf-8", len(story), parts=pages)
    Console(file=shown, width=100).print(sources_view([best], {"story.txt": paged}))
    assert f"story.txt, page 2, line {best.line}" in shown.getvalue() and "stands out" not in shown.getvalue()


def finish_text(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def test_a_low_score_is_no_source_and_counts_are_checked() -> None:
    shown = StringIO()
    weak = Source("a.txt", "Some words.\nMore words.", 12, 23, 0.1)
    Console(file=shown, width=100).print(sources_view([weak], {}))
    assert "no passage stands out" in shown.getvalue() and "a.txt, line 2" in shown.getvalue()
    for wrong in ("0", "21", "x", "-1", "99999999"):
        with pytest.raises(SettingsError, match="/sources takes a number from 1 to 20"):
            show_sources(None, wrong)  # type: ignore[arg-type]  # refused before the chat is looked at
