"""Options and dispatch of `duolocal eval`. Light: the command line builds its parser with it for `--help`."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from duolocal.errors import SettingsError
from duolocal.settings import LoadSettings, parse_threads, parse_tokens
from duolocal.terminal.bench_options import parse_sizes

if TYPE_CHECKING:
    from rich.console import Console

    from duolocal.evaluate import Setting

_P = TypeVar("_P", bound=argparse.ArgumentParser)

_LISTS = """\
--heads, --kv, --sink-size, --recent-size, --select and --prefill take lists such as 0.75,0.5: every combination is
measured, beside one dense pass for all. Dense is the same model with a 16-bit KV cache and every head a retrieval head.
"""
_CHECK = """\
Reads your document with your settings and with a dense 16-bit cache, compares what both expect at every token, hides
passkeys in it, and says in one line whether anything is lost. Then it tries neighbouring settings, as far as --minutes
go, and says which dial to turn. good: KL up to 0.02 nats per token, perplexity up to +2%, no passkey lost; small loss:
0.1, +10%, a third of the passkeys.
"""
_WEIGHTS = """\
All models read the same windows with a dense 16-bit KV cache; they must have one vocabulary, and fit into memory
together. In --against, nf4 and int8 stand for --model itself, quantized while loading.
"""
_NEEDLE = """\
Hides facts in a text of any length, reads it once with --reader retrieve, as the chat does, and asks for each of them.
Three figures: the passages that the reader picked hold the needle; the model goes on rightly where its answer is begun;
its free answer is right. --out keeps every length in a file, and takes up a reading that was interrupted. The text is
documentation that is installed here (docstrings of Python, torch and others), none of it twice.
"""
NEEDLE_NAMES = ("passkey", "fact", "paraphrase")  # as in duolocal.evaluate.needle, which is not imported for --help
TASK_NAMES = ("needles", "variables", "recall")  # as in duolocal.evaluate.tasks, which is not imported for --help
PIPED_COLUMNS = 120  # where nobody says how wide the paper is: no figure is cut off


def add_eval_parsers(
    what: "argparse._SubParsersAction[_P]",
    add_model_options: Callable[..., None],
    *,
    add_model: Callable[[argparse.ArgumentParser], None],
    add_machine: Callable[[argparse.ArgumentParser], None],
) -> dict[str, _P]:
    """Add what can be evaluated to the subparsers of `eval`; return the new parsers by name ("eval kl")."""
    parsers: dict[str, _P] = {}

    def add(name: str, text: str, description: str = _LISTS) -> _P:
        parser = what.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.\n\n{description}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parsers[f"eval {name}"] = parser
        return parser

    passkey = add("passkey", "a number hidden in real text, under these settings and beside the dense model")
    _lengths(passkey, "3.5K")
    _depths(passkey, 10)
    passkey.add_argument("--no-dense", action="store_true", help="leave out the dense 16-bit model beside it")
    _text_and_seed(passkey)
    _png(passkey, "a heat map of lengths and depths for each setting")
    add_model_options(passkey, context=False)

    niah = add("niah", "a fact hidden in real text, by length and depth, beside the dense model")
    _lengths(niah, "1K,2K,3.5K")
    _depths(niah, 5)
    _text_and_seed(niah)
    _png(niah, "a heat map of lengths and depths for each setting")
    add_model_options(niah, context=False)

    needle = add("needle", "needles in texts far longer than the context, with --reader retrieve", _NEEDLE)
    needle.add_argument(
        "--reader", default="retrieve", choices=("retrieve",), help="how the text is read (default: %(default)s)"
    )
    _lengths(needle, "32K", also="--lengths")
    _depths(needle, 10)
    needle.add_argument("--kinds", default=",".join(NEEDLE_NAMES), metavar="LIST", help="of %(default)s (default: all)")
    needle.add_argument(
        "--absent",
        default="3",
        metavar="N",
        help="questions of each kind whose needle is not there, 0 for none (default: %(default)s)",
    )
    needle.add_argument("--passages", metavar="TOKENS", help="of passages for an answer (default: 1K)")
    needle.add_argument("--out", metavar="FOLDER", help="keep every length there, and go on from what is there")
    needle.add_argument("--text", metavar="PATH", help="a text of your own (default: documentation installed here)")
    _seed(needle)
    _png(needle, "a heat map of lengths and depths for each kind")
    add_model_options(needle, context=False)

    multihop = add("multihop", "several needles, chains of variables and recall of pairs, beside the dense model")
    _lengths(multihop, "1K,2K,3.5K")
    multihop.add_argument(
        "--samples", default="5", metavar="N", help="prompts for each task and length (default: %(default)s)"
    )
    multihop.add_argument(
        "--tasks", default=",".join(TASK_NAMES), metavar="LIST", help="which of %(default)s (default: all)"
    )
    _text_and_seed(multihop)
    _png(multihop, "a heat map of tasks and lengths")
    add_model_options(multihop, context=False)

    for name, text in (
        ("ppl", "perplexity of real text, beside the dense model"),
        ("kl", "KL divergence from the dense model, top-1 agreement and perplexity on real text"),
    ):
        parser = add(name, text)
        _windows(parser)
        _text(parser)
        _png(parser, "a curve of KV memory against loss")
        add_model_options(parser, context=False)

    weights = add("weights", "perplexity and KL of models against another: what fewer bits per weight cost", _WEIGHTS)
    add_model(weights)
    weights.add_argument("--against", required=True, metavar="LIST", help="the models to compare with it")
    _windows(weights)
    _text(weights)
    add_machine(weights)
    weights.set_defaults(weights="auto", outer_weights="auto", png=None)

    check = add("check", "your own document under your own settings, beside the dense model", _CHECK)
    check.add_argument("--doc", required=True, metavar="PATH", help="the document")
    check.add_argument("--tokens", metavar="N", help="take the first N tokens only (default: all)")
    check.add_argument(
        "--minutes",
        default="10",
        metavar="N",
        help="for passkeys and other settings, beside reading the document twice (default: %(default)s)",
    )
    _seed(check)
    _png(check, "the curve of KV memory against loss")
    add_model_options(check)
    return parsers


def run_eval(options: argparse.Namespace, console: "Console", progress: "Console") -> int:
    """Evaluate what `options` ask for; return the exit code. Raises DuoLocalError."""
    settings = LoadSettings(
        model=options.model,
        device=options.device,
        threads=None if options.threads is None else parse_threads(options.threads),
        kernels=options.kernels,
        weights=options.weights,
        outer_weights=options.outer_weights,
    )
    if getattr(options, "kv_device_memory", None) is not None:
        raise SettingsError("--kv-device-memory changes no result: leave it out of eval")
    if options.action in ("ppl", "kl", "check") and options.select != "off":
        raise SettingsError(
            f"--select is for answers, and eval {options.action} measures reading, which reads everything: leave it "
            "out, or use eval passkey, niah or multihop"
        )
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_COLUMNS
    png = Path(options.png).expanduser() if options.png else None
    if png is not None:
        _check_png(png)
    common: dict[str, Any] = {"png": png, "console": console, "progress": progress}
    if options.action == "check":
        return _check(options, settings, common)
    if options.action == "needle":
        return _needle(options, settings, common)
    if options.action == "weights":
        return _compare_weights(options, settings, console, progress)
    lists = _choices(options)
    if options.action in ("ppl", "kl"):
        num_tokens = parse_tokens(options.tokens, "--tokens")
        window = parse_tokens(options.context, "--context")
        text = _load_text(options.text)
        from duolocal.terminal.eval_compare_view import eval_compare

        return eval_compare(options.action, settings, lists, text, num_tokens=num_tokens, window=window, **common)
    lengths = parse_sizes(options.tokens, "--tokens")
    common |= {"lengths": lengths, "seed": options.seed}
    if options.action == "multihop":
        samples, tasks = parse_tokens(options.samples, "--samples"), _tasks(options.tasks)
        text = _load_text(options.text)
        from duolocal.terminal.eval_view import eval_multihop

        return eval_multihop(settings, lists, text, tasks=tasks, samples=samples, **common)
    depths = parse_tokens(options.depths, "--depths")
    text = _load_text(options.text)
    from duolocal.terminal.eval_view import eval_grid

    dense = not getattr(options, "no_dense", False)
    return eval_grid(options.action, settings, lists, text, depths=depths, dense=dense, **common)


def _compare_weights(
    options: argparse.Namespace, settings: LoadSettings, console: "Console", progress: "Console"
) -> int:
    against = _list(options.against, "--against")
    num_tokens, window = parse_tokens(options.tokens, "--tokens"), parse_tokens(options.context, "--context")
    text = _load_text(options.text)
    from duolocal.terminal.eval_weights_view import eval_weights

    return eval_weights(
        settings, against, text, num_tokens=num_tokens, window=window, console=console, progress=progress
    )


def _needle(options: argparse.Namespace, settings: LoadSettings, common: dict[str, Any]) -> int:
    from dataclasses import replace

    kinds = _list(options.kinds, "--kinds")
    for word in kinds:
        if word not in NEEDLE_NAMES:
            raise SettingsError(f"--kinds has {word!r}: give a list of {', '.join(NEEDLE_NAMES)}")
    if options.prefill != "exact":
        raise SettingsError("eval needle reads exactly: leave --prefill out")
    lengths, depths = parse_sizes(options.tokens, "--tokens"), parse_tokens(options.depths, "--depths")
    absent = 0 if options.absent.strip() == "0" else parse_tokens(options.absent, "--absent")
    passages = None if options.passages is None else parse_tokens(options.passages, "--passages")
    text = None if options.text is None else _load_text(options.text)
    out = Path(options.out).expanduser() if options.out else None
    settings = replace(settings, kv=options.kv, heads=options.heads)
    from duolocal.terminal.needle_view import eval_needle

    return eval_needle(
        settings,
        text,
        lengths=lengths,
        depths=depths,
        kinds=kinds,
        absent=absent,
        passages=passages,
        seed=options.seed,
        out=out,
        **common,
    )


def _check(options: argparse.Namespace, settings: LoadSettings, common: dict[str, Any]) -> int:
    chosen = _choices(options)
    if len(chosen) != 1:
        raise SettingsError("eval check takes one setting: give --heads and --kv one value each")
    context = None if options.context is None else parse_tokens(options.context, "--context")
    num_tokens = None if options.tokens is None else parse_tokens(options.tokens, "--tokens")
    minutes = _minutes(options.minutes)
    from duolocal.documents import load_document

    document = load_document(options.doc)
    from duolocal.terminal.eval_check_view import eval_check

    return eval_check(
        settings,
        chosen[0],
        document,
        num_tokens=num_tokens,
        context=context,
        minutes=minutes,
        seed=options.seed,
        **common,
    )


def _lengths(parser: argparse.ArgumentParser, default: str, *, also: str | None = None) -> None:
    parser.add_argument(
        *filter(None, ("--tokens", also)),
        default=default,
        metavar="LIST",
        help="lengths of the prompts (default: %(default)s)",
    )


def _windows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", default="16K", metavar="N", help="tokens of text (default: %(default)s)")
    parser.add_argument(
        "--context", default="4K", metavar="N", help="read in windows of so many tokens (default: %(default)s)"
    )


def _depths(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--depths",
        default=str(default),
        metavar="N",
        help="places, from the beginning to the end (default: %(default)s)",
    )


def _text_and_seed(parser: argparse.ArgumentParser) -> None:
    _text(parser)
    _seed(parser)


def _text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        default="licences",
        metavar="PATH",
        help="a text of your own, licences (those that come with torch), or help (Python's) (default: %(default)s)",
    )


def _seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of what is hidden, and where (default: %(default)s)"
    )


def _png(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--png", metavar="FILE", help=f"draw {what}")


def _choices(options: argparse.Namespace) -> "list[Setting]":
    heads, kv = _list(options.heads, "--heads"), _list(options.kv, "--kv")
    sinks = [_sink(text) for text in _list(options.sink_size, "--sink-size")] if options.sink_size else [None]
    recent = [parse_tokens(text, "--recent-size") for text in _list(options.recent_size, "--recent-size")]
    from duolocal.evaluate import combinations

    prefills = _list(options.prefill, "--prefill")
    return combinations(heads, kv, sinks, recent or [None], _list(options.select, "--select"), prefills)


def _list(text: str | None, option: str) -> list[str]:
    if text is None:
        return []
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    if not all(words):
        raise SettingsError(f"{option} is {text!r}: a value is missing; give one, or several with commas between")
    return words


def _sink(text: str) -> int:
    return 0 if text == "0" else parse_tokens(text, "--sink-size")


def _tasks(text: str) -> list[str]:
    words = _list(text, "--tasks")
    for word in words:
        if word not in TASK_NAMES:
            raise SettingsError(f"--tasks has {word!r}: give a list of {', '.join(TASK_NAMES)}")
    return words


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes <= 10_000:
        raise SettingsError(f"--minutes is {text!r}: give a number such as 10 or 0.5")
    return minutes


def _load_text(spelled: str) -> tuple[str, str]:
    """Return the text and its name; "licences" and "help" are built in."""
    from duolocal.sample_text import license_text, sample_text

    if spelled == "licences":
        return license_text(), spelled
    if spelled == "help":
        return sample_text(), spelled
    from duolocal.documents import load_document

    document = load_document(spelled)
    return document.text, document.name


def _check_png(path: Path) -> None:
    """Refuse a picture that could not be drawn, before minutes of measuring."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise SettingsError(f"{path}: pictures are drawn with matplotlib: pip install matplotlib")
    if not path.absolute().parent.is_dir():
        raise SettingsError(f"cannot write the picture {path}: there is no folder {path.absolute().parent}")
    if path.is_dir():
        raise SettingsError(f"cannot write the picture {path}: it is a folder")
