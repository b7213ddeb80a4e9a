"""lm_head and embedding in fewer bits: the rounding against float64 and ggml's decoder, what is chosen and said."""

from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from hypothesis import given
from hypothesis import strategies as st

from duolocal import cli
from duolocal.engine.engine import Engine
from duolocal.engine.events import LoadEvents
from duolocal.errors import ModelFileError, SettingsError
from duolocal.kernels.cpu import build
from duolocal.models.loader import open_model
from duolocal.models.native_writer import write_native
from duolocal.models.outer_weights import NAMES, outer_formats, outer_note, quantize_outer
from duolocal.models.weights import ModelWeights
from duolocal.quant import gguf_pack
from duolocal.quant.gguf import GGUFWeight
from duolocal.quant.gguf_pack import quantize_rows
from duolocal.quant.weight import DenseWeight
from duolocal.settings import OUTER_WEIGHTS, LoadSettings
from tests.model_files import write_gguf
from tests.tiny import huggingface_model, save_checkpoint

CPU = torch.device("cpu")
RowFormat = Literal["Q8_0", "Q4_1"]


def quantized(values: torch.Tensor, kind: RowFormat) -> tuple[np.ndarray, np.ndarray]:
    """Return what ggml's own decoder makes of our blocks, [rows, groups, 32] float64, and the scales [rows, groups]."""
    found = quantize_rows(DenseWeight(values), kind, device=CPU)
    assert (found.out_features, found.in_features, found.format) == (*values.shape, kind)
    decoded = gguf.quants.dequantize(found.raw.numpy(), getattr(GGMLType, kind))
    assert torch.equal(found.dequantize(torch.float32), torch.from_numpy(decoded))
    blocks = found.raw.numpy().reshape(values.shape[0], -1, found.type.block_bytes)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[..., 0].astype(np.float64)
    return decoded.astype(np.float64).reshape(*scales.shape, 32), scales


def rtn_q4_1(groups: np.ndarray) -> np.ndarray:
    """Return plain rounding between the least and the largest value, [..., 32] float64."""
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    minimum = low.astype(np.float16).astype(np.float64)
    scale = np.maximum(((high - low) / 15).astype(np.float16).astype(np.float64), 2.0**-24)
    return minimum + scale * np.clip(np.rint((groups - minimum) / scale), 0, 15)


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    magnitude=st.sampled_from((1e-4, 0.02, 1.0, 500.0)),
    shift=st.sampled_from((0.0, 1.0, -3.0)),
    seed=st.integers(0, 1000),
)
def test_rounding_against_float64(rows: int, groups: int, magnitude: float, shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(rows, 32 * groups, generator=generator) + shift) * magnitude
    exact = values.double().numpy().reshape(rows, groups, 32)
    decoded, scales = quantized(values, "Q8_0")
    largest = np.abs(exact).max(-1)
    # A float16 scale: 11 bits, or steps of 2**-24 below the normal range.
    assert np.all(np.abs(scales - largest / 127) <= np.maximum(largest / 127 * 2.0**-11, 2.0**-25) * 1.001)
    assert np.all(np.abs(decoded - exact) <= np.maximum(scales * 0.5, largest - 127 * scales)[..., None] * 1.001)
    decoded, _ = quantized(values, "Q4_1")
    ours = np.square(decoded - exact).sum(-1)
    plain = np.square(rtn_q4_1(exact) - exact).sum(-1)
    # Never worse than plain rounding, but for the last bit: our codes are found in float32.
    assert np.all(ours <= plain * 1.001 + 1e-12)


def test_the_refits_pay() -> None:
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    exact = values.double().numpy().reshape(64, -1, 32)
    ours = np.square(quantized(values, "Q4_1")[0] - exact).sum()
    assert ours < 0.9 * np.square(rtn_q4_1(exact) - exact).sum()


