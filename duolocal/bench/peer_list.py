"""Which runners a comparison has, what they need, and the refusal where a package or memory is missing."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duolocal.bench.child import Child, runner_command
from duolocal.bench.compare import DUOLOCAL, RunnerSpec
from duolocal.errors import MemoryLimitError, SettingsError
from duolocal.files import replacing
from duolocal.models.loader import ModelSource
from duolocal.models.registry import models_folder
from duolocal.plan.memory import dense_16bit_bytes
from duolocal.settings import LoadSettings

LLAMA_CPP, REQUANTIZED, TRANSFORMERS = "llama.cpp", "llama.cpp Q4_0", "transformers"
PEERS = (LLAMA_CPP, TRANSFORMERS)
# Tokens: beyond these a run would take hours. On CPUs llama.cpp with flash attention and quantized KV is slower than
# with its other settings, in prefill many times.
FLASH_QUANTIZED = "llama.cpp-fa-quantized"
DEFAULT_LIMITS = {TRANSFORMERS: 8192, FLASH_QUANTIZED: 4096}
_PACKAGES = {LLAMA_CPP: ("llama_cpp",), TRANSFORMERS: ("transformers", "accelerate", "gguf")}
_KV_SHARE = {"f16": 1.0, "q8_0": 8.5 / 16, "q4_0": 4.5 / 16}  # of 16 bits
KV_NAMES = tuple(_KV_SHARE)
_LLAMA_BATCH = 512
_BASE_BYTES = 300 << 20  # an interpreter with its libraries


@dataclass(frozen=True)
class PeerChoice:
    """What is compared."""

    peers: tuple[str, ...] = PEERS
    flash: tuple[bool, ...] = (True, False)  # llama.cpp's flash attention
    kv: tuple[str, ...] = KV_NAMES  # llama.cpp's KV formats
    requantized: bool = True  # llama.cpp also on Q4_0
    limits: Mapping[str, int] | None = None  # tokens by peer; None: DEFAULT_LIMITS

    def limit(self, peer: str) -> int | None:
        """Return the longest context of a peer, None where there is none."""
        return {**DEFAULT_LIMITS, **(self.limits or {})}.get(peer)


def check_packages(peers: Sequence[str]) -> None:
    """Raise SettingsError, with what to install, where a peer's package is missing."""
    for peer in peers:
        for package in _PACKAGES[peer]:
            if importlib.util.find_spec(package) is None:
                others = [other for other in peers if other != peer] or ["none"]
                raise SettingsError(
                    f'{peer} needs the package {package}: pip install "duolocal[peers]" (llama-cpp-python builds from '
                    f"source, which takes some minutes and a C++ compiler), or leave it out: --peers {','.join(others)}"
                )


def has_requantized(source: ModelSource, choice: PeerChoice) -> bool:
    """Return whether Q4_0 is another peer beside the file itself."""
    return choice.requantized and LLAMA_CPP in choice.peers and source.weight_format != "Q4_0"


def runner_specs(
    source: ModelSource,
    settings: LoadSettings,
    choice: PeerChoice,
    contexts: Sequence[int],
    *,
    threads: int,
    decode_tokens: int,
    q4_0: Path | None = None,
) -> list[RunnerSpec]:
    """Return all runners, duolocal's first; `q4_0` is the requantized file."""

    def room(peer: str) -> int:
        limit = choice.limit(peer)
        longest = max(context for context in contexts if limit is None or context <= limit)
        return longest + decode_tokens + 2

    specs = []
    for heads in dict.fromkeys((settings.heads, "all")):
        options: dict[str, Any] = {
            "path": str(source.path),
            "context": room(DUOLOCAL),
            "heads": heads,
            "kv": settings.kv,
            "sink_size": settings.sink_size,
            "recent_size": settings.recent_size,
            "threads": threads,
            "kernels": settings.kernels,
            "device": "cpu",
        }
        name = f"duolocal heads={Path(heads).name}" + ("" if settings.kv == "auto" else f" kv={settings.kv}")
        specs.append(RunnerSpec(name, DUOLOCAL, runner_command("duolocal"), options))
    for peer in choice.peers:
        limit = choice.limit(peer)
        if limit is not None and limit < min(contexts):
            continue
        if peer == TRANSFORMERS:
            options = {"path": str(source.path), "threads": threads}
            specs.append(RunnerSpec(peer, peer, runner_command("transformers"), options, limit))
            continue
        for path, name in ((source.path, LLAMA_CPP), (q4_0, REQUANTIZED)):
            if path is not None:
                specs += _llama_cpp(path, name, choice, room(LLAMA_CPP), threads, shortest=min(contexts))
    return specs


