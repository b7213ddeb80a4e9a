"""What a process really takes for weights, context, prefill and decode, beside what the planner said (Linux).

Two ways to look, each in a process of its own (tests/plan_child.py): the most that was resident, within 5% of the plan;
and a limit on what may be allocated, which is enough at the plan's total and not enough a little below it.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from duolocal.cache import Placement
from duolocal.engine import engine as engine_module
from duolocal.engine.automatic import choose
from duolocal.engine.engine import Engine
from duolocal.engine.known_model import OpenedModel
from duolocal.engine.planning import plan_settings
from duolocal.engine.resolve import resolve
from duolocal.errors import MemoryLimitError
from duolocal.models.loader import open_model
from duolocal.plan import free as free_module
from duolocal.plan.fitting import Free
from duolocal.settings import LoadSettings

CONTEXT = 4096
SHARE = 0.05  # of what is taken: how far the plan may be above it

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads and resets /proc (Linux)")


def write_model(
    folder: Path, *, hidden: int, inner: int, heads: int, kv_heads: int, dim: int, layers: int, vocab: int
) -> Path:
    """Write a seeded bfloat16 llama."""
    folder.mkdir()
    raw = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "vocab_size": vocab,
        "max_position_embeddings": 1 << 20,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    shapes = {
        "self_attn.q_proj": (heads * dim, hidden),
        "self_attn.k_proj": (kv_heads * dim, hidden),
        "self_attn.v_proj": (kv_heads * dim, hidden),
        "self_attn.o_proj": (hidden, heads * dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    tensors = {"model.embed_tokens.weight": random(vocab, hidden), "lm_head.weight": random(vocab, hidden)}
    tensors["model.norm.weight"] = torch.ones(hidden).bfloat16()
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a model of 67 MB, one of 109 MB with wide layers, and a small one to warm up with."""
    base = tmp_path_factory.mktemp("models")
    return {
        "small": write_model(base / "small", hidden=128, inner=256, heads=4, kv_heads=2, dim=64, layers=2, vocab=512),
        "deep": write_model(base / "deep", hidden=512, inner=1536, heads=8, kv_heads=4, dim=64, layers=8, vocab=8192),
        "wide": write_model(base / "wide", hidden=1024, inner=3072, heads=8, kv_heads=4, dim=128, layers=3, vocab=8192),
    }


def run(small: Path, model: Path | str, options: dict[str, Any], **asked: Any) -> dict[str, Any]:
    """Load, fill and decode in a process of its own; `options` are those of `Engine.load`."""
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    request = {"small": str(small), "model": str(model), "context": CONTEXT, "options": options} | asked
    child = subprocess.run(
        [sys.executable, "-m", "tests.plan_child", json.dumps(request)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout.splitlines()[-1])


def options_of(kernels: str, kv: str, chunk_size: int, **more: Any) -> dict[str, Any]:
    return {
        "heads": "random@0.5",
        "kv": kv,
        "kernels": kernels,
        "chunk_size": chunk_size,
        "threads": 1,
        "device": "cpu",
    } | more


def total(model: Path | str, options: dict[str, Any], context: int = CONTEXT) -> int:
    return plan_settings(LoadSettings(str(model), context=context, **options)).plan.total


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "kernels", "kv", "chunk_size"),
    [
        ("deep", "compiled", "int4", 64),
        pytest.param("deep", "compiled", "16", 512, marks=pytest.mark.full),
        ("wide", "compiled", "int8", 512),
        pytest.param("wide", "compiled", "32", 128, marks=pytest.mark.full),
        pytest.param("deep", "torch", "k8v4", 64, marks=pytest.mark.full),
        pytest.param("wide", "torch", "16", 512, marks=pytest.mark.full),
    ],
)
def test_the_plan_is_what_a_process_takes(
    folders: dict[str, Path], model: str, kernels: str, kv: str, chunk_size: int
) -> None:
    options = options_of(kernels, kv, chunk_size)
    planned = total(folders[model], options)
    found = run(folders["small"], folders[model], options)
    assert found["decoded"]
    assert found["resident"] <= planned <= (1 + SHARE) * found["resident"], (planned, found)


@linux
@pytest.mark.slow
def test_the_plan_counts_what_sparse_prefill_takes(folders: dict[str, Path]) -> None:
    options = options_of("compiled", "int8", 512, prefill="sparse")
    planned = total(folders["deep"], options)
    found = run(folders["small"], folders["deep"], options)
    assert found["resident"] <= planned <= (1 + SHARE) * found["resident"], (planned, found)


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "kv", "chunk_size", "short"),
    # The slow reference finds some room in what its libraries hold since the warm-up.
    [
        ("compiled", "int4", 256, 0.95),
        pytest.param("torch", "int4", 128, 0.9, marks=pytest.mark.full),
    ],
)
def test_a_limit_at_the_plan_is_enough_and_below_it_is_not(
    folders: dict[str, Path], kernels: str, kv: str, chunk_size: int, short: float
) -> None:
    options = options_of(kernels, kv, chunk_size)
    planned = total(folders["wide"], options)
    found = run(folders["small"], folders["wide"], options, limit=planned)
    assert found.get("decoded"), found
    found = run(folders["small"], folders["wide"], options, limit=int(short * planned), check=False)
    assert "decoded" not in found and "allocate memory" in found["error"], found


