"""The planner's arithmetic against figures made by hand, files, and what is really allocated."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duolocal.cache import DuoCache
from duolocal.cache.home import Placement
from duolocal.cache.selection import Selection, SelectionPolicy
from duolocal.engine.known_model import known_model
from duolocal.engine.planning import Planned, plan_settings
from duolocal.errors import ConfigError, ModelNotFoundError, SettingsError
from duolocal.heads import HeadPlan, choose_heads
from duolocal.kernels.digest import DigestChannels, digest_channels
from duolocal.kernels.torch_kernels import TorchKernels
from duolocal.models.loader import open_model
from duolocal.models.names import MODELS
from duolocal.plan.cards import CARDS, card_rates
from duolocal.plan.dials import with_kept_back
from duolocal.plan.duration import Rates, duration_of, work_of
from duolocal.plan.fitting import Free, Freedom, fits, nearest, offloaded
from duolocal.plan.memory import GIB, bytes_per_token, dense_16bit_bytes, plan_memory, selection_bytes
from duolocal.plan.request import Request
from duolocal.plan.session_size import session_bytes
from duolocal.plan.weights import NAMED_FORMATS, weights_by_arithmetic, weights_of
from duolocal.quant.kv import KV_FORMATS, kv_layout
from duolocal.settings import LoadSettings
from tests.tiny import save_checkpoint, tiny_config

LLAMA = MODELS["llama3-8b-awq"].config
BF16 = torch.bfloat16
MILLION = 2**20


def cut(ratio: float) -> HeadPlan:
    return choose_heads(ratio, num_layers=32, num_kv_heads=8, fingerprint=None, can_rank=True).plan


def llama_weights(outer: str = "auto", kernels: str = "triton", weights: str = "auto"):
    return weights_by_arithmetic(
        LLAMA,
        layers="AWQ",
        outer="F16",
        kernels=kernels,
        dtype=BF16,
        device="cuda" if kernels == "triton" else "cpu",
        outer_weights=outer,
        weights=weights,
    )


def llama(**changes: Any) -> Request:
    request = Request(
        config=LLAMA,
        heads=cut(0.5),
        layout=kv_layout("int4", head_dim=128, dtype=BF16),
        weights=llama_weights(),
        context=MILLION,
        chunk_size=4096,
        dtype=BF16,
        kernels="triton",
        device="cuda",
        outer="memory",
    )
    return replace(request, **changes)


def test_llama_3_8b_by_hand() -> None:
    """32 layers, 8 KV heads of 128, half of them retrieval heads, 4 bits and a scale and a minimum per token."""
    request = llama()
    plan = plan_memory(request)
    # 128 heads x (64 + 4 + 64 + 4) bytes: 17,408; a million (2^20) tokens of it, and 8 bytes per block in the table.
    assert bytes_per_token(request) == 128 * 136 == 17_408
    assert plan.device.blocks == 17_408 * MILLION + 128 * (MILLION // 64) * 8
    # 64 sink and 256 recent tokens, keys and values in 16 bits, 32 x 8 heads of 128: half of 42 MB each.
    assert plan.device.retrieval_windows == plan.device.streaming_windows == 320 * 128 * 2 * 2 * 128
    # The matrices of a layer: q, o 4096 x 4096, k, v 1024 x 4096, gate, up, down 14336 x 4096.
    elements = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    assert request.weights.layer_elements == elements
    file = llama_weights(kernels="compiled")
    outside = 128256 * 4096 * 2  # each of embedding and lm_head
    # 4 bits, and per 128: a 16-bit scale and a 4-bit zero point (a byte where a GPU regroups it).
    assert file.nbytes == elements // 2 + elements // 128 * 5 // 2 + 2 * outside
    assert request.weights.nbytes == elements // 2 + elements // 128 * 3 + outside
    assert plan.host_weights == outside and plan_memory(llama(weights=file)).host_weights == 0
    assert dense_16bit_bytes(LLAMA, MILLION) == 2 * 32 * 8 * 128 * 2 * MILLION
    # As published for the model: 5.7 GB.
    assert abs(file.nbytes / MODELS["llama3-8b-awq"].size_bytes - 1) < 0.01
    assert not plan.offloaded and plan.host_blocks == plan.disk_blocks == 0


def test_times_are_work_over_rates() -> None:
    """The floors of decode at a million tokens that were computed by hand before (10^6 tokens): H100 6.6 ms …"""
    request = llama(context=10**6)
    plan = plan_memory(request)
    for name, floor_ms in (("h100", 6.6), ("a100", 10.8), ("rtx4090", 21.9), ("rtx3090", 23.6)):
        card = CARDS[name]
        whole = replace(card_rates(card), weights=card.bandwidth, blocks=card.bandwidth, output=card.bandwidth)
        assert abs(1000 * duration_of(request, plan, whole).floor_s - floor_ms) < 0.03 * floor_ms
    work = work_of(request, plan)
    assert abs(work.product_flop / 14e15 - 1) < 0.01  # 14 PFLOP
    assert abs(work.attention_flop / 131e15 - 1) < 0.01  # half of 262 PFLOP
    rates = Rates(1e12, 2e12, 1e9, 2e9, 4e9, 0.5, None, "", measured=False)
    expected = duration_of(request, plan, rates)
    assert expected.prefill_s == pytest.approx(work.product_flop / 1e12 + work.attention_flop / 2e12)
    read = work.layer_bytes / 1e9 + work.block_bytes / 2e9 + work.output_bytes / 4e9
    assert expected.decode_s == pytest.approx(read + 0.5)


def test_moved_blocks_wait_for_the_link() -> None:
    request = llama(kv_device_memory=4 * GIB)
    plan = plan_memory(request)
    work = work_of(request, plan)
    assert work.moved_bytes == pytest.approx(17_408 * MILLION * (1 - plan.slots / plan.max_blocks), rel=1e-6)
    rates = card_rates(CARDS["rtx4090"])
    assert rates.link is not None
    assert duration_of(request, plan, rates).decode_s == pytest.approx(work.moved_bytes / rates.link + rates.step_s)
    selected = work_of(replace(request, select=2048), plan)
    assert selected.block_bytes + selected.moved_bytes < 0.04 * (work.block_bytes + work.moved_bytes)


@given(
    st.sampled_from(KV_FORMATS),
    st.integers(1, 40),
    st.floats(0, 1),
    st.sampled_from([None, 0, 20_000, 60_000, 200_000]),
    st.sampled_from(["memory", "disk"]),
)
def test_the_cache_is_what_was_planned(
    tmp_path_factory: pytest.TempPathFactory, kv: str, blocks: int, ratio: float, device_bytes: int | None, outer: Any
) -> None:
    """Blocks, tables and windows as `DuoCache` really allocates them, on the device and beyond it."""
    config = tiny_config()
    heads = choose_heads(ratio, num_layers=2, num_kv_heads=2, fingerprint=None, can_rank=True).plan
    layout = kv_layout(kv, head_dim=16, dtype=torch.float32)
    weights = weights_by_arithmetic(config, layers="F32", outer="F32", kernels="torch", dtype=torch.float32)
    request = Request(
        config=config,
        heads=heads,
        layout=layout,
        weights=weights,
        context=blocks * 64 + 5,
        chunk_size=64,
        dtype=torch.float32,
        kernels="torch",
        kv_device_memory=device_bytes,
        outer=outer,
    )
    plan = plan_memory(request)
    cache = DuoCache(
        heads,
        layout,
        num_heads=config.num_heads,
        context=request.context,
        device=torch.device("cpu"),
        dtype=torch.float32,
        kernels=TorchKernels(torch.float32),
        placement=Placement(device_bytes, outer, tmp_path_factory.getbasetemp()),
    )
    memory = cache.memory()
    # Where no record has room on the device, one stands for the address of the first.
    assert cache.pool.nbytes - plan.device.blocks in (0, 0 if plan.slots else layout.record_bytes)
    assert cache.pool.outer_bytes == plan.host_blocks + plan.disk_blocks
    assert plan.offloaded == cache.pool.tiered or heads.num_retrieval == 0
    assert memory.retrieval_windows == plan.device.retrieval_windows
    assert memory.streaming_windows == plan.device.streaming_windows


@pytest.mark.parametrize(("head_dim", "budget"), [(16, 64), (128, 2048), (64, 1000)])
def test_digests_are_what_selected_decode_allocates(head_dim: int, budget: int) -> None:
    layout = kv_layout("int4", head_dim=head_dim, dtype=torch.float32)
    num_channels = digest_channels(head_dim)
    channels = DigestChannels(torch.zeros(6, num_channels, dtype=torch.int32), torch.zeros(6, num_channels))
    made = Selection(SelectionPolicy(budget, channels), layout, num_rows=6, max_blocks=50, device=torch.device("cpu"))
    assert selection_bytes(layout, rows=6, max_blocks=50, budget=budget) == made.nbytes


# --- what fits -----------------------------------------------------------------------------------------------------


def freedom(kv: str = "int4", **changes: Any) -> Freedom:
    return Freedom(kv, cut=cut, outer_weights=llama_weights, **changes)


@given(
    memory=st.integers(4, 40),
    host=st.sampled_from([0, 8, 64]),
    disk=st.sampled_from([0, 100]),
    kv=st.sampled_from(KV_FORMATS),
    ratio=st.sampled_from([0.25, 0.5, 1.0]),
    context=st.sampled_from([2**17, 2**19, 2**20]),
)
def test_every_suggestion_fits_and_says_how(
    memory: int, host: int, disk: int, kv: str, ratio: float, context: int
) -> None:
    request = llama(heads=cut(ratio), layout=kv_layout(kv, head_dim=128, dtype=BF16), context=context)
    free = Free(memory * GIB, host * GIB, disk * GIB)
    if fits(plan_memory(request), free):
        return
    placed = next(offloaded(request, free), None)
    if placed is not None:
        assert fits(plan_memory(placed), free) and plan_memory(placed).offloaded
        assert placed == replace(request, kv_device_memory=placed.kv_device_memory)
        return
    found = nearest(request, free, freedom(kv))
    assert len(found) <= 3
    for setting in found:
        assert fits(setting.plan, free) and setting.plan == plan_memory(setting.request)
        # The options, applied by hand to what was asked for, are the request that was judged.
        made = request
        for option, value in zip(setting.options[::2], setting.options[1::2], strict=True):
            made = replace(made, **applied(option, value, made, setting.request))
        assert made == setting.request
    smallest = llama(heads=cut(0.125), layout=kv_layout("int4", head_dim=128, dtype=BF16), context=1024, chunk_size=64)
    if fits(plan_memory(replace(smallest, weights=llama_weights("int4"))), free):
        assert found  # something fits, so something is said


def applied(option: str, value: str, request: Request, wanted: Request) -> dict[str, Any]:
    if option == "--chunk-size":
        return {"chunk_size": int(value)}
    if option == "--kv-device-memory":
        from duolocal.sizes import parse_bytes

        return {"kv_device_memory": parse_bytes(value, option), "outer": wanted.outer}
    if option == "--outer-weights":
        return {"weights": llama_weights(value)}
    if option == "--kv":
        return {"layout": kv_layout(value, head_dim=128, dtype=BF16)}
    if option == "--heads":
        return {"heads": cut(float(value))}
    from duolocal.sizes import parse_tokens

    assert option == "--context"
    return {"context": parse_tokens(value)}


def test_what_changes_no_answer_comes_first() -> None:
    request = llama(heads=cut(1.0))
    kinds = [setting.options[0] for setting in nearest(request, Free(23 * GIB, 64 * GIB), freedom())]
    assert kinds == ["--kv-device-memory", "--heads", "--context"]
    kinds = [setting.options[0] for setting in nearest(request, Free(23 * GIB), freedom())]
    assert kinds == ["--heads", "--context"]
    slightly = plan_memory(request).total - 100 * 2**20
    assert nearest(request, Free(slightly), freedom())[0].options == ("--chunk-size", "2048")


def test_the_longest_context_is_suggested() -> None:
    request = llama(heads=cut(1.0))
    free = Free(16 * GIB)
    (setting,) = (one for one in nearest(request, free, freedom()) if one.options[0] == "--context")
    assert not fits(plan_memory(replace(request, context=setting.request.context + 1024)), free)


# --- where sizes come from ------------------------------------------------------------------------------------------


def planned(model: str, **changes: Any) -> Planned:
    kept = {name: changes.pop(name) for name in ("memory", "host_memory", "disk", "card") if name in changes}
    return plan_settings(LoadSettings(model, **changes), **kept)


def test_every_named_model_can_be_planned_without_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    assert set(NAMED_FORMATS) == set(MODELS)
    for name, model in MODELS.items():
        found = planned(name, card="h100")
        assert found.source is None and any("is not on this machine" in note for note in found.notes)
        # What is published for the file, headers and vocabulary included.
        weights = planned(name, device="cpu", kernels="torch").request.weights.nbytes
        assert abs(weights / model.size_bytes - 1) < 0.04, (name, weights, model.size_bytes)


def test_the_extended_llama_has_the_pattern_published_for_it() -> None:
    for name, published in (
        ("llama3-8b-awq", "Llama-3-8B-Instruct-Gradient-1048k"),
        ("llama3.1-8b-awq", "Meta-Llama-3.1-8B-Instruct"),
    ):
        found = known_model(name).published
        assert found is not None and found.name == published


@pytest.mark.parametrize("tie", [False, True])
def test_an_embedding_is_on_the_device_only_where_it_is_lm_head(tmp_path: Path, tie: bool) -> None:
    """Counted as it is loaded: `meta` stands for a GPU."""
    save_checkpoint(tmp_path, "llama", tie=tie)
    source = open_model(tmp_path)
    loaded = source.load(device="meta", dtype=BF16)
    counted = weights_of(source, kernels="torch", dtype=BF16, device="cuda")
    embedding = loaded.embedding.packed().data
    assert embedding.device.type == ("meta" if tie else "cpu")
    on_host = 0 if tie else loaded.embedding.nbytes
    assert counted.host_bytes == on_host
    assert counted.nbytes == sum(matrix.nbytes for matrix in loaded.matrices()) - on_host
    assert weights_of(source, kernels="torch", dtype=BF16).host_bytes == 0


@pytest.mark.real
def test_a_gguf_is_counted_from_its_header(smollm2_path: Path) -> None:
    source = open_model(smollm2_path)
    weights = weights_of(source, kernels="compiled", dtype=torch.float32)
    assert weights.nbytes == source.size_bytes
    # Rows of Q and K (9 and 3 heads of 64) in another order, 30 layers of 18 blocks of 20 bytes; 61 norms; strings.
    reordered = 30 * (576 + 192) * 576 // 32 * 20
    assert 0 < weights.copies - reordered - 61 * 576 * 4 < 20 * 2**20
    on_gpu = weights_of(source, kernels="triton", dtype=BF16, device="cuda")
    assert on_gpu.copies == 61 * 576 * 2 and on_gpu.nbytes == on_gpu.layer_bytes + on_gpu.outer_bytes
    loaded = source.load()
    assert weights.layer_bytes + weights.outer_bytes == sum(matrix.nbytes for matrix in loaded.matrices())
    by_name = weights_by_arithmetic(source.config, layers="Q4_1", outer="Q8_0", kernels="compiled", dtype=torch.float32)
    for name in ("layer_bytes", "outer_bytes", "output_bytes", "layer_elements", "layer_format", "outer_format"):
        assert getattr(by_name, name) == getattr(weights, name), name


def config_json(folder: Path, **changes: Any) -> None:
    raw = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "max_position_embeddings": 4096,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(raw | changes))


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    config_json(tmp_path)
    found = planned(str(tmp_path), device="cpu")
    layer = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256
    assert found.request.weights.nbytes == (2 * layer + 2 * 1000 * 256) * 2
    assert any("counted from its config.json (F16)" in note for note in found.notes)
    awq = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
    config_json(tmp_path, quantization_config=awq)
    assert planned(str(tmp_path), device="cpu").request.weights.nbytes == 2 * layer // 2 + 2 * layer // 64 * 5 // 2 + (
        2 * 1000 * 256 * 2
    )
    config_json(tmp_path, model_type="bert")
    with pytest.raises(ConfigError):
        planned(str(tmp_path))


@pytest.mark.parametrize(
    ("model", "changes", "error", "message"),
    [
        (
            "org/nowhere",
            {},
            ModelNotFoundError,
            r"^org/nowhere: is not on this machine; `duolocal models fetch` fe",
        ),
        ("llama3-8b-awq", {"card": "riva128"}, SettingsError, r"--card 'riva128' is not in the table: give one of rtx"),
        ("llama3-8b-awq", {"card": "h100", "device": "cpu"}, SettingsError, r"^--card h100 is a GPU and --device is"),
        ("llama3-8b-awq", {"kv": "int3"}, SettingsError, r"^unknown KV format 'int3'"),
        ("llama3-8b-awq", {"context": 4}, SettingsError, r"^context is 4; it must be 16 tokens or more"),
        ("llama3-8b-awq", {"weights": "nf4"}, SettingsError, r"^--weights nf4 makes nf4 of 16-bit weights, and this"),
        ("llama3-8b-awq", {"heads": "nowhere.json"}, SettingsError, r"head pattern nowhere.json: No such file"),
    ],
)
def test_what_cannot_be_planned_is_said(
    model: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        planned(model, **changes)


def test_what_only_a_loaded_model_can_tell_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path))
    found = planned("llama3-8b-awq", card="rtx4090", context=MILLION)
    assert found.kv == "int4" and any(note.startswith("KV formats are measured on first use") for note in found.notes)
    assert found.request.heads.num_retrieval == 128  # as published
    # As first use starts where memory allows it: nothing waits for a measurement.
    roomy = planned("llama3-8b-awq", card="h100", context=MILLION)
    assert roomy.kv == "int8" and any("planned as it starts" in note for note in roomy.notes)
    config_json(tmp_path, max_position_embeddings=65536)
    fixed: dict[str, Any] = {"device": "cpu", "context": 32768, "kv": "int8", "outer_weights": "int8", "chunk_size": 64}
    small = planned(str(tmp_path), **fixed)
    assert (small.kv, small.request.heads.num_streaming) == ("int8", 0)
    tight = planned(str(tmp_path), **fixed, memory=with_kept_back(small.plan.total) + small.plan.process - 100)
    assert tight.fits and tight.request.heads.num_retrieval == 3  # two thirds
    assert any(note.startswith("its heads are ranked on first use") for note in tight.notes)
    assert tight.line is not None and tight.line.startswith("75% of the KV heads keep the whole context (heads not yet")
    assert "what that costs is not measured for this model" in tight.line
    both = planned("llama3-8b-awq", card="h100", kv="k8v4", heads="all")
    assert not any("ranked" in note or "measured" in note for note in both.notes)


@pytest.mark.real
def test_what_is_known_of_a_model_is_used(smollm2_path: Path) -> None:
    found = planned(str(smollm2_path))
    assert (found.kv, found.request.heads.num_retrieval) == ("k8v4", 45)


# --- saved sessions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["16", "int4"])
def test_a_saved_session_has_the_size_that_was_planned(tmp_path: Path, kv: str) -> None:
    """Beside the text all but a few per cent is counted exactly."""
    import numpy as np

    from duolocal.engine.turns import Turn
    from duolocal.sessions.conversation import turns_to_json
    from duolocal.sessions.folder import KINDS, ContextFolder, NewSegment, Segments

    config = tiny_config(num_layers=4, num_kv_heads=4, head_dim=32)
    heads = choose_heads(0.5, num_layers=4, num_kv_heads=4, fingerprint=None, can_rank=True).plan
    weights = weights_by_arithmetic(config, layers="F32", outer="F32", kernels="torch", dtype=torch.float32)
    layout = kv_layout(kv, head_dim=32, dtype=torch.float32)
    request = Request(config, heads, layout, weights, 32 * 1024, 64, torch.float32, "torch")
    plan = plan_memory(request)
    column = heads.num_retrieval * layout.record_bytes
    folder = ContextFolder.create(tmp_path / "a.duo")
    ids = tuple(np.random.default_rng(0).integers(0, 150_000, request.context).tolist())
    turns = turns_to_json([Turn(1, None, "document", ids, text="word " * 26_000)])  # four letters a token
    segments: Segments = {kind: [] for kind in KINDS} | {
        "blocks": [NewSegment(1, column * request.max_blocks, lambda: bytes(column * request.max_blocks))],
        "turns": [NewSegment(1, len(turns), lambda: turns)],
        "rings": [NewSegment(1, plan.device.windows, lambda: bytes(plan.device.windows))],
    }
    folder.commit({"kind": "session"}, segments)
    written = folder.nbytes
    folder.close()
    assert abs(session_bytes(request, plan) / written - 1) < 0.01


def test_the_headline_fits_a_card_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million tokens on 24 GiB, nothing set by hand, on any machine: published heads at 50%, every block there."""
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("DUOLOCAL_HEAD_PATTERNS", raising=False)
    monkeypatch.setattr("duolocal.heads.known.fetch_small", lambda urls, *_, **__: pytest.fail(f"asked for {urls}"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: pytest.fail("looked at this machine's memory"))
    found = planned("llama3-8b-awq", context=MILLION, memory=24 * GIB, card="rtx4090")
    assert found.fits and not found.plan.offloaded and found.plan.with_process <= 24 * GIB
    assert found.request.heads.num_retrieval == 128
    assert any("pattern of Llama-3-8B-Instruct-Gradient-1048k" in note for note in found.notes)
    assert not any("quality past" in note for note in found.notes)  # it was trained for that


def test_blocks_beside_a_named_card_are_asked_for() -> None:
    asked: dict[str, Any] = {"context": MILLION, "heads": "all", "kv": "int4", "card": "rtx4090"}
    assert not planned("llama3-8b-awq", **asked).fits
    there = planned("llama3-8b-awq", **asked, host_memory=64 * GIB)
    assert there.fits and there.plan.offloaded
