"""A seeded sample of `python -m tests.fuzz`, and the harness itself on readers that do what they must not."""

import random
import struct
from pathlib import Path

import pytest

from duolocal.errors import DuoLocalError, ModelFileError, one_line
from duolocal.models.loader import open_model
from tests.fuzz.damage import HOSTILE, damaged_bytes, damaged_json, damaged_text, json_bytes, nested
from tests.fuzz.gguf_fields import gguf_fields
from tests.fuzz.misbehave import MISBEHAVING, WAYS
from tests.fuzz.run import Readers, run_target, total
from tests.fuzz.seeds import make_seeds
from tests.fuzz.targets import TARGETS

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc (Linux)")
COUNT = 40  # files of each target


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Path:
    return make_seeds(tmp_path_factory.mktemp("fuzz") / "seeds")


def test_a_sample_of_every_target(seeds: Path, tmp_path: Path) -> None:
    readers = Readers(seeds, tmp_path / "file", list(TARGETS))
    tallies = [run_target(name, seeds, tmp_path, count=COUNT, seed=1, readers=readers) for name in TARGETS]
    readers.close()
    lines = "\n".join([*(tally.line() for tally in tallies), *total(tallies).failures])
    assert not total(tallies).failures, lines
    for tally in tallies:
        assert tally.files == COUNT
        assert tally.refused > COUNT * TARGETS[tally.target].least_refused, lines
        assert tally.loaded > 0, lines  # else the first check hides all others
    assert len({kind for tally in tallies for kind in tally.kinds}) > 40, lines  # of refusals
    assert total(tallies).line().startswith(f"total: {COUNT * len(TARGETS):,} files, ")


EXPECTED = {
    "raises": "KeyError",
    "says two lines": "no printable line",
    "says escapes": "no printable line",
    "says too much": "5000 characters",
    "runs a program": "what no file may: os.system",
    "writes a file": "what no file may: writing /",
    "takes memory": "MemoryError",
    "hangs": "hangs",
    "dies": "ended the process with -6",
}


def test_whatever_a_reader_must_not_do_is_a_failure(seeds: Path, tmp_path: Path) -> None:
    seen: dict[str, str] = {}
    keep = tmp_path / "keep"
    readers = Readers(seeds, tmp_path / "file", [MISBEHAVING.name])
    for number in range(60):
        way = random.Random(f"{MISBEHAVING.name} 0 {number}").choice(WAYS)
        if way in seen:
            continue
        tally = run_target(
            MISBEHAVING.name, seeds, tmp_path, count=1, first=number, keep=keep, wall_limit_s=3.0, readers=readers
        )
        (seen[way],) = tally.failures or [f"{tally.loaded} loaded, {tally.refused} refused"]
        kept = keep / f"misbehaving-0-{number}" / "way"
        assert kept.exists() == bool(tally.failures)
        assert not kept.exists() or kept.read_text() == way
    readers.close()
    assert set(seen) == set(WAYS)
    assert (seen.pop("fine"), seen.pop("refuses")) == ("1 loaded, 0 refused", "0 loaded, 1 refused")
    for way, failure in seen.items():
        assert EXPECTED[way] in failure, (way, failure)


def test_damage_is_the_same_for_one_seed_and_another_for_another(seeds: Path, tmp_path: Path) -> None:
    for name, target in TARGETS.items():
        made = []
        for run, seed in enumerate((1, 1, 2, 3)):
            path = target.damage(seeds / target.seeds, tmp_path / name / str(run), random.Random(f"{name} {seed}"))
            files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
            made.append([file.read_bytes() for file in files])
        assert made[0] == made[1], name
        assert made[0] != made[2] or made[0] != made[3], name


def test_the_fields_of_a_gguf_are_found(seeds: Path) -> None:
    content = (seeds / "gguf" / "q4_1.gguf").read_bytes()
    fields, end = gguf_fields(content)
    assert {field.kind for field in fields} == {"count", "length", "type", "value", "dimension", "offset"}
    offsets = [int.from_bytes(content[f.at : f.at + f.size], "little") for f in fields if f.kind == "offset"]
    assert len(offsets) == 21 and offsets == sorted(offsets) and offsets[0] == 0
    assert end < len(content) - max(offsets)


@pytest.mark.parametrize("start", [b"", b"GGUF\x03\0\0\0"])
def test_random_bytes_are_refused(start: bytes, tmp_path: Path) -> None:
    rng, path = random.Random(5), tmp_path / "a.gguf"
    for _ in range(20):
        path.write_bytes(start + rng.randbytes(rng.randrange(2000)))
        with pytest.raises(ModelFileError):
            open_model(path)


def test_a_count_that_the_file_cannot_hold_reserves_no_memory(tmp_path: Path) -> None:
    # 2^23 strings are within the limit on arrays; the file has no room for them.
    key = b"tokenizer.ggml.tokens"
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    content += struct.pack("<IIQ", 9, 8, 1 << 23)
    path = tmp_path / "a.gguf"
    for changed, message in (
        (content, "truncated"),
        (content[:-12] + struct.pack("<IQ", 6, 1 << 23), "truncated"),  # as many float32
        (content[:-8] + struct.pack("<Q", 1 << 62), "more than any real file"),
    ):
        path.write_bytes(changed)
        with pytest.raises(ModelFileError, match=message):
            open_model(path)


def test_kinds_of_damage() -> None:
    rng = random.Random(0)
    assert len({damaged_bytes(b"some bytes" * 9, rng, head=20) for _ in range(100)}) > 80
    assert len({damaged_text("{% if x %}{{ y }}{% endif %}", rng) for _ in range(100)}) > 60
    value = {"a": 1, "b": [1, 2, {"c": "x"}], "d": None}
    made = {json_bytes(damaged_json(value, rng), rng) for _ in range(300)}
    assert len(made) > 150
    assert value == {"a": 1, "b": [1, 2, {"c": "x"}], "d": None}  # a copy is damaged
    depth, inner = 0, nested(rng)
    while not isinstance(inner, int):
        inner, depth = inner[0] if isinstance(inner, list) else inner["a"], depth + 1
    assert depth >= 40
    assert any(isinstance(item, str) and not item.isprintable() for item in HOSTILE)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain: a  b 'é'", "plain: a  b 'é'"),
        ("two\nlines\r\n", "two lines"),
        ("\x1b[2J\x07", "␛[2J␇"),
        ("a\u202eb\ud800\x9b", "a\ufffdb\ufffd\ufffd"),
        ("a\u2028b\x85c", "a b c"),
    ],
)
def test_a_message_is_one_printable_line(text: str, shown: str) -> None:
    assert one_line(text) == shown == str(ModelFileError(text))
    assert shown.isprintable()


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    message = str(DuoLocalError("begin " + "x\n" * 5000 + " end: do this"))
    assert len(message) <= 1000 and message.isprintable()
    assert message.startswith("begin x") and message.endswith("end: do this")
