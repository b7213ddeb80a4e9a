"""The command line: `duolocal chat`, `models`, `bench`, `heads`… Parses, dispatches, turns errors into one line.

Loads neither torch nor a model before a command needs them, so that `--help` is quick.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not complete (an answer, or some of the inputs), 130 interrupted.
"""

import argparse
import difflib
import os
import signal
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from duolocal import __version__
from duolocal.errors import DuoLocalError, SettingsError
from duolocal.settings import DTYPES, ChatSettings, parse_bytes, parse_threads, parse_tokens
from duolocal.startup import without_collection
from duolocal.terminal.bench_options import add_bench_parsers, run_bench
from duolocal.terminal.docs_options import add_docs_parsers, run_docs
from duolocal.terminal.eval_options import add_eval_parsers, run_eval
from duolocal.terminal.heads_options import add_heads_parsers, run_heads
from duolocal.terminal.models_options import add_convert_parser, run_convert
from duolocal.terminal.plan_options import add_plan_parser, run_plan
from duolocal.terminal.quantize_options import add_quantize_parser, run_quantize
from duolocal.terminal.reader_options import add_reader_options, make_reader, reader_settings
from duolocal.terminal.sessions_options import (
    add_session_options,
    add_sessions_parsers,
    make_keeper,
    run_sessions,
    settings_of_session,
)
from duolocal.terminal.summarize_options import add_summarize_parser, run_summarize

if TYPE_CHECKING:
    from rich.console import Console

    from duolocal.documents import Document
    from duolocal.sampling import Sampling

DEFAULT_MODEL = "smollm2-135m"  # as in the registry, which is not imported for --help
_MODEL_HELP = "a name from `duolocal models`, a hub id org/name, a .gguf file or a model folder (default: %(default)s)"
_SAMPLING = {
    "temperature": ("T", "0 always takes the likeliest token (default: 0.3)"),
    "top_k": ("N", "choose among the N likeliest tokens; 0: all"),
    "top_p": ("P", "choose among the likeliest tokens that hold P of the probability (default: 0.9)"),
    "min_p": ("P", "leave out tokens less likely than P times the likeliest"),
    "repetition_penalty": ("R", "above 1 makes repetition less likely (default: 1.1)"),
    "seed": ("N", "make the choice of tokens repeatable"),
    "max_tokens": ("N", "end an answer after N tokens (default: 1024; none: no limit)"),
}
_EXIT_CODES = """\
One answer for a script:
  duolocal chat --doc report.txt --prompt "What is decided here?"
  git diff | duolocal chat --prompt "Summarise this change" --json
Exit codes: 0 answered; 1 failed; 2 wrong usage; 3 the answer is not complete (cut off by --max-tokens or a
full context); 130 interrupted.
"""


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
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_chat_options(chat)
    parsers["chat"] = chat

    models = commands.add_parser("models", help="list the named models, fetch or convert one", allow_abbrev=False)
    actions = models.add_subparsers(dest="action", metavar="[fetch|convert]", parser_class=_Parser)
    fetch = actions.add_parser("fetch", help="fetch a model into the cache", allow_abbrev=False)
    fetch.add_argument("name", help="a name from `duolocal models`, or a hub id org/name")
    convert = add_convert_parser(actions, add_model=_add_model)
    parsers |= {"models": models, "models fetch": fetch, "models convert": convert}

    bench = commands.add_parser("bench", help="measure on this machine", allow_abbrev=False)
    what = bench.add_subparsers(dest="action", metavar="WHAT", parser_class=_Parser, required=True)
    parsers |= {"bench": bench, **add_bench_parsers(what, _add_model_options)}

    kv = commands.add_parser("kv", help="compare the KV formats on a model", allow_abbrev=False)
    what = kv.add_subparsers(dest="action", metavar="WHAT", parser_class=_Parser, required=True)
    measure = what.add_parser(
        "measure", help="KL and perplexity of every KV format against the 16-bit cache", allow_abbrev=False
    )
    _add_measure_options(measure)
    parsers |= {"kv": kv, "kv measure": measure}

    heads = commands.add_parser("heads", help="which heads of a model see the whole context", allow_abbrev=False)
    what = heads.add_subparsers(dest="action", metavar="WHAT", parser_class=_Parser, required=True)
    parsers |= {"heads": heads, **add_heads_parsers(what, add_model=_add_model, add_machine=_add_machine_options)}

    sessions = commands.add_parser("sessions", help="list, show or remove saved contexts", allow_abbrev=False)
    what = sessions.add_subparsers(dest="action", metavar="WHAT", parser_class=_Parser, required=True)
    parsers |= {"sessions": sessions, **add_sessions_parsers(what)}

    evaluate = commands.add_parser(
        "eval", help="measure what a smaller KV cache costs, beside the dense model", allow_abbrev=False
    )
    what = evaluate.add_subparsers(dest="action", metavar="WHAT", parser_class=_Parser, required=True)
    evaluations = add_eval_parsers(what, _add_model_options, add_model=_add_model, add_machine=_add_machine_options)
    parsers |= {"eval": evaluate, **evaluations}

    docs = commands.add_parser("docs", help="what documents would take of the context", allow_abbrev=False)
    what = docs.add_subparsers(dest="action", metavar="WHAT", parser_class=_Parser, required=True)
    parsers |= {"docs": docs, **add_docs_parsers(what, add_model=_add_model)}

    parsers["plan"] = add_plan_parser(
        commands, add_model_options=_add_model_options, add_compute_options=_add_compute_options
    )
    quantize = add_quantize_parser(commands, add_machine=_add_machine_options)
    parsers["quantize"] = quantize
    parsers["summarize"] = add_summarize_parser(
        commands, add_model_options=_add_model_options, add_compute_options=_add_compute_options
    )
    return parser, parsers


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help=_MODEL_HELP)


