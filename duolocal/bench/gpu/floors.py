"""What a figure is compared with: datasheet rates, the bytes and operations that must be, and the targets.

Loads no torch. docs/gpu.md has the formulas in words.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from duolocal.bench.gpu.sizes import K, M
from duolocal.models.config import ModelConfig


@dataclass(frozen=True)
class Datasheet:
    """A GPU by its vendor's datasheet: leads, not measurements."""

    name: str
    bytes_per_s: float
    bf16_flop_per_s: float  # dense, float32 sums
    memory_bytes: float


DATASHEETS = (
    Datasheet("H200", 4.8e12, 989e12, 141e9),
    Datasheet("H100", 3.35e12, 989e12, 80e9),  # SXM
    Datasheet("A100", 2.039e12, 312e12, 80e9),  # SXM, 80 GB
    Datasheet("RTX 4090", 1.008e12, 165e12, 24 * 2.0**30),
    Datasheet("RTX 3090", 0.936e12, 71e12, 24 * 2.0**30),
)
_H100 = DATASHEETS[1]


def datasheet(device_name: str) -> Datasheet | None:
    """Return the entry of a device as torch names it, or None."""
    found = (sheet for sheet in DATASHEETS if sheet.name.replace(" ", "") in device_name.replace(" ", ""))
    return next(found, None)


def linear_bytes(config: ModelConfig, group_size: int) -> int:
    """Return the bytes of the 4-bit matrices of all layers: codes, float16 scales, one byte per zero point."""
    return round(_linear_weights(config) * (0.5 + 3 / group_size))


def lm_head_bytes(config: ModelConfig) -> int:
    """Return the bytes of a 16-bit output matrix."""
    return 2 * config.vocab_size * config.hidden_size


def prefill_flop(config: ModelConfig, tokens: int, *, retrieval: float, window: int) -> float:
    """Return the operations of a prefill of `tokens` from an empty cache.

    retrieval: share of the heads that attend to everything, the others to at most `window` tokens. Causal halves are
    counted as halves; the output matrix is applied once and left out.
    """
    width = config.num_heads * config.head_dim
    causal = tokens * (tokens + 1) / 2
    windowed = causal if tokens <= window else window * (window + 1) / 2 + (tokens - window) * window
    attention = 4 * width * config.num_layers * (retrieval * causal + (1 - retrieval) * windowed)
    return 2 * _linear_weights(config) * tokens + attention


def attention_read_bytes(
    seen: int,
    *,
    num_retrieval: int,
    num_streaming: int,
    head_dim: int,
    itemsize: int,
    record_bytes: int,
    block_size: int,
    sink_size: int,
    recent_size: int,
    exact_recent: int,
) -> int:
    """Return the bytes of keys and values that the decode step of a token that sees `seen` tokens must read."""
    windows = num_retrieval * min(seen, sink_size + exact_recent) + num_streaming * min(seen, sink_size + recent_size)
    first, end = sink_size // block_size, -(-(seen - exact_recent) // block_size)
    return windows * 2 * head_dim * itemsize + num_retrieval * max(0, end - first) * record_bytes


def _linear_weights(config: ModelConfig) -> int:
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    per_layer = config.hidden_size * (2 * q_size + 2 * kv_size + 3 * config.intermediate_size)
    return config.num_layers * per_layer


@dataclass(frozen=True)
class Target:
    """One target beside what was measured; `met` is None where it was not measured."""

    text: str
    measured: str
    met: bool | None


def targets(report: Mapping[str, Any]) -> list[Target]:
    """Return the targets of a report. Milliseconds, set for an H100, are scaled by the datasheets' bandwidths."""
    return list(_targets(report))


