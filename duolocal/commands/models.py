"""`duolocal models`, `duolocal kv measure`, and the parts of LoadSettings that commands share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from duolocal.commands.parsing import Fields, Group, command
from duolocal.errors import SettingsError
from duolocal.options import ANY, REQUIRED, TOKENS, choice, option, path
from duolocal.settings import LoadSettings
from duolocal.terminal.consoles import new_console, progress_console

_MACHINE = ("device", "threads", "kernels")
_CACHE = (
    "kv",
    "heads",
    "weights",
    "outer_weights",
    "kv_device_memory",
    "select",
    "prefill",
    "sink_size",
    "recent_size",
)
ModelSettings = Annotated[LoadSettings, Fields(("model", *_MACHINE))]
CacheSettings = Annotated[LoadSettings, Fields(("model", *_CACHE, *_MACHINE))]
ContextSettings = Annotated[LoadSettings, Fields(("model", "context", *_CACHE, *_MACHINE))]
OUT_FOLDER = path("give the folder to write")
FORMS = ("native", "f16")
_CONVERT = """\
native: one file for the kernels of this machine (or of --device), loaded as a memory map without repacking; its values
are the source's, bit for bit, and what is known of the source (head pattern, KV format) holds for it. f16: 16-bit
safetensors as transformers writes them, for other tools and for `duolocal quantize`; --device, --weights and
--outer-weights are for native.
"""
GROUP = Group("models", "list the named models, fetch or convert one", metavar="[fetch|convert]")
KV = Group("kv", "compare the KV formats on a model")


@command("models", "list the named models")
def models() -> int:
    """Print the named models."""
    from duolocal.models.registry import list_models
    from duolocal.terminal.models_view import models_view

    console = new_console()
    console.print(models_view(list_models(), console.width), soft_wrap=False)
    return 0


@dataclass(frozen=True)
class Fetch:
    """What is fetched."""

    name: str = option(ANY, "a name from `duolocal models`, or a hub id org/name", default=REQUIRED, positional=True)


@command("models fetch", "fetch a model into the cache")
def fetch(options: Fetch) -> int:
    """Fetch a model, and print its path alone."""
    from duolocal.terminal.fetching import fetch as fetch_model

    print(fetch_model(options.name, progress_console()))
    return 0


@dataclass(frozen=True)
class Convert:
    """Where the other form goes, and which it is."""

    out: Path = option(OUT_FOLDER, "the folder to write; new or empty", default=REQUIRED, metavar="DIR")
    to: str = option(choice(*FORMS), " or ".join(FORMS), default=FORMS[0], metavar="FORM")


@command(
    "models convert",
    "write a model in the form that loads fastest, or as 16-bit safetensors",
    description="Write a model in another form.",
    epilog=_CONVERT,
)
def convert(
    settings: Annotated[LoadSettings, Fields(("model", "device", "weights", "outer_weights"))], options: Convert
) -> int:
    """Write a model in another form."""
    if options.to != "native":
        for name, value in (
            ("--device", settings.device),
            ("--weights", settings.weights),
            ("--outer-weights", settings.outer_weights),
        ):
            if value != "auto":
                raise SettingsError(f"{name} is for --to native: leave it out")
    from duolocal.terminal.convert_view import convert_model

    return convert_model(settings, options.out, to=options.to, console=new_console(), progress=progress_console())


@dataclass(frozen=True)
class Measure:
    """What is read."""

    tokens: int = option(TOKENS, "length of the text", default=2048)
    text: str | None = option(ANY, "a text to read", metavar="PATH", default_help="prose that comes with Python")


@command("kv measure", "KL and perplexity of every KV format against the 16-bit cache")
def measure(settings: ModelSettings, options: Measure) -> int:
    """Compare the KV formats."""
    from duolocal.documents import load_document

    text = load_document(options.text).text if options.text else None
    from duolocal.terminal.bench_view import measure_kv_formats

    return measure_kv_formats(settings, text, options.tokens, new_console(), progress_console())
