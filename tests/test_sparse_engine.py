"""Sparse prefill in an engine: what the options mean, where chunks are cut, exact where it promises to be."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duolocal import cli
from duolocal.cache import DuoCache
from duolocal.engine.engine import Engine
from duolocal.engine.prefill_choice import prefill_note, prefill_policy
from duolocal.errors import SettingsError
from duolocal.evaluate import Setting, combinations
from duolocal.heads import HeadPlan
from duolocal.kernels.sparse import SparsePrefill
from duolocal.settings import LoadSettings, Sampling
from tests.tiny import random_model, save_checkpoint, tiny_config, transformer_of

CPU = torch.device("cpu")
PLAN = HeadPlan(((True, False), (True, True)), sink_size=4, recent_size=24, source="test")
POLICY = SparsePrefill(mass=0.7, tile=32, stride=4, least_blocks=2)


def make_engine(policy: SparsePrefill | None, *, chunk_size: int = 640, kv: str = "k8v4") -> Engine:
    transformer = transformer_of(random_model(tiny_config(max_positions=4096), dtype=torch.float64), context=1024)
    return Engine.build(transformer, PLAN, kv=kv, chunk_size=chunk_size, block_size=16, prefill=policy)


def ids(count: int) -> list[int]:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(0)).tolist()


@given(
    cuts=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    chunk_size=st.sampled_from((1, 31, 32, 70, 128)),
    sparse=st.booleans(),
)
def test_chunks_end_between_tiles_and_lose_no_token(cuts: list[int], chunk_size: int, sparse: bool) -> None:
    engine = make_engine(POLICY if sparse else None, chunk_size=chunk_size)
    tokens = ids(sum(cuts))
    size = chunk_size // 32 * 32 if sparse and chunk_size >= 32 else chunk_size
    start = 0
    for cut in cuts:
        engine.cache.num_tokens = start  # chunks are cut by position alone
        chunks = list(engine._chunks(tokens[start : start + cut]))
        assert [token for chunk in chunks for token in chunk] == tokens[start : start + cut]
        ends = [start + sum(map(len, chunks[: at + 1])) for at in range(len(chunks))]
        assert all(0 < len(chunk) <= size for chunk in chunks)
        if sparse:
            assert all(end % size == 0 for end in ends[:-1])
        else:
            assert all(len(chunk) == size for chunk in chunks[:-1])
        start += cut
    assert list(engine._chunks([])) == []


def test_the_chunk_size_does_not_change_what_is_chosen() -> None:
    tokens = ids(900)
    outputs, counts = [], []
    for chunk_size in (1024, 100, 32):
        engine = make_engine(POLICY, chunk_size=chunk_size)
        outputs.append(engine.logits(tokens))
        assert engine.cache.sparse_counts is not None
        counts.append(engine.cache.sparse_counts)
    for logits, each in zip(outputs[1:], counts[1:], strict=True):
        torch.testing.assert_close(logits, outputs[0], rtol=0, atol=2e-6)
        assert torch.equal(each.read, counts[0].read) and torch.equal(each.seen, counts[0].seen)
    assert 0.3 < counts[0].density < 0.95
    exact = make_engine(None).logits(tokens)
    assert not torch.allclose(outputs[0][600:], exact[600:], rtol=0, atol=1e-3)
    # Nothing is left out before a tile sees enough, nor of what comes after the last whole one.
    torch.testing.assert_close(outputs[0][:160], exact[:160], rtol=0, atol=2e-6)


def test_a_mass_of_one_equals_exact_prefill_and_what_is_generated_after_it() -> None:
    tokens = ids(700)
    sparse, exact = make_engine(replace(POLICY, mass=1.0), chunk_size=100), make_engine(None)
    torch.testing.assert_close(sparse.logits(tokens), exact.logits(tokens), rtol=0, atol=2e-6)
    sampling = Sampling(temperature=0, max_tokens=8)
    assert list(sparse.generate([3, 4, 5], sampling)) == list(exact.generate([3, 4, 5], sampling))
    assert sparse.cache.sparse_counts is not None and sparse.cache.sparse_counts.density == 1.0


def test_what_one_feeds_in_pieces_shorter_than_a_tile_is_exact() -> None:
    tokens = ids(700)
    sparse, exact = make_engine(POLICY), make_engine(None)
    cuts = list(range(0, 701, 28))
    for first, last in pairwise(cuts):
        got, wanted = sparse.logits(tokens[first:last]), exact.logits(tokens[first:last])
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)
    assert sparse.cache.sparse_counts is not None and sparse.cache.sparse_counts.density == 1.0


def test_undo_and_a_saved_moment_are_those_of_the_cache() -> None:
    tokens = ids(800)
    engine = make_engine(POLICY)
    for _ in engine.prefill(tokens[:500]):
        pass
    moment = engine.snapshot()
    first = engine.logits(tokens[500:])
    engine.restore(moment)
    torch.testing.assert_close(engine.logits(tokens[500:]), first, rtol=0, atol=0)


def test_policies_and_their_refusals() -> None:
    assert prefill_policy("exact", chunk_size=1) is None
    policy = prefill_policy("sparse", chunk_size=512)
    assert policy == SparsePrefill() and policy is not None and policy.mass == 0.98
    assert "98%" in prefill_note(policy) and "\n" not in prefill_note(policy)
    for words, message in (
        ({"prefill": "dense", "chunk_size": 512}, "--prefill is 'dense': give one of exact, sparse"),
        ({"prefill": "sparse", "chunk_size": 100}, "--chunk-size is 100: --prefill sparse chooses for 128 tokens"),
    ):
        with pytest.raises(SettingsError) as raised:
            prefill_policy(**words)  # type: ignore[arg-type]
        assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_the_settings_know_the_option() -> None:
    assert LoadSettings("m", prefill="sparse").options() == ["--model", "m", "--prefill", "sparse"]
    assert LoadSettings("m").options() == ["--model", "m"]
    with pytest.raises(SettingsError, match=r"^--prefill is 'fast': give one of exact, sparse$"):
        LoadSettings("m", prefill="fast")
    assert [setting.prefill for setting in combinations(["all"], ["16"], prefills=["exact", "sparse"])] == [
        "exact",
        "sparse",
    ]
    assert Setting().prefill == "exact"


def test_engines_are_loaded_with_it_and_say_so(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    options = {"context": 600, "kv": "k8v4", "heads": "all", "kernels": "torch"}
    engine = Engine.load(str(tmp_path), prefill="sparse", **options)  # type: ignore[arg-type]
    assert isinstance(engine.cache, DuoCache) and engine.cache.prefill == SparsePrefill()
    assert any("--prefill exact" in note for note in engine.notes)
    assert Engine.load(str(tmp_path), **options).cache.prefill is None  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="--chunk-size is 64"):
        Engine.load(str(tmp_path), prefill="sparse", chunk_size=64, **options)  # type: ignore[arg-type]


def test_a_wrong_word_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "prefill", "--prefill", "quick"]) != 0
    shown = capsys.readouterr()
    assert "--prefill is 'quick': give one of exact, sparse" in shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize("words", [["bench", "decode"], ["bench", "memory"], ["bench", "profile"], ["eval", "needle"]])
def test_what_reads_exactly_refuses_the_option(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "--prefill", "sparse"]) != 0
    assert f"{' '.join(words)} reads exactly: leave --prefill out" in capsys.readouterr().err
