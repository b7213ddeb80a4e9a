"""The Transformer against transformers' own models, whole and in pieces, with the float64 oracle cache."""

import itertools
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duolocal.kernels import torch_kernels
from duolocal.models.config import ModelConfig
from duolocal.models.loader import open_model
from duolocal.models.transformer import Transformer
from duolocal.models.weights import ModelWeights
from duolocal.quant.weight import DenseWeight
from tests.oracle import OracleCache, naive_visibility, oracle_attention, visibility_mask
from tests.tiny import (
    ARCHITECTURES,
    ROPE_VARIANTS,
    TRAINED,
    Architecture,
    huggingface_model,
    random_model,
    save_checkpoint,
    tiny_config,
    weights_of,
    wide_transformers,
)

CPU = torch.device("cpu")
NUM_TOKENS = TRAINED + 32  # beyond the trained length, where dynamic scaling differs from none


def tokens(num_tokens: int, vocab_size: int = 320) -> Tensor:
    return torch.randint(0, vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(1))


def transformer(
    config: ModelConfig,
    weights: ModelWeights,
    *,
    context: int = NUM_TOKENS,
    dtype: torch.dtype = torch.float64,
) -> Transformer:
    return Transformer(config, weights, context=context, device=CPU, dtype=dtype)


def run(model: Transformer, token_ids: Tensor, cuts: list[int], cache: OracleCache | None = None) -> Tensor:
    """Feed `token_ids` cut at `cuts`; return the hidden states of all [num_tokens, hidden_size]."""
    cache = OracleCache(model.config) if cache is None else cache
    edges = [0, *sorted(set(cuts)), token_ids.shape[0]]
    return torch.cat(
        [
            model.hidden(token_ids[start:stop], torch.arange(start, stop), cache)
            for start, stop in itertools.pairwise(edges)
        ]
    )


@pytest.mark.parametrize("rope", ROPE_VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_and_cut_match_transformers(architecture: Architecture, rope: str) -> None:
    token_ids = tokens(NUM_TOKENS)
    with wide_transformers(), torch.no_grad():
        theirs = huggingface_model(architecture, rope=rope)
        wanted = theirs.model(token_ids[None]).last_hidden_state[0]
        wanted_logits = theirs(token_ids[None]).logits[0]
    assert wanted_logits.dtype == torch.float64
    model = transformer(tiny_config(architecture, rope=rope), weights_of(theirs, torch.float64))
    for cuts in ([], [1, 2, 40, 64]):
        hidden = run(model, token_ids, cuts)
        # Float64 throughout on both sides, values of size 1; measured 3e-15.
        torch.testing.assert_close(hidden, wanted, rtol=0, atol=1e-13)
        # Ours are float32 by contract: one rounding (2^-24) of logits up to 5.
        torch.testing.assert_close(model.logits(hidden).double(), wanted_logits, rtol=0, atol=5e-7)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_matches_transformers_as_it_is(architecture: Architecture, tie: bool) -> None:
    token_ids = tokens(NUM_TOKENS)
    with torch.no_grad():
        theirs = huggingface_model(architecture, tie=tie)
        wanted = theirs(token_ids[None]).logits[0]
    config, weights = tiny_config(architecture, tie=tie), weights_of(theirs)
    assert (weights.lm_head is weights.embedding) == tie
    model = transformer(config, weights, dtype=torch.float32)
    got = model.logits(run(model, token_ids, [33]))
    # Two layers of float32 on both sides, logits up to 5; measured 2.4e-6.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rope", ROPE_VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_checkpoint_matches_transformers(architecture: Architecture, rope: str, tmp_path: Path) -> None:
    token_ids = tokens(NUM_TOKENS)
    tie = rope == "linear"  # tied embeddings are stored once
    with torch.no_grad():
        theirs = save_checkpoint(tmp_path, architecture, rope=rope, tie=tie)
        wanted = theirs(token_ids[None]).logits[0]
    source = open_model(tmp_path)
    assert source.config.sliding_window is None  # null in Mistral's config.json
    assert source.config.tie_embeddings == tie
    model = transformer(source.config, source.load(), dtype=torch.float32)
    got = model.logits(run(model, token_ids, [33]))
    # As above.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.1), (torch.float16, 0.0125)])
def test_16_bit_dtypes_stay_near_float64(dtype: torch.dtype, limit: float) -> None:
    # Hidden states have size 1. Every rounding costs up to 2^-8 (bf16) or 2^-11 (fp16), some 12 of them per
    # layer; the bounds are 26 of them, about 2.5 times the largest measured error (0.039 and 0.0057).
    config, weights = random_model(tiny_config("qwen3"), dtype=dtype)
    model, exact = transformer(config, weights, dtype=dtype), transformer(config, widened(weights))
    token_ids = tokens(NUM_TOKENS)
    got = run(model, token_ids, [])
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), run(exact, token_ids, []), rtol=0, atol=limit)
    assert model.logits(got).dtype == torch.float32


