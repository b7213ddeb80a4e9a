"""`duolocal eval`: measure what a smaller KV cache costs, beside the dense model."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from duolocal.commands.models import CacheSettings, ModelSettings
from duolocal.commands.parsing import Fields, Group, command
from duolocal.errors import SettingsError
from duolocal.options import ANY, REQUIRED, TOKENS, choice, counted, flagged, like, listed, number, option, path, whole
from duolocal.settings import LoadSettings
from duolocal.terminal.consoles import new_console, progress_console

if TYPE_CHECKING:
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
together. In --against, nf4 and int8 stand for --model itself, quantized while loading.
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
PIPED_COLUMNS = 120  # where nobody says how wide the paper is: no figure is cut off

_MACHINE = ("model", "weights", "outer_weights", "kv_device_memory", "device", "threads", "kernels")
Machine = Annotated[LoadSettings, Fields(_MACHINE)]


def _check_png(file: Path) -> None:
    """Refuse a picture that could not be drawn, before minutes of measuring."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise SettingsError(f"{file}: pictures are drawn with matplotlib: pip install matplotlib")
    if not file.absolute().parent.is_dir():
        raise SettingsError(f"cannot write the picture {file}: there is no folder {file.absolute().parent}")
    if file.is_dir():
        raise SettingsError(f"cannot write the picture {file}: it is a folder")


_lengths = partial(option, listed(TOKENS, ascending=True), "lengths of the prompts")
_count = partial(option, TOKENS)
_depths = partial(_count, help="places, from the beginning to the end")
_windows = partial(_count, help="read in windows of so many tokens", default=4096)
_text = partial(
    option,
    ANY,
    "a text of your own, licences (those that come with torch), or help (Python's)",
    default="licences",
    metavar="PATH",
)
_seed = partial(option, whole("a whole number"), "of what is hidden, and where", default=0)
_words = partial(option)
_png = partial(option, path("give a file"), metavar="FILE")
_MAPS = "draw a heat map of lengths and depths for each setting"
GROUP = Group("eval", "measure what a smaller KV cache costs, beside the dense model")


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


def _consoles() -> dict[str, Any]:
    console = new_console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_COLUMNS
    return {"console": console, "progress": progress_console()}


def _check(what: str, settings: LoadSettings, variants: Variants, png: Path | None) -> None:
    """Refuse what would change nothing or could not be drawn."""
    if settings.kv_device_memory is not None:
        raise SettingsError("--kv-device-memory changes no result: leave it out of eval")
    if what in ("ppl", "kl", "check") and variants.select != ("off",):
        raise SettingsError(
            f"--select is for answers, and eval {what} measures reading, which reads everything: leave it "
            "out, or use eval passkey, niah or multihop"
        )
    if png is not None:
        _check_png(png)


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


@dataclass(frozen=True)
class Passkey:
    """Where the numbers are hidden."""

    tokens: tuple[int, ...] = _lengths(default=(3584,))
    depths: int = _depths(default=10)
    no_dense: bool = flagged("leave out the dense 16-bit model beside it")
    text: str = _text()
    seed: int = _seed()
    png: Path | None = _png(_MAPS)


@dataclass(frozen=True)
class Niah:
    """Where the facts are hidden."""

    tokens: tuple[int, ...] = _lengths(default=(1024, 2048, 3584))
    depths: int = _depths(default=5)
    text: str = _text()
    seed: int = _seed()
    png: Path | None = _png(_MAPS)


def _grid(task: str, options: Passkey | Niah, variants: Variants, settings: LoadSettings, *, dense: bool) -> int:
    _check(task, settings, variants, options.png)
    choices, text = variants.settings(), _load_text(options.text)
    from duolocal.terminal.eval_view import eval_grid

    return eval_grid(
        task,
        settings,
        choices,
        text,
        lengths=options.tokens,
        depths=options.depths,
        seed=options.seed,
        dense=dense,
        png=options.png,
        **_consoles(),
    )


@command("eval passkey", "a number hidden in real text, under these settings and beside the dense model", epilog=_LISTS)
def passkey(options: Passkey, variants: Variants, settings: Machine) -> int:
    """Hide numbers."""
    return _grid("passkey", options, variants, settings, dense=not options.no_dense)


@command("eval niah", "a fact hidden in real text, by length and depth, beside the dense model", epilog=_LISTS)
def niah(options: Niah, variants: Variants, settings: Machine) -> int:
    """Hide facts."""
    return _grid("niah", options, variants, settings, dense=True)


@dataclass(frozen=True)
class Needle:
    """Which needles are hidden in what, and where the results go."""

    reader: str = option(choice("retrieve"), "how the text is read", default="retrieve", metavar="HOW")
    tokens: tuple[int, ...] = _lengths(default=(32768,), also=("--lengths",))
    depths: int = _depths(default=10)
    kinds: tuple[str, ...] = _words(
        listed(ANY, NEEDLE_NAMES), f"of {', '.join(NEEDLE_NAMES)}", default=NEEDLE_NAMES, default_help="all"
    )
    absent: int = option(counted(0), "questions of each kind whose needle is not there, 0 for none", default=3)
    passages: int | None = option(TOKENS, "of passages for an answer", metavar="TOKENS", default_help="1K")
    out: Path | None = option(
        path("give a folder"), "keep every length there, and go on from what is there", metavar="FOLDER"
    )
    text: str | None = option(ANY, "a text of your own", metavar="PATH", default_help="documentation installed here")
    seed: int = _seed()
    png: Path | None = _png("draw a heat map of lengths and depths for each kind")


