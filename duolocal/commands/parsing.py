"""From words to a command and its typed options, and to --help: argparse, told by the dataclasses.

    Command("bench decode", "decode speed by length", "bench_speed_view:bench_decode", (Decode, CACHE))

A command takes frozen dataclasses of options (`duolocal.options`), whole or as Taken says, and names the function in
`duolocal.terminal` that is called with them, so that --help imports none. Raises SettingsError for wrong usage.
"""

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from duolocal.errors import SettingsError
from duolocal.options import REQUIRED, declared_in, default_text, flag


@dataclass(frozen=True)
class Taken:
    """What a command takes of a dataclass of options: some fields (None: all), and what they are if not given."""

    owner: Any
    names: tuple[str, ...] | None = None
    base: Any = None  # None: the fields' own defaults

    @property
    def items(self) -> "tuple[Field[Any], ...]":
        return tuple(item for item in fields(self.owner) if self.names is None or item.name in self.names)

    def default_of(self, item: "Field[Any]") -> Any:
        return item.default if self.base is None else getattr(self.base, item.name)

    def value(self, words: argparse.Namespace) -> Any:
        """Read the words of one command line."""
        given: dict[str, Any] = {}
        for item in self.items:
            declared, typed = declared_in(item), getattr(words, item.name)
            name = declared.metavar or item.name if declared.positional else flag(item.name)
            if declared.kind.is_flag:
                given[item.name] = typed
            elif isinstance(typed, list) and typed:
                given[item.name] = tuple(declared.parse(word, name) for word in typed)
            elif isinstance(typed, str):
                given[item.name] = declared.parse(typed, name)
        return self.owner(**given) if self.base is None else replace(self.base, **given)


@dataclass(frozen=True)
class Command:
    """A command: its words, a line of help, "module:function" that it runs, and the options that it takes.

    refuse: raises SettingsError for options that do not go together, before anything heavy is imported.
    """

    name: str
    help: str
    run: str
    takes: tuple[Any, ...] = ()  # dataclasses, or Taken
    refuse: Callable[..., None] = lambda *values: None
    description: str | None = None
    epilog: str = ""
    opens_session: bool = False  # which may name the model

    @property
    def parts(self) -> tuple[Taken, ...]:
        return tuple(part if isinstance(part, Taken) else Taken(part) for part in self.takes)


@dataclass(frozen=True)
class Group:
    """The first word of several commands; `metavar` stands for the second."""

    name: str
    help: str
    metavar: str = "WHAT"


def program_of(name: str) -> str:
    """Return the words that start a command, as the user typed them."""
    return "python chat.py" if name == "chat" and Path(sys.argv[0]).name == "chat.py" else f"duolocal {name}"


class Formatter(argparse.HelpFormatter):
    """Wraps paragraphs, which end with a period or colon; lines that begin with a space are examples and stay lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for line in text.splitlines():
            if lines and not line.startswith(" ") and not lines[-1].startswith(" ") and lines[-1][-1:] not in ".:":
                lines[-1] += f" {line}"
            else:
                lines.append(line)
        return "\n".join(
            part for line in lines for part in ([line] if line.startswith(" ") else self._split_lines(line, width))
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports its errors as ours: one line."""

    def __init__(self, prog: str, usage: str, description: str, epilog: str = "") -> None:
        usage = literal(f"{prog} {usage}")
        super().__init__(prog, usage, description, epilog, formatter_class=Formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message.removeprefix("argument "))

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:  # argparse's own says nothing where help cannot be written
            print(message, end="", file=file or sys.stderr, flush=True)


def literal(text: str) -> str:
    return text.replace("%", "%%")


def parser_of(found: Command) -> argparse.ArgumentParser:
    """Build the parser of a command."""
    description = found.description or f"{found.help[0].upper()}{found.help[1:]}."
    parser = Parser(program_of(found.name), _usage(found.parts), description, found.epilog)
    groups: dict[str | None, Any] = {None: parser}
    for part in found.parts:
        for item in part.items:
            title = declared_in(item).group
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            _add(groups[title], item, part.default_of(item))
    return parser


def _usage(parts: Sequence[Taken]) -> str:
    """Return what must be given, and what may stand without an option's name."""
    words = ["[options]"]
    for part in parts:
        for item in part.items:
            declared, required = declared_in(item), part.default_of(item) is REQUIRED
            if declared.positional:
                word = f"{declared.metavar or item.name}{' ...' if declared.kind.many else ''}"
                words.append(word if required else f"[{word}]")
            elif required:
                words.append(f"{flag(item.name)} {declared.metavar}")
    return " ".join(words)


def _add(where: Any, item: "Field[Any]", default: Any) -> None:
    declared = declared_in(item)
    kind, shown = declared.kind, default_text(item, default)
    told = literal(f"{declared.help} (default: {shown})" if shown else declared.help)
    if declared.positional:
        several, one = ("+", None) if default is REQUIRED else ("*", "?")
        metavar = declared.metavar or item.name
        where.add_argument(item.name, nargs=several if kind.many else one, metavar=metavar, help=told)
    elif kind.is_flag:
        where.add_argument(flag(item.name), dest=item.name, action="store_true", help=told)
    else:
        where.add_argument(
            flag(item.name),
            *declared.also,
            dest=item.name,
            action={"": "store", "each": "append", "run": "extend"}[kind.many],
            nargs="+" if kind.many == "run" else None,
            metavar=declared.metavar,
            required=default is REQUIRED,
            help=told,
        )
