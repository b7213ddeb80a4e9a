"""The chat: reads a line, runs a command or asks the model, shows what comes back.

Owns the loop and what the commands share. The commands are in `commands`, what they show in `views`; the
context and the conversation belong to the session.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.text import Text

from duolocal.documents import Document
from duolocal.engine.session import ChatSession, Event, Finished
from duolocal.errors import DuoLocalError
from duolocal.sampling import Sampling
from duolocal.settings import LoadSettings
from duolocal.terminal import commands, figures, reader_view, views
from duolocal.terminal.clean import clean, clean_line
from duolocal.terminal.progress import bar
from duolocal.terminal.prompt import InputCompleter, InputLine
from duolocal.terminal.stream import show_events

if TYPE_CHECKING:
    from duolocal.reader.session import Picked, ReadingSession
    from duolocal.sessions.keeper import ContextKeeper


@dataclass
class Chat:
    """A running chat; every failure a user can act on is one line, and the chat goes on."""

    console: Console
    session: ChatSession
    facts: views.Facts
    settings: LoadSettings
    sampling: Sampling
    program: str = "duolocal chat"
    history_file: Path | None = None
    files: dict[str, Document] = field(default_factory=dict)  # by name, also of documents undone since
    # By message index: a user's message also holds the documents, and an answer does not say how it ended.
    questions: dict[int, str] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    last_answer: Finished | None = None
    last_load: Finished | None = None
    leaving: bool = False
    keeper: "ContextKeeper | None" = None  # of sessions and documents on disk
    reader: "ReadingSession | None" = None  # has the documents that are read for each question

    def run(self, documents: Sequence[Document] = (), *, left_out: str | None = None) -> int:
        """Talk until the user leaves; return the exit code. `left_out` tells which files were not loaded."""
        self.show(views.welcome(self.facts, len(documents)))
        for note in views.notes_view(self.facts):
            self.show(note)
        self.show_notes()
        if self.reader is not None:
            self.note(reader_view.EXPLAINED)
        if left_out:
            self.note(left_out)
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
            self.show_notes()
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
            if self.reader is not None:
                self.reader.tidy()

    def ask(self, text: str) -> None:
        """Ask the model and stream its answer."""
        if self.reader is not None and self.reader.documents:
            self._answer(self.reader.ask(text, self.sampling), text)
        else:
            self._answer(self.session.ask(text, self.sampling), text)

    def retry(self) -> None:
        """Answer the last question once more."""
        question = self.questions.get(len(self.session.messages) - 2, "")
        self._answer(self.session.retry(self.sampling), question)

    def _answer(self, events: "Iterable[Event | Picked]", question: str) -> None:
        finished = self.consume(events, reading="reading")
        self.forget_undone()
        if finished is None:
            return
        if not finished.completion_tokens and finished.reason == "cancelled":
            self.note("stopped before the answer began; the question is not in the context\n")
            return
        self.last_answer = finished
        index = len(self.session.messages) - 1
        self.questions[index - 1] = question
        if finished.reason != "stop":
            self.ends[index] = finished.reason
        self.show(views.answer_line(finished, context=self.facts.context))
        self.show("")  # a blank line between turns

    def consume(self, events: "Iterable[Event | Picked]", *, reading: str) -> Finished | None:
        """Show a session's events until they end."""
        finished = show_events(
            self.console,
            self.session if self.reader is None else self.reader,
            events,
            reading=reading,
            on_picked=lambda picked: self.show(reader_view.picked_view(picked, self.files)),
        )
        self.show_notes()
        return finished

    def show_notes(self) -> None:
        """Show what the keeper of sessions wants to be known."""
        if self.keeper is not None:
            for note in self.keeper.notes:
                self.note(note)
            self.keeper.notes.clear()

    def add_documents(self, documents: Sequence[Document]) -> None:
        """Read documents into the context, all or, when they do not fit, none; complain when it does not work."""
        named = self._name(documents)
        if not named:
            return
        for document in named.values():
            if document.note:
                self.note(document.note)
        if self.reader is not None:
            for name, document in named.items():
                try:
                    self.reader.add(name, document.text)
                except DuoLocalError as error:
                    self.complain(str(error))
                    continue
                self.files[name] = document
                self.note(f"{clean_line(name)}: {len(document.text):,} characters, read for each question")
            return
        names = ", ".join(map(clean_line, named)) if len(named) < 4 else f"{len(named)} documents"
        texts = [(name, document.text) for name, document in named.items()]
        self.files |= named  # now, for what is saved while they are read
        try:
            with bar(self.console, "counting tokens", ""):
                events = self.session.add_documents(texts)
            finished = self.consume(events, reading=f"reading {names}")
        except DuoLocalError as error:
            self.complain(str(error))
            return
        self.last_load = finished
        sizes = {item.name: item.num_tokens for item in self.session.context_items() if item.kind == "document"}
        free = self.facts.context - self.session.engine.position
        for name in named:
            if name in sizes:
                self.note(f"loaded {clean_line(name)}: {figures.tokens(sizes[name])}")
            else:
                self.note(f"stopped: {clean_line(name)} is not in the context")
        self.note(f"{free:,} tokens are free")

    def _name(self, documents: Sequence[Document]) -> dict[str, Document]:
        """Give every document a name of its own; what is in the context already is left out."""
        named: dict[str, Document] = {}
        loaded = set(self.session.documents if self.reader is None else self.reader.documents)
        for document in documents:
            name = document.name
            known = self.files.get(name) if name in loaded else named.get(name)
            if known is not None and (known.path, known.text) == (document.path, document.text):
                self.note(f"{clean_line(name)} is in the context already")
                continue
            if name in loaded or name in named:
                name = str(document.path)
            count = 2
            while name in loaded or name in named:
                name = f"{document.path} ({count})"
                count += 1
            named[name] = document
        return named

    def forget_undone(self) -> None:
        """Drop what was known of messages that are no longer there."""
        count = len(self.session.messages)
        for known in (self.questions, self.ends):
            for index in [index for index in known if index >= count]:
                del known[index]

    def status(self, columns: int) -> str:
        """Build the bottom line of the prompt."""
        engine = self.session.engine
        return views.status_line(self.facts, engine.position, engine.memory(), self.last_answer, columns)

    def show(self, what: RenderableType) -> None:
        """Print something of ours."""
        self.console.print(what)

    def note(self, text: str) -> None:
        """Print a dim line."""
        self.console.print(Text(clean(text), style="dim"))

    def complain(self, text: str) -> None:
        """Print one line about something that did not work."""
        self.console.print(Text(clean(text), style="red"))
