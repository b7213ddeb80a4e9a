"""The whole engine on Triton kernels: against the float64 torch path on the same weights, and against itself.

In the interpreter the decode step runs eagerly; on a CUDA device it is captured and replayed as a graph.
"""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from duolocal.engine.decoder import GpuDecoder, HostDecoder
from duolocal.engine.engine import Cancelled, Engine
from duolocal.engine.kernels import arrangement
from duolocal.heads import HeadPlan
from duolocal.kernels.gpu import linear
from duolocal.kernels.gpu.operations import TritonKernels
from duolocal.models.transformer import Transformer
from duolocal.models.weights import LayerWeights, ModelWeights
from duolocal.quant.weight import DenseWeight, Linear, Weight
from duolocal.settings import Sampling
from tests.compiled import random_weight
from tests.tiny import random_model, tiny_config
from tests.triton_device import COMPUTE_DTYPES, DEVICE, INTERPRETED

# One KV head per layer, and few features: the interpreter takes a tenth of a second for some tiles.
PLAN = HeadPlan(((True,), (False,)), sink_size=4, recent_size=24, source="test")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Hidden states of size 1 after two layers, each rounding to the compute dtype about ten times.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 0.2}


def packed_model(packing: str, **changes: Any) -> tuple[Any, ModelWeights]:
    """Return a random model of two layers; matrices of the first are packed as in a file, the others dense."""
    shapes: dict[str, Any] = {
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
    }
    config = replace(tiny_config("llama", **changes), **shapes, max_positions=4096)
    config, weights = random_model(config)

    def pack(seed: int, layer: Linear) -> Linear:
        weight = random_weight(packing, layer.weight.out_features, layer.weight.in_features, seed=seed)
        return Linear(weight, layer.bias)

    first, *others = weights.layers
    packed: dict[str, Any] = {name: pack(at, getattr(first, name)) for at, name in enumerate(PROJECTIONS)}
    return config, replace(weights, layers=(replace(first, **packed), *others))


def moved(weights: ModelWeights, dtype: torch.dtype) -> ModelWeights:
    """Return the weights as `Engine.load` has them on the device for Triton kernels."""
    arrange = arrangement(TritonKernels(dtype), dtype)
    assert arrange is not None

    def matrix(weight: Weight) -> Weight:
        return arrange(on_device(weight))

    def vector(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(DEVICE, dtype)

    def layer(one: LayerWeights) -> LayerWeights:
        fields: dict[str, Any] = {
            name: vector(getattr(one, name)) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")
        }
        for name in PROJECTIONS:
            linear = getattr(one, name)
            fields[name] = Linear(matrix(linear.weight), vector(linear.bias))
        return LayerWeights(**fields)

    tied = weights.lm_head is weights.embedding
    embedding = matrix(weights.embedding) if tied else weights.embedding
    norm = vector(weights.norm)
    assert norm is not None
    return ModelWeights(
        embedding=embedding,
        layers=tuple(map(layer, weights.layers)),
        norm=norm,
        lm_head=embedding if tied else matrix(weights.lm_head),
    )


def on_device(weight: Any) -> Any:
    tensors = {name: value.to(DEVICE) for name, value in vars(weight).items() if isinstance(value, Tensor)}
    return replace(weight, **tensors)


def engines(
    packing: str = "Q4_1",
    *,
    kv: str = "k8v4",
    dtype: torch.dtype = COMPUTE_DTYPES[-1],
    plan: HeadPlan = PLAN,
    **changes: Any,
) -> tuple[Engine, Engine]:
    """Return the engine under test and its float64 reference on the same weights; changes: as of `packed_model`."""
    config, weights = packed_model(packing, **changes)
    wide = replace(weights, norm=weights.norm.double(), layers=tuple(map(widened, weights.layers)))
    reference = Transformer(config, wide, context=640, device=torch.device("cpu"), dtype=torch.float64)
    tested = Transformer(
        config, moved(weights, dtype), context=640, device=DEVICE, dtype=dtype, kernels=TritonKernels(dtype)
    )
    return (
        Engine.build(tested, plan, kv=kv, chunk_size=512),
        Engine.build(reference, plan, kv=kv, chunk_size=512),
    )


def widened(layer: LayerWeights) -> LayerWeights:
    norms = {
        name: norm.double()
        for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")
        if (norm := getattr(layer, name)) is not None
    }
    linears = {
        name: replace(linear, bias=linear.bias.double())
        for name in PROJECTIONS
        if (linear := getattr(layer, name)).bias is not None
    }
    return replace(layer, **norms, **linears)


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def near(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    error = (got.double().cpu() - wanted.double()).norm() / wanted.double().norm()
    assert error < TOLERANCE[dtype], float(error)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(linear, "_WARPS_WANTED", 1)


@pytest.mark.parametrize(
    ("packing", "dtype"), [("Q4_1", COMPUTE_DTYPES[0]), pytest.param("AWQ", COMPUTE_DTYPES[-1], marks=pytest.mark.full)]
)
def test_prefill_and_decode_are_the_float64_path(packing: str, dtype: torch.dtype) -> None:
    engine, reference = engines(packing, dtype=dtype)
    tokens = ids(193)
    cuts = [160, 31, 1, 1]  # the third block is closed by the first single token
    for cut in cuts:
        chunk = tokens[engine.position : engine.position + cut]
        near(engine.logits(chunk), reference.logits(chunk), dtype)
    assert engine.token_ids == tokens


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.full)])
def test_generation_is_the_hosts(count: int) -> None:
    engine, _ = engines()
    prompt, sampling = ids(30), Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=3, max_tokens=count)
    decoder = engine._decoder(sampling)
    assert isinstance(decoder, GpuDecoder)
    first = list(engine.generate(prompt, sampling, eos_ids=frozenset()))
    if not INTERPRETED:
        engine.reset()
        again = list(engine.generate(prompt, sampling, eos_ids=frozenset()))  # replays what was captured
        assert again == first
    engine.reset()
    host = HostDecoder(engine.transformer, engine.cache, sampling)
    token = host.first(engine.step(prompt)[-1:])
    expected = [token]
    while len(expected) < count:
        token = engine._decode(host, token)
        expected.append(token)
    assert first == expected


