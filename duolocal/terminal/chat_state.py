"""What a chat knows, and what its commands may do in it.

Owns no command and no loop: commands (`docs_chat`, `settings_chat`, `turns_chat`, `sessions_chat`) are written against
this file, and `chat` runs them.
"""

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, RenderableType

from duolocal.documents import Document
from duolocal.engine.session import ChatSession, Event, Finished
from duolocal.errors import SettingsError
from duolocal.settings import LoadSettings, Sampling
from duolocal.terminal.views import Facts

if TYPE_CHECKING:
    from duolocal.reader.session import Picked, ReadingSession
    from duolocal.sessions.keeper import ContextKeeper


@dataclass
class ChatState:
    """All that a chat knows beside its session, which owns the context and the conversation."""

    session: ChatSession
    facts: Facts
    settings: LoadSettings
    sampling: Sampling
    program: str = "duolocal chat"
    files: dict[str, Document] = field(default_factory=dict)  # by name, also of documents undone since
    # By message index: a user's message also holds the documents, and an answer does not say how it ended.
    questions: dict[int, str] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    last_answer: Finished | None = None
    last_load: Finished | None = None
    leaving: bool = False
    reopen: str | None = None  # the session to go on with after leaving, by another start
    keeper: "ContextKeeper | None" = None  # of sessions and documents on disk
    reader: "ReadingSession | None" = None  # has the documents that are read for each question

    @property
    def documents(self) -> list[str]:
        """Names of the documents that answers are made from."""
        return list(self.session.documents if self.reader is None else self.reader.documents)

    def forget_undone(self) -> None:
        """Drop what was known of messages that are no longer there."""
        count = len(self.session.messages)
        for known in (self.questions, self.ends):
            for index in [index for index in known if index >= count]:
                del known[index]

    def forget_messages(self) -> None:
        """Drop what was known of all messages."""
        self.questions.clear()
        self.ends.clear()

    def follow(self) -> None:
        """Bring questions and endings in line with the turn the session is at."""
        self.forget_messages()
        exchanges = [turn for turn in self.session.tree.current.way() if turn.kind == "exchange"]
        answers = [index for index, message in enumerate(self.session.messages) if message.role == "assistant"]
        for turn, index in zip(exchanges, answers, strict=True):
            self.questions[index - 1] = turn.name
            if turn.reason not in ("", "stop"):
                self.ends[index] = turn.reason


class CommandHost(Protocol):
    """What a command may do: change the state, write, and have the session's work shown and stopped by Ctrl-C."""

    @property
    def state(self) -> ChatState: ...

    @property
    def console(self) -> Console:
        """Where the chat is shown: its width, and bars."""

    def show(self, what: RenderableType) -> None:
        """Print something of ours."""

    def note(self, text: str) -> None:
        """Print a dim line."""

    def complain(self, text: str) -> None:
        """Print one line about something that did not work."""

    def consume(self, events: "Iterable[Event | Picked]", *, reading: str) -> Finished | None:
        """Show a session's events until they end; `reading` says what is read."""

    def answer(self, events: "Iterable[Event | Picked]", question: str) -> None:
        """Show the answer to a question, and remember both."""


Run = Callable[[CommandHost, str], None]


@dataclass(frozen=True)
class Command:
    """A command: what may follow its name, one line of help, the words that complete it, and what it does."""

    usage: str
    help: str
    words: Sequence[str]
    run: Run


class Commands(dict[str, Command]):
    """The commands of one room by name, in the order of `/help`."""

    def add(self, usage: str, help: str, *, words: Sequence[str] = ()) -> Callable[[Run], Run]:
        """Register a function as the command that `usage` begins with."""

        def register(run: Run) -> Run:
            self[usage.split()[0].removeprefix("/")] = Command(usage, help, words, run)
            return run

        return register


def no_words(name: str, rest: str) -> None:
    """Raise SettingsError where something follows a command that takes nothing."""
    if rest:
        raise SettingsError(f"/{name} takes nothing after it, but there is {rest!r}: leave it out")


def split_words(rest: str) -> list[str]:
    """Split the words after a command as a shell does; SettingsError for an open quote."""
    try:
        return shlex.split(rest)
    except ValueError:
        raise SettingsError(f"a quote is not closed in {rest!r}: close it") from None


def all_or_nothing(name: str, rest: str) -> bool:
    """Return whether `all` follows a command; raises SettingsError for anything else."""
    if rest not in ("", "all"):
        raise SettingsError(f"/{name} {rest} is not known: give /{name} or /{name} all")
    return bool(rest)


def whole_number(rest: str, *, default: int, most: int) -> int | None:
    """Return the number from 1 to `most` that follows a command, `default` where none does; None if it is no such."""
    if not rest:
        return default
    number = int(rest[:9]) if rest.isascii() and rest.isdigit() else 0
    return number if 1 <= number <= most else None
