"""The options of `duolocal eval`."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duolocal.commands.models import CACHE, MODEL, read_text
from duolocal.commands.parsing import Command, Group, Taken
from duolocal.errors import SettingsError
from duolocal.options import (
    ANY,
    REQUIRED,
    TOKENS,
    Kind,
    choice,
    counted,
    flagged,
    like,
    listed,
    number,
    option,
    path,
    whole,
)
from duolocal.paths import user_path
from duolocal.settings import LoadSettings

if TYPE_CHECKING:
    from duolocal.documents import Document
    from duolocal.evaluate import Setting

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
together. In --against, nf4 and int8 stand for --model itself, quantized while loading, int8-activations
and int16-activations for --model with activations as a chat may have them on a CPU; all others have them in float32.
"""
_NEEDLE = """\
Hides facts in a text of any length, reads it once with --reader retrieve, as the chat does, and asks for each of them.
Three figures: the passages that the reader picked hold the needle; the model goes on rightly where its answer is begun;
its free answer is right. --out keeps every length in a file, and takes up a reading that was interrupted. The text is
documentation that is installed here (docstrings of Python, torch and others), none of it twice.
"""
# As in duolocal.evaluate, which is not imported for --help.
NEEDLE_NAMES = ("passkey", "fact", "paraphrase")
TASK_NAMES = ("needles", "variables", "recall")
_MACHINE = ("model", "weights", "outer_weights", "kv_device_memory", "device", "threads", "kernels")
MACHINE = Taken(LoadSettings, _MACHINE)


def _read_picture(text: str, name: str) -> Path:
    """Refuse a picture that could not be drawn, before minutes of measuring."""
    import importlib.util

    file = user_path(text)
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingsError(f"{file}: pictures are drawn with matplotlib: pip install matplotlib")
    if not file.absolute().parent.is_dir():
        raise SettingsError(f"cannot write the picture {file}: there is no folder {file.absolute().parent}")
    if file.is_dir():
        raise SettingsError(f"cannot write the picture {file}: it is a folder")
    return file


def _read_haystack(spelled: str, name: str) -> tuple[str, str]:
    from duolocal.sample_text import license_text, sample_text

    built_in = {"licences": license_text, "help": sample_text}
    return (built_in[spelled](), spelled) if spelled in built_in else read_text(spelled, name)


def _read_document(spelled: str, name: str) -> "Document":
    from duolocal.documents import load_document

    return load_document(spelled)


_HAYSTACK = Kind(_read_haystack, metavar="PATH")  # the text and its name
_lengths = partial(option, listed(TOKENS, ascending=True), "lengths of the prompts")
_count = partial(option, TOKENS)
_depths = partial(_count, help="places, from the beginning to the end")
_text = partial(
    option,
    _HAYSTACK,
    "a text of your own, licences (those that come with torch), or help (Python's)",
    default_help="licences",
)
_seed = partial(option, whole("a whole number"), "of what is hidden, and where", default=0)
_png = partial(option, Kind(_read_picture, metavar="FILE"))
_MAPS = "draw a heat map of lengths and depths for each setting"


@dataclass(frozen=True)
class Variants:
    """The caches that are measured: every combination of what is listed."""

    heads: tuple[str, ...] = like(LoadSettings, "heads", several=True)
    kv: tuple[str, ...] = like(LoadSettings, "kv", several=True)
    sink_size: tuple[int | None, ...] = like(LoadSettings, "sink_size", several=True)
    recent_size: tuple[int | None, ...] = like(LoadSettings, "recent_size", several=True)
    select: tuple[str, ...] = like(LoadSettings, "select", several=True)
    prefill: tuple[str, ...] = like(LoadSettings, "prefill", several=True)

    def settings(self) -> "list[Setting]":
        """Return all combinations."""
        from duolocal.evaluate import combinations

        return combinations(self.heads, self.kv, self.sink_size, self.recent_size, self.select, self.prefill)


def _measures(what: str) -> Callable[..., None]:
    """Return what refuses settings that would change nothing in what is measured."""

    def refuse(*values: Any) -> None:
        *_, variants, settings = values
        _refuse_memory(settings)
        if what in ("ppl", "kl", "check") and variants.select != ("off",):
            raise SettingsError(
                f"--select is for answers, and eval {what} measures reading, which reads everything: leave it "
                "out, or use eval passkey, niah or multihop"
            )

    return refuse


def _refuse_memory(settings: LoadSettings) -> None:
    if settings.kv_device_memory is not None:
        raise SettingsError("--kv-device-memory changes no result: leave it out of eval")


@dataclass(frozen=True)
class Passkey:
    """Where the numbers are hidden."""

    tokens: tuple[int, ...] = _lengths(default=(3584,))
    depths: int = _depths(default=10)
    no_dense: bool = flagged("leave out the dense 16-bit model beside it")
    text: tuple[str, str] | None = _text()
    seed: int = _seed()
    png: Path | None = _png(_MAPS)


@dataclass(frozen=True)
class Niah:
    """Where the facts are hidden."""

    tokens: tuple[int, ...] = _lengths(default=(1024, 2048, 3584))
    depths: int = _depths(default=5)
    text: tuple[str, str] | None = _text()
    seed: int = _seed()
    png: Path | None = _png(_MAPS)


