"""The options of `duolocal bench`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from duolocal.commands.models import CACHE, CONTEXT
from duolocal.commands.parsing import Command, Group
from duolocal.errors import SettingsError
from duolocal.options import ANY, TOKENS, Kind, flagged, listed, number, option, path, repeated
from duolocal.paths import user_path
from duolocal.settings import LoadSettings
from duolocal.sizes import parse_tokens

_PEERS = """\
One process per runner, all on the same .gguf, text and threads, taking turns; llama.cpp in every combination of
flash attention and KV format, and again with the weights requantized to Q4_0, which it computes fastest with.
Needs: pip install "duolocal[peers]". All settings at 32K take hours and some GiB of memory: --llama-flash,
--llama-kv and --no-requantized leave some out.
"""
_DECODE = """\
With --select or --kv-device-memory: decode that reads all blocks, selected ones, and both with the blocks beyond that
much memory, in turns, over a cache of random numbers (no prefill: 128K are a matter of seconds).
"""
_FORMS = """\
Makes the forms in a temporary folder (room for 2 bytes per weight and more), then loads each in fresh processes that
take turns: from nothing to a first token, and from the command line to the chat's first prompt. Heads and KV format are
fixed (all, int8; or what is asked for), so that nothing is measured on a form's first use.
"""
# As in duolocal.bench, which is not imported for --help.
FLASH = ("on", "off")
LLAMA_KV = ("f16", "q8_0", "q4_0")
PEER_NAMES = ("llama.cpp", "transformers")
FORM_NAMES = ("f16", "awq", "native")
SECTIONS = ("a", "b", "c", "d", "e", "f", "g")
_LIMITED = (*PEER_NAMES, "llama.cpp-fa-quantized")
_SIZES = listed(TOKENS, ascending=True)


def _read_limit(text: str, name: str) -> tuple[str, int]:
    peer, _, size = text.partition("=")
    if peer not in _LIMITED or not size:
        raise ValueError(text)
    return peer, parse_tokens(size, name)


def _read_folder(text: str, name: str) -> Path:
    folder = user_path(text)
    if not folder.is_dir():
        raise ValueError(text)
    return folder


_contexts = partial(option, _SIZES, "lengths", also=("--context",))
_repeats = partial(option, TOKENS, "runs")
_words = partial(option)


def _reads(*reads: str, what: str) -> Callable[..., None]:
    """Return what refuses settings that `what` would not look at; `reads`: "beyond" memory or selected, "prefill"."""

    def refuse(*values: Any) -> None:
        settings: LoadSettings = values[-1]
        beyond = settings.select != "off" or settings.kv_device_memory is not None
        if beyond and "beyond" not in reads:
            raise SettingsError(
                f"{what} reads all blocks, in memory: leave --select and --kv-device-memory out, or use bench decode"
            )
        if settings.prefill != "exact" and "prefill" not in reads:
            raise SettingsError(f"{what} reads exactly: leave --prefill out, or use bench prefill")

    return refuse


@dataclass(frozen=True)
class Decode:
    """What is decoded."""

    contexts: tuple[int, ...] = _contexts(default=(512, 2048, 8192))
    tokens: int = option(TOKENS, "tokens per run", default=32)
    repeats: int = _repeats(default=5)


@dataclass(frozen=True)
class Prefill:
    """What is read."""

    contexts: tuple[int, ...] = _contexts(default=(512, 2048, 8192))
    chunk_sizes: tuple[int, ...] = option(_SIZES, "tokens per prefill step", default=(128, 512, 2048))
    repeats: int = _repeats(default=3)


@dataclass(frozen=True)
class Profile:
    """Where time is looked for."""

    contexts: tuple[int, ...] = _contexts(default=(512, 8192))
    repeats: int = _repeats(default=50)


@dataclass(frozen=True)
class Gpu:
    """What the suite of the GPU kernels does; it has a model of its own."""

    out: Path = option(
        path("give a folder"), "for the JSON and the logs", default=Path("benchmarks/results"), metavar="DIR"
    )
    minutes: float = option(
        number("a number such as 9, at most 1440", lambda value: 0 < value <= 24 * 60),
        "end within so many minutes",
        default=9,
    )
    sections: tuple[str, ...] = _words(
        listed(ANY, SECTIONS),
        "a device, b tests, c kernels, d decode, e prefill, f under memory caps, g tuning",
        default=SECTIONS,
    )


@dataclass(frozen=True)
class Load:
    """How often a model is loaded."""

    repeats: int = _repeats(default=5)
    cold: bool = flagged("drop the files from the page cache before each run")


@dataclass(frozen=True)
class Forms:
    """What is made of a model and loaded."""

    forms: tuple[str, ...] = _words(
        listed(ANY, FORM_NAMES, empty=True),
        f"made of the model: of {', '.join(FORM_NAMES)}, or none",
        default=FORM_NAMES,
    )
    also: tuple[str, ...] = _words(listed(ANY, empty=True), "models to load beside it, by name or path", default=())
    work: Path | None = option(
        Kind(_read_folder, "give a folder that is there"),
        "where to put the forms for the time",
        metavar="DIR",
        default_help="the system's",
    )


@dataclass(frozen=True)
class Peers:
    """With what duolocal is compared, and how."""

    contexts: tuple[int, ...] = _contexts(default=(512, 2048, 8192, 32768))
    tokens: int = option(TOKENS, "tokens per decode run", default=32)
    repeats: int = _repeats(default=3)
    peers: tuple[str, ...] = _words(
        listed(ANY, PEER_NAMES, empty=True), f"of {', '.join(PEER_NAMES)}, or none", default=PEER_NAMES
    )
    limit: tuple[tuple[str, int], ...] = option(
        repeated(Kind(_read_limit, f"give for example {PEER_NAMES[-1]}=8K")),
        "longest context of a peer",
        default=(),
        metavar="PEER=SIZE",
        default_help="transformers=8K llama.cpp-fa-quantized=4K",
    )
    llama_flash: tuple[str, ...] = _words(listed(ANY, FLASH), "llama.cpp's flash attention", default=FLASH)
    llama_kv: tuple[str, ...] = _words(listed(ANY, LLAMA_KV), "llama.cpp's KV formats", default=LLAMA_KV)
    no_requantized: bool = flagged("leave out llama.cpp on Q4_0 weights")
    json: Path | None = option(path("give a file"), "write the JSON to a file too, after every length", metavar="FILE")


def _refuse_forms(options: Forms, load: Load, settings: LoadSettings) -> None:
    _reads(what="bench forms")(settings)
    if (settings.weights, settings.outer_weights) != ("auto", "auto"):
        raise SettingsError("--weights and --outer-weights are not for bench forms: leave them out")


def _refuse_peers(options: Peers, settings: LoadSettings) -> None:
    _reads(what="bench peers")(settings)
    if settings.device not in ("auto", "cpu"):
        raise SettingsError(f"--device is {settings.device!r}: the peers are compared on the CPU; leave it out")


GROUPS = (Group("bench", "measure on this machine"),)
COMMANDS = (
    Command(
        "bench memory",
        "bytes really allocated for the KV cache, by head class",
        "bench_view:bench_memory",
        (CONTEXT,),
        _reads("beyond", what="bench memory"),
    ),
    Command(
        "bench decode",
        "decode speed by length, and the memory bandwidth it comes to; of ways to decode side by side",
        "bench_variants_view:bench_decode",
        (Decode, CACHE),
        _reads("beyond", what="bench decode"),
        _DECODE,
    ),
    Command(
        "bench prefill",
        "prefill speed by length and chunk size; with --prefill sparse, exact and sparse in turns",
        "bench_speed_view:bench_prefill",
        (Prefill, CACHE),
        _reads("prefill", what="bench prefill"),
    ),
    Command(
        "bench profile",
        "where a decode step and a prefill chunk spend their time, operation by operation",
        "bench_profile_view:bench_profile",
        (Profile, CACHE),
        _reads(what="bench profile"),
    ),
    Command(
        "bench gpu",
        "test and measure the GPU kernels on this machine's CUDA device, with random weights",
        "bench_gpu_view:bench_gpu",
        (Gpu,),
    ),
    Command(
        "bench load",
        "time from nothing to a first token, in fresh processes",
        "bench_speed_view:bench_load",
        (Load, CONTEXT),
        _reads(what="bench load"),
    ),
    Command(
        "bench forms",
        "load time and peak memory of a model as it is, as 16-bit safetensors, AWQ and native",
        "bench_forms_view:bench_forms",
        (Forms, Load, CONTEXT),
        _refuse_forms,
        _FORMS,
    ),
    Command(
        "bench peers",
        "speed and memory beside llama.cpp and transformers",
        "bench_peers_view:bench_peers",
        (Peers, replace(CACHE, base=LoadSettings(heads="0.5"))),  # and "all" as a second runner
        _refuse_peers,
        _PEERS,
    ),
)