@settings(max_examples=12, deadline=None)
@given(
    rope=st.sampled_from(list(ROPE_VARIANTS)),
    cuts=st.lists(st.integers(1, 79), max_size=6),
    retrieval=st.lists(st.booleans(), min_size=4, max_size=4),
    sink_size=st.integers(0, 4),
    recent_size=st.integers(1, 24),
)
def test_the_cut_does_not_matter(
    rope: str, cuts: list[int], retrieval: list[bool], sink_size: int, recent_size: int
) -> None:
    model = transformer(*random_model(tiny_config(rope=rope), dtype=torch.float64))
    token_ids = tokens(80)
    plan = [retrieval[:2], retrieval[2:]]

    def cache() -> OracleCache:
        return OracleCache(model.config, plan, sink_size=sink_size, recent_size=recent_size)

    whole = run(model, token_ids, [], cache())
    # Only the order of float64 sums may differ.
    torch.testing.assert_close(run(model, token_ids, cuts, cache()), whole, rtol=0, atol=1e-13)


def test_a_streaming_head_changes_the_result_only_beyond_its_window() -> None:
    model = transformer(*random_model(dtype=torch.float64))
    token_ids = tokens(40)
    plan = [[True, False], [False, True]]
    dense = run(model, token_ids, [])
    streaming = run(model, token_ids, [], OracleCache(model.config, plan, sink_size=4, recent_size=8))
    differs = (dense - streaming).abs().amax(dim=1) > 1e-6
    # Position 11 still sees 0..3 as sinks and 4..11 as recent; position 12 is the first to miss one, position
    # 4.
    assert differs.tolist() == [False] * 12 + [True] * 28


def test_the_model_keeps_no_state() -> None:
    model = transformer(*random_model(dtype=torch.float64))
    token_ids = tokens(20)
    first = run(model, token_ids, [])
    run(model, token_ids.flip(0), [7])
    assert torch.equal(run(model, token_ids, []), first)


def test_before_layer_is_called_in_order_and_may_cancel() -> None:
    model = transformer(*random_model(dtype=torch.float64))
    seen: list[int] = []
    model.hidden(tokens(3), torch.arange(3), OracleCache(model.config), before_layer=seen.append)
    assert seen == [0, 1]

    def cancel(layer: int) -> None:
        if layer == 1:
            raise KeyboardInterrupt

    cache = OracleCache(model.config)
    with pytest.raises(KeyboardInterrupt):
        model.hidden(tokens(3), torch.arange(3), cache, before_layer=cancel)
    assert [k.shape[0] for k in cache.k] == [3, 0]


class CountingWeight:
    """A quantized weight's stand-in that notes which rows were dequantized, and how many at a time."""

    format = "counted"

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.out_features, self.in_features = tensor.shape
        self.nbytes = tensor.nbytes
        self.taken: list[list[int]] = []

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        raise AssertionError("the whole output matrix was dequantized")

    def row_range(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        self.taken.append(list(range(start, stop)))
        return self.tensor[start:stop].to(dtype)


@pytest.mark.parametrize("make", [CountingWeight, DenseWeight])
@pytest.mark.parametrize("num_rows", [0, 1, 11])
def test_logits_in_tiles(make: Callable[[Tensor], Any], num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_kernels, "VOCAB_TILE", 96)  # 320 = 3 * 96 + 32
    monkeypatch.setattr(torch_kernels, "ROW_TILE", 4)
    config, weights = random_model(dtype=torch.float64)
    assert isinstance(weights.lm_head, DenseWeight)
    matrix = weights.lm_head.tensor
    head = make(matrix)
    model = transformer(config, ModelWeights(weights.embedding, weights.layers, weights.norm, head))
    hidden = torch.randn(num_rows, config.hidden_size, dtype=torch.float64)
    got = model.logits(hidden)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), hidden @ matrix.T, rtol=1e-7, atol=1e-7)
    if isinstance(head, CountingWeight):
        assert [row for rows in head.taken for row in rows] == list(range(320))  # each once
        assert max(map(len, head.taken)) == 96


