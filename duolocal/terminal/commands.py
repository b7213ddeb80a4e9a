"""The commands of the chat: those of every room, /help and /quit; finds the command that an input names."""

import difflib
import re
from collections.abc import Sequence

from rich.text import Text

from duolocal.errors import SettingsError
from duolocal.terminal import docs_chat, sessions_chat, settings_chat, turns_chat
from duolocal.terminal.chat_state import CommandHost, Commands, no_words
from duolocal.terminal.tables import bare_table

COMMANDS = Commands(
    {**docs_chat.COMMANDS, **settings_chat.COMMANDS, **turns_chat.COMMANDS, **sessions_chat.COMMANDS}
)  # in the order of /help
_COMMAND = re.compile(r"/([A-Za-z]+|\?)(?:\s+(.*))?", re.DOTALL)
_ALIASES = {"exit": "quit", "q": "quit", "?": "help", "doc": "load"}


def help_lines() -> dict[str, str]:
    """Return command name -> its line of help, for completion."""
    return {name: command.help for name, command in COMMANDS.items()}


def words_after(command: str) -> Sequence[str]:
    """Return the words that may follow a command, for completion."""
    if command == "help":
        return list(COMMANDS)
    return COMMANDS[command].words if command in COMMANDS else ()


def parse(text: str) -> tuple[str, str] | None:
    """Split an input into (command, rest); None when it is a question.

    A first word with a second slash in it is text (a path, a comment); so is a line that starts with a space.
    """
    match = _COMMAND.fullmatch(text.rstrip())
    return (match[1].lower(), (match[2] or "").strip()) if match else None


def run(host: CommandHost, name: str, rest: str) -> None:
    """Run a command; an unknown one raises SettingsError with a suggestion."""
    command = COMMANDS.get(_ALIASES.get(name, name))
    if command is None:
        close = difflib.get_close_matches(name, [*COMMANDS, *_ALIASES], n=1, cutoff=0.5)
        hint = f"did you mean /{close[0]}?" if close else "/help lists them"
        raise SettingsError(f"unknown command /{name}: {hint} (a space before the slash sends it as text)")
    command.run(host, rest)


@COMMANDS.add("/help", "this list")
def _help(host: CommandHost, rest: str) -> None:
    table = bare_table()
    table.add_column(style="bold", no_wrap=host.console.width >= 60)
    table.add_column(overflow="fold")
    for command in COMMANDS.values():
        table.add_row(Text(command.usage), Text(command.help))
    host.show(table)
    host.note(
        "Several lines: Alt+Enter, a backslash at the end of a line, or ''' before and after; a paste stays one "
        "input.\nCtrl-C stops an answer or a document being read, and clears the line; twice, or Ctrl-D, leaves."
    )


@COMMANDS.add("/quit", "leave (/exit and Ctrl-D do the same)")
def _quit(host: CommandHost, rest: str) -> None:
    no_words("quit", rest)
    host.state.leaving = True