@command("eval needle", "needles in texts far longer than the context, with --reader retrieve", epilog=_NEEDLE)
def needle(options: Needle, settings: CacheSettings) -> int:
    """Hide needles, and read with the reader."""
    _check("needle", settings, Variants(), options.png)
    if settings.prefill != "exact":
        raise SettingsError("eval needle reads exactly: leave --prefill out")
    text = None if options.text is None else _load_text(options.text)
    from duolocal.terminal.needle_view import eval_needle

    return eval_needle(
        settings,
        text,
        lengths=options.tokens,
        depths=options.depths,
        kinds=options.kinds,
        absent=options.absent,
        passages=options.passages,
        seed=options.seed,
        out=options.out,
        png=options.png,
        **_consoles(),
    )


@dataclass(frozen=True)
class Multihop:
    """Which tasks are asked, and how often."""

    tokens: tuple[int, ...] = _lengths(default=(1024, 2048, 3584))
    samples: int = _count("prompts for each task and length", default=5)
    tasks: tuple[str, ...] = _words(
        listed(ANY, TASK_NAMES), f"which of {', '.join(TASK_NAMES)}", default=TASK_NAMES, default_help="all"
    )
    text: str = _text()
    seed: int = _seed()
    png: Path | None = _png("draw a heat map of tasks and lengths")


@command(
    "eval multihop", "several needles, chains of variables and recall of pairs, beside the dense model", epilog=_LISTS
)
def multihop(options: Multihop, variants: Variants, settings: Machine) -> int:
    """Ask tasks of several steps."""
    _check("multihop", settings, variants, options.png)
    choices, text = variants.settings(), _load_text(options.text)
    from duolocal.terminal.eval_view import eval_multihop

    return eval_multihop(
        settings,
        choices,
        text,
        tasks=options.tasks,
        lengths=options.tokens,
        samples=options.samples,
        seed=options.seed,
        png=options.png,
        **_consoles(),
    )


@dataclass(frozen=True)
class Text:
    """What is read."""

    tokens: int = _count("tokens of text", default=16384)
    context: int = _windows()
    text: str = _text()


@dataclass(frozen=True)
class Curve:
    """What is drawn."""

    png: Path | None = _png("draw a curve of KV memory against loss")


def _compare(what: str, read: Text, png: Path | None, variants: Variants, settings: LoadSettings) -> int:
    _check(what, settings, variants, png)
    choices, text = variants.settings(), _load_text(read.text)
    from duolocal.terminal.eval_compare_view import eval_compare

    return eval_compare(
        what, settings, choices, text, num_tokens=read.tokens, window=read.context, png=png, **_consoles()
    )


@command("eval ppl", "perplexity of real text, beside the dense model", epilog=_LISTS)
def ppl(read: Text, curve: Curve, variants: Variants, settings: Machine) -> int:
    """Compare perplexity."""
    return _compare("ppl", read, curve.png, variants, settings)


@command("eval kl", "KL divergence from the dense model, top-1 agreement and perplexity on real text", epilog=_LISTS)
def kl(read: Text, curve: Curve, variants: Variants, settings: Machine) -> int:
    """Compare distributions."""
    return _compare("kl", read, curve.png, variants, settings)


@dataclass(frozen=True)
class Against:
    """The models that are compared."""

    against: tuple[str, ...] = _words(listed(ANY), "the models to compare with it", default=REQUIRED)


@command(
    "eval weights", "perplexity and KL of models against another: what fewer bits per weight cost", epilog=_WEIGHTS
)
def weights(models: Against, read: Text, settings: ModelSettings) -> int:
    """Compare models."""
    text = _load_text(read.text)
    from duolocal.terminal.eval_weights_view import eval_weights

    return eval_weights(settings, models.against, text, num_tokens=read.tokens, window=read.context, **_consoles())


@dataclass(frozen=True)
class Check:
    """Whose document is read, and how long it may take."""

    doc: str = option(ANY, "the document", default=REQUIRED, metavar="PATH")
    tokens: int | None = _count("take the first N tokens only", default_help="all")
    minutes: float = option(
        number("a number such as 10 or 0.5", lambda value: 0 <= value <= 10_000),
        "for passkeys and other settings, beside reading the document twice",
        default=10,
    )
    seed: int = _seed()
    png: Path | None = _png("draw the curve of KV memory against loss")


@command("eval check", "your own document under your own settings, beside the dense model", epilog=_CHECK)
def check(
    options: Check,
    variants: Variants,
    settings: Annotated[LoadSettings, Fields(("context", *_MACHINE))],
) -> int:
    """Check what is lost of a document."""
    _check("check", settings, variants, options.png)
    choices = variants.settings()
    if len(choices) != 1:
        raise SettingsError("eval check takes one setting: give --heads and --kv one value each")
    from duolocal.documents import load_document

    document = load_document(options.doc)
    from duolocal.terminal.eval_check_view import eval_check

    return eval_check(
        settings,
        choices[0],
        document,
        num_tokens=options.tokens,
        context=settings.context,
        minutes=options.minutes,
        seed=options.seed,
        png=options.png,
        **_consoles(),
    )