def test_mismatched_shapes_are_refused() -> None:
    model = transformer(*random_model(dtype=torch.float64))
    with pytest.raises(ValueError, match=r"token_ids \(3,\), positions \(2,\)"):
        model.hidden(tokens(3), torch.arange(2), OracleCache(model.config))
    with pytest.raises(ValueError, match=r"token_ids \(1, 3\)"):
        model.hidden(tokens(3)[None], torch.arange(3)[None], OracleCache(model.config))
    with pytest.raises(ValueError, match=r"hidden \(64,\): wanted \[n, hidden_size 64\]"):
        model.logits(torch.zeros(64, dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(
    start=st.integers(0, 9),
    q_len=st.integers(1, 6),
    retrieval=st.booleans(),
    sink_size=st.integers(0, 5),
    recent_size=st.integers(1, 6),
)
def test_the_oracle_is_the_rule_of_the_design(
    start: int, q_len: int, retrieval: bool, sink_size: int, recent_size: int
) -> None:
    positions, kv_len = torch.arange(start, start + q_len), start + q_len
    generator = torch.Generator().manual_seed(start)
    q = torch.randn(q_len, 2, 4, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, kv_len, 1, 4, generator=generator, dtype=torch.float64)
    wanted = torch.empty_like(q)
    mask = visibility_mask(positions, kv_len, retrieval=retrieval, sink_size=sink_size, recent_size=recent_size)
    for row, i in enumerate(positions.tolist()):
        seen = [
            j
            for j in range(kv_len)
            if naive_visibility(i, j, retrieval=retrieval, sink_size=sink_size, recent_size=recent_size)
        ]
        assert mask[row].nonzero().flatten().tolist() == seen
        assert i in seen
        for head in range(2):
            weights = torch.stack([(q[row, head] @ k[j, 0] / 2.0).exp() for j in seen])
            wanted[row, head] = sum(w * v[j, 0] for w, j in zip(weights / weights.sum(), seen, strict=True))
    got = oracle_attention(q, k, v, positions, retrieval=[retrieval], sink_size=sink_size, recent_size=recent_size)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


def widened(weights: ModelWeights) -> ModelWeights:
    """Return the same weights, each value as it is, in float64."""

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double()
        if isinstance(value, tuple):
            return tuple(wide(entry) for entry in value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{entry.name: wide(getattr(value, entry.name)) for entry in fields(value)})
        return value

    wider = wide(weights)
    assert isinstance(wider, ModelWeights)
    return wider


class RecordedGPU:
    """Stands for a CUDA device: what is copied to it is recorded, and stays where it was."""

    type = "cuda"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copies: list[tuple[torch.dtype, bool]] = []  # dtype, whether the host waits
        self.pinned = 0
        real = Tensor.to

        def to(x: Tensor, target: Any, *rest: Any, **how: Any) -> Tensor:
            if target is not self:
                return real(x, target, *rest, **how)
            self.copies.append((x.dtype, not how.get("non_blocking", False)))
            return x

        def pin_memory(x: Tensor) -> Tensor:
            self.pinned += 1
            return x

        monkeypatch.setattr(Tensor, "to", to)
        monkeypatch.setattr(Tensor, "pin_memory", pin_memory)


@pytest.mark.parametrize("tie", [False, True])
def test_rows_are_read_from_host_memory_where_lm_head_is_another_matrix(
    tie: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied as they are stored, pinned, without waiting; a tied embedding is on the device, and only ids go there."""
    config, weights = random_model(tiny_config(tie=tie), dtype=torch.float16)
    model, ids = transformer(config, weights, dtype=torch.float32), tokens(5)
    wanted = model.embed(ids)
    gpu = RecordedGPU(monkeypatch)
    monkeypatch.setattr(model, "device", gpu)
    found = model.embed(ids)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
    assert (gpu.copies, gpu.pinned) == (([(torch.int64, True)], 0) if tie else ([(torch.float16, False)], 1))
