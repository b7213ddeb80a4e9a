"""The command line: `duolocal chat`, `models`, `bench`, `heads`… Finds the command, turns errors into one line.

Loads neither torch nor a model before a command needs them, so that `--help` is quick.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not complete (an answer, or some of the inputs), 130 interrupted.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from duolocal import __version__
from duolocal.commands import bench, chat, docs, eval, heads, models, plan, quantize, sessions, summarize, tune
from duolocal.commands.parsing import Command, Parser, parser_of
from duolocal.errors import DuoLocalError, SettingsError, refusal
from duolocal.processes import INTERRUPTED
from duolocal.settings import LoadSettings
from duolocal.startup import without_collection
from duolocal.terminal.consoles import progress_console, say, starting_notice

_MODULES = (chat, models, bench, heads, sessions, eval, docs, plan, tune, quantize, summarize)  # in the order of --help
COMMANDS = {command.name: command for module in _MODULES for command in module.COMMANDS}
GROUPS = {group.name: group for module in (models, bench, heads, sessions, eval, docs) for group in module.GROUPS}

_OPTIONS = ("--help", "--version")  # that stand without a command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; the only place where an error becomes a printed line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 is no reason to stop
    if "OMP_NUM_THREADS" not in os.environ:
        # Read when torch is imported. Two threads left to wander have been seen to share one core, 40 times slower.
        os.environ.setdefault("OMP_PROC_BIND", "true")
    import duolocal.kernels.cpu.threads  # noqa: F401  before torch: it notes which cores we may use

    try:
        found = read(list(sys.argv[1:] if argv is None else argv))
        code = 0 if found is None else run(*found)
        sys.stdout.flush()
        return code
    except DuoLocalError as error:
        say(str(error))
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _abandon_output()  # the reader went away: nothing is left to say
        return 128 + 13
    except (OSError, MemoryError) as error:
        say(refusal(error))
        try:
            sys.stdout.flush()
        except OSError:  # it is the output that takes no more
            _abandon_output()
        return 1


def _abandon_output() -> None:
    """Lose what is still to be written to standard output, so that the interpreter's flush at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(command: Command, values: Sequence[Any]) -> int:
    """Run a command with its options; return the exit code. Raises DuoLocalError."""
    command.refuse(*values)
    module, _, name = command.run.partition(":")
    with starting_notice(progress_console()), without_collection():  # importing torch takes seconds on a cold disk
        from duolocal.terminal.fetching import settle_model

        function = getattr(importlib.import_module(f"duolocal.terminal.{module}"), name)
    if not command.opens_session:
        values = [
            settle_model(value)
            if part.owner is LoadSettings and "model" in (item.name for item in part.items)
            else value
            for part, value in zip(command.parts, values, strict=True)
        ]
    code: int = function(*values)
    return code


def read(argv: Sequence[str]) -> tuple[Command, tuple[Any, ...]] | None:
    """Read a command line: the command and its options; None where help was asked for, which is printed.

    Raises SettingsError.
    """
    if not argv or argv[0].startswith("-"):
        overview = _overview("duolocal", "Chat with long documents on your own machine.", "COMMAND")
        overview.add_argument("--version", action="version", version=f"duolocal {__version__}")
        if argv:
            if argv[0] not in overview._option_string_actions:
                _refuse(argv[0], overview)
            overview.parse_args(argv)
        overview.print_help()
        return None
    first, rest = argv[0], argv[1:]
    names = sorted({name.split()[0] for name in COMMANDS})
    if first not in names:
        raise SettingsError(f"unknown command {first!r}: {_hint(first, names, _OPTIONS)}")
    if first in GROUPS:
        group = GROUPS[first]
        if rest[:1] in (["-h"], ["--help"]):
            _overview(f"duolocal {first}", f"{group.help[0].upper()}{group.help[1:]}.", group.metavar).print_help()
            return None
        below = [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{first} ")]
        if rest and rest[0] in below:
            first, rest = f"{first} {rest[0]}", rest[1:]
        elif rest and not rest[0].startswith("-"):
            raise SettingsError(f"unknown command {f'{first} {rest[0]}'!r}: {_hint(rest[0], below)}")
        elif first not in COMMANDS:
            raise SettingsError(f"`duolocal {first}` needs a command after it: give one of {', '.join(below)}")
    command = COMMANDS[first]
    parser = parser_of(command)
    words, unknown = parser.parse_known_args(rest)
    if unknown:
        _refuse(unknown[0], parser)
    return command, tuple(part.value(words) for part in command.parts)


def _hint(word: str, names: Sequence[str], options: Sequence[str] = ()) -> str:
    close = difflib.get_close_matches(word, [*names, *options], n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"give one of {', '.join(names)}"


def _refuse(word: str, parser: argparse.ArgumentParser) -> NoReturn:
    name = word.partition("=")[0]
    if not name.startswith("-"):
        raise SettingsError(f"unexpected argument {word!r}: a question goes after --prompt, a file after --doc")
    close = difflib.get_close_matches(name, list(parser._option_string_actions), n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else f"`{parser.prog} --help` lists the options"
    raise SettingsError(f"unknown option {name}: {hint}")


def _overview(program: str, description: str, metavar: str) -> Parser:
    """Build a parser whose help lists the commands below `program`."""
    parser = Parser(program, f"{metavar} ...", description)
    start = f"{program} ".removeprefix("duolocal ")
    listed: dict[str, str] = {}
    for name, command in COMMANDS.items():
        if name.startswith(start):
            word = name.removeprefix(start).split()[0]
            listed.setdefault(word, GROUPS[word].help if not start and word in GROUPS else command.help)
    commands = parser.add_subparsers(title="commands", metavar=metavar, parser_class=argparse.ArgumentParser)
    for name, help in listed.items():
        commands.add_parser(name, help=help.replace("%", "%%"))
    return parser
