"""The native format: exact for every kind of weight, opened like any model, refused where it was not written so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from safetensors import safe_open

from duolocal.errors import DuoLocalError, ModelFileError
from duolocal.models import native_writer
from duolocal.models.assemble import layer_roles, roles
from duolocal.models.loader import ModelSource, open_model
from duolocal.models.native import NativeWeights, role_key
from duolocal.models.native_config import config_as_json, config_from_json
from duolocal.models.native_writer import write_native
from duolocal.quant.grouped import GroupedWeight, group, ungroup
from duolocal.quant.weight import Weight
from duolocal.tokenizer import load_tokenizer
from tests.loading import LINEARS, loaded_state
from tests.model_files import random_awq, write_gguf
from tests.tiny import ARCHITECTURES, ROPE_SCALINGS, Architecture, huggingface_model, save_checkpoint, tiny_config
from tests.tokenizer_files import LLAMA3_SPLIT, byte_level

CPU = torch.device("cpu")


def convert(source: ModelSource, folder: Path, arrangement: str = "rows", **changes: Any) -> ModelSource:
    arrange: Callable[[Weight], Weight] = group if arrangement == "planes" else lambda weight: weight
    write_native(source, folder, arrangement=arrangement, arrange=arrange, **changes)
    return open_model(folder)


def bits(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous().view(torch.int32) for name, tensor in state.items()}  # tells 0 from -0


def assert_same_values(found: ModelSource, wanted: ModelSource) -> None:
    ours, theirs = bits(loaded_state(found.load())), bits(loaded_state(wanted.load()))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def awq_folder(folder: Path, *, group_size: int = 32) -> None:
    """Make an AWQ checkpoint: random packed layers beside a dense embedding."""
    from safetensors.torch import load_file, save_file

    save_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    shapes = {role.name.partition(".")[0]: role.shape for role in layer_roles(tiny_config(), 0) if len(role.shape) == 2}
    for layer in range(2):
        for seed, (field, module) in enumerate(LINEARS.items()):
            name = f"model.layers.{layer}.{module}"
            del tensors[f"{name}.weight"]
            rows, columns = shapes[field]
            parts, _ = random_awq(10 * layer + seed, columns, rows, group_size)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))


@pytest.mark.parametrize("arrangement", ["rows", "planes"])
@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_1, GGMLType.Q4_0], ids=str)
def test_a_gguf_keeps_every_bit(tmp_path: Path, kind: GGMLType, arrangement: str) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, huggingface_model("llama", vocab_size=32, attention_bias=True), "llama", kind=kind)
    source = open_model(path)
    native = convert(source, tmp_path / "native", arrangement)
    assert native.kind == "native"
    assert (native.config, native.fingerprint, native.weight_format) == (
        source.config,
        source.fingerprint,
        source.weight_format,
    )
    assert native.metadata["tokenizer.ggml.tokens"] == source.metadata["tokenizer.ggml.tokens"]
    assert_same_values(native, source)
    q_proj = native.load().layers[1].q_proj.weight
    assert isinstance(q_proj, GroupedWeight) == (arrangement == "planes" and kind not in (GGMLType.F32, GGMLType.F16))


@pytest.mark.parametrize("arrangement", ["rows", "planes"])
@pytest.mark.parametrize("group_size", [32, 16])  # 16: no planes for it, so it stays as it is
def test_awq_keeps_every_bit(tmp_path: Path, arrangement: str, group_size: int) -> None:
    awq_folder(tmp_path / "awq", group_size=group_size)
    source = open_model(tmp_path / "awq")
    native = convert(source, tmp_path / "native", arrangement)
    assert native.weight_format == f"AWQ int4 g{group_size}"
    assert_same_values(native, source)
    weight = native.load().layers[0].down_proj.weight
    assert isinstance(weight, GroupedWeight) == (arrangement == "planes" and group_size == 32)
    original, back = source.load().layers[0].down_proj.weight.packed(), ungroup(weight).packed()
    assert torch.equal(back.data, original.data)  # what the CPU kernels read of either file is the same
    assert back.zeros is not None and original.zeros is not None and torch.equal(back.zeros, original.zeros)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_folders_of_every_architecture(tmp_path: Path, architecture: Architecture, tie: bool) -> None:
    huggingface_model(architecture, tie=tie).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    source = open_model(tmp_path / "source")
    native = convert(source, tmp_path / "native")
    assert (native.config, native.metadata) == (source.config, {"general.name": "source"})
    assert_same_values(native, source)
    weights = native.load()
    assert (weights.lm_head is weights.embedding) == tie
    assert convert(native, tmp_path / "again").fingerprint == source.fingerprint
    assert_same_values(open_model(tmp_path / "again"), source)


def test_on_the_cpu_matrices_are_views_of_the_file_at_multiples_of_64(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, huggingface_model("llama", vocab_size=33), "llama", kind=GGMLType.Q4_1)
    native = convert(open_model(path), tmp_path / "native")
    assert isinstance(native.tensors, NativeWeights)
    file = tmp_path / "native" / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
        assert all(opened.get_tensor(name).data_ptr() % 64 == 0 for name in names if not name.startswith("pad:"))
    wanted = {role_key(role) for role in roles(native.config)}
    assert {name.partition(":")[0] for name in names} == wanted | {"pad"}
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    for matrix in native.load().matrices():
        at = matrix.packed().data.data_ptr()
        assert any(low <= at < high for low, high in ranges)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(byte_level(LLAMA3_SPLIT, ["<|end_of_text|>"])))
    (tmp_path / "source" / "LICENSE.txt").write_text("as is")
    (tmp_path / "source" / "notes.bin").write_text("not wanted")
    source = open_model(tmp_path / "source")
    native = convert(source, tmp_path / "native")
    assert load_tokenizer(native).fingerprint == load_tokenizer(source).fingerprint
    names = {path.name for path in (tmp_path / "native").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE.txt"} <= names
    assert "notes.bin" not in names


@pytest.mark.parametrize("rope", [*ROPE_SCALINGS])
def test_every_config_is_read_back_as_it_was(rope: str) -> None:
    config = tiny_config(
        "llama", rope=rope, sliding_window=12, eos_ids=(2, 5), rope_freq_factors=tuple(0.1 * i + 1 for i in range(8))
    )
    text = json.dumps(config_as_json(config))
    assert config_from_json(json.loads(text), "here") == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("norm_eps"), "norm_eps is missing"),
        (lambda c: c.update(extra=1), "extra is unknown: written by a newer duolocal?"),
        (lambda c: c.update(num_layers="2"), "num_layers is '2', wanted an integer"),
        (lambda c: c.update(num_layers=True), "num_layers is True, wanted an integer"),
        (lambda c: c.update(architecture="gpt2"), "architecture is 'gpt2', wanted one of llama, mistral"),
        (lambda c: c.update(tie_embeddings=1), "tie_embeddings is 1, wanted true or false"),
        (lambda c: c.update(eos_ids=[1.5]), "eos_ids is [1.5], wanted a list of integers"),
        (lambda c: c.update(eos_ids=7), "eos_ids is 7, wanted a list of at most"),
        (lambda c: c.update(rope_freq_factors=["x"]), "rope_freq_factors is ['x'], wanted a list of numbers"),
        (lambda c: c.update(rope_scaling=None), "rope_scaling is None, wanted an object"),
        (lambda c: c["rope_scaling"].update(kind="odd"), "kind is 'odd', wanted one of none, linear"),
        (lambda c: c["rope_scaling"].pop("factor"), "factor is missing"),
        (lambda c: c.update(num_heads=3), "num_kv_heads is 2, wanted a divisor"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(change: Callable[[dict], Any], said: str) -> None:
    raw = json.loads(json.dumps(config_as_json(tiny_config())))
    change(raw)
    with pytest.raises(DuoLocalError) as caught:
        config_from_json(raw, "here")
    assert str(caught.value).startswith("here") and said in str(caught.value) and "\n" not in str(caught.value)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_header(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header in place; the data and its length stay."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    room = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + room])
    edit(header)
    path.write_bytes(data[:8] + json.dumps(header).encode().ljust(room) + data[8 + room :])


def edit_data(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def rename(header: dict[str, Any], old: str, new: str) -> None:
    header[new] = header.pop(old)


GATE = "layers.1.gate_proj.weight:Q4_1"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda f: edit_config(f, version=2), "is version 2 of the native format, this duolocal reads 1"),
        (lambda f: edit_config(f, version=True), "is version True of the native format"),
        (lambda f: edit_config(f, more=1), "wanted model_type, version and config, and nothing else"),
        (lambda f: (f / "config.json").write_text((f / "config.json").read_text() + " "), "is not the one that was"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: is missing"),
        (edit_data, "the weights are not those that were written (damaged, or edited)"),
        (lambda f: edit_header(f, lambda h: h["__metadata__"].update(version="9")), "is version '9' of the native"),
        (lambda f: edit_header(f, lambda h: h.pop("__metadata__")), "is not of the native format, though"),
        (lambda f: edit_header(f, lambda h: h["__metadata__"].pop("fingerprint")), "key fingerprint is missing or"),
        (lambda f: edit_header(f, lambda h: h["__metadata__"].update(more="x")), "key more is missing or unknown"),
        (lambda f: edit_header(f, lambda h: h["__metadata__"].update(arrangement="x")), "layout 'x', wanted rows or"),
        (lambda f: edit_header(f, lambda h: h["__metadata__"].update(fingerprint="x")), "fingerprint is 'x', wanted"),
        (lambda f: edit_header(f, lambda h: h["__metadata__"].update(source_name="a\nb")), "wanted a short name"),
        (lambda f: edit_header(f, lambda h: rename(h, GATE, "pad:x")), "layers.1.gate_proj.weight is missing"),
        (lambda f: edit_header(f, lambda h: rename(h, GATE, f"{GATE}x")), "consists of Q4_1x, which is no kind"),
        (lambda f: edit_header(f, lambda h: rename(h, "pad:0", "evil")), "evil belongs to no model"),
        (lambda f: edit_header(f, lambda h: rename(h, GATE, GATE.replace("Q4_1", "Q4_0"))), "wanted U8 [96, 36]"),
        (lambda f: edit_header(f, lambda h: h[GATE].update(dtype="I8")), "is I8 [96, 40], wanted U8 [96, 40]"),
        (lambda f: edit_header(f, lambda h: h[GATE].update(shape=[40, 96])), "is U8 [40, 96], wanted U8 [96, 40]"),
        (lambda f: (f / "gguf_metadata.json").write_text("[1]"), "wanted a JSON object"),
        (lambda f: (f / "gguf_metadata.json").write_text('{"a": {"b": 1}}'), "a is {'b': 1}, wanted numbers or"),
        (lambda f: (f / "gguf_metadata.json").write_text('{"a": [1, "b"]}'), "a is [1, 'b'], wanted numbers or"),
    ],
)
def test_what_was_not_written_so_is_refused_in_one_line(tmp_path: Path, edit: Callable[[Path], Any], said: str) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, huggingface_model("llama", vocab_size=33), "llama", kind=GGMLType.Q4_1)
    convert(open_model(path), tmp_path / "native")
    edit(tmp_path / "native")
    with pytest.raises(DuoLocalError) as caught:
        open_model(tmp_path / "native")
    text = str(caught.value)
    assert said in text and "\n" not in text and len(text) < 700


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "source")
    source = open_model(tmp_path / "source")
    out = tmp_path / "new" / "native"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(native_writer, "_append", full)
        with pytest.raises(ModelFileError, match=r"native: cannot be written .No space left.* make room"):
            convert(source, out)
    assert list((tmp_path / "new").iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(native_writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(ModelFileError, match=r"about 0\.0 GB are needed and 0\.0 GB are free"):
            convert(source, out)
    out.mkdir(parents=True)
    (out / "mine").touch()
    with pytest.raises(ModelFileError, match="native: is there already; give a folder that is new or empty"):
        convert(source, out)
    (out / "mine").unlink()
    assert convert(source, out).kind == "native"  # into an empty folder


def test_progress_counts_tensors(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source")
    seen: list[tuple[int, int]] = []
    source = open_model(tmp_path / "source")
    convert(source, tmp_path / "native", on_progress=lambda done, total: seen.append((done, total)))
    count = sum(1 for _ in roles(source.config))
    assert seen == [(number, count) for number in range(1, count + 1)]


def test_one_seed_gives_one_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source")
    source = open_model(tmp_path / "source")
    for name in ("a", "b"):
        convert(source, tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
