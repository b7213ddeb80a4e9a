"""The chat: reads a line, runs a command or asks the model, shows what comes back.

Owns the loop. The commands are in `commands`, what they share in `chat_state`, what is shown in `views`; the context
and the conversation belong to the session.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType

from duolocal.documents import Document
from duolocal.engine.session import Event, Finished
from duolocal.errors import DuoLocalError, refusal
from duolocal.terminal import commands, reader_view, views
from duolocal.terminal.chat_state import ChatState
from duolocal.terminal.clean import clean
from duolocal.terminal.consoles import print_prose
from duolocal.terminal.docs_chat import add_documents
from duolocal.terminal.prompt import InputCompleter, InputLine
from duolocal.terminal.stream import show_events

if TYPE_CHECKING:
    from duolocal.reader.session import Picked


class Chat:
    """A running chat, and the CommandHost of its commands.

    Every failure a user can act on is one line, and the chat goes on.
    """

    def __init__(self, console: Console, state: ChatState, *, history_file: Path | None = None) -> None:
        self.console = console
        self.state = state
        self._history_file = history_file

    def run(self, documents: Sequence[Document] = (), *, left_out: str | None = None) -> int:
        """Talk until the user leaves; return the exit code. `left_out` tells which files were not loaded."""
        self.show(views.welcome(self.state.facts, len(documents)))
        for note in views.notes_view(self.state.facts):
            self.show(note)
        self._show_notes()
        if self.state.reader is not None:
            self.note(reader_view.EXPLAINED)
        if left_out:
            self.note(left_out)
        add_documents(self, documents)
        line = InputLine(
            history_file=self._history_file,
            completer=InputCompleter(commands.help_lines(), commands.words_after),
            status=self._status,
            no_color=self.console.no_color,
        )
        while not self.state.leaving:
            try:
                text = line.read()
            except EOFError:
                break
            try:
                self.handle(text)
            except DuoLocalError as error:
                self.complain(str(error))
            except (OSError, MemoryError) as error:
                self.complain(refusal(error))
            except KeyboardInterrupt:
                self.note("stopped")
            self._show_notes()
        return 0

    def handle(self, text: str) -> None:
        """Run one input: a command or a question. Raises DuoLocalError."""
        if not text.strip():
            return
        state, reader, command = self.state, self.state.reader, commands.parse(text)
        if command is None:
            text = text.strip()
            asked = reader if reader is not None and reader.documents else state.session
            self.answer(asked.ask(text, state.sampling), text)
        else:
            commands.run(self, *command)
            if reader is not None:
                reader.tidy()

    def answer(self, events: "Iterable[Event | Picked]", question: str) -> None:
        """Stream an answer and sum it up; remember the question."""
        state = self.state
        finished = self.consume(events, reading="reading")
        state.forget_undone()
        if finished is None:
            return
        if not finished.completion_tokens and finished.reason == "cancelled":
            self.note("stopped before the answer began; the question is not in the context\n")
            return
        state.last_answer = finished
        index = len(state.session.messages) - 1
        state.questions[index - 1] = question
        if finished.reason != "stop":
            state.ends[index] = finished.reason
        self.show(views.answer_line(finished, context=state.facts.context))
        self.show("")  # a blank line between turns

    def consume(self, events: "Iterable[Event | Picked]", *, reading: str) -> Finished | None:
        """Show a session's events until they end."""
        finished = show_events(
            self.console,
            self.state.reader or self.state.session,
            events,
            reading=reading,
            on_picked=lambda picked: self.show(reader_view.picked_view(picked, self.state.files)),
        )
        self._show_notes()
        return finished

    def _show_notes(self) -> None:
        """Show what the keeper of sessions wants to be known."""
        if self.state.keeper is not None:
            for note in self.state.keeper.notes:
                self.note(note)
            self.state.keeper.notes.clear()

    def _status(self, columns: int) -> str:
        """Build the bottom line of the prompt."""
        state, engine = self.state, self.state.session.engine
        return views.status_line(state.facts, engine.position, engine.memory(), state.last_answer, columns)

    def show(self, what: RenderableType) -> None:
        """Print something of ours."""
        self.console.print(what)

    def note(self, text: str) -> None:
        """Print a dim line."""
        print_prose(self.console, clean(text), "dim")

    def complain(self, text: str) -> None:
        """Print one line about something that did not work."""
        print_prose(self.console, clean(text), "red")
