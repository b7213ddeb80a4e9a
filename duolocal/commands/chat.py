"""`duolocal chat`: its options, and the way from them to a chat or to one answer."""

import os
import stat
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from duolocal.commands.parsing import command, program_of
from duolocal.commands.sessions import KEEP, make_keeper, sessions_option, settings_of_session
from duolocal.errors import SettingsError
from duolocal.options import ANY, TOKENS, choice, flagged, nonempty, option, repeated
from duolocal.settings import CHAT_SAMPLING, LoadSettings, Sampling
from duolocal.startup import without_collection
from duolocal.terminal.clean import clean_line
from duolocal.terminal.consoles import new_console, progress_console, starting_notice

if TYPE_CHECKING:
    from duolocal.documents import Document
    from duolocal.engine.session import ChatSession
    from duolocal.reader.session import ReadingSession

_MORE = """\
One answer for a script:
  duolocal chat --doc report.txt --prompt "What is decided here?"
  git diff | duolocal chat --prompt "Summarise this change" --json
Exit codes: 0 answered; 1 failed; 2 wrong usage; 3 the answer is not complete (cut off by --max-tokens or a
full context); 130 interrupted.
"""
_about = partial(option, group="what to talk about")
_reading = partial(option, group="reading")
_saved = partial(option, group="saved contexts")


@dataclass(frozen=True)
class ChatOptions:
    """What a chat is about, beside the model and the sampling."""

    no_color: bool = flagged("no colours (NO_COLOR does the same)")
    doc: tuple[str, ...] = _about(
        repeated(ANY, "run"),
        "documents to load: files of many formats, folders, zip archives, patterns such as 'docs/*.md'",
        default=(),
        metavar="PATH",
    )
    system: str | None = _about(ANY, "a system message", metavar="TEXT")
    prompt: str | None = _about(
        nonempty("give the question as its text"),
        "answer this once and exit; piped stdin is then a document named stdin, and without --prompt the question",
        metavar="TEXT",
    )
    json: bool = flagged("print the one answer as JSON, with counts and timings", group="what to talk about")
    reader: str = _reading(
        choice("full", "retrieve"),
        "full: documents go into the context, or are refused; retrieve: documents of any length are read in parts "
        "for each question, and the model is given the passages that its attention picks",
        default="full",
        metavar="HOW",
    )
    passages: int | None = _reading(
        TOKENS, "with --reader retrieve: tokens of passages for an answer", metavar="TOKENS", default_help="1K"
    )
    session: str | None = _saved(
        ANY, "open this session, or begin it; it is saved after every turn and while documents are read", metavar="NAME"
    )
    keep: int | None = _saved(
        KEEP,
        "disk that documents may take to be opened next time instead of read; off keeps none",
        metavar="SIZE",
        default_help="$DUOLOCAL_KEEP, or 8GiB",
    )
    sessions_folder: str | None = sessions_option(group="saved contexts")

    def __post_init__(self) -> None:
        if self.passages is not None and self.reader == "full":
            raise SettingsError("--passages is for --reader retrieve: add that, or leave it out")
        if self.reader == "retrieve" and self.session is not None:
            raise SettingsError(
                "--session keeps what is in the context, and --reader retrieve reads for each question: "
                "use one of the two; /save NAME keeps a chat"
            )


@command(
    "chat",
    "chat in the terminal, or answer one question",
    description="Chat with a model about long documents, or answer one question (--prompt, or stdin).",
    epilog=_MORE,
)
def chat(options: ChatOptions, settings: LoadSettings, sampling: Sampling = CHAT_SAMPLING) -> int:
    """Chat, or answer once; return the exit code. All that can be refused is refused before the model is loaded."""
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
    settings, taken = settings_of_session(options.session, options.sessions_folder, settings)
    with starting_notice(progress), without_collection():
        keeper = make_keeper(options.sessions_folder, options.keep, settings, private=piped is not None)
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
    reader = _make_reader(options, started.session)
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
        program=program_of("chat"),
        keeper=keeper,
        files=files,
        reader=reader,
    )
    if options.session is not None:
        state.follow()
    keeper.extra = lambda: extra_of(state.files)
    console = new_console(no_color=options.no_color)
    return Chat(console, state, history_file=history_file()).run(documents, left_out=left_out)


def _piped_stdin() -> bytes | None:
    """Read what is piped or redirected into us; None for a terminal, a device or nothing."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    if stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode):  # /dev/null, as under cron
        return None
    return sys.stdin.buffer.read() or None


def _question(options: ChatOptions) -> tuple[str | None, "Document | None"]:
    """Find the one question to answer (None: a chat) and the document that came through stdin."""
    from duolocal.documents import decode_document

    piped = _piped_stdin()
    document = decode_document(piped, Path("stdin")) if piped and piped.strip() else None
    if options.prompt is not None:
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


def _make_reader(options: ChatOptions, session: "ChatSession") -> "ReadingSession | None":
    """Return what reads documents for each question, None where they go into the context. Raises SettingsError."""
    if options.reader == "full":
        return None
    from duolocal.reader import PASSAGE_TOKENS, Retriever
    from duolocal.reader.session import ReadingSession

    passages = PASSAGE_TOKENS if options.passages is None else options.passages
    return ReadingSession(session, Retriever(session.engine, session.tokenizer, passage_tokens=passages))


def history_file() -> Path:
    """Return where the chat keeps what was typed: below DUOLOCAL_CACHE, or the user's state folder."""
    chosen = os.environ.get("DUOLOCAL_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "history"
    import platformdirs

    return platformdirs.user_state_path("duolocal", appauthor=False) / "history"