def test_extreme_groups() -> None:
    values = torch.zeros(7, 32)
    values[1] = 0.37
    values[2, 5] = 60000.0
    values[3] = torch.arange(32) * 2.0**-24
    values[4] = 1e-30
    values[5, ::2], values[5, 1::2] = -1.0, 1.0
    values[6] = -2.5
    for kind, tolerance in (("Q8_0", 0.5 / 127), ("Q4_1", 0.5 / 15)):
        decoded, _ = quantized(values, kind)  # type: ignore[arg-type]
        spread = values.double().abs().amax(1).numpy()[:, None, None]
        assert np.all(np.abs(decoded[:, :, :] - values.double().numpy()[:, None]) <= spread * tolerance * 1.01 + 2e-6)
        assert np.all(decoded[0] == 0)
    constant, _ = quantized(torch.full((1, 32), 0.25), "Q4_1")
    assert np.all(constant == 0.25)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_no_scale_can_hold_is_refused(kind: RowFormat, bad: float) -> None:
    values = torch.randn(9, 64)
    values[4, 40] = bad
    with pytest.raises(ModelFileError, match=rf"lm_head: rows \d+ to \d+ have values .* beyond what {kind} can scale"):
        quantize_rows(DenseWeight(values), kind, device=CPU, name="lm_head")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_the_chunk_does_not_matter(kind: RowFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = DenseWeight(torch.randn(50, 96, dtype=torch.bfloat16))
    whole = quantize_rows(weight, kind, device=CPU)
    monkeypatch.setattr(gguf_pack, "_CHUNK_ELEMENTS", 7 * 96)
    seen: list[tuple[int, int]] = []
    parts = quantize_rows(weight, kind, device=CPU, on_progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(parts.raw, whole.raw)
    assert seen == [(done, 50) for done in (7, 14, 21, 28, 35, 42, 49, 50)]


@pytest.mark.parametrize(("wanted", "kind", "bits"), [("int8", "Q8_0", 8.5), ("int4", "Q4_1", 5.0)])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_outer_matrices_are_rounded_and_the_layers_are_not(
    tmp_path: Path, wanted: str, kind: str, bits: float, tie: bool
) -> None:
    huggingface_model("llama", tie=tie).half().save_pretrained(tmp_path)
    source = open_model(tmp_path)
    changed = quantize_outer(source, wanted)
    weights, before = changed.load(), source.load()
    for found, exact in ((weights.embedding, before.embedding), (weights.lm_head, before.lm_head)):
        assert isinstance(found, GGUFWeight) and found.format == kind
        expected = quantize_rows(exact, found.format, device=CPU)  # type: ignore[arg-type]
        assert torch.equal(found.raw, expected.raw)
    assert (weights.lm_head is weights.embedding) == tie
    assert all(isinstance(layer.q_proj.weight, DenseWeight) for layer in weights.layers)
    count = (1 if tie else 2) * 320 * 64
    assert changed.size_bytes == source.size_bytes - count * 2 + count * bits / 8
    assert (changed.fingerprint, changed.config) == (source.fingerprint, source.config)
    note = outer_note(changed)
    assert note is not None and f"{kind} made of f16" in note and f"(--outer-weights {wanted})" in note
    assert ("lm_head and embedding (tied)" in note) == tie
    assert quantize_outer(changed, wanted) is changed


def test_auto_changes_nothing_and_says_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    source = open_model(tmp_path)
    assert quantize_outer(source, "auto") is source and outer_note(source) is None


@pytest.mark.parametrize(
    ("kind", "wanted", "after"),
    [
        (GGMLType.Q8_0, "int8", "Q8_0"),
        (GGMLType.Q4_0, "int8", "Q4_0"),
        (GGMLType.Q4_0, "int4", "Q4_0"),
        (GGMLType.Q8_0, "int4", "Q4_1"),
        (GGMLType.F32, "int8", "Q8_0"),
    ],
    ids=str,
)
def test_only_what_gets_smaller_is_rounded_again(tmp_path: Path, kind: GGMLType, wanted: str, after: str) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, huggingface_model("llama"), "llama", kind=kind)
    source = open_model(path)
    changed = quantize_outer(source, wanted)
    loaded = changed.load()
    assert {loaded.embedding.format, loaded.lm_head.format} == {after}
    note = outer_note(changed)
    assert note is not None
    if after == kind.name:
        assert note == f"lm_head and embedding are as in the file: --outer-weights {wanted} would not make them smaller"
        assert changed.size_bytes == source.size_bytes
        raw = source.load().embedding
        assert isinstance(raw, GGUFWeight) and isinstance(loaded.embedding, GGUFWeight)
        assert torch.equal(raw.raw, loaded.embedding.raw)
    else:
        assert f"embedding {after} made of {kind.name if kind != GGMLType.F32 else 'f32'}" in note


def test_what_cannot_be_had_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    source = open_model(tmp_path)
    with pytest.raises(SettingsError, match="--outer-weights is 'int2': give one of auto, int8, int4"):
        quantize_outer(source, "int2")
    save_checkpoint(tmp_path / "odd", hidden_size=48, head_dim=12, num_attention_heads=4)
    with pytest.raises(SettingsError, match="takes rows of a multiple of 32 values, this model's have 48: leave it"):
        quantize_outer(open_model(tmp_path / "odd"), "int8")
    with pytest.raises(SettingsError, match="--outer-weights is 'int2': give one of auto, int8, int4"):
        LoadSettings(model="a", outer_weights="int2")
    assert NAMES == OUTER_WEIGHTS
    assert LoadSettings(model="a", outer_weights="int4").options() == ["--model", "a", "--outer-weights", "int4"]


@pytest.mark.parametrize("kernels", ["torch", "compiled"])
@pytest.mark.parametrize("wanted", ["int8", "int4"])
def test_an_engine_computes_with_them(tmp_path: Path, kernels: str, wanted: str) -> None:
    if kernels == "compiled" and build.unsupported() is not None:
        pytest.skip(str(build.unsupported()))
    huggingface_model("llama").half().save_pretrained(tmp_path)
    rows: list[int] = []

    class Seen(LoadEvents):
        def quantizing(self, done: int, total: int) -> None:
            rows.append(done)

    engine = Engine.load(
        str(tmp_path),
        context=48,
        kv="32",
        heads="all",
        kernels=kernels,
        threads=1,
        outer_weights=wanted,
        events=Seen(),
    )
    assert rows == [320, 320]
    assert any(f"(--outer-weights {wanted})" in note for note in engine.notes)
    ids = list(range(3, 43))
    found = engine.logits(ids)
    # The same model with the rounded values as a plain float64 matrix.
    oracle = Engine.load(str(tmp_path), context=48, kv="32", heads="all", kernels="torch", dtype="float64")
    loaded = oracle.transformer.weights
    ours = engine.transformer.weights
    oracle.transformer.weights = ModelWeights(
        embedding=DenseWeight(ours.embedding.dequantize(torch.float64)),
        layers=loaded.layers,
        norm=loaded.norm,
        lm_head=DenseWeight(ours.lm_head.dequantize(torch.float64)),
    )
    expected = oracle.logits(ids)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    plain = Engine.load(str(tmp_path), context=48, kv="32", heads="all", kernels="torch", dtype="float64").logits(ids)
    assert (plain - expected).abs().max() > 1e-3 * expected.abs().max()  # else the comparison above says nothing


def test_a_native_file_keeps_them(tmp_path: Path) -> None:
    huggingface_model("llama").half().save_pretrained(tmp_path / "source")
    source = open_model(tmp_path / "source")
    changed = quantize_outer(source, "int4")
    write_native(changed, tmp_path / "native", arrangement="rows", arrange=lambda weight: weight)
    native = open_model(tmp_path / "native")
    ours, wanted = native.load().lm_head, changed.load().lm_head
    assert isinstance(ours, GGUFWeight) and isinstance(wanted, GGUFWeight)
    assert torch.equal(ours.raw, wanted.raw)
    assert native.fingerprint == source.fingerprint
    # Nothing is rounded a second time.
    assert quantize_outer(native, "int4").load().lm_head.format == "Q4_1"
    assert quantize_outer(native, "int4").size_bytes == native.size_bytes


def test_the_command_line_refuses_other_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "--prompt", "x", "--outer-weights", "16"]) == 2
    assert capsys.readouterr().err == "duolocal: --outer-weights is '16': give one of auto, int8, int4\n"


def test_formats_tell_apart_what_the_fingerprint_does_not(tmp_path: Path) -> None:
    """Saved contexts and finished summaries are compared by these."""
    save_checkpoint(tmp_path, vocab_size=64)
    source = open_model(tmp_path)
    sources = [quantize_outer(source, wanted) for wanted in NAMES]
    assert [set(outer_formats(each)) for each in sources] == [{"f32"}, {"Q8_0"}, {"Q4_1"}]
    assert len({each.fingerprint for each in sources}) == 1
    twice = outer_formats(quantize_outer(sources[1], "int4"))
    assert set(twice) == {"Q4_1 of Q8_0"}