@dataclass(frozen=True)
class Needle:
    """Which needles are hidden in what, and where the results go."""

    reader: str = option(choice("retrieve"), "how the text is read", default="retrieve", metavar="HOW")
    tokens: tuple[int, ...] = _lengths(default=(32768,), also=("--lengths",))
    depths: int = _depths(default=10)
    kinds: tuple[str, ...] = option(
        listed(ANY, NEEDLE_NAMES), f"of {', '.join(NEEDLE_NAMES)}", default=NEEDLE_NAMES, default_help="all"
    )
    absent: int = option(counted(0), "questions of each kind whose needle is not there, 0 for none", default=3)
    passages: int | None = option(TOKENS, "of passages for an answer", metavar="TOKENS", default_help="1K")
    out: Path | None = option(
        path("give a folder"), "keep every length there, and go on from what is there", metavar="FOLDER"
    )
    text: tuple[str, str] | None = option(_HAYSTACK, "a text of your own", default_help="documentation installed here")
    seed: int = _seed()
    png: Path | None = _png("draw a heat map of lengths and depths for each kind")


@dataclass(frozen=True)
class Multihop:
    """Which tasks are asked, and how often."""

    tokens: tuple[int, ...] = _lengths(default=(1024, 2048, 3584))
    samples: int = _count("prompts for each task and length", default=5)
    tasks: tuple[str, ...] = option(
        listed(ANY, TASK_NAMES), f"which of {', '.join(TASK_NAMES)}", default=TASK_NAMES, default_help="all"
    )
    text: tuple[str, str] | None = _text()
    seed: int = _seed()
    png: Path | None = _png("draw a heat map of tasks and lengths")


@dataclass(frozen=True)
class Reading:
    """What is read."""

    tokens: int = _count("tokens of text", default=16384)
    context: int = _count("read in windows of so many tokens", default=4096)
    text: tuple[str, str] | None = _text()


@dataclass(frozen=True)
class Curve:
    """What is drawn."""

    png: Path | None = _png("draw a curve of KV memory against loss")


@dataclass(frozen=True)
class Weights:
    """The models that are compared."""

    against: tuple[str, ...] = option(listed(ANY), "the models to compare with it", default=REQUIRED)


@dataclass(frozen=True)
class Check:
    """Whose document is read, and how long it may take."""

    doc: "Document" = option(Kind(_read_document, metavar="PATH"), "the document", default=REQUIRED)
    tokens: int | None = _count("take the first N tokens only", default_help="all")
    minutes: float = option(
        number("a number such as 10 or 0.5", lambda value: 0 <= value <= 10_000),
        "for passkeys and other settings, beside reading the document twice",
        default=10,
    )
    seed: int = _seed()
    png: Path | None = _png("draw the curve of KV memory against loss")


def _refuse_needle(options: Needle, settings: LoadSettings) -> None:
    _refuse_memory(settings)
    if settings.prefill != "exact":
        raise SettingsError("eval needle reads exactly: leave --prefill out")


def _refuse_check(options: Check, variants: Variants, settings: LoadSettings) -> None:
    _measures("check")(options, variants, settings)
    if any(len(getattr(variants, item.name)) != 1 for item in fields(Variants)):
        raise SettingsError("eval check takes one setting: give --heads and --kv one value each")


GROUPS = (Group("eval", "measure what a smaller KV cache costs, beside the dense model"),)
COMMANDS = (
    Command(
        "eval passkey",
        "a number hidden in real text, under these settings and beside the dense model",
        "eval_view:passkey",
        (Passkey, Variants, MACHINE),
        _measures("passkey"),
        epilog=_LISTS,
    ),
    Command(
        "eval niah",
        "a fact hidden in real text, by length and depth, beside the dense model",
        "eval_view:niah",
        (Niah, Variants, MACHINE),
        _measures("niah"),
        epilog=_LISTS,
    ),
    Command(
        "eval needle",
        "needles in texts far longer than the context, with --reader retrieve",
        "needle_view:eval_needle",
        (Needle, CACHE),
        _refuse_needle,
        epilog=_NEEDLE,
    ),
    Command(
        "eval multihop",
        "several needles, chains of variables and recall of pairs, beside the dense model",
        "eval_view:multihop",
        (Multihop, Variants, MACHINE),
        _measures("multihop"),
        epilog=_LISTS,
    ),
    Command(
        "eval ppl",
        "perplexity of real text, beside the dense model",
        "eval_compare_view:ppl",
        (Reading, Curve, Variants, MACHINE),
        _measures("ppl"),
        epilog=_LISTS,
    ),
    Command(
        "eval kl",
        "KL divergence from the dense model, top-1 agreement and perplexity on real text",
        "eval_compare_view:kl",
        (Reading, Curve, Variants, MACHINE),
        _measures("kl"),
        epilog=_LISTS,
    ),
    Command(
        "eval weights",
        "perplexity and KL of models against another: what fewer bits per weight cost",
        "eval_weights_view:eval_weights",
        (Weights, Reading, MODEL),
        epilog=_WEIGHTS,
    ),
    Command(
        "eval check",
        "your own document under your own settings, beside the dense model",
        "eval_check_view:eval_check",
        (Check, Variants, Taken(LoadSettings, ("context", *_MACHINE))),
        _refuse_check,
        epilog=_CHECK,
    ),
)
