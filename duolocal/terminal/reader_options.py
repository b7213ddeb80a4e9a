"""Options of `--reader`, and what stands for them. Light: the command line builds its parser with it for `--help`."""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from duolocal.errors import SettingsError
from duolocal.settings import parse_tokens

if TYPE_CHECKING:
    from duolocal.engine.session import ChatSession
    from duolocal.reader.session import ReadingSession

READERS = ("full", "retrieve")


@dataclass(frozen=True)
class ReaderSettings:
    """How documents are read: "full" into the context, or "retrieve", for each question."""

    reader: str = "full"
    passages: int | None = None  # tokens; None: the reader's own choice

    @property
    def retrieves(self) -> bool:
        return self.reader == "retrieve"


def add_reader_options(group: argparse._ActionsContainer) -> None:
    """Add --reader and --passages."""
    group.add_argument(
        "--reader",
        default="full",
        metavar="HOW",
        help="full: documents go into the context, or are refused; retrieve: documents of any length are read in parts "
        "for each question, and the model is given the passages that its attention picks (default: full)",
    )
    group.add_argument(
        "--passages", metavar="TOKENS", help="with --reader retrieve: tokens of passages for an answer (default: 1K)"
    )


def reader_settings(options: argparse.Namespace) -> ReaderSettings:
    """Read the options. Raises SettingsError."""
    if options.reader not in READERS:
        raise SettingsError(f"--reader is {options.reader!r}: give {' or '.join(READERS)}")
    if options.passages is not None and options.reader == "full":
        raise SettingsError("--passages is for --reader retrieve: add that, or leave it out")
    if options.reader == "retrieve" and getattr(options, "session", None) is not None:
        raise SettingsError(
            "--session keeps what is in the context, and --reader retrieve reads for each question: "
            "use one of the two; /save NAME keeps a chat"
        )
    passages = None if options.passages is None else parse_tokens(options.passages, "--passages")
    return ReaderSettings(options.reader, passages)


def make_reader(settings: ReaderSettings, session: "ChatSession") -> "ReadingSession | None":
    """Return what reads documents for each question, None where they go into the context. Raises SettingsError."""
    if not settings.retrieves:
        return None
    from duolocal.reader import PASSAGE_TOKENS, Retriever
    from duolocal.reader.session import ReadingSession

    passages = PASSAGE_TOKENS if settings.passages is None else settings.passages
    return ReadingSession(session, Retriever(session.engine, session.tokenizer, passage_tokens=passages))