@pytest.mark.parametrize("tie", [False, True])
def test_no_graph_reads_host_memory(tie: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untied embedding's row is copied to the same device buffer before every step; a tied one is on the device."""
    engine, _ = engines(tie=tie)
    captured, looked_up, read = False, 0, set()
    run, rows, hidden_of = GpuDecoder._run, DenseWeight.rows, Transformer.hidden_of

    def watched_run(self: GpuDecoder, greedy: bool) -> None:
        nonlocal captured
        captured = True
        try:
            run(self, greedy)
        finally:
            captured = False

    def watched_rows(self: DenseWeight, index: Tensor, dtype: torch.dtype) -> Tensor:
        nonlocal looked_up
        assert captured == tie and self is engine.transformer.weights.embedding
        looked_up += 1
        return rows(self, index, dtype)

    def watched_hidden_of(self: Transformer, x: Tensor, *rest: Any) -> Tensor:
        read.add(x.data_ptr())
        return hidden_of(self, x, *rest)

    engine.step(ids(5))
    monkeypatch.setattr(GpuDecoder, "_run", watched_run)
    monkeypatch.setattr(DenseWeight, "rows", watched_rows)
    monkeypatch.setattr(Transformer, "hidden_of", watched_hidden_of)
    decoder = engine._decoder(Sampling(temperature=0))
    for token in (7, 8):
        engine._decode(decoder, token)
    assert isinstance(decoder, GpuDecoder)
    assert read == (set() if tie else {decoder._row.data_ptr()})
    assert looked_up == 2 or not INTERPRETED  # a captured step is not run again


def test_a_decoder_does_not_hold_its_engine() -> None:
    """Its memory is the device's: it goes when the engine is dropped, not when a collector comes by."""
    engine, _ = engines()
    assert isinstance(engine._decoder(Sampling()), GpuDecoder)
    dropped: list[weakref.ref[Any]] = [weakref.ref(engine), weakref.ref(engine.cache)]
    gc.disable()
    try:
        del engine
        assert [ref() for ref in dropped] == [None, None]
    finally:
        gc.enable()


@pytest.mark.full
def test_undo_and_cancel_leave_no_trace() -> None:
    engine, _ = engines()
    list(engine.prefill(ids(190)))
    snapshot = engine.snapshot()
    wanted = engine.logits(ids(3, seed=5))
    engine.restore(snapshot)
    list(engine.generate(ids(2, seed=6), Sampling(temperature=0, max_tokens=2), eos_ids=frozenset()))
    engine.restore(snapshot)
    layers = []

    def stop_at_the_second(layer: int = 0) -> None:
        layers.append(layer)
        if layer == 1:
            raise Cancelled

    engine.raise_if_cancelled = stop_at_the_second  # type: ignore[method-assign, assignment]
    with pytest.raises(Cancelled):
        engine.step(ids(3, seed=7))
    del engine.raise_if_cancelled
    assert layers == [0, 1]
    got = engine.logits(ids(3, seed=5))
    assert torch.equal(got, wanted)


@pytest.mark.skipif(INTERPRETED, reason="a CUDA graph needs a CUDA device")
def test_the_graph_stays_valid_while_the_context_grows() -> None:
    engine, _ = engines()
    sampling = Sampling(temperature=0, max_tokens=300)
    drawn = list(engine.generate(ids(60), sampling, eos_ids=frozenset()))
    assert engine._gpu_decoder is not None and list(engine._gpu_decoder._graphs) == [(True, "decodes")]
    history = list(engine.token_ids)
    engine.reset()
    list(engine.prefill(history[:60]))
    for at, token in enumerate(history[60:], start=1):  # teacher-forced, eager
        eager = int(engine.logits([token])[0].argmax())
        assert eager == drawn[at], at
