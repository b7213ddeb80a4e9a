"""The input line: history, several lines, completion, keys. Knows the commands' names, not what they do."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import ColorDepth, Output

QUOTES = "'''"


class InputCompleter(Completer):
    """Completes command names, paths after /load and /save, and words after the other commands."""

    def __init__(self, commands: dict[str, str], words: Callable[[str], Sequence[str]]) -> None:
        self._commands = commands  # name without slash -> one line of help
        self._words = words  # command -> what may follow it
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        if not line.startswith("/") or "\n" in line:
            return
        command, space, rest = line[1:].partition(" ")
        if not space:
            for name, help_line in self._commands.items():
                if name.startswith(command):
                    yield Completion(name, start_position=-len(command), display_meta=help_line)
        elif command in ("load", "save"):
            word = rest.rpartition(" ")[2]
            yield from self._paths.get_completions(Document(word, len(word)), complete_event)
        else:
            word = rest.rpartition(" ")[2]
            for candidate in self._words(command) if " " not in rest else ():
                if candidate.startswith(word):
                    yield Completion(candidate, start_position=-len(word))


def is_open(text: str) -> bool:
    """Tell whether Enter continues the input: a backslash at the end, or a ''' block not yet closed."""
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        return not (stripped.endswith(QUOTES) and len(stripped) >= 2 * len(QUOTES))
    return text.endswith("\\")


def unwrap(text: str) -> str:
    """Take the ''' marks off a block."""
    stripped = text.strip()
    if stripped.startswith(QUOTES) and not is_open(text):
        return stripped[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


class InputLine:
    """Reads one input at a time; Ctrl-C clears it, twice in a row (or Ctrl-D) ends the chat."""

    def __init__(
        self,
        *,
        history_file: Path | None,
        completer: Completer,
        status: Callable[[int], str],
        no_color: bool = False,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        self._status = status
        self._armed = False  # one Ctrl-C was pressed and nothing typed since
        self._pasted = False  # into this input: it is sent as it is, whatever marks it begins or ends with
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            history=_history(history_file),
            completer=completer,
            complete_while_typing=Condition(self._is_command),
            key_bindings=self._keys(),
            bottom_toolbar=self._toolbar,
            prompt_continuation=_continuation,
            reserve_space_for_menu=4,
            color_depth=ColorDepth.DEPTH_1_BIT if no_color else None,
            input=input,
            output=output,
        )
        self._session.default_buffer.on_text_changed += self._disarm

    def read(self) -> str:
        """Return the next input; raises EOFError when the user leaves."""
        self._armed = self._pasted = False
        text = self._session.prompt("> ")
        return text if self._pasted else unwrap(text)

    def _is_command(self) -> bool:
        return self._session.default_buffer.text.startswith("/")

    def _disarm(self, buffer: Any) -> None:
        if buffer.text:
            self._armed = False

    def _toolbar(self) -> str:
        if self._armed:
            return " Ctrl-C again or Ctrl-D leaves the chat "
        if not self._pasted and self._session.default_buffer.text.lstrip().startswith(QUOTES):
            return f" {QUOTES} ends the text, Ctrl-C drops it "
        return self._status(self._session.app.output.get_size().columns)

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter")
        def accept(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if self._pasted or not is_open(buffer.text):
                buffer.validate_and_handle()
                return
            if buffer.text.endswith("\\") and not buffer.text.strip().startswith(QUOTES):
                buffer.text = buffer.text[:-1]
                buffer.cursor_position = len(buffer.text)
            buffer.insert_text("\n")

        @keys.add(Keys.BracketedPaste)
        def paste(event: KeyPressEvent) -> None:
            self._pasted = True
            event.current_buffer.insert_text(event.data.replace("\r\n", "\n").replace("\r", "\n"))

        @keys.add("escape", "enter")
        def newline(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c")
        def interrupt(event: KeyPressEvent) -> None:
            if self._armed:
                event.app.exit(exception=EOFError())
                return
            event.current_buffer.reset()
            self._armed, self._pasted = True, False

        return keys


def _continuation(width: int, _line: int, wrap_count: int) -> str:
    # Dots for a line that the user began, nothing for one that only wraps.
    return " " * width if wrap_count else "." * (width - 1) + " "


def _history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))  # questions are private
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)
