"""What a computed context belongs to, and the refusal where a start differs in any of it.

A context is the keys and values that one model computed under one set of choices; with another weight, tokenizer,
head plan, RoPE, KV format or compute type it would be a context of nothing. What only changes rounding (threads, chunk
size, which kernels compute, CPU or GPU in one compute type) may differ.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from duolocal.engine.engine import Engine
from duolocal.errors import SessionError
from duolocal.models.outer_weights import outer_formats
from duolocal.models.rope import describe, rope_frequencies
from duolocal.sessions.fields import Fields
from duolocal.sizes import format_tokens
from duolocal.tokenizer import Tokenizer

# Frequencies are float64, made by a power function that may differ in its last bit between machines. A part in 10^12
# turns position 10^6 by 10^-6 of a radian: less than float32 resolves.
_FREQUENCY_TOLERANCE = 1e-12


class OtherStartError(SessionError):
    """A saved context belongs to another model, or to other choices."""


def identify(engine: Engine, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return, for JSON, what this engine's contexts belong to. Raises SessionError for an engine without a file."""
    source, plan, layout, config = engine.source, engine.plan, engine.cache.layout, engine.config
    if source is None:
        raise SessionError("a context can be kept only of a model that was loaded from a file: use Engine.load")
    frequencies, scale = rope_frequencies(config, engine.context)
    return {
        "weights": source.fingerprint,
        "outer": outer_formats(source),
        "tokenizer": _tokenizer(tokenizer),
        "retrieval": ["".join("x" if flag else "-" for flag in layer) for layer in plan.retrieval],
        "sink_size": plan.sink_size,
        "recent_size": plan.recent_size,
        "rope": {"frequencies": frequencies.tolist(), "scale": float(scale), "shown": describe(config, engine.context)},
        "kv": engine.kv,
        "block_size": layout.block_size,
        "record_bytes": layout.record_bytes,
        "head_dim": layout.head_dim,
        "vocab_size": config.vocab_size,
        "dtype": str(engine.transformer.dtype).removeprefix("torch."),
    }


def compatible(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether a context saved under one identity is one of the other."""
    return _same_rope(saved.get("rope"), now["rope"]) and all(
        saved.get(key) == value for key, value in now.items() if key != "rope"
    )


def check_identity(description: Fields, now: Mapping[str, Any], *, what: str, options: Sequence[str]) -> None:
    """Raise SessionError where a saved context does not belong to this start: what differs, what to start with.

    what: the context, for the message. options: of this start, as `LoadSettings.options` lists them.
    """
    saved = description.inner("identity")
    if isinstance(raw := description.raw("identity"), dict) and compatible(raw, now):
        return
    then = _by_option(description.texts("options"))
    here = _by_option(options)
    differing: list[tuple[str, str]] = []  # what differs, what to start with

    def said(option: str) -> str:
        if option in then:
            return f"{option} {then[option]}"
        return f"no {option}" if option in here else ""

    if saved.raw("weights") != now["weights"]:
        wanted = " ".join(filter(None, (said("--model"), said("--weights"))))
        differing.append((f"other weights ({description.text('model')})", wanted))
    if saved.raw("outer") != now["outer"]:
        seen = " and ".join(saved.texts("outer", longest=2))
        wanted = said("--outer-weights") or said("--model")
        differing.append((f"lm_head and embedding as {seen} (now {' and '.join(now['outer'])})", wanted))
    if saved.raw("tokenizer") != now["tokenizer"]:
        differing.append(("another tokenizer or chat template", said("--model")))
    if any(saved.raw(key) != now[key] for key in ("retrieval", "sink_size", "recent_size")):
        seen = _heads(saved.texts("retrieval"), saved.raw("sink_size"), saved.raw("recent_size"))
        wanted = " ".join(filter(None, map(said, ("--heads", "--sink-size", "--recent-size"))))
        differing.append((f"{seen} (now {_heads(now['retrieval'], now['sink_size'], now['recent_size'])})", wanted))
    if not _same_rope(saved.raw("rope"), now["rope"]):
        seen = saved.inner("rope").text("shown")
        context = f"--context {format_tokens(description.integer('context', most=1 << 31))}"
        wanted = f"{said('--rope')} {context}".strip() if seen.startswith("dynamic") else said("--rope") or context
        shown = f"RoPE scaling {seen} (now {now['rope']['shown']})" if seen != now["rope"]["shown"] else "another RoPE"
        differing.append((shown, wanted))
    if saved.raw("kv") != now["kv"]:
        differing.append((f"KV format {saved.text('kv')} (now {now['kv']})", f"--kv {saved.text('kv')}"))
    if saved.raw("dtype") != now["dtype"]:
        dtype = saved.text("dtype")
        differing.append((f"compute type {dtype} (now {now['dtype']})", f"--dtype {dtype}"))
    if not differing:  # block size, record size or head size: another version of the formats
        differing.append(("blocks of another layout", ""))
    wanted = ", ".join(dict.fromkeys(option for _, option in differing if option))
    advice = f"start with {wanted}, or read the documents again" if wanted else "read the documents again"
    raise OtherStartError(f"{what} was saved with {'; '.join(text for text, _ in differing)}: {advice}")


def _by_option(words: Sequence[str]) -> dict[str, str]:
    return dict(zip(words[::2], words[1::2], strict=False))


def _heads(retrieval: Sequence[str], sink_size: object, recent_size: object) -> str:
    marks = "".join(retrieval)
    return f"{marks.count('x')} of {len(marks)} retrieval heads, sink {sink_size}, recent {recent_size}"


def _same_rope(saved: object, now: Mapping[str, Any]) -> bool:
    if not isinstance(saved, dict):
        return False
    frequencies = saved.get("frequencies")
    if not isinstance(frequencies, list) or len(frequencies) != len(now["frequencies"]):
        return False
    pairs = [*zip(frequencies, now["frequencies"], strict=True), (saved.get("scale"), now["scale"])]
    return all(
        isinstance(then, float) and abs(then - value) <= _FREQUENCY_TOLERANCE * abs(value) for then, value in pairs
    )


def _tokenizer(tokenizer: Tokenizer) -> str:
    # The map between text and ids alone would take a conversation on in another template's words.
    return hashlib.sha256(f"{tokenizer.fingerprint}\n{tokenizer.chat_template or ''}".encode()).hexdigest()
