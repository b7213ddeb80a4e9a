"""Kinds of damage: to bytes, to JSON values and to text. Everything is drawn from the generator that is given."""

import copy
import json
import random
import struct
from collections.abc import Sequence
from typing import Any

EXTREMES = (
    b"\0" * 8,
    b"\xff" * 8,
    struct.pack("<Q", 1 << 63),
    struct.pack("<Q", 1 << 40),
    struct.pack("<Q", 1 << 31),
    struct.pack("<q", -1),
    struct.pack("<d", float("nan")),
    struct.pack("<Q", 7),
)
# What a field of length, count or offset is set to, besides its neighbours.
NUMBERS = (
    0,
    1,
    2,
    3,
    5,
    8,
    31,
    255,
    1 << 16,
    1 << 20,
    1 << 24,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 63,
    (1 << 64) - 1,
)
# In names and messages: line breaks, terminal escapes, a bell, right-to-left marks, what no UTF-8 can hold.
NASTY_TEXTS = (
    "",
    "\n",
    "\r\nduolocal: all is well",
    "\x1b[2J\x1b]0;owned\x07",
    "\x9b31m",
    "\u202eevil\u2066",
    "\u2028\u2029\x85",
    "\ud800",
    "\0",
    "a" * 5000,
    "é" * 70,
    "../../etc/passwd",
    "%s%n{0.__class__}",
)
HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    31,
    2**31,
    2**53 + 1,
    2**64,
    10**400,
    -0.5,
    0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    "silu",
    "true",
    [],
    [1, "x"],
    [[]],
    [None] * 50,
    {},
    {"type": "Sequence"},
    {"id": 3},
    {"rope_type": "yarn"},
    {"quant_method": "awq"},
    *NASTY_TEXTS,
)


def damaged_bytes(content: bytes, rng: random.Random, *, head: int | None = None) -> bytes:
    """Return `content` with one kind of damage, most of it within the first `head` bytes."""
    data = bytearray(content)
    head = len(data) if head is None else min(head, len(data))
    at = rng.randrange(head if rng.random() < 0.8 else len(data)) if data else 0
    kind = rng.randrange(7)
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
    elif kind == 4:
        other = rng.randrange(len(data))
        data[at:at] = data[other : other + rng.randrange(1, 40)]
    elif kind == 5:
        data[at : at + 1] = rng.choice(NASTY_TEXTS).encode("utf-8", "surrogatepass")
    else:
        run = rng.randrange(1, 200)
        data[at : at + run] = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * min(run, len(data) - at)
    return bytes(data)


def flipped_bits(content: bytes, rng: random.Random) -> bytes:
    """Return `content` with a few bits flipped, its length kept."""
    data = bytearray(content)
    for _ in range(rng.randrange(1, 5)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def set_number(content: bytes, at: int, size: int, rng: random.Random) -> bytes:
    """Return `content` with the little-endian number of `size` bytes at `at` changed: a length, a count, an offset."""
    value = int.from_bytes(content[at : at + size], "little")
    near = (value + 1, value - 1, value * 2, value // 2, value + 32, value - 32, value + (1 << 32))
    changed = rng.choice(near if rng.random() < 0.4 else NUMBERS) % (1 << 8 * size)
    return content[:at] + changed.to_bytes(size, "little") + content[at + size :]


def damaged_text(text: str, rng: random.Random) -> str:
    """Return `text` with a few pieces cut out, doubled, swapped or replaced."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, other = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        other = min(other, at + rng.randrange(1, 60))
        kind = rng.randrange(4)
        if kind == 0:
            text = text[:at] + text[other:]
        elif kind == 1:
            text = text[:other] + text[at:]
        elif kind == 2:
            text = text[:at] + rng.choice(NASTY_TEXTS) + text[other:]
        else:
            text = text[:at] + text[at:other][::-1] + text[other:]
    return text


def nested(rng: random.Random) -> Any:
    """Return something nested deeper than anyone's stack likes."""
    value: Any = 1
    for _ in range(rng.choice((40, 120, 250))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


Path = tuple[Any, ...]


def places(value: Any, *, most: int = 400) -> list[Path]:
    """Return the paths to all values in a JSON value, at most the first `most` of every list or object."""
    found: list[Path] = []

    def walk(inner: Any, path: Path) -> None:
        if path:
            found.append(path)
        if isinstance(inner, dict):
            for key in list(inner)[:most]:
                walk(inner[key], (*path, key))
        elif isinstance(inner, list):
            for index in range(min(len(inner), most)):
                walk(inner[index], (*path, index))

    walk(value, ())
    return found


def damaged_json(value: Any, rng: random.Random, *, more: Sequence[str] = ()) -> Any:
    """Return a copy with one to four values replaced, removed, renamed, swapped or added.

    Shallow places are as likely as all deep ones together. `more`: keys worth setting that are not there.
    """
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        found = places(value)
        if not found:
            return rng.choice(HOSTILE)
        shallow = [path for path in found if len(path) <= 2]
        path = rng.choice(shallow if shallow and rng.random() < 0.5 else found)
        if more and rng.random() < 0.25 and isinstance(value, dict):
            path = (rng.choice(more),)
        holder = value
        for step in path[:-1]:
            holder = holder[step]
        _change(holder, path[-1], rng, _look_up(value, rng.choice(found)))
    return value


def _change(holder: Any, key: Any, rng: random.Random, other: Any) -> None:
    kind = rng.randrange(10)
    present = isinstance(holder, list) or key in holder
    if kind == 0 and present:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict) and present:
        holder[rng.choice(NASTY_TEXTS)] = holder.pop(key)
    elif kind == 2:
        holder[key] = copy.deepcopy(other)
    elif kind == 3 and present and isinstance(holder[key], str):
        holder[key] = damaged_text(holder[key], rng)
    elif kind == 4 and present and isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] += rng.choice((-1, 1, 1 << 16, 1 << 24, 1 << 31, 1 << 62))
    elif kind == 5 and present and isinstance(holder[key], list) and holder[key]:
        holder[key] = holder[key] * rng.choice((2, 50))
    elif kind == 6 and rng.random() < 0.3:
        holder[key] = nested(rng)
    else:
        holder[key] = copy.deepcopy(rng.choice(HOSTILE))


def _look_up(value: Any, path: Path) -> Any:
    for step in path:
        value = value[step]
    return value


def json_bytes(value: Any, rng: random.Random) -> bytes:
    """Write JSON, now and then with a key given twice, or with damage to the text itself."""
    text = json.dumps(value)
    if isinstance(value, dict) and value and rng.random() < 0.05:
        key = rng.choice(list(value))
        text = "{" + json.dumps(key) + ": " + json.dumps(rng.choice(HOSTILE)) + ", " + text[1:]
    data = text.encode()
    if rng.random() < 0.1:
        data = damaged_bytes(data, rng)
    if rng.random() < 0.01:
        data = b"[" * 200_000
    return data