def _llama_cpp(
    path: Path, peer: str, choice: PeerChoice, context: int, threads: int, *, shortest: int
) -> list[RunnerSpec]:
    specs = []
    for flash in choice.flash:
        for kv in choice.kv:
            value = kv if flash else "f16"  # llama.cpp quantizes values only with flash attention
            setting = f"fa {kv}" if flash else kv if kv == value else f"{kv}/{value}"
            options = {"path": str(path), "context": context, "threads": threads}
            options |= {"flash": flash, "key": kv, "value": value}
            limits = [choice.limit(LLAMA_CPP), choice.limit(FLASH_QUANTIZED) if flash and kv != "f16" else None]
            limit = min((limit for limit in limits if limit is not None), default=None)
            if limit is not None and limit < shortest:
                continue
            specs.append(RunnerSpec(f"{peer} {setting}", peer, runner_command("llama_cpp"), options, limit))
    return specs


def check_room(source: ModelSource, specs: Sequence[RunnerSpec], longest: int, *, available: int) -> None:
    """Raise MemoryLimitError where all runners together, which stay loaded, would need more than there is.

    longest: tokens. A rough sum, made before an hour of work is lost.
    """
    needed = sum(needed_bytes(source, spec, longest) for spec in specs)
    if needed > available:
        raise MemoryLimitError(
            f"{len(specs)} runners at once need about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free: "
            "compare fewer (--llama-flash on --llama-kv f16,q8_0, --no-requantized) or give shorter --contexts"
        )


def needed_bytes(source: ModelSource, spec: RunnerSpec, longest: int) -> int:
    """Estimate what one runner takes at most, up to `longest` tokens."""
    context, config = min(longest, spec.limit or longest), source.config
    kv = dense_16bit_bytes(config, context)
    if spec.peer == TRANSFORMERS:  # all weights as float32, and parts of them twice while loading
        matrices = source.size_bytes * 32 // 4
        return _BASE_BYTES + matrices + 2 * kv
    if spec.peer == DUOLOCAL:  # at most: all heads, 16 bits
        return _BASE_BYTES + source.size_bytes + kv
    shares = (_KV_SHARE[spec.options["key"]] + _KV_SHARE[spec.options["value"]]) / 2
    scores = 0 if spec.options["flash"] else config.num_heads * context * _LLAMA_BATCH * 4
    logits = config.vocab_size * _LLAMA_BATCH * 4
    return _BASE_BYTES // 2 + 2 * source.size_bytes + int(kv * shares) + scores + logits


def requantized_path(source: ModelSource) -> Path:
    """Return where the Q4_0 file of a model lies, or will."""
    return models_folder() / "requantized" / f"{source.path.stem}-{source.fingerprint[:12]}-Q4_0.gguf"


def requantize(source: ModelSource, *, threads: int) -> Path:
    """Return the model's weights as a Q4_0 file in the user's cache folder, made by llama.cpp where it is missing."""
    target = requantized_path(source)
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(target) as made,
            Child("llama.cpp", runner_command("quantize"), threads=threads) as child,
        ):
            child.ask("quantize", path=str(source.path), target=str(made), threads=threads)
    except OSError as error:
        raise SettingsError(
            f"cannot write {target}: {error.strerror or error}; set DUOLOCAL_CACHE to a folder you can write to, or "
            "leave it out: --no-requantized"
        ) from error
    return target


def check_model(source: ModelSource, peers: Sequence[str]) -> None:
    """Raise SettingsError where the peers cannot read the model."""
    if peers and source.kind != "gguf":
        raise SettingsError(f"{source.path} is no .gguf file, which is what the peers read: give one, or --peers none")
