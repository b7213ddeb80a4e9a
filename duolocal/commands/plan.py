"""The options of `duolocal plan`."""

from dataclasses import dataclass, replace
from functools import partial

from duolocal.commands.parsing import Command
from duolocal.errors import SettingsError
from duolocal.options import ANY, BYTES, flagged, option
from duolocal.settings import LoadSettings

CARDS = "rtx3090, rtx4090, rtx5090, a100, h100 …"  # as in duolocal.plan.cards, which is not imported for --help
_MORE = """\
  duolocal plan --model llama3-8b-awq --context 1M --memory 24GiB --card rtx4090
  duolocal plan --model ./model.gguf --context 128K --heads 0.5
Nothing is loaded and nothing fetched: a name, a config.json or the header of a .gguf is enough. Bytes are exact where
the file is here; speeds are measured on this machine (some seconds, once per model), or computed for a card from what
its maker publishes (docs/plan.md).
Exit codes: 0 it fits; 1 it does not, and the settings nearest to it that do are listed; 2 wrong usage.
"""
_HERE = "what is free here; with --card none"
_there_is = partial(option, group="what there is", metavar="SIZE")
_said = partial(flagged, group="what is said")


@dataclass(frozen=True)
class Plan:
    """What there is, and what is said."""

    memory: int | None = _there_is(
        replace(BYTES, wanted="give a size such as 24GiB", fits=lambda value: value > 0),
        "memory that may be used where it computes: 24GiB",
        default_help="what is free",
    )
    host_memory: int | None = _there_is(BYTES, "beside a GPU, for blocks", default_help=_HERE)
    disk: int | None = _there_is(BYTES, "for a file of blocks", default_help=_HERE)
    card: str | None = _there_is(ANY, f"plan for this GPU instead of this machine: {CARDS}", metavar="NAME")
    measure: bool = _said("measure this machine's speed anew")
    no_measure: bool = _said("measure nothing; speeds only where they are known")
    json: bool = _said("print one JSON object")

    def __post_init__(self) -> None:
        if self.measure and self.no_measure:
            raise SettingsError("--measure and --no-measure were both given: leave one of them out")


COMMANDS = (
    Command(
        "plan",
        "what a model and a context take in memory and time, before anything is loaded",
        "plan_view:plan",
        (Plan, LoadSettings),
        description="Plan memory and time: weights, KV cache by head class, working memory, file size, speeds.",
        epilog=_MORE,
    ),
)
