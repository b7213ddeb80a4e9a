"""The command line: `duolocal chat`, `models`, `bench`, `heads`… Parses, dispatches, turns errors into one line.

Loads neither torch nor a model before a command needs them, so that `--help` is quick.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not complete (an answer, or some of the inputs), 130 interrupted.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from duolocal import __version__
from duolocal.errors import DuoLocalError, SettingsError
from duolocal.processes import INTERRUPTED
from duolocal.settings import LoadSettings, parse_tokens
from duolocal.terminal.bench_options import add_bench_parsers, run_bench
from duolocal.terminal.chat_options import EXIT_CODES, add_chat_options, run_chat
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import new_console, progress_console, starting_notice
from duolocal.terminal.docs_options import add_docs_parsers, run_docs
from duolocal.terminal.eval_options import add_eval_parsers, run_eval
from duolocal.terminal.heads_options import add_heads_parsers, run_heads
from duolocal.terminal.model_options import (
    add_compute_options,
    add_machine_options,
    add_model,
    add_model_options,
    chosen_settings,
    chosen_threads,
)
from duolocal.terminal.models_options import add_convert_parser, run_convert
from duolocal.terminal.plan_options import add_plan_parser, run_plan
from duolocal.terminal.quantize_options import add_quantize_parser, run_quantize
from duolocal.terminal.sessions_options import add_sessions_parsers, run_sessions
from duolocal.terminal.summarize_options import add_summarize_parser, run_summarize


class _Parser(argparse.ArgumentParser):
    """An argparse parser that reports its errors as ours: one line."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message.removeprefix("argument "))


