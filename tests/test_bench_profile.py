"""The profile: every operation is counted, the work is the model's, and the cache is left as it was."""

import json

import pytest
import torch

from duolocal.bench.profile import Ceilings, OperationShare, measure_ceilings, profile_decode, profile_prefill
from duolocal.cli import main
from duolocal.engine.engine import Engine
from duolocal.errors import SettingsError
from duolocal.heads import HeadPlan
from duolocal.kernels.cpu.operations import CpuKernels
from tests.tiny import random_model, tiny_config, transformer_of

TOKENS = [(7 * i) % 300 + 3 for i in range(300)]
SINK, RECENT = 8, 32


def engine(kernels: CpuKernels | None) -> Engine:
    transformer = transformer_of(random_model(tiny_config(max_positions=512)), context=400, kernels=kernels)
    plan = HeadPlan(((True, False),) * 2, SINK, RECENT, "test")
    return Engine.build(transformer, plan, kv="int8", chunk_size=64)


def work_of(ours: Engine, tokens: int) -> tuple[int, int]:
    """Return the bytes and the floating-point operations of all layers' products, without the output matrix."""
    linears = [
        linear.weight
        for layer in ours.transformer.weights.layers
        for linear in (
            layer.q_proj,
            layer.k_proj,
            layer.v_proj,
            layer.o_proj,
            layer.gate_proj,
            layer.up_proj,
            layer.down_proj,
        )
    ]
    flop = sum(2 * tokens * weight.in_features * weight.out_features for weight in linears)
    return sum(weight.nbytes for weight in linears), flop


def test_decode_counts_every_operation_and_leaves_no_trace() -> None:
    ours = engine(CpuKernels(2))
    for _ in ours.prefill(TOKENS[:250]):
        pass
    before = ours.logits([5])
    moment = ours.position
    profile = profile_decode(ours, 7, repeats=3)
    assert ours.position == moment
    by_name = {operation.name: operation for operation in profile.operations}
    layers = ours.config.num_layers
    assert {name: by_name[name].calls for name in ("qkv", "o", "gate, up", "down", "lm_head", "rms_norm", "rope")} == {
        "qkv": layers,
        "o": layers,
        "gate, up": layers,
        "down": layers,
        "lm_head": 1,
        "rms_norm": 2 * layers + 1,
        "rope": 2 * layers,
    }
    num_bytes, flop = work_of(ours, 1)
    products = [by_name[name] for name in ("qkv", "o", "gate, up", "down")]
    assert (sum(p.num_bytes for p in products), sum(p.flop for p in products)) == (num_bytes, flop)
    assert by_name["decode_attention"].num_bytes > 0
    assert sum(operation.elapsed_s for operation in profile.operations) > 0
    assert [o.elapsed_s for o in profile.operations] == sorted((o.elapsed_s for o in profile.operations), reverse=True)
    ours.reset()
    for _ in ours.prefill(TOKENS[:250]):
        pass
    torch.testing.assert_close(ours.logits([5]), before)


def test_prefill_counts_what_queries_see() -> None:
    ours = engine(CpuKernels(1))
    for _ in ours.prefill(TOKENS[:200]):
        pass
    profile = profile_prefill(ours, TOKENS[200:260], repeats=2)
    assert (profile.tokens, profile.position, ours.position) == (60, 200, 200)
    by_name = {operation.name: operation for operation in profile.operations}
    seen = 0
    for i in range(200, 260):
        for j in range(i + 1):
            seen += 1 + (j < SINK or i - j < RECENT)  # one retrieval and one streaming head per layer
    assert by_name["prefill_attention"].flop == seen * 2 * 2 * ours.config.head_dim * 4  # layers, query heads per head
    products = [by_name[name] for name in ("qkv", "o", "gate, up", "down")]
    assert sum(p.flop for p in products) == work_of(ours, 60)[1]


def test_the_share_of_the_nearer_ceiling() -> None:
    ceilings = Ceilings(read_bytes_per_s=100.0, flop_per_s=1000.0)
    assert OperationShare("x", 1, 2.0, num_bytes=100, flop=500).of_ceiling(ceilings) == 0.5
    assert OperationShare("x", 1, 2.0, num_bytes=10, flop=1500).of_ceiling(ceilings) == 0.75
    assert ceilings.best(Ceilings(50.0, 2000.0)) == Ceilings(100.0, 2000.0)


def test_ceilings_are_measured() -> None:
    found = measure_ceilings(CpuKernels(1))
    assert found.read_bytes_per_s > 1e8 and found.flop_per_s > 1e8


def test_other_kernels_have_no_profile() -> None:
    with pytest.raises(SettingsError, match="leave out --kernels"):
        profile_decode(engine(None), 7, repeats=1)


@pytest.mark.full
@pytest.mark.real
def test_the_command_prints_tables_and_json_last(smollm2_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "profile", "--contexts", "64", "--repeats", "2", "--threads", "2"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    report = json.loads(lines[-1])
    assert [step["step"] for step in report["steps"]] == ["decode", "prefill"]
    assert any("lm_head" in line for line in lines)
    assert {"gate, up", "prefill_attention"} <= {o["operation"] for o in report["steps"][1]["operations"]}