def _add_measure_options(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--tokens", default="2K", metavar="N", help="length of the text (default: 2K)")
    parser.add_argument("--text", metavar="PATH", help="a text to read (default: prose that comes with Python)")
    _add_machine_options(parser)


def _add_model_options(parser: argparse.ArgumentParser, *, context: bool = True) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=DEFAULT_MODEL, help=_MODEL_HELP)
    if context:
        group.add_argument(
            "--context",
            metavar="SIZE",
            help="tokens of context: 8192, 32K, 1M (default: what the model was trained for, at most 32K)",
        )
    group.add_argument(
        "--kv",
        default="auto",
        metavar="FORMAT",
        help="KV cache of the retrieval heads: auto (measured for the model), 32, 16, int8, fp8, k8v4, int4",
    )
    group.add_argument(
        "--heads",
        default="auto",
        metavar="SPLIT",
        help="retrieval heads: auto, all, a ratio such as 0.5, published, or a pattern file or folder (default: auto)",
    )
    group.add_argument(
        "--weights",
        default="auto",
        metavar="FORMAT",
        help="auto (as in the file), or nf4 or int8: made of a 16-bit model while loading, by bitsandbytes",
    )
    group.add_argument(
        "--outer-weights",
        default="auto",
        metavar="FORMAT",
        help="lm_head and embedding: auto (as in the file), or int8 or int4, made while loading",
    )
    group.add_argument(
        "--kv-device-memory",
        metavar="SIZE",
        help="GPU memory, or without a GPU memory, for KV blocks, such as 4GiB; the others lie in host memory, or in a "
        "file (default: as many as fit)",
    )
    group.add_argument(
        "--select",
        default="off",
        metavar="BUDGET",
        help="answers read only the blocks that matter: auto (2,048 tokens per retrieval head, in contexts from 32K), "
        "a number of tokens, or off, which reads everything (default: off)",
    )
    group.add_argument(
        "--prefill",
        default="exact",
        metavar="HOW",
        help="how retrieval heads read a prompt: exact, or sparse: only the blocks that hold 98%% of their attention, "
        "by an estimate (default: exact)",
    )
    group.add_argument("--sink-size", metavar="N", help="first tokens that streaming heads keep")
    group.add_argument("--recent-size", metavar="N", help="last tokens that streaming heads keep")
    _add_machine_options(group)


def _add_machine_options(group: argparse._ActionsContainer) -> None:
    group.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    group.add_argument("--threads", metavar="N", help="CPU threads (default: one per physical core)")
    group.add_argument(
        "--kernels", default="auto", help="CPU kernels: auto, compiled or torch, the slow reference (default: auto)"
    )


def _add_compute_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("computing")
    group.add_argument("--chunk-size", metavar="N", help="tokens per prefill step; changes memory, not results")
    group.add_argument(
        "--dtype", default="auto", help=f"compute type: {', '.join(DTYPES)} (default: auto)", metavar="TYPE"
    )
    group.add_argument("--rope", metavar="SCALING", help="override the model's RoPE scaling, for example yarn:4")


