"""The engine on seeded tiny models: cuts, undo and cancelling change nothing; what does not fit is refused first."""

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from duolocal.engine import engine as engine_module
from duolocal.engine.engine import Cancelled, Engine
from duolocal.errors import ContextOverflowError, DuoLocalError, ModelNotFoundError, SettingsError, TokenizerError
from duolocal.heads import HeadPlan
from duolocal.models.loader import open_model
from duolocal.plan.fitting import Free
from duolocal.settings import Sampling
from duolocal.tokenizer import load_tokenizer
from tests.oracle import OracleCache
from tests.tiny import random_model, save_checkpoint, tiny_config, transformer_of

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0, max_tokens=12)
PLAN = HeadPlan(((True, False), (False, True)), sink_size=4, recent_size=24, source="test")
ALL = HeadPlan(((True, True),) * 2, sink_size=4, recent_size=24, source="test")


def make_engine(
    *, plan: HeadPlan = PLAN, kv: str = "int4", chunk_size: int = 64, context: int = 640, block_size: int = 64
) -> Engine:
    transformer = transformer_of(random_model(tiny_config(max_positions=4096), dtype=torch.float64), context=context)
    return Engine.build(transformer, plan, kv=kv, chunk_size=chunk_size, block_size=block_size)


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(actual: Tensor, expected: Tensor) -> None:
    # The model runs in float64 and logits are rounded to float32 at the end: half a unit in their last place, 1e-6.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("plan", [PLAN, ALL], ids=["split", "all"])
def test_logits_equal_the_dense_oracle(plan: HeadPlan) -> None:
    """With the exact format the whole engine computes what the oracle's dense cache and explicit mask do."""
    engine = make_engine(plan=plan, kv="32", chunk_size=50)
    tokens = ids(400)
    config = engine.config
    oracle = OracleCache(config, plan.retrieval, sink_size=plan.sink_size, recent_size=plan.recent_size)
    hidden = engine.transformer.hidden(torch.tensor(tokens), torch.arange(400), oracle)
    close(engine.logits(tokens), engine.transformer.logits(hidden))


@given(
    cuts=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    chunk_size=st.sampled_from([1, 7, 64, 300]),
    block_size=st.sampled_from([16, 64, 128]),
    kv=st.sampled_from(["int4", "k8v4", "int8", "fp8", "16"]),
)
def test_how_tokens_are_fed_changes_nothing(cuts: list[int], chunk_size: int, block_size: int, kv: str) -> None:
    total = min(sum(cuts), 500)
    tokens = ids(total)
    expected = make_engine(kv=kv, chunk_size=500).logits(tokens)
    engine = make_engine(kv=kv, chunk_size=chunk_size, block_size=block_size)
    parts = []
    for cut in cuts:
        if engine.position < total:
            parts.append(engine.logits(tokens[engine.position : min(total, engine.position + cut)]))
    close(torch.cat(parts), expected)
    assert engine.token_ids == tokens


def test_generation_is_teacher_forcing_of_its_own_ids() -> None:
    engine = make_engine()
    prompt = ids(200)
    produced = list(engine.generate(prompt, GREEDY))
    assert len(produced) == 12
    assert engine.finish_reason == "length"
    assert engine.token_ids == [*prompt, *produced[:-1]]
    logits = make_engine().logits([*prompt, *produced[:-1]])
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == produced


def test_the_repetition_penalty_looks_at_the_answer_only() -> None:
    """A penalty that forbids repetition leaves an answer of distinct ids, and its first id, which the prompt holds."""
    prompt = [*ids(200), *range(320)]  # all ids of the vocabulary
    plain = list(make_engine().generate(prompt, GREEDY))
    penalised = list(make_engine().generate(prompt, Sampling(temperature=0, max_tokens=12, repetition_penalty=1e6)))
    assert penalised[0] == plain[0]
    assert len(set(penalised)) == len(penalised)


def test_generation_ends_at_an_end_token_and_does_not_feed_it() -> None:
    prompt = ids(100)
    first = list(make_engine().generate(prompt, GREEDY))
    end = first[5]
    engine = make_engine()
    produced = list(engine.generate(prompt, GREEDY, eos_ids=frozenset({end})))
    assert produced == first[: first.index(end)]
    assert engine.finish_reason == "stop"
    assert engine.token_ids == [*prompt, *produced]


