"""The chat: reads a line, runs a command or asks the model, shows what comes back.

Owns the loop and what the commands share. The commands are in `commands`, what they show in `views`; the
context and the conversation belong to the session.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, RenderableType
from rich.text import Text

from duolocal.documents import Document
from duolocal.engine.session import ChatSession, Event, Finished
from duolocal.errors import DuoLocalError
from duolocal.sampling import Sampling
from duolocal.settings import ChatSettings
from duolocal.terminal import commands, figures, views
from duolocal.terminal.clean import clean, clean_line
from duolocal.terminal.prompt import InputCompleter, InputLine
from duolocal.terminal.stream import show_events


@dataclass
class Chat:
    """A running chat; every failure a user can act on is one line, and the chat goes on."""

    console: Console
    session: ChatSession
    facts: views.Facts
    settings: ChatSettings
    sampling: Sampling
    program: str = "duolocal chat"
    history_file: Path | None = None
    files: dict[str, Document] = field(default_factory=dict)  # by name, also of documents undone since
    ends: dict[int, str] = field(default_factory=dict)  # message index -> how its answer ended
    last: Finished | None = None
    leaving: bool = False

    def run(self, documents: Sequence[Document] = ()) -> int:
        """Talk until the user leaves; return the exit code."""
        self.show(views.welcome(self.facts, len(documents)))
        for note in self.facts.notes:
            self.note(note)
        self.add_documents(documents)
        line = InputLine(
            history_file=self.history_file,
            completer=InputCompleter(commands.help_lines(), commands.words_after),
            status=self.status,
            no_color=self.console.no_color,
        )
        while not self.leaving:
            try:
                text = line.read()
            except EOFError:
                break
            try:
                self.handle(text)
            except DuoLocalError as error:
                self.complain(str(error))
            except KeyboardInterrupt:
                self.note("stopped")
        return 0

    def handle(self, text: str) -> None:
        """Run one input: a command or a question. Raises DuoLocalError."""
        if not text.strip():
            return
        command = commands.parse(text)
        if command is None:
            self.ask(text.strip())
        else:
            name, rest = command
            commands.run(self, name, rest)

    def ask(self, text: str) -> None:
        """Ask the model and stream its answer."""
        self._answer(self.session.ask(text, self.sampling))

    def retry(self) -> None:
        """Answer the last question once more."""
        self._answer(self.session.retry(self.sampling))

    def _answer(self, events: Iterable[Event]) -> None:
        finished = self.consume(events, reading="reading")
        if finished is None:
            return
        self.last = finished
        self.forget_ends()
        if finished.reason != "stop":
            self.ends[len(self.session.messages) - 1] = finished.reason
        self.show(views.answer_line(finished, context=self.facts.context))
        self.show("")  # a blank line between turns

    def consume(self, events: Iterable[Event], *, reading: str) -> Finished | None:
        """Show a session's events until they end."""
        return show_events(self.console, self.session, events, reading=reading)

    def add_documents(self, documents: Sequence[Document]) -> None:
        """Put documents into the context, one by one; complain about one that does not fit and go on."""
        for document in documents:
            try:
                self._add_document(document)
            except DuoLocalError as error:
                self.complain(str(error))

    def _add_document(self, document: Document) -> None:
        loaded = {item.name: item for item in self.session.context_items() if item.kind == "document"}
        name = document.name
        if name in loaded:
            known = self.files.get(name)
            if known is not None and known.path == document.path and known.text == document.text:
                self.note(f"{clean_line(name)} is in the context already")
                return
            name = str(document.path) if str(document.path) not in loaded else f"{document.path} (again)"
        if document.note:
            self.note(document.note)
        finished = self.consume(
            self.session.add_document(name, document.text), reading=f"reading {clean_line(name)}"
        )
        if finished is not None and finished.reason == "cancelled":
            self.note(f"stopped: {clean_line(name)} is not in the context")
            return
        self.files[name] = document
        num_tokens = next(
            (
                item.num_tokens
                for item in self.session.context_items()
                if (item.kind, item.name) == ("document", name)
            ),
            0,
        )
        free = self.facts.context - self.session.engine.position
        self.note(f"loaded {clean_line(name)}: {figures.tokens(num_tokens)}, {free:,} free")

    def forget_ends(self) -> None:
        """Drop what was known of answers that are no longer there."""
        count = len(self.session.messages)
        self.ends = {index: reason for index, reason in self.ends.items() if index < count - 1}

    def status(self, columns: int) -> str:
        """Build the bottom line of the prompt."""
        engine = self.session.engine
        return views.status_line(self.facts, engine.position, engine.memory(), self.last, columns)

    def show(self, what: RenderableType) -> None:
        """Print something of ours."""
        self.console.print(what)

    def note(self, text: str) -> None:
        """Print a dim line."""
        self.console.print(Text(clean(text), style="dim"))

    def complain(self, text: str) -> None:
        """Print one line about something that did not work."""
        self.console.print(Text(clean(text), style="red"))