def build_parser(program: str = "duolocal") -> tuple[_Parser, dict[str, _Parser]]:
    """Build the parser; also return the parsers of the commands by name ("bench memory")."""
    parser = _Parser(prog="duolocal", description="Chat with long documents on your own machine.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"duolocal {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", parser_class=_Parser)
    parsers: dict[str, _Parser] = {}

    chat = commands.add_parser(
        "chat",
        prog=program if program.endswith("chat.py") else None,
        help="chat in the terminal, or answer one question",
        description="Chat with a model about long documents, or answer one question (--prompt, or stdin).",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_chat_options(chat)
    parsers["chat"] = chat

    models = commands.add_parser("models", help="list the named models, fetch or convert one", allow_abbrev=False)
    actions = models.add_subparsers(dest="action", metavar="[fetch|convert]", parser_class=_Parser)
    fetch = actions.add_parser("fetch", help="fetch a model into the cache", allow_abbrev=False)
    fetch.add_argument("name", help="a name from `duolocal models`, or a hub id org/name")
    convert = add_convert_parser(actions, add_model=add_model)
    parsers |= {"models": models, "models fetch": fetch, "models convert": convert}

    bench = commands.add_parser("bench", help="measure on this machine", allow_abbrev=False)
    what = bench.add_subparsers(dest="action", metavar="WHAT", parser_class=_Parser, required=True)
    parsers |= {"bench": bench, **add_bench_parsers(what, add_model_options)}

    kv = commands.add_parser("kv", help="compare the KV formats on a model", allow_abbrev=False)
    what = kv.add_subparsers(dest="action", metavar="WHAT", parser_class=_Parser, required=True)
    measure = what.add_parser(
        "measure", help="KL and perplexity of every KV format against the 16-bit cache", allow_abbrev=False
    )
    _add_measure_options(measure)
    parsers |= {"kv": kv, "kv measure": measure}

    heads = commands.add_parser("heads", help="which heads of a model see the whole context", allow_abbrev=False)
    what = heads.add_subparsers(dest="action", metavar="WHAT", parser_class=_Parser, required=True)
    parsers |= {"heads": heads, **add_heads_parsers(what, add_model=add_model, add_machine=add_machine_options)}

    sessions = commands.add_parser("sessions", help="list, show or remove saved contexts", allow_abbrev=False)
    what = sessions.add_subparsers(dest="action", metavar="WHAT", parser_class=_Parser, required=True)
    parsers |= {"sessions": sessions, **add_sessions_parsers(what)}

    evaluate = commands.add_parser(
        "eval", help="measure what a smaller KV cache costs, beside the dense model", allow_abbrev=False
    )
    what = evaluate.add_subparsers(dest="action", metavar="WHAT", parser_class=_Parser, required=True)
    evaluations = add_eval_parsers(what, add_model_options, add_model=add_model, add_machine=add_machine_options)
    parsers |= {"eval": evaluate, **evaluations}

    docs = commands.add_parser("docs", help="what documents would take of the context", allow_abbrev=False)
    what = docs.add_subparsers(dest="action", metavar="WHAT", parser_class=_Parser, required=True)
    parsers |= {"docs": docs, **add_docs_parsers(what, add_model=add_model)}

    parsers["plan"] = add_plan_parser(
        commands, add_model_options=add_model_options, add_compute_options=add_compute_options
    )
    quantize = add_quantize_parser(commands, add_machine=add_machine_options)
    parsers["quantize"] = quantize
    parsers["summarize"] = add_summarize_parser(
        commands, add_model_options=add_model_options, add_compute_options=add_compute_options
    )
    return parser, parsers


def _add_measure_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--tokens", default="2K", metavar="N", help="length of the text (default: 2K)")
    parser.add_argument("--text", metavar="PATH", help="a text to read (default: prose that comes with Python)")
    add_machine_options(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; the only place where an error becomes a printed line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 is no reason to stop
    if "OMP_NUM_THREADS" not in os.environ:
        # Read when torch is imported. Two threads left to wander have been seen to share one core, 40 times slower.
        os.environ.setdefault("OMP_PROC_BIND", "true")
    import duolocal.kernels.cpu.threads  # noqa: F401  before torch: it notes which cores we may use

    program = "python chat.py" if Path(sys.argv[0]).name == "chat.py" else "duolocal"
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv), program)
        sys.stdout.flush()
        return code
    except DuoLocalError as error:
        print(f"duolocal: {clean_line(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away: nothing is left to say, not even by the interpreter's own flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13


def _run(argv: list[str], program: str) -> int:
    parser, parsers = build_parser(program)
    if not argv:
        parser.print_help()
        return 0
    _check_command(argv[0], parsers)
    options, unknown = parser.parse_known_args(argv)
    name = " ".join(filter(None, (options.command, getattr(options, "action", None))))
    if unknown:
        _refuse(unknown[0], parsers[name])
    if name == "chat":
        return run_chat(options, "python chat.py" if program == "python chat.py" else "duolocal chat")
    if options.command == "bench":
        return run_bench(options, chosen_settings(options), new_console(), progress_console())
    if options.command == "heads":
        return run_heads(options, new_console(), progress_console())
    if options.command == "sessions":
        return run_sessions(options, new_console())
    if name == "kv measure":
        return _kv_measure(options)
    if options.command == "docs":
        return run_docs(options, new_console(), progress_console())
    if options.command == "eval":
        return run_eval(options, new_console(), progress_console())
    if name == "plan":
        progress = progress_console()
        return run_plan(options, chosen_settings(options), new_console(), progress, starting=starting_notice(progress))
    if name == "quantize":
        return run_quantize(options, new_console(), progress_console())
    if name == "summarize":
        progress = progress_console()
        return run_summarize(
            options, chosen_settings(options), new_console(), progress, starting=starting_notice(progress)
        )
    return _models(options)


def _check_command(word: str, parsers: dict[str, _Parser]) -> None:
    names = sorted({name.split()[0] for name in parsers})
    if word.startswith("-") or word in names:
        return
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"give one of {', '.join(names)}"
    raise SettingsError(f"unknown command {word!r}: {hint}")


def _refuse(word: str, parser: argparse.ArgumentParser) -> NoReturn:
    option = word.partition("=")[0]
    if not option.startswith("-"):
        raise SettingsError(f"unexpected argument {word!r}: a question goes after --prompt, a file after --doc")
    known = [text for action in parser._actions for text in action.option_strings]
    close = difflib.get_close_matches(option, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else f"`{parser.prog} --help` lists the options"
    raise SettingsError(f"unknown option {option}: {hint}")


def _models(options: argparse.Namespace) -> int:
    if options.action == "convert":
        return run_convert(options, new_console(), progress_console())
    from duolocal.models.registry import list_models
    from duolocal.terminal.fetching import fetch
    from duolocal.terminal.models_view import models_view

    if options.action == "fetch":
        print(fetch(options.name, progress_console()))
        return 0
    console = new_console()
    console.print(models_view(list_models(), console.width), soft_wrap=False)
    return 0


def _kv_measure(options: argparse.Namespace) -> int:
    settings = LoadSettings(
        model=options.model, device=options.device, threads=chosen_threads(options), kernels=options.kernels
    )
    num_tokens = parse_tokens(options.tokens, "--tokens")
    from duolocal.documents import load_document

    text = load_document(options.text).text if options.text else None
    from duolocal.terminal.bench_view import measure_kv_formats

    return measure_kv_formats(settings, text, num_tokens, new_console(), progress_console())
