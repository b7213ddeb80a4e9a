"""Seeded damage to small model files: each is refused in one line or loads whole, and in bounded time."""

import json
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as GGMLType

from duolocal.errors import DuoLocalError
from duolocal.models.loader import open_model
from tests.loading import loaded_state
from tests.model_files import write_gguf
from tests.tiny import huggingface_model

LIMIT_S = 5.0  # for one file; the undamaged ones take about 20 ms
EXTREMES = (b"\0" * 8, b"\xff" * 8, struct.pack("<Q", 1 << 63), struct.pack("<Q", 1 << 40), struct.pack("<q", -1))


def outcome(path: Path) -> str:
    """Open, load and decode a model: "loaded", or the refusal after checking that it is one line."""
    start = time.perf_counter()
    try:
        source = open_model(path)
        state = loaded_state(source.load())
        config = source.config
        assert state["model.embed_tokens.weight"].shape == (config.vocab_size, config.hidden_size)
        result = "loaded"
    except DuoLocalError as error:
        result = str(error)
        assert "\n" not in result
        assert 0 < len(result) < 700
    assert time.perf_counter() - start < LIMIT_S
    return result


def damaged(content: bytes, rng: random.Random, head: int) -> bytes:
    """Return `content` with one kind of damage, most of it within the first `head` bytes."""
    data = bytearray(content)
    kind = rng.randrange(5)
    at = rng.randrange(head if rng.random() < 0.8 else len(data))
    if kind == 0:
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(head)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        extreme = rng.choice(EXTREMES)[: rng.choice((1, 2, 4, 8))]
        data[at : at + len(extreme)] = extreme
    elif kind == 3:
        del data[at : at + rng.randrange(1, 40)]
    else:
        other = rng.randrange(len(data))
        data[at:at] = data[other : other + rng.randrange(1, 40)]
    return bytes(data)


def counts(results: list[str]) -> tuple[int, int]:
    return sum(result == "loaded" for result in results), sum(result != "loaded" for result in results)


def test_damaged_gguf(tmp_path: Path):
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, huggingface_model("llama", vocab_size=32), "llama", kind=GGMLType.Q4_1)
    content = whole.read_bytes()
    assert outcome(whole) == "loaded"
    rng = random.Random(1)
    results = []
    for number in range(120):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(damaged(content, rng, head=3500))
        results.append(outcome(path))
        path.unlink()
    loaded, refused = counts(results)
    assert loaded > 5  # damage to weights or names of no importance: otherwise only the first check is tested
    assert refused > 60
    assert len({result.split(": ", 1)[-1][:12] for result in results}) > 8  # many different checks were reached


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    huggingface_model("qwen2", vocab_size=32).save_pretrained(folder, max_shard_size="60KB")
    assert outcome(folder) == "loaded"
    return folder


def damage_one_file(
    folder: Path, tmp_path: Path, count: int, seed: int, pick: Callable[[Path], list[Path]]
) -> list[str]:
    rng = random.Random(seed)
    results = []
    for number in range(count):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        target = rng.choice(pick(copy))
        content = target.read_bytes()
        target.write_bytes(damaged(content, rng, head=min(len(content), 1500)))
        results.append(outcome(copy))
        shutil.rmtree(copy)
    return results


def test_damaged_shards(folder: Path, tmp_path: Path):
    results = damage_one_file(folder, tmp_path, 60, 2, lambda copy: sorted(copy.glob("*.safetensors")))
    loaded, refused = counts(results)
    assert loaded > 0
    assert refused > 30


def test_damaged_json(folder: Path, tmp_path: Path):
    results = damage_one_file(folder, tmp_path, 40, 3, lambda copy: sorted(copy.glob("*.json")))
    loaded, refused = counts(results)
    assert loaded > 0
    assert refused > 20


HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**64,
    10**400,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "silu",
    "\ud800\n",
    [],
    [1, "x"],
    {},
    {"rope_type": "yarn"},
    {"quant_method": "awq"},
]


def test_hostile_values_in_config_json(folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "config.json"
    raw = json.loads(path.read_text())
    keys = [*raw, "head_dim", "rope_scaling", "quantization_config", "mlp_bias", "unknown_key"]
    rng = random.Random(4)
    results = []
    for _ in range(120):
        changed = dict(raw)
        for key in rng.sample(keys, rng.choice((1, 1, 1, 2, 4))):
            if rng.random() < 0.1:
                changed.pop(key, None)
            elif key == "rope_parameters" and rng.random() < 0.7:
                inner = rng.choice(("rope_type", "rope_theta", "factor", "original_max_position_embeddings"))
                changed[key] = {"rope_type": rng.choice(("linear", "yarn", "llama3")), inner: rng.choice(HOSTILE)}
            else:
                changed[key] = rng.choice(HOSTILE)
        path.write_text(json.dumps(changed))
        results.append(outcome(copy))
    loaded, refused = counts(results)
    assert loaded > 5
    assert refused > 60


def test_random_bytes_are_refused(tmp_path: Path):
    rng = random.Random(5)
    for number in range(20):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes((b"GGUF\x03\0\0\0" if number % 2 else b"") + rng.randbytes(rng.randrange(2000)))
        assert outcome(path) != "loaded"


def test_a_count_that_the_file_cannot_hold_reserves_no_memory(tmp_path: Path):
    # 2^23 strings are within the limit on arrays; the file has no room for them.
    key = b"tokenizer.ggml.tokens"
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    content += struct.pack("<IIQ", 9, 8, 1 << 23)
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    assert "truncated" in outcome(path)
    path.write_bytes(content[:-12] + struct.pack("<IQ", 6, 1 << 23))  # as many float32
    assert "truncated" in outcome(path)
    path.write_bytes(content[:-8] + struct.pack("<Q", 1 << 62))
    assert "more than any real file" in outcome(path)