def test_generation_ends_when_the_context_is_full() -> None:
    engine = make_engine(context=64)
    produced = list(engine.generate(ids(60), Sampling(temperature=0)))
    # Sixty tokens, four more fed, and the id that follows the last: nothing is dropped, nothing is overwritten.
    assert len(produced) == 5
    assert engine.finish_reason == "context"
    assert engine.position == 64


def test_a_prompt_that_does_not_fit_is_refused_before_any_work() -> None:
    engine = make_engine(context=128)
    list(engine.prefill(ids(100)))
    message = "^40 tokens do not fit: 100 of 128 are in use, 28 are free; a context of 140 or more is needed$"
    for call in (engine.prefill, engine.iter_logits, lambda tokens: engine.generate(tokens, GREEDY)):
        with pytest.raises(ContextOverflowError, match=message):
            list(call(ids(40)))
    assert engine.position == 100


@given(before=st.integers(0, 200), detour=st.integers(1, 300))
def test_restore_leaves_no_trace(before: int, detour: int) -> None:
    engine = make_engine(chunk_size=40)
    list(engine.prefill(ids(before)))
    snapshot = engine.snapshot()
    list(engine.prefill(ids(detour, seed=5)))
    engine.restore(snapshot)
    tail = ids(100, seed=6)
    fresh = make_engine()
    list(fresh.prefill(ids(before)))
    close(engine.logits(tail), fresh.logits(tail))
    assert engine.token_ids == [*ids(before), *tail]


@given(before=st.integers(0, 200), layer=st.integers(0, 1), chunk=st.integers(0, 3))
def test_cancelling_in_any_layer_of_any_chunk_keeps_whole_chunks(before: int, layer: int, chunk: int) -> None:
    engine = make_engine(chunk_size=64)
    list(engine.prefill(ids(before)))
    calls = 0

    def cancel_at(current: int) -> None:
        nonlocal calls
        if current == layer and calls // 2 == chunk:
            engine.cancel()
        calls += 1
        check(current)

    check = engine.raise_if_cancelled
    engine.raise_if_cancelled = cancel_at  # type: ignore[method-assign, assignment]
    with pytest.raises(Cancelled):
        list(engine.prefill(ids(256, seed=3)))
    engine.raise_if_cancelled = check  # type: ignore[method-assign]
    assert engine.token_ids == [*ids(before), *ids(256, seed=3)[: 64 * chunk]]
    fresh = make_engine()
    list(fresh.prefill(engine.token_ids))
    close(engine.logits(ids(50)), fresh.logits(ids(50)))


def test_cancel_from_another_thread_stops_generation() -> None:
    engine = make_engine()
    generation = engine.generate(ids(10), Sampling(temperature=0))
    first = next(generation)
    thread = threading.Thread(target=engine.cancel)
    thread.start()
    thread.join()
    with pytest.raises(Cancelled):
        next(generation)
    assert engine.token_ids == ids(10)
    assert list(make_engine().generate([*ids(10), first], GREEDY)) == list(engine.generate([first], GREEDY))


