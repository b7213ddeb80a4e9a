"""What is kept of one input: its summary or its error, and all that it depended on."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

FORMAT = "duolocal-summary-1"
# First in every line, so that the torn beginning of one is still known as ours.
LINE_START = f'{{"format": "{FORMAT}", '.encode()


@dataclass(frozen=True)
class Timings:
    """Seconds that one input took."""

    load_s: float = 0.0  # reading and converting the file
    prefill_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True)
class Record:
    """One input of a job; either `summary` or `error` is set."""

    index: int  # among the inputs
    name: str
    source: str
    digest: str | None  # SHA-256 of the file's bytes
    occurrence: int  # of the same bytes among the inputs before it
    kind: str | None  # "text", "pdf" …
    tokens: int | None  # of the document
    parts: int  # that it was read in; 1 where it fits
    levels: int  # of merging; 0 where there was nothing to merge
    summary: str | None
    # "stop"; "length": cut off by max_tokens; "sentence": ended with a whole one where --length ends; "repeat": it went
    # round in circles; "context"; "near-empty": the text itself; "skipped": left out of a folder, see `error`
    finish_reason: str | None
    parts_cut: int  # summaries of parts that were cut off by max_tokens
    prompt_tokens: int  # read for this input, over all parts and merges
    completion_tokens: int
    timings: Timings
    notes: tuple[str, ...]
    error: str | None
    settings: Mapping[str, Any]
    settings_digest: str
    finished_at: str  # UTC
    version: str  # of duolocal
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)  # fields of a later version; kept

    @property
    def cut_off(self) -> bool:
        """Whether max_tokens or the context ended the summary."""
        return self.finish_reason in ("length", "context")

    def to_line(self) -> bytes:
        """Return the record as a line of JSON with its line break."""
        value = {key: item for key, item in asdict(self).items() if key != "extra"}
        text = json.dumps({"format": FORMAT, **value, **self.extra}, ensure_ascii=False)
        # Undecodable file names hold lone surrogates, which JSON can write and UTF-8 cannot.
        return text.encode("utf-8", "backslashreplace") + b"\n"


_NAMES = frozenset(item.name for item in fields(Record)) - {"extra"}
_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "source", "settings_digest", "finished_at", "version"), (str,)),
    **dict.fromkeys(("digest", "kind", "summary", "finish_reason", "error"), (str, type(None))),
    **dict.fromkeys(("index", "occurrence", "parts", "levels"), (int,)),
    **dict.fromkeys(("parts_cut", "prompt_tokens", "completion_tokens"), (int,)),
    "tokens": (int, type(None)),
    "settings": (dict,),
    "timings": (dict,),
    "notes": (list,),
}


def parse_line(line: bytes) -> Record | None:
    """Return the record of a line without its line break, or None where it is none."""
    if not line.startswith(LINE_START):
        return None
    try:
        value = json.loads(line)
        timings = Timings(**{key: float(seconds) for key, seconds in value["timings"].items()})
        if any(not isinstance(value[name], types) for name, types in _TYPES.items()):
            return None
        if not all(isinstance(note, str) for note in value["notes"]):
            return None
        if (value["summary"] is None) == (value["error"] is None):
            return None
        known: dict[str, Any] = {name: value[name] for name in _NAMES}
        extra = {key: item for key, item in value.items() if key not in _NAMES and key != "format"}
        known |= {"timings": timings, "notes": tuple(value["notes"]), "extra": extra}
        return Record(**known)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
