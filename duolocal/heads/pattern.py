"""The head pattern: a score per layer and KV head, cut at a ratio into a plan; and our own file of it.

Ties are the rule, not the exception: of published gates 81 to 95% exceed 0.5, and many are exactly 1. The published
code adds noise before it cuts; here a rank depends on nothing but the pattern (see `rank_heads`).

The file is JSON, format "duolocal-head-pattern", version 1. What it may hold is `_KEYS`; docs/heads.md explains it.
The published layout is in `published.py`.
"""

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from duolocal.errors import SettingsError
from duolocal.files import write_file
from duolocal.heads.plan import HeadPlan

PATTERN_FORMAT = "duolocal-head-pattern"
PATTERN_VERSION = 1
MAX_FILE_BYTES = 4 * 2**20  # 128 layers of 128 KV heads with two scores take less than one MiB
MAX_HEADS = 2**16
MAX_WINDOW = 2**31 - 1  # tokens: positions are 32-bit numbers

Table = tuple[tuple[float, ...], ...]  # [num_layers][num_kv_heads]
Place = tuple[int, int]  # layer, KV head

_REQUIRED = ("sink_size", "recent_size", "default_ratio", "scores")
_OPTIONAL = (
    "model",
    "fingerprints",
    "num_layers",
    "num_kv_heads",
    "method",
    "seed",
    "secondary",
    "details",
)
_KEYS = ("format", "version", *_REQUIRED, *_OPTIONAL)


@dataclass(frozen=True)
class HeadPattern:
    """Retrieval scores [num_layers][num_kv_heads], higher means more in need of the whole context.

    Invariant: the tables are full, of one shape, and finite; sizes and ratio are in range.
    """

    scores: Table
    sink_size: int  # tokens
    recent_size: int  # tokens
    default_ratio: float  # of retrieval heads
    source: str  # for people: where it was read
    secondary: Table | None = None  # decides between equal scores
    method: str = ""
    model: str = ""  # its name, for people
    fingerprints: tuple[str, ...] = ()  # of the weights it was made with
    seed: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)  # settings and figures of the method; JSON values

    def __post_init__(self) -> None:
        if not self.scores or len({len(row) for row in self.scores}) != 1 or not self.scores[0]:
            self._refuse("scores must be a full table, one row per layer, one number per KV head")
        if self.num_layers * self.num_kv_heads > MAX_HEADS:
            self._refuse(f"{self.num_layers} layers × {self.num_kv_heads} KV heads are more than any model has")
        if self.secondary is not None and [len(r) for r in self.secondary] != [len(r) for r in self.scores]:
            self._refuse("secondary must be a table of the same shape as scores")
        for table in (self.scores, self.secondary or ()):
            if not all(math.isfinite(score) for row in table for score in row):
                self._refuse("a score is not a finite number")
        for name, size, least in (("sink_size", self.sink_size, 0), ("recent_size", self.recent_size, 1)):
            if not least <= size <= MAX_WINDOW:
                self._refuse(f"{name} is {size!r:.20}; it must lie between {least} and {MAX_WINDOW}")
        if not 0 <= self.default_ratio <= 1:
            self._refuse(f"default_ratio is {self.default_ratio:g}; it must lie between 0 and 1")

    def _refuse(self, what: str) -> None:
        raise SettingsError(f"{self.source}: {what}")

    @property
    def num_layers(self) -> int:
        return len(self.scores)

    @property
    def num_kv_heads(self) -> int:
        return len(self.scores[0])

    def ranking(self) -> list[Place]:
        """Return all (layer, KV head), the one most in need of the whole context first."""
        return rank_heads(self.scores, self.secondary)

    def cut(self, ratio: float, *, sink_size: int | None = None, recent_size: int | None = None) -> HeadPlan:
        """Return the plan whose round(ratio · heads) best-ranked heads are retrieval heads.

        A layer may get any number of them, from none to all. Sizes are the pattern's own where None. Raises
        SettingsError for a ratio outside 0..1.
        """
        if not 0 <= ratio <= 1:
            raise SettingsError(f"the retrieval ratio is {ratio:g}; it must lie between 0 and 1")
        ranked = self.ranking()
        chosen = set(ranked[: round(ratio * len(ranked))])
        return HeadPlan(
            retrieval=tuple(
                tuple((layer, head) in chosen for head in range(len(row))) for layer, row in enumerate(self.scores)
            ),
            sink_size=self.sink_size if sink_size is None else sink_size,
            recent_size=self.recent_size if recent_size is None else recent_size,
            source=f"{self.source}, {len(chosen)} of {len(ranked)} KV heads",
        )


def rank_heads(scores: Sequence[Sequence[float]], secondary: Sequence[Sequence[float]] | None = None) -> list[Place]:
    """Return all (layer, KV head), the best first: by score, then secondary score, then spread over the layers.

    scores, secondary: [num_layers][num_kv_heads], higher is better. Among heads that are equal in both, the next is
    always one of the layer that has the fewest ranked heads so far, then the lower layer, then the lower head:
    where nothing is known of them, a cut through a tie should not give all to the first layers and leave the last
    without any. A larger cut only adds heads.
    """

    def key(place: Place) -> tuple[float, float]:
        layer, head = place
        return -scores[layer][head], 0.0 if secondary is None else -secondary[layer][head]

    places = sorted(((layer, head) for layer, row in enumerate(scores) for head in range(len(row))), key=key)
    ranked: list[Place] = []
    per_layer = [0] * len(scores)
    for _, tied in groupby(places, key=key):
        # The n-th head that a layer has in this tie comes when the layer has n more than it had before.
        turns = []
        for layer, head in tied:  # ascending: sorting is stable
            turns.append((per_layer[layer], layer, head))
            per_layer[layer] += 1
        ranked += [(layer, head) for _, layer, head in sorted(turns)]
    return ranked


