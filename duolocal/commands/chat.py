"""The options of `duolocal chat`."""

from dataclasses import dataclass
from functools import partial

from duolocal.commands.parsing import Command, Taken
from duolocal.commands.sessions import KEEP, sessions_option
from duolocal.errors import SettingsError
from duolocal.options import ANY, TOKENS, choice, flagged, nonempty, option, repeated
from duolocal.settings import CHAT_SAMPLING, FirstUse, LoadSettings, Sampling

_MORE = """\
One answer for a script:
  duolocal chat --doc report.txt --prompt "What is decided here?"
  git diff | duolocal chat --prompt "Summarise this change" --json
Exit codes: 0 answered; 1 failed; 2 wrong usage; 3 the answer is not complete (cut off by --max-tokens or a
full context); 130 interrupted.
"""
_about = partial(option, group="what to talk about")
_reading = partial(option, group="reading")
_saved = partial(option, group="saved contexts")


@dataclass(frozen=True)
class Chat:
    """What a chat is about, beside the model and the sampling."""

    no_color: bool = flagged("no colours (NO_COLOR does the same)")
    doc: tuple[str, ...] = _about(
        repeated(ANY, "run"),
        "documents to load: files of many formats, folders, zip archives, patterns such as 'docs/*.md'",
        default=(),
        metavar="PATH",
    )
    system: str | None = _about(ANY, "a system message", metavar="TEXT")
    prompt: str | None = _about(
        nonempty("give the question as its text"),
        "answer this once and exit; piped stdin is then a document named stdin, and without --prompt the question",
        metavar="TEXT",
    )
    json: bool = flagged("print the one answer as JSON, with counts and timings", group="what to talk about")
    reader: str = _reading(
        choice("full", "retrieve"),
        "full: documents go into the context, or are refused; retrieve: documents of any length are read in parts "
        "for each question, and the model is given the passages that its attention picks",
        default="full",
        metavar="HOW",
    )
    passages: int | None = _reading(
        TOKENS, "with --reader retrieve: tokens of passages for an answer", metavar="TOKENS", default_help="1K"
    )
    session: str | None = _saved(
        ANY, "open this session, or begin it; it is saved after every turn and while documents are read", metavar="NAME"
    )
    keep: int | None = _saved(
        KEEP,
        "disk that documents may take to be opened next time instead of read; off keeps none",
        metavar="SIZE",
        default_help="$DUOLOCAL_KEEP, or 8GiB",
    )
    sessions_folder: str | None = sessions_option(group="saved contexts")

    def __post_init__(self) -> None:
        if self.passages is not None and self.reader == "full":
            raise SettingsError("--passages is for --reader retrieve: add that, or leave it out")
        if self.reader == "retrieve" and self.session is not None:
            raise SettingsError(
                "--session keeps what is in the context, and --reader retrieve reads for each question: "
                "use one of the two; /save NAME keeps a chat"
            )


COMMANDS = (
    Command(
        "chat",
        "chat in the terminal, or answer one question",
        "chat_start:chat",
        (Chat, LoadSettings, Taken(Sampling, base=CHAT_SAMPLING), FirstUse),
        description="Chat with a model about long documents, or answer one question (--prompt, or stdin).",
        epilog=_MORE,
        opens_session=True,
    ),
)
