"""Options and dispatch of `duolocal bench`. Light: the command line builds its parser with it for `--help`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from duolocal.errors import SettingsError
from duolocal.settings import LoadSettings, parse_tokens

if TYPE_CHECKING:
    from rich.console import Console

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
_LISTS = {"--llama-flash": ("on", "off"), "--llama-kv": ("f16", "q8_0", "q4_0")}
# As in duolocal.bench.peer_list, which is not imported for --help.
_PEER_NAMES = ("llama.cpp", "transformers")
_FORM_NAMES = ("f16", "awq", "native")  # as in duolocal.bench.forms
_LIMITED = (*_PEER_NAMES, "llama.cpp-fa-quantized")

_P = TypeVar("_P", bound=argparse.ArgumentParser)


def add_bench_parsers(what: "argparse._SubParsersAction[_P]", add_model_options: Callable[..., None]) -> dict[str, _P]:
    """Add what can be measured to the subparsers of `bench`; return the new parsers by name ("bench memory")."""
    parsers: dict[str, _P] = {}

    def add(name: str, text: str, **more: Any) -> _P:
        parser = what.add_parser(name, help=text, allow_abbrev=False, **more)
        parsers[f"bench {name}"] = parser
        return parser

    memory = add("memory", "bytes really allocated for the KV cache, by head class")
    add_model_options(memory)

    decode = add(
        "decode",
        "decode speed by length, and the memory bandwidth it comes to; of ways to decode side by side",
        description=_DECODE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _contexts(decode, "512,2K,8K")
    decode.add_argument("--tokens", default="32", metavar="N", help="tokens per run (default: %(default)s)")
    _repeats(decode, 5)
    add_model_options(decode, context=False)

    prefill = add("prefill", "prefill speed by length and chunk size; with --prefill sparse, exact and sparse in turns")
    _contexts(prefill, "512,2K,8K")
    prefill.add_argument(
        "--chunk-sizes", default="128,512,2K", metavar="LIST", help="tokens per prefill step (default: %(default)s)"
    )
    _repeats(prefill, 3)
    add_model_options(prefill, context=False)

    profile = add("profile", "where a decode step and a prefill chunk spend their time, operation by operation")
    _contexts(profile, "512,8K")
    _repeats(profile, 50)
    add_model_options(profile, context=False)

    gpu = add("gpu", "test and measure the GPU kernels on this machine's CUDA device, with random weights")
    gpu.add_argument(
        "--out", default="benchmarks/results", metavar="DIR", help="for the JSON and the logs (default: %(default)s)"
    )
    gpu.add_argument("--minutes", default="9", metavar="N", help="end within so many minutes (default: %(default)s)")
    gpu.add_argument(
        "--sections",
        default="a,b,c,d,e,f,g",
        metavar="LIST",
        help="a device, b tests, c kernels, d decode, e prefill, f under memory caps, g tuning (default: %(default)s)",
    )
    # It has a model of its own.
    gpu.set_defaults(model="random", kv="int4", heads="0.5", device="cuda", threads=None)

    load = add("load", "time from nothing to a first token, in fresh processes")
    _repeats(load, 5)
    load.add_argument("--cold", action="store_true", help="drop the model file from the page cache before each run")
    add_model_options(load)

    forms = add(
        "forms",
        "load time and peak memory of a model as it is, as 16-bit safetensors, AWQ and native",
        description=_FORMS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    forms.add_argument(
        "--forms",
        default=",".join(_FORM_NAMES),
        metavar="LIST",
        help="made of the model: of %(default)s, or none (default: %(default)s)",
    )
    forms.add_argument("--also", default="", metavar="LIST", help="models to load beside it, by name or path")
    forms.add_argument("--work", metavar="DIR", help="where to put the forms for the time (default: the system's)")
    _repeats(forms, 5)
    forms.add_argument("--cold", action="store_true", help="drop the files from the page cache before each run")
    add_model_options(forms)

    peers = add(
        "peers",
        "speed and memory beside llama.cpp and transformers",
        description=_PEERS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _contexts(peers, "512,2K,8K,32K")
    peers.add_argument("--tokens", default="32", metavar="N", help="tokens per decode run (default: %(default)s)")
    _repeats(peers, 3)
    peers.add_argument(
        "--peers", default=",".join(_PEER_NAMES), metavar="LIST", help="of %(default)s, or none (default: %(default)s)"
    )
    peers.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="PEER=SIZE",
        help="longest context of a peer (default: transformers=8K llama.cpp-fa-quantized=4K)",
    )
    for option, values in _LISTS.items():
        meaning = "flash attention" if option == "--llama-flash" else "KV formats"
        peers.add_argument(
            option, default=",".join(values), metavar="LIST", help=f"llama.cpp's {meaning} (default: %(default)s)"
        )
    peers.add_argument("--no-requantized", action="store_true", help="leave out llama.cpp on Q4_0 weights")
    peers.add_argument("--json", metavar="FILE", help="write the JSON to a file too, after every length")
    add_model_options(peers, context=False)
    peers.set_defaults(heads="0.5")  # and "all" as a second runner
    return parsers


def _contexts(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--contexts",
        "--context",
        dest="contexts",
        default=default,
        metavar="LIST",
        help="lengths (default: %(default)s)",
    )


def _repeats(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument("--repeats", default=str(default), metavar="N", help="runs (default: %(default)s)")


def run_bench(options: argparse.Namespace, settings: LoadSettings, console: "Console", progress: "Console") -> int:
    """Measure what `options` ask for; return the exit code. Raises DuoLocalError."""
    beyond = settings.select != "off" or settings.kv_device_memory is not None
    if beyond and options.action not in ("decode", "memory"):
        raise SettingsError(
            f"bench {options.action} reads all blocks, in memory: leave --select and --kv-device-memory out, or use "
            "bench decode"
        )
    if settings.prefill != "exact" and options.action != "prefill":
        raise SettingsError(f"bench {options.action} reads exactly: leave --prefill out, or use bench prefill")
    if options.action == "memory":
        from duolocal.terminal.bench_view import bench_memory

        return bench_memory(settings, console, progress)
    if options.action == "gpu":
        from duolocal.terminal.bench_gpu_view import bench_gpu

        return bench_gpu(Path(options.out).expanduser(), minutes=options.minutes, letters=options.sections)
    repeats = parse_tokens(options.repeats, "--repeats")
    if options.action == "load":
        from duolocal.terminal.bench_speed_view import bench_load

        return bench_load(settings, console, progress, repeats=repeats, cold=options.cold)
    if options.action == "forms":
        return _forms(options, settings, console, progress, repeats=repeats)
    contexts = parse_sizes(options.contexts, "--contexts")
    if options.action == "decode":
        num_tokens = parse_tokens(options.tokens, "--tokens")
        if settings.select != "off" or settings.kv_device_memory is not None:
            from duolocal.terminal.bench_variants_view import bench_variants

            return bench_variants(
                settings, console, progress, contexts=contexts, num_tokens=num_tokens, repeats=repeats
            )
        from duolocal.terminal.bench_speed_view import bench_decode

        return bench_decode(settings, console, progress, contexts=contexts, num_tokens=num_tokens, repeats=repeats)
    if options.action == "profile":
        from duolocal.terminal.bench_profile_view import bench_profile

        return bench_profile(settings, console, progress, contexts=contexts, repeats=repeats)
    if options.action == "prefill":
        chunk_sizes = parse_sizes(options.chunk_sizes, "--chunk-sizes")
        from duolocal.terminal.bench_speed_view import bench_prefill

        return bench_prefill(settings, console, progress, contexts=contexts, chunk_sizes=chunk_sizes, repeats=repeats)
    return _peers(options, settings, console, progress, contexts=contexts, repeats=repeats)


def _forms(
    options: argparse.Namespace, settings: LoadSettings, console: "Console", progress: "Console", *, repeats: int
) -> int:
    forms = () if options.forms == "none" else _words(options.forms, "--forms", _FORM_NAMES)
    others = [word.strip() for word in options.also.split(",") if word.strip()]
    if (settings.weights, settings.outer_weights) != ("auto", "auto"):
        raise SettingsError("--weights and --outer-weights are not for bench forms: leave them out")
    work = None if options.work is None else Path(options.work).expanduser()
    if work is not None and not work.is_dir():
        raise SettingsError(f"--work is {options.work!r}: give a folder that is there")
    from duolocal.terminal.bench_forms_view import bench_forms

    return bench_forms(settings, others, console, progress, forms=forms, work=work, repeats=repeats, cold=options.cold)


def _peers(
    options: argparse.Namespace,
    settings: LoadSettings,
    console: "Console",
    progress: "Console",
    *,
    contexts: list[int],
    repeats: int,
) -> int:
    num_tokens = parse_tokens(options.tokens, "--tokens")
    flash, kv = (_words(getattr(options, option[2:].replace("-", "_")), option, _LISTS[option]) for option in _LISTS)
    peers = () if options.peers == "none" else _words(options.peers, "--peers", _PEER_NAMES)
    limits = dict(_limit(text) for text in options.limit)
    if settings.device not in ("auto", "cpu"):
        raise SettingsError(f"--device is {settings.device!r}: the peers are compared on the CPU; leave it out")
    from duolocal.bench.peer_list import PeerChoice

    choice = PeerChoice(
        peers=peers,
        flash=tuple(word == "on" for word in flash),
        kv=kv,
        requantized=not options.no_requantized,
        limits=limits,
    )
    from duolocal.terminal.bench_peers_view import bench_peers

    return bench_peers(
        settings,
        choice,
        console,
        progress,
        contexts=contexts,
        decode_tokens=num_tokens,
        repeats=repeats,
        json_file=Path(options.json).expanduser() if options.json else None,
    )


def parse_sizes(text: str, option: str) -> list[int]:
    """Read `512,2K,8K` as ascending numbers of tokens, each once; raises SettingsError."""
    return sorted({parse_tokens(part, option) for part in text.split(",")})


def _words(text: str, option: str, known: tuple[str, ...]) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for word in words:
        if word not in known:
            raise SettingsError(f"{option} has {word!r}: give a list of {', '.join(known)}")
    return words


def _limit(text: str) -> tuple[str, int]:
    peer, _, size = text.partition("=")
    if peer not in _LIMITED or not size:
        raise SettingsError(f"--limit is {text!r}: give for example {_PEER_NAMES[-1]}=8K")
    return peer, parse_tokens(size, "--limit")
