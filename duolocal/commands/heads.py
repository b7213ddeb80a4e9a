"""The options of `duolocal heads`."""

from dataclasses import dataclass
from functools import partial

from duolocal.commands.parsing import Command, Group, Taken
from duolocal.errors import SettingsError
from duolocal.options import ANY, RATIO, TOKENS, Option, choice, counted, flag, option, repeated
from duolocal.settings import LoadSettings

# As in duolocal.identify, which is not imported for --help.
METHODS = ("drift", "attribution", "echo", "copy", "distill")
_METHODS = """\
Methods: drift, how far a layer's result moves when a head sees its window only; attribution, that and the gradient of
what the model predicts: minutes, and the best so far (docs/quality.md); echo, repeated random tokens, the quickest;
copy, which heads look at a needle while it is copied; distill, trained gates (DuoAttention), the slowest: it can be
interrupted and goes on where it was. Drift, echo and copy are forward only.
Without --out the pattern is kept for this model, and --heads auto takes it from then on.
"""
_or_default = partial(option)


@dataclass(frozen=True)
class Show:
    """Which pattern is shown."""

    pattern: str | None = _or_default(
        ANY,
        "a pattern file, a folder in the published layout, or published:NAME; --heads is then a ratio",
        metavar="PATTERN",
        positional=True,
        default_help="the model's pattern",
    )
    png: str | None = _or_default(ANY, "draw the map into this file", metavar="FILE")


@dataclass(frozen=True)
class Identify:
    """How the heads are ranked, and where the pattern goes."""

    method: str = option(choice(*METHODS), ", ".join(METHODS), default=METHODS[0], metavar="METHOD")
    out: str | None = _or_default(ANY, "the pattern file; FOLDER/ writes the published layout", metavar="FILE")
    format: str | None = _or_default(
        choice("json", "published"), "json or published", metavar="FORMAT", default_help="by the name after --out"
    )
    seed: int = option(counted(0), "the same seed gives the same pattern", default=0)
    tokens: int | None = _or_default(TOKENS, "tokens per run", default_help="the method's")
    steps: int | None = _or_default(TOKENS, "training steps of distill", default_help="the method's")
    text_share: float | None = _or_default(
        RATIO, "share of distill's loss at ordinary text; 0: at the answers alone, as published", default_help="a half"
    )
    pressure: float | None = _or_default(
        RATIO, "what an open gate costs distill; lower keeps more gates open", default_help="0.05"
    )
    default_ratio: float | None = _or_default(
        RATIO, "share of retrieval heads that the pattern is cut at where none is asked for", default_help="two thirds"
    )
    compare: tuple[str, ...] = option(repeated(ANY, "run"), "patterns to compare with", default=(), metavar="PATTERN")
    png: str | None = _or_default(
        ANY, "draw the map into this file; none: no picture", metavar="FILE", default_help="beside the pattern"
    )

    def __post_init__(self) -> None:
        if self.format is not None and self.out is None:
            raise SettingsError("--format is for a file: give --out FILE too")
        for name in ("steps", "text_share", "pressure"):
            if getattr(self, name) is not None and self.method != "distill":
                raise SettingsError(f"{flag(name)} is for --method distill; {self.method} has none: leave it out")


def _refuse(options: Show, settings: LoadSettings) -> None:
    if options.pattern is not None and settings.heads != "auto":
        Option(RATIO, "").parse(settings.heads.removeprefix("ratio="), "--heads")


_IDENTIFIED = ("model", "sink_size", "recent_size", "device", "threads", "kernels")
GROUPS = (Group("heads", "which heads of a model see the whole context"),)
COMMANDS = (
    Command(
        "heads show",
        "which heads of a model or pattern are retrieval heads",
        "heads_view:show_heads",
        (Show, Taken(LoadSettings, ("model", "heads"))),
        _refuse,
    ),
    Command(
        "heads identify",
        "find the retrieval heads of a model and write a pattern",
        "heads_identify_view:identify_heads",
        (Identify, Taken(LoadSettings, _IDENTIFIED)),
        epilog=_METHODS,
    ),
    Command("heads list", "models for which a pattern is published", "heads_view:list_published"),
)
