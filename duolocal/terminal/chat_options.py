"""`duolocal chat`: its options, and the way from them to a chat or to one answer."""

import argparse
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from duolocal.errors import SettingsError
from duolocal.startup import without_collection
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import new_console, progress_console, starting_notice
from duolocal.terminal.model_options import add_compute_options, add_model_options, chosen_settings
from duolocal.terminal.reader_options import add_reader_options, make_reader, reader_settings
from duolocal.terminal.sessions_options import add_session_options, make_keeper, settings_of_session

if TYPE_CHECKING:
    from duolocal.documents import Document
    from duolocal.sampling import Sampling

_SAMPLING = {
    "temperature": ("T", "0 always takes the likeliest token (default: 0.3)"),
    "top_k": ("N", "choose among the N likeliest tokens; 0: all"),
    "top_p": ("P", "choose among the likeliest tokens that hold P of the probability (default: 0.9)"),
    "min_p": ("P", "leave out tokens less likely than P times the likeliest"),
    "repetition_penalty": ("R", "above 1 makes repetition less likely (default: 1.1)"),
    "seed": ("N", "make the choice of tokens repeatable"),
    "max_tokens": ("N", "end an answer after N tokens (default: 1024; none: no limit)"),
}
EXIT_CODES = """\
One answer for a script:
  duolocal chat --doc report.txt --prompt "What is decided here?"
  git diff | duolocal chat --prompt "Summarise this change" --json
Exit codes: 0 answered; 1 failed; 2 wrong usage; 3 the answer is not complete (cut off by --max-tokens or a
full context); 130 interrupted.
"""


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `duolocal chat`."""
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
    add_model_options(parser)
    add_compute_options(parser)
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


def chosen_sampling(options: argparse.Namespace) -> "Sampling":
    """Return the sampling that the options ask for; raises SettingsError."""
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


def run_chat(options: argparse.Namespace, program: str) -> int:
    """Chat, or answer once; return the exit code. All that can be refused is refused before the model is loaded."""
    settings, reading = chosen_settings(options), reader_settings(options)
    from duolocal.documents.loading import summary
    from duolocal.terminal.docs_load import load_paths

    progress = progress_console(no_color=options.no_color)
    loaded = load_paths(options.doc, progress)
    documents, left_out = list(loaded.documents), summary(loaded.skipped)
    question, piped = _question(options)
    if piped is not None:
        documents.append(piped)
    if left_out and question is not None:
        print(f"duolocal: {clean_line(left_out)}", file=sys.stderr)
    settings, taken = settings_of_session(options, settings)
    with starting_notice(progress), without_collection():
        sampling = chosen_sampling(options)
        keeper = make_keeper(options, settings, private=piped is not None)
        keeper.notes += [taken] if taken else []
        from duolocal.terminal.sessions_chat import begin_or_open, extra_of, not_yet_read
        from duolocal.terminal.start import start

        if question is None:
            from duolocal.terminal.chat import Chat
            from duolocal.terminal.chat_state import ChatState
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
    state = ChatState(
        started.session,
        started.facts,
        settings,
        sampling,
        program=program,
        keeper=keeper,
        files=files,
        reader=reader,
    )
    if options.session is not None:
        state.follow()
    keeper.extra = lambda: extra_of(state.files)
    chat = Chat(new_console(no_color=options.no_color), state, history_file=history_file())
    return chat.run(documents, left_out=left_out)


def history_file() -> Path:
    """Return where the chat keeps what was typed: below DUOLOCAL_CACHE, or the user's state folder."""
    chosen = os.environ.get("DUOLOCAL_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "history"
    import platformdirs

    return platformdirs.user_state_path("duolocal", appauthor=False) / "history"
