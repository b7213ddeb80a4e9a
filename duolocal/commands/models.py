"""The options of `duolocal models` and `duolocal kv measure`, and what commands share."""

from dataclasses import dataclass
from pathlib import Path

from duolocal.commands.parsing import Command, Group, Taken
from duolocal.errors import SettingsError
from duolocal.options import ANY, REQUIRED, TOKENS, Kind, choice, flag, option, path
from duolocal.settings import LoadSettings


def read_text(spelled: str, name: str) -> tuple[str, str]:
    """Read a document: its text and its name. Raises DocumentError."""
    from duolocal.documents import load_document

    document = load_document(spelled)
    return document.text, document.name


_MACHINE = ("device", "threads", "kernels")
_WEIGHTS = ("weights", "outer_weights")
_CACHE = ("kv", "heads", *_WEIGHTS, "kv_device_memory", "select", "prefill", "sink_size", "recent_size")
MODEL = Taken(LoadSettings, ("model", *_MACHINE))
CACHE = Taken(LoadSettings, ("model", *_CACHE, *_MACHINE))
CONTEXT = Taken(LoadSettings, ("model", "context", *_CACHE, *_MACHINE))
TEXT = Kind(read_text, metavar="PATH")  # the text and its name
OUT_FOLDER = path("give the folder to write")
FORMS = ("native", "f16")
_CONVERT = """\
native: one file for the kernels of this machine (or of --device), loaded as a memory map without repacking; its values
are the source's, bit for bit, and what is known of the source (head pattern, KV format) holds for it. f16: 16-bit
safetensors as transformers writes them, for other tools and for `duolocal quantize`; --device, --weights and
--outer-weights are for native.
"""


@dataclass(frozen=True)
class Fetch:
    """What is fetched."""

    name: str = option(ANY, "a name from `duolocal models`, or a hub id org/name", default=REQUIRED, positional=True)


@dataclass(frozen=True)
class Convert:
    """Where the other form goes, and which it is."""

    out: Path = option(OUT_FOLDER, "the folder to write; new or empty", default=REQUIRED, metavar="DIR")
    to: str = option(choice(*FORMS), " or ".join(FORMS), default=FORMS[0], metavar="FORM")


@dataclass(frozen=True)
class Measure:
    """What is read."""

    tokens: int = option(TOKENS, "length of the text", default=2048)
    text: tuple[str, str] | None = option(TEXT, "a text to read", default_help="prose that comes with Python")


def _refuse(settings: LoadSettings, options: Convert) -> None:
    for name in ("device", "weights", "outer_weights"):
        if options.to != "native" and getattr(settings, name) != "auto":
            raise SettingsError(f"{flag(name)} is for --to native: leave it out")


GROUPS = (
    Group("models", "list the named models, fetch or convert one", metavar="[fetch|convert]"),
    Group("kv", "compare the KV formats on a model"),
)
COMMANDS = (
    Command("models", "list the named models", "models_view:models"),
    Command("models fetch", "fetch a model into the cache", "fetching:fetch_model", (Fetch,)),
    Command(
        "models convert",
        "write a model in the form that loads fastest, or as 16-bit safetensors",
        "convert_view:convert_model",
        (Taken(LoadSettings, ("model", "device", *_WEIGHTS)), Convert),
        _refuse,
        "Write a model in another form.",
        _CONVERT,
    ),
    Command(
        "kv measure",
        "KL and perplexity of every KV format against the 16-bit cache",
        "bench_view:measure_kv_formats",
        (MODEL, Measure),
    ),
)
