"""From words to a command and its typed options, and to --help: argparse, told by the dataclasses.

    @command("bench decode", "decode speed by length")
    def decode(settings: CacheSettings, options: Decode) -> int: ...

A parameter is a frozen dataclass of options (`duolocal.options`), or Annotated with the fields of one that the command
takes; its default value is where the options begin. Raises SettingsError for wrong usage; prints nothing but --help.
"""

import argparse
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn, get_args

from duolocal.errors import SettingsError
from duolocal.options import REQUIRED, declared_in, default_text, flag


class Fields(tuple[str, ...]):
    """The fields that a command takes of a dataclass: Annotated[LoadSettings, Fields(("model", "device"))]."""


@dataclass(frozen=True)
class Command:
    """A command: its words, one line of help, what it runs, and what --help says before and after the options."""

    name: str
    help: str
    run: Callable[..., int]
    description: str
    epilog: str


@dataclass(frozen=True)
class Group:
    """The first word of several commands; `metavar` stands for the second."""

    name: str
    help: str
    metavar: str = "WHAT"


def command(
    name: str, help: str, *, description: str | None = None, epilog: str = ""
) -> Callable[[Callable[..., int]], Command]:
    """Make a function the command `name`."""
    return lambda run: Command(name, help, run, description or f"{help[0].upper()}{help[1:]}.", epilog)


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


def literal(text: str) -> str:
    return text.replace("%", "%%")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a command: which fields of which dataclass it takes, and what they are if they are not given."""

    name: str
    owner: Any
    items: "tuple[Field[Any], ...]"
    base: Any  # None: the fields' own defaults

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


def _parameters(run: Callable[..., int]) -> Iterator[Parameter]:
    for name, parameter in inspect.signature(run).parameters.items():
        owner, chosen = parameter.annotation, None
        if get_args(owner):
            owner, chosen = get_args(owner)
        items = tuple(item for item in fields(owner) if chosen is None or item.name in chosen)
        yield Parameter(name, owner, items, None if parameter.default is parameter.empty else parameter.default)


def parser_of(found: Command) -> tuple[argparse.ArgumentParser, tuple[Parameter, ...]]:
    """Build the parser of a command."""
    parameters = tuple(_parameters(found.run))
    parser = Parser(program_of(found.name), _usage(parameters), found.description, found.epilog)
    groups: dict[str | None, Any] = {None: parser}
    for parameter in parameters:
        for item in parameter.items:
            title = declared_in(item).group
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            _add(groups[title], item, parameter.default_of(item))
    return parser, parameters


def _usage(parameters: Sequence[Parameter]) -> str:
    """Return what must be given, and what may stand without an option's name."""
    words = ["[options]"]
    for parameter in parameters:
        for item in parameter.items:
            declared, required = declared_in(item), parameter.default_of(item) is REQUIRED
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