def _targets(report: Mapping[str, Any]) -> Iterator[Target]:
    device = str(report.get("device", ""))
    records = [record for section in report.get("sections", {}).values() for record in section.get("records", [])]
    good = [record for record in records if "error" not in record and "skipped" not in record]

    sheet = datasheet(device)
    decode = [r for r in good if r["what"] == "decode" and r["kv"] == "int4"]
    at_1m = _first(decode, context=M, heads="50%")
    if sheet is not None:
        wanted = 8.2 * _H100.bytes_per_s / sheet.bytes_per_s
        yield _at_most(f"decode at 1M, 50% int4: {wanted:.2f} ms (8.2 on an H100, by bandwidth)", at_1m, "ms", wanted)
    else:
        yield _at_least("decode at 1M, 50% int4: 80% of the byte floor", at_1m, "of_floor", 0.8)
    yield _at_least("empty decode: 70% of the byte floor", _first(decode, context=0, heads="50%"), "of_floor", 0.7)

    attention = [r for r in good if r["what"] == "decode_attention" and r["context"] >= 128 * K]
    int4 = [r for r in attention if r["kv"] == "int4"]
    worst = min(int4, key=lambda r: r["of_copy"], default=None)
    yield _at_least("int4 decode attention from 128K on: 85% of the copy bandwidth", worst, "of_copy", 0.85)
    ratios = [
        {"ratio": min(r["us"] for r in rivals) / ours["us"]}
        for ours in int4
        # All heads retrieval: a 16-bit kernel then reads the same tokens.
        if ours["retrieval"] == ours["heads"] and (rivals := _sixteen_bit(good, ours["context"], ours["heads"]))
    ]
    lowest = min(ratios, key=lambda r: r["ratio"], default=None)
    yield _at_least("... and 3.2 × the best 16-bit kernel of this run", lowest, "ratio", 3.2)

    capped = [r for r in good if r["what"] == "capped decode"]
    for text, context in (("1M tokens in 24 GiB", M), ("4.0M tokens in 80 GB", 4_000_000)):
        found = _first(capped, context=context)
        measured = "not measured" if found is None else f"{found['ms']:.2f} ms/token"
        tried = any(r["what"] == "capped decode" and r.get("context") == context and "error" in r for r in records)
        yield Target(text, "failed" if tried else measured, None if found is None and not tried else not tried)

    yield from _selected(good, sheet)

    prefill = [r for r in good if r["what"] == "prefill" and r["context"] == 320 * K]
    ours, dense = ([r for r in prefill if r["heads"] == heads] for heads in ("50%", "all"))
    best = max(ours, key=lambda r: r["tokens_per_s"], default=None)
    if best is not None and dense:
        ratio = best["tokens_per_s"] / max(r["tokens_per_s"] for r in dense)
        yield _at_least("prefill of 320K: 1.70 × our own dense", {"ratio": ratio}, "ratio", 1.7)
    else:
        yield Target("prefill of 320K: 1.70 × our own dense", "not measured", None)
    if len(ours) > 1 and best is not None:
        spread = best["tokens_per_s"] / min(r["tokens_per_s"] for r in ours) - 1
        yield Target("... within 3% over chunk sizes", f"{spread:.1%}", spread <= 0.03)
    else:
        yield Target("... within 3% over chunk sizes", "not measured", None)


def _selected(good: Sequence[Mapping[str, Any]], sheet: Datasheet | None) -> Iterator[Target]:
    """Yield the targets of decode that reads selected blocks."""
    ways = [r for r in good if r["what"] == "selected decode"]
    at_1m, at_128k = (_first(ways, way="selected", context=context) for context in (M, 128 * K))
    away = _first(ways, way="selected, offloaded", context=M)
    if sheet is not None:
        wanted = 2.4 * _H100.bytes_per_s / sheet.bytes_per_s
        yield _at_most(f"selected decode at 1M: {wanted:.2f} ms (2.4 on an H100, by bandwidth)", at_1m, "ms", wanted)
    else:
        yield _at_least("selected decode at 1M: 60% of the byte floor", at_1m, "of_floor", 0.6)
    growth = None if at_1m is None or at_128k is None else {"growth": at_1m["ms"] / at_128k["ms"]}
    yield _at_most("... at most 1.2 × that at 128K", growth, "growth", 1.2)
    slower = None if at_1m is None or away is None else {"slower": away["ms"] / at_1m["ms"]}
    yield _at_most("... at most 2 × that with blocks in host memory", slower, "slower", 2.0)
    gigabytes = None
    if away is not None and "peak_reserved_bytes" in away:
        gigabytes = {"GB": away["peak_reserved_bytes"] / 1e9}
    yield _at_most("... in 8 GB of device memory", gigabytes, "GB", 8.0)


def _sixteen_bit(records: Sequence[Mapping[str, Any]], context: int, heads: int) -> list[Mapping[str, Any]]:
    ours = [r for r in records if r["what"] == "decode_attention" and r["kv"] == "16" and r["retrieval"] == heads]
    library = [r for r in records if r["what"] == "sdpa decode" and r["retrieval"] == heads]
    return [r for r in ours + library if r["context"] == context]


def _first(records: Sequence[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any] | None:
    return next((r for r in records if all(r.get(name) == value for name, value in wanted.items())), None)


def _at_least(text: str, record: Mapping[str, Any] | None, name: str, wanted: float) -> Target:
    if record is None:
        return Target(text, "not measured", None)
    value = record[name]
    return Target(text, f"{value:.2f}" if name == "ratio" else f"{value:.1%}", value >= wanted)


def _at_most(text: str, record: Mapping[str, Any] | None, name: str, wanted: float) -> Target:
    if record is None:
        return Target(text, "not measured", None)
    return Target(text, f"{record[name]:.2f}", record[name] <= wanted)