def _add_chat_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to talk about")
    group.add_argument(
        "--doc",
        action="extend",
        nargs="+",
        default=[],
        metavar="PATH",
        help="documents to load: files of many formats, folders, zip archives, patterns such as 'docs/*.md'",
    )
    group.add_argument("--system", metavar="TEXT", help="a system message")
    group.add_argument(
        "--prompt",
        metavar="TEXT",
        help="answer this once and exit; piped stdin is then a document named stdin, and without --prompt the question",
    )
    group.add_argument("--json", action="store_true", help="print the one answer as JSON, with counts and timings")
    add_reader_options(parser.add_argument_group("reading"))
    add_session_options(parser)
    _add_model_options(parser)
    _add_compute_options(parser)
    sampling = parser.add_argument_group("sampling")
    for name, (metavar, text) in _SAMPLING.items():
        sampling.add_argument("--" + name.replace("_", "-"), dest=name, metavar=metavar, help=text)
    sampling.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end an answer before TEXT; may be given several times",
    )
    parser.add_argument("--no-color", action="store_true", help="no colours (NO_COLOR does the same)")


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
        print(f"duolocal: {_one_line(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader went away: nothing is left to say, not even by the interpreter's own flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13


def _one_line(text: str) -> str:
    from duolocal.terminal.clean import clean_line

    return clean_line(text)


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
        return _chat(options, "python chat.py" if program == "python chat.py" else "duolocal chat")
    if options.command == "bench":
        return run_bench(options, _settings(options), _console(), _progress_console())
    if options.command == "heads":
        return run_heads(options, _console(), _progress_console())
    if options.command == "sessions":
        return run_sessions(options, _console())
    if name == "kv measure":
        return _kv_measure(options)
    if options.command == "docs":
        return run_docs(options, _console(), _progress_console())
    if options.command == "eval":
        return run_eval(options, _console(), _progress_console())
    if name == "plan":
        progress = _progress_console()
        return run_plan(options, _settings(options), _console(), progress, starting=_import_notice(progress))
    if name == "quantize":
        return run_quantize(options, _console(), _progress_console())
    if name == "summarize":
        progress = _progress_console()
        return run_summarize(options, _settings(options), _console(), progress, starting=_import_notice(progress))
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


def _settings(options: argparse.Namespace) -> ChatSettings:
    def count(name: str) -> int | None:
        text = getattr(options, name, None)  # a benchmark has some of the options only
        option = "--" + name.replace("_", "-")
        if text is None:
            return None
        return 0 if text.strip() == "0" and name == "sink_size" else parse_tokens(text, option)

    memory = getattr(options, "kv_device_memory", None)
    return ChatSettings(
        model=options.model,
        context=count("context"),
        kv=options.kv,
        heads=options.heads,
        sink_size=count("sink_size"),
        recent_size=count("recent_size"),
        chunk_size=count("chunk_size"),
        device=options.device,
        dtype=getattr(options, "dtype", "auto"),
        rope=getattr(options, "rope", None),
        threads=_threads(options),
        kernels=getattr(options, "kernels", "auto"),
        weights=getattr(options, "weights", "auto"),
        outer_weights=getattr(options, "outer_weights", "auto"),
        kv_device_memory=parse_bytes(memory, "--kv-device-memory") if memory else None,
        select=getattr(options, "select", "off"),
        prefill=getattr(options, "prefill", "exact"),
    )


def _threads(options: argparse.Namespace) -> int | None:
    return None if options.threads is None else parse_threads(options.threads)


def _sampling(options: argparse.Namespace) -> "Sampling":
    from dataclasses import replace

    from duolocal.sampling import CHAT_SAMPLING
    from duolocal.terminal.sampling_options import change

    sampling = CHAT_SAMPLING
    for name in _SAMPLING:
        text = getattr(options, name)
        if text is not None:
            sampling = change(sampling, name, text, shown="--" + name.replace("_", "-"))
    return replace(sampling, stop=tuple(options.stop)) if options.stop else sampling


def _piped_stdin() -> bytes | None:
    """Read what is piped or redirected into us; None for a terminal, a device or nothing."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    if stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode):  # /dev/null, as under cron
        return None
    return sys.stdin.buffer.read() or None


def _question(options: argparse.Namespace) -> tuple[str | None, "Document | None"]:
    """Find the one question to answer (None: a chat) and the document that came through stdin."""
    from duolocal.documents import decode_document

    piped = _piped_stdin()
    document = decode_document(piped, Path("stdin")) if piped and piped.strip() else None
    if options.prompt is not None:
        if not options.prompt.strip():
            raise SettingsError("--prompt is empty: give the question as its text")
        return options.prompt, document
    if document is not None:
        return document.text.strip(), None
    if not sys.stdin or not sys.stdin.isatty():
        raise SettingsError("there is no question: give --prompt TEXT, pipe one in, or run in a terminal")
    if options.json:
        raise SettingsError("--json is for one answer: give --prompt TEXT or pipe the question in")
    if not sys.stdout.isatty():
        raise SettingsError("the chat needs a terminal to write to: give --prompt TEXT for one answer")
    return None, None


def _console(*, stderr: bool = False, no_color: bool = False) -> "Console":
    from rich.console import Console

    # An empty NO_COLOR counts as unset (no-color.org); Rich looks for the variable only when not told.
    return Console(stderr=stderr, no_color=no_color or bool(os.environ.get("NO_COLOR")), highlight=False)


def _progress_console(*, no_color: bool = False) -> "Console":
    console = _console(stderr=True, no_color=no_color)
    console.quiet = not console.is_terminal
    return console


def _chat(options: argparse.Namespace, program: str) -> int:
    # All that can be refused is refused before the model is loaded.
    settings, reading = _settings(options), reader_settings(options)
    from duolocal.documents.loading import summary
    from duolocal.terminal.docs_load import load_paths

    progress = _progress_console(no_color=options.no_color)
    loaded = load_paths(options.doc, progress)
    documents, left_out = list(loaded.documents), summary(loaded.skipped)
    question, piped = _question(options)
    if piped is not None:
        documents.append(piped)
    if left_out and question is not None:
        print(f"duolocal: {_one_line(left_out)}", file=sys.stderr)
    settings, taken = settings_of_session(options, settings)
    with _import_notice(progress), without_collection():
        sampling = _sampling(options)
        keeper = make_keeper(options, settings, private=piped is not None)
        keeper.notes += [taken] if taken else []
        from duolocal.terminal.sessions_chat import begin_or_open, extra_of, follow, not_yet_read
        from duolocal.terminal.start import start

        if question is None:
            from duolocal.terminal.chat import Chat
        else:
            from duolocal.terminal.once import answer_once
    started = start(settings, system=options.system, progress=progress)
    started.session.keeper = keeper
    reader = make_reader(reading, started.session)
    files: dict[str, Document] = {}
    keeper.extra = lambda: extra_of(files)
    if options.session is not None:
        files |= begin_or_open(keeper, started.session, options.session, system=options.system)
        documents, known = not_yet_read(started.session, documents)
        keeper.notes += [f"{name} is in the context already" for name in known]
    if question is not None:
        files |= {document.name: document for document in documents}
        return answer_once(
            started.session,
            started.facts,
            question,
            sampling,
            documents=documents,
            as_json=options.json,
            progress=progress,
            keeper=keeper,
            reader=reader,
        )
    chat = Chat(
        _console(no_color=options.no_color),
        started.session,
        started.facts,
        settings,
        sampling,
        program=program,
        history_file=history_file(),
        keeper=keeper,
        files=files,
        reader=reader,
    )
    if options.session is not None:
        follow(chat)
    keeper.extra = lambda: extra_of(chat.files)
    return chat.run(documents, left_out=left_out)


def _import_notice(progress: "Console") -> Any:
    # Importing torch takes seconds on a cold disk.
    from duolocal.terminal.progress import bar

    return bar(progress, "starting", "")


def history_file() -> Path:
    """Return where the chat keeps what was typed: below DUOLOCAL_CACHE, or the user's state folder."""
    chosen = os.environ.get("DUOLOCAL_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "history"
    import platformdirs

    return platformdirs.user_state_path("duolocal", appauthor=False) / "history"


def _models(options: argparse.Namespace) -> int:
    if options.action == "convert":
        return run_convert(options, _console(), _progress_console())
    from duolocal.models.registry import list_models, resolve
    from duolocal.terminal.models_view import models_view
    from duolocal.terminal.progress import bar

    if options.action == "fetch":
        with bar(_progress_console(), f"fetching {_one_line(options.name)}", "bytes") as shown:
            path = resolve(options.name, on_progress=shown.update)
        print(path)
        return 0
    console = _console()
    console.print(models_view(list_models(), console.width), soft_wrap=False)
    return 0


def _kv_measure(options: argparse.Namespace) -> int:
    settings = ChatSettings(
        model=options.model, device=options.device, threads=_threads(options), kernels=options.kernels
    )
    num_tokens = parse_tokens(options.tokens, "--tokens")
    from duolocal.documents import load_document

    text = load_document(options.text).text if options.text else None
    from duolocal.terminal.bench_view import measure_kv_formats

    return measure_kv_formats(settings, text, num_tokens, _console(), _progress_console())