def read_json_pattern(path: Path) -> HeadPattern:
    """Read a pattern file of our own. Raises SettingsError naming the file and what is wrong with it."""
    return parse_pattern(parse_json(read_text(path), where=f"head pattern {path}"), where=str(path))


def write_json_pattern(pattern: HeadPattern, path: Path) -> None:
    """Write a pattern as our JSON, one line of scores per layer, whole or not at all.

    Reading it returns an equal pattern but for `source`. Raises SettingsError where it cannot be written.
    """
    head: dict[str, Any] = {
        "format": PATTERN_FORMAT,
        "version": PATTERN_VERSION,
        "model": pattern.model,
        "fingerprints": list(pattern.fingerprints),
        "num_layers": pattern.num_layers,
        "num_kv_heads": pattern.num_kv_heads,
        "sink_size": pattern.sink_size,
        "recent_size": pattern.recent_size,
        "default_ratio": pattern.default_ratio,
        "method": pattern.method,
        "seed": pattern.seed,
        "details": dict(pattern.details),
    }
    kept = {key: value for key, value in head.items() if value not in (None, "", [], {})}
    tables = {"scores": pattern.scores} | ({"secondary": pattern.secondary} if pattern.secondary else {})
    text = json.dumps(kept, indent=2, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    for name, table in tables.items():
        rows = ",\n".join(f"    {json.dumps(row)}" for row in table)
        text += f',\n  "{name}": [\n{rows}\n  ]'
    write_text(path, text + "\n}\n")


def parse_pattern(data: Any, *, where: str) -> HeadPattern:
    """Return the pattern in decoded JSON; raises SettingsError that begins with `where`."""

    def refuse(what: str) -> SettingsError:
        return SettingsError(f"{where}{what}")

    if not isinstance(data, dict) or data.get("format") != PATTERN_FORMAT:
        raise refuse(f" is not a head pattern: its format is not {PATTERN_FORMAT!r}")
    if data.get("version") != PATTERN_VERSION:
        raise refuse(f": version {data.get('version')!r:.40} is unknown; this duolocal reads version {PATTERN_VERSION}")
    unknown = [key for key in data if key not in _KEYS]
    if unknown:
        raise refuse(f": {unknown[0]!r:.40} is no part of version {PATTERN_VERSION}; a newer duolocal may know it")
    missing = [key for key in _REQUIRED if key not in data]
    if missing:
        raise refuse(f": {missing[0]} is missing")
    fingerprints = data.get("fingerprints", [])
    if not isinstance(fingerprints, list) or not all(isinstance(item, str) for item in fingerprints):
        raise refuse(": fingerprints must be a list of texts")
    details = data.get("details", {})
    if not isinstance(details, dict):
        raise refuse(": details must be an object")
    pattern = HeadPattern(
        scores=_table(data["scores"], "scores", where),
        sink_size=whole_number(data, "sink_size", where),
        recent_size=whole_number(data, "recent_size", where),
        default_ratio=_number(data["default_ratio"], "default_ratio", where),
        source=where,
        secondary=None if data.get("secondary") is None else _table(data["secondary"], "secondary", where),
        method=_text(data, "method", where),
        model=_text(data, "model", where),
        fingerprints=tuple(fingerprints),
        seed=None if data.get("seed") is None else whole_number(data, "seed", where),
        details=details,
    )
    for name, found in (("num_layers", pattern.num_layers), ("num_kv_heads", pattern.num_kv_heads)):
        if name in data and data[name] != found:
            raise refuse(f": {name} is {data[name]!r:.40}, but the scores have {found}")
    return pattern


def parse_json(text: str, *, where: str) -> Any:
    """Return decoded JSON; raises SettingsError, also for what is too deep or too long to decode."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        detail = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise SettingsError(f"{where} is not JSON: {detail}") from None


def read_text(path: Path) -> str:
    """Return what a small UTF-8 file holds; raises SettingsError for one that is missing, too large, or no file."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise SettingsError(f"head pattern {path} is no ordinary file: give a pattern file or folder")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"head pattern {path}: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise SettingsError(f"head pattern {path} has more than {MAX_FILE_BYTES >> 20} MiB: it is not a head pattern")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SettingsError(f"head pattern {path} is not text") from None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; raises SettingsError."""
    try:
        write_file(path, text)
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror or error}") from None


def whole_number(data: Mapping[str, Any], name: str, where: str) -> int:
    """Return data[name] as an int; raises SettingsError for a text, a fraction or a truth value."""
    value = data.get(name)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise SettingsError(f"{where}: {name} is {value!r:.40}; it must be a whole number")
    return value


def _open_without_waiting(path: str, flags: int) -> int:
    # A pipe that nobody writes to would block for ever; Windows has neither the flag nor such pipes.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _table(value: Any, name: str, where: str) -> Table:
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise SettingsError(f"{where}: {name} must be a full table, one row per layer, one number per KV head")
    return tuple(tuple(_number(score, f"a value of {name}", where) for score in row) for row in value)


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    raise SettingsError(f"{where}: {name} is {value!r:.40}, not a number")


def _text(data: Mapping[str, Any], name: str, where: str) -> str:
    value = data.get(name, "")
    if not isinstance(value, str):
        raise SettingsError(f"{where}: {name} is {value!r:.40}; it must be a text")
    return value