def test_the_engine_refuses_by_the_same_arithmetic(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of("torch", "int4", 64)
    planned = total(folders["small"], options)
    monkeypatch.setattr(free_module, "available_bytes", lambda device: planned)
    engine = Engine.load(str(folders["small"]), context=CONTEXT, **options)
    assert engine.context == CONTEXT
    monkeypatch.setattr(free_module, "available_bytes", lambda device: int(0.9 * planned))
    with pytest.raises(MemoryLimitError, match=r"^context 4,096 needs 0\.0 GiB on cpu .* this fits: --"):
        Engine.load(str(folders["small"]), context=CONTEXT, **options)


def test_blocks_are_placed_where_they_have_room(folders: dict[str, Path]) -> None:
    """On the device if all fit, else with as large a cache there as has room, else not at all."""
    settings = LoadSettings(
        "deep", heads="all", kv="16", context=32 * 1024, chunk_size=64, device="cpu", kernels="torch"
    )
    model = OpenedModel(open_model(folders["deep"]))

    def placed(free: Free, **changes: Any) -> Placement:
        found = choose(resolve(replace(settings, **changes), model), free).request
        return Placement(found.kv_device_memory, found.outer)

    blocks = 32 * 1024 * 32 * 256  # of 32 heads: 268 MB
    assert placed(Free(2**40)) == Placement(None, "disk")
    placement = placed(Free(300 * 2**20, disk=2**40))
    assert placement.outer == "disk" and placement.device_bytes is not None and placement.device_bytes < blocks
    with pytest.raises(MemoryLimitError, match=r"^context 32,768 needs 0\.3 GiB on cpu \(weights 0\.1, KV blocks"):
        placed(Free(300 * 2**20, disk=blocks))  # one record of alignment too little
    asked = placed(Free(300 * 2**20, disk=2**40), kv_device_memory=8 * 2**20)
    assert asked.device_bytes == 8 * 2**20
    with pytest.raises(MemoryLimitError, match=r"and 0\.3 GiB on the disk, where 0\.0 GiB are free"):
        placed(Free(300 * 2**20), kv_device_memory=8 * 2**20)


@pytest.mark.full
@linux
@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "kv"), [("compiled", "k8v4"), ("compiled", "16"), ("torch", "int8")])
def test_the_real_model(folders: dict[str, Path], smollm2_path: Path, kernels: str, kv: str) -> None:
    options = options_of(kernels, kv, 512, heads="0.5", speculate="off")
    planned = total(smollm2_path, options)
    found = run(folders["small"], smollm2_path, options)
    assert found["resident"] <= planned <= (1 + SHARE) * found["resident"], (planned, found)
    if kernels == "compiled":  # which steps look ahead and are recorded, the text decides
        options |= {"speculate": "auto"}
        planned = total(smollm2_path, options)
        found = run(folders["small"], smollm2_path, options)
        assert found["resident"] <= planned, (planned, found)


@pytest.mark.full
@linux
@pytest.mark.slow
def test_the_real_model_with_digests(
    folders: dict[str, Path], smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once their channels are known: finding them, as measuring formats and ranking heads, happens before the cache."""
    options = options_of("compiled", "int8", 512, heads="0.5", select="256")
    planned = total(smollm2_path, options)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run(folders["small"], smollm2_path, options)
    found = run(folders["small"], smollm2_path, options)
    assert found["resident"] <= planned <= (1 + SHARE) * found["resident"], (planned, found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kv", ["int4", "16"])
def test_a_memory_fraction_at_the_plan_is_enough_on_a_gpu(folders: dict[str, Path], kv: str) -> None:
    """torch's allocator gets what the plan says and no more; the CUDA context and the libraries' own are outside."""
    options = options_of("auto", kv, 512, device="cuda", threads=None)
    plan = plan_settings(LoadSettings(str(folders["wide"]), context=CONTEXT, **options)).plan
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    _, all_bytes = torch.cuda.mem_get_info(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        torch.cuda.set_per_process_memory_fraction((before + plan.total) / all_bytes)
        engine = Engine.load(str(folders["wide"]), context=CONTEXT, **options)
        for _ in engine.prefill([7] * (CONTEXT - 8)):
            pass
        list(engine.generate([7], engine_module.Sampling(max_tokens=4), eos_ids=frozenset()))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= plan.total <= (1 + SHARE) * taken + plan.device.workspace, (plan, taken)
