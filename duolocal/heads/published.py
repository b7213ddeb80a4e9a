"""The published layout of DuoAttention's patterns (arXiv 2410.10819, github.com/mit-han-lab/duo-attention).

A folder with config.json, of which sink_size and recent_size are read, and full_attention_heads.tsv: one line per
layer, one gate per KV head, tabs between. Gates are clipped to 0..1, as their loader does: training leaves some a
little below 0, and the order of those says nothing.
"""

import json
import math
from pathlib import Path
from typing import Any

from duolocal.errors import SettingsError
from duolocal.heads.pattern import (
    PATTERN_FORMAT,
    PATTERN_VERSION,
    HeadPattern,
    Table,
    parse_json,
    parse_pattern,
    read_text,
    whole_number,
    write_text,
)

CONFIG_FILE = "config.json"
SCORES_FILE = "full_attention_heads.tsv"
# The paper's own cut for models whose query heads share KV heads; 0.25 for those whose heads do not.
DEFAULT_RATIO = 0.5
_OURS = "duolocal"  # the key in config.json for what the layout has no place for; other loaders pass over it


def read_published(folder: Path) -> HeadPattern:
    """Read a folder in the published layout.

    Raises SettingsError naming the file and what is wrong with it: missing, no table of finite numbers, no sizes.
    """
    where = str(folder)
    scores = _read_scores(folder / SCORES_FILE)
    config = parse_json(read_text(folder / CONFIG_FILE), where=f"head pattern {folder / CONFIG_FILE}")
    if not isinstance(config, dict):
        raise SettingsError(f"{where}: {CONFIG_FILE} must be an object with sink_size and recent_size")
    for name in ("sink_size", "recent_size"):
        if name not in config:
            raise SettingsError(f"{where}: {CONFIG_FILE} lacks {name}")
    ours = config.get(_OURS, {})
    if not isinstance(ours, dict):
        raise SettingsError(f"{where}: {_OURS} in {CONFIG_FILE} must be an object")
    # One reader for one set of fields: what the folder says is put into our own form and read from there.
    defaults = {"default_ratio": DEFAULT_RATIO, "method": _method(config), "model": _model(config)}
    return parse_pattern(
        {
            **defaults,
            **ours,
            "format": PATTERN_FORMAT,
            "version": PATTERN_VERSION,
            "sink_size": whole_number(config, "sink_size", where),
            "recent_size": whole_number(config, "recent_size", where),
            "scores": [list(row) for row in scores],
        },
        where=where,
    )


def write_published(pattern: HeadPattern, folder: Path) -> None:
    """Write a pattern in the published layout, making the folder where it is missing.

    Scores that leave 0..1 are scaled into it, in the same order: other loaders clip. What the layout has no place
    for, such as the secondary scores, goes under "duolocal" in config.json. Raises SettingsError.
    """
    ours: dict[str, Any] = {
        "default_ratio": pattern.default_ratio,
        "method": pattern.method,
        "model": pattern.model,
        "fingerprints": list(pattern.fingerprints),
        "seed": pattern.seed,
        "secondary": pattern.secondary,
        "details": dict(pattern.details),
    }
    config = {
        "model_name": pattern.model or None,
        "sink_size": pattern.sink_size,
        "recent_size": pattern.recent_size,
        _OURS: {key: value for key, value in ours.items() if value not in (None, "", [], {})},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"cannot make the folder {folder}: {error.strerror or error}") from None
    rows = ("\t".join(f"{score:.18e}" for score in row) for row in _unit_range(pattern.scores))
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / SCORES_FILE, "".join(f"{row}\n" for row in rows))


def _read_scores(path: Path) -> Table:
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        row = []
        for cell in line.split("\t"):
            try:
                score = float(cell)
            except ValueError:
                raise SettingsError(f"{path}, line {number}: {cell!r:.40} is not a number") from None
            if not math.isfinite(score):
                raise SettingsError(f"{path}, line {number}: {cell!r:.40} is not a finite number")
            row.append(min(1.0, max(0.0, score)))
        rows.append(tuple(row))
    return tuple(rows)


def _unit_range(scores: Table) -> Table:
    flat = [score for row in scores for score in row]
    low, high = min(flat), max(flat)
    if low >= 0 and high <= 1:
        return scores
    if low == high:
        return tuple(tuple(1.0 for _ in row) for row in scores)
    return tuple(tuple((score - low) / (high - low) for score in row) for row in scores)


def _method(config: dict[str, Any]) -> str:
    """Say from the training options that the published files hold how the gates were made."""
    if config.get("supervision") != "distill":
        return ""
    names = {"lr": "lr", "reg_weight": "reg", "num_steps": "steps", "num_passkeys": "passkeys"}
    found = [f"{name} {config[key]:g}" for key, name in names.items() if isinstance(config.get(key), (int, float))]
    return "DuoAttention's distillation" + (f" ({', '.join(found)})" if found else "")


def _model(config: dict[str, Any]) -> str:
    name = config.get("model_name")
    return name.rstrip("/").rpartition("/")[2] if isinstance(name, str) else ""