def test_transient_memory_does_not_grow_with_the_context() -> None:
    """The largest tensor that attention makes over 8,000 tokens of history is bounded by span and tile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func._schema.name.endswith("_"):  # in place: makes no tensor
                return result
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor) and not tensor._is_view():
                    self.numel = max(self.numel, tensor.numel())
            return result

    sizes = []
    for history in (4096, 8192):
        engine = make_engine(context=history + 64)
        engine.cache.begin(history)  # a history of zeros costs no time
        engine.cache.commit()
        engine.cache.pool.records.zero_()
        engine.token_ids.extend([0] * history)
        with Largest() as largest:
            list(engine.prefill(ids(64)))
        sizes.append(largest.numel)
    assert sizes[0] == sizes[1]


def test_prefill_called_plainly_does_its_work() -> None:
    engine = make_engine()
    assert engine.prefill(ids(70))[-1] == 70 == engine.position


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5,), "the model is 5: give a name, a path, or what open_model returns"),
        (("smollm2-135m", {"context": 64}), "settings is dict: give a LoadSettings, or context=4096 and the like"),
    ],
)
def test_wrong_types_are_refused_in_words(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        Engine.load(*arguments)


def test_a_name_and_a_path_are_taken_wherever_a_model_is_meant(smollm2_path: Path) -> None:
    opened = open_model(smollm2_path)
    assert open_model("smollm2-135m").path == open_model(str(smollm2_path)).path == opened.path
    assert open_model(opened) is opened
    assert load_tokenizer("smollm2-135m").fingerprint == load_tokenizer(smollm2_path).fingerprint
    engine = Engine.load(smollm2_path, context=64)
    assert engine.source is not None and engine.source.path == opened.path
    with pytest.raises(ModelNotFoundError, match=r"no model is called 'smollm-135m' .did you mean smollm2-135m"):
        open_model("smollm-135m")
    with pytest.raises(ModelNotFoundError, match="the model is 5: give a name, a hub id or a path"):
        open_model(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 4}, "context is 4; it must be 16 tokens or more"),
        ({"chunk_size": 0}, "--chunk-size is 0: give 1 or more"),
        ({"kv": "int3"}, "unknown KV format 'int3': choose auto or one of 32, 16, int8, fp8, k8v4, int4"),
        ({"device": "tpu"}, "device 'tpu' is unknown: use auto, cpu or cuda"),
        ({"dtype": "int8"}, "--dtype is 'int8': give one of auto, float32, bfloat16, float16, float64"),
        ({"heads": "1.5"}, "--heads 1.5: a ratio must lie between 0 and 1"),
        ({"heads": "nowhere.json"}, "head pattern nowhere.json: No such file or directory"),
        ({"sink_size": -1, "heads": "all"}, "--sink-size is -1: give 0 or more"),
        ({"recent_size": 0, "heads": "all"}, "--recent-size is 0: give 1 or more"),
        ({"contxt": 64}, "no setting is called 'contxt': did you mean context?"),
    ],
)
def test_settings_that_cannot_be_used_are_named(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    save_checkpoint(tmp_path, "llama")
    with pytest.raises(DuoLocalError) as caught:
        Engine.load(str(tmp_path), **{"kv": "16", **settings})  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_a_context_that_does_not_fit_names_numbers_and_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, "llama")
    monkeypatch.setattr(engine_module, "free_places", lambda *_, **__: Free(2**30))
    with pytest.raises(DuoLocalError) as caught:
        Engine.load(str(tmp_path), context=2**23, kv="16", heads="all")
    text = str(caught.value)
    assert text.startswith("context 8,388,608 needs 2.3 GiB on cpu (weights 0.0, KV blocks 2.0, windows 0.0, work")
    assert "and 1.0 GiB are free; this fits: --context " in text and " or --kv int8 --context " in text
    assert text.endswith("K; streaming heads would need less (--heads with a pattern file)")
    suggested = int(text.split("--context ")[1].split("K")[0]) * 1024
    engine = Engine.load(str(tmp_path), context=suggested, kv="16", heads="all")
    assert engine.memory().cache.total < 2**30


def test_what_does_not_fit_into_memory_goes_to_a_file_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "model", "llama")
    monkeypatch.setattr(engine_module, "cache_folder", lambda: tmp_path)
    options = {"context": 2**18, "kv": "16", "heads": "all"}
    inside = Engine.load(str(tmp_path / "model"), **options)  # type: ignore[arg-type]
    needed = inside.memory().weights + inside.memory().cache.total
    assert not inside.cache.pool.tiered
    monkeypatch.setattr(engine_module, "free_places", lambda *_, **__: Free(needed * 3 // 4, disk=2**30))
    beyond = Engine.load(str(tmp_path / "model"), **options)  # type: ignore[arg-type]
    assert beyond.cache.pool.tiered and beyond.cache.pool.mapping is not None
    assert beyond.memory().weights + beyond.memory().cache.total < needed * 3 // 4
    assert beyond.cache.pool.num_slots > 0  # the memory is used
    assert any("lie in a file" in note for note in beyond.notes)
    tokens = ids(400)
    assert torch.equal(beyond.logits(tokens), inside.logits(tokens))


@pytest.mark.parametrize("wrong", [-1, 320])
def test_a_token_that_the_model_has_not_is_refused_before_any_work(wrong: int) -> None:
    """A tokenizer of another model must not make a kernel read past the embedding."""
    engine = make_engine()
    message = f"token {wrong} is not one of the model's 320: its tokenizer belongs to another model"
    for use in (
        lambda tokens: list(engine.prefill(tokens)),
        lambda tokens: list(engine.generate(tokens, GREEDY)),
        engine.logits,
        engine.step,
    ):
        with pytest.raises(TokenizerError, match=message):
            use([*ids(100), wrong])
    assert engine.position == 0
    assert len(engine.logits([0, 319])) == 2
