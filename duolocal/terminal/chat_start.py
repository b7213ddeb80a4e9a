"""From the options of `duolocal chat` to a chat or to one answer. Light: torch is imported when all else is right."""

import os
import stat
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duolocal.commands.chat import Chat
from duolocal.commands.parsing import program_of
from duolocal.commands.sessions import keep_bytes
from duolocal.errors import DuoLocalError, SettingsError
from duolocal.options import values_in, words_of
from duolocal.paths import sessions_folder, user_path
from duolocal.settings import FirstUse, LoadSettings, Sampling
from duolocal.startup import without_collection
from duolocal.terminal.consoles import new_console, progress_console, say, starting_notice, telling_after
from duolocal.terminal.fetching import settle_model

if TYPE_CHECKING:
    from rich.console import Console

    from duolocal.documents import Document
    from duolocal.engine.engine import Engine
    from duolocal.engine.session import ChatSession
    from duolocal.reader.session import ReadingSession
    from duolocal.sessions.context import Origin
    from duolocal.sessions.keeper import ContextKeeper
    from duolocal.terminal.chat_state import ChatState

_STDIN_PATIENCE_S = 1.0

# What a chat takes from its session where nothing was asked.
_TAKEN = frozenset(
    ("model", "context", "kv", "heads", "sink_size", "recent_size", "dtype", "rope", "weights", "outer_weights")
)


def chat(options: Chat, settings: LoadSettings, sampling: Sampling, first_use: FirstUse) -> int:
    """Chat, or answer once; return the exit code. All that can be refused is refused before the model is loaded."""
    from duolocal.documents.loading import summary
    from duolocal.terminal.docs_load import beside, load_paths

    progress = progress_console(no_color=options.no_color)
    loaded = load_paths(options.doc, progress)
    documents, left_out = list(loaded.documents), summary(loaded.skipped)
    question, piped = _question(options)
    if piped is not None:
        documents.append(piped)
    if left_out and question is not None:
        say(left_out)
    private, length = piped is not None, sum(len(document.text) for document in documents)
    state = _start(options, settings, sampling, first_use, progress, private=private, length=length)
    if question is None:
        return _talk(state, documents, left_out, options, settings, first_use, progress)
    from duolocal.terminal.once import answer_once

    named, notes = beside(documents, state.files)
    state.files |= named
    assert state.keeper is not None
    state.keeper.notes += notes
    return answer_once(
        state.session,
        state.facts,
        question,
        sampling,
        documents=[replace(document, name=name) for name, document in named.items()],
        as_json=options.json,
        progress=progress,
        keeper=state.keeper,
        reader=state.reader,
    )


def _talk(
    state: "ChatState",
    documents: "list[Document]",
    left_out: str | None,
    options: Chat,
    settings: LoadSettings,
    first_use: FirstUse,
    progress: "Console",
) -> int:
    """Chat until the user leaves, with another start for every session that needs one; return the exit code."""
    import gc

    from duolocal.terminal.chat import Chat as Conversation

    console = new_console(no_color=options.no_color)
    while True:
        code = Conversation(console, state, history_file=history_file()).run(documents, left_out=left_out)
        following, sampling, keeper = state.reopen, state.sampling, state.keeper
        if following is None or keeper is None:
            return code
        before = replace(options, session=keeper.name)
        keeper.close()
        documents, left_out = [], None
        del state, keeper
        gc.collect()  # its model goes before the next one comes
        options = replace(options, session=following, system=None)
        unasked: dict[str, Any] = {item.name: item.default for item in fields(LoadSettings) if item.name in _TAKEN}
        try:
            state = _start(options, replace(settings, **unasked), sampling, first_use, progress)
        except DuoLocalError as error:
            say(str(error))
            options = before
            state = _start(before, settings, sampling, first_use, progress)


def _start(
    options: Chat,
    settings: LoadSettings,
    sampling: Sampling,
    first_use: FirstUse,
    progress: "Console",
    *,
    private: bool = False,
    length: int = 0,
) -> "ChatState":
    """Load the model and open or begin the session; private: as of `_make_keeper`; length: characters to be read."""
    settings, taken = settings_of_session(options, settings)
    settings = settle_model(settings)
    with starting_notice(progress), without_collection():
        keeper = _make_keeper(options, settings, private=private)
        keeper.notes += [taken] if taken else []
        from duolocal.terminal.chat_state import ChatState
        from duolocal.terminal.sessions_chat import begin_or_open, extra_of
        from duolocal.terminal.start import CHARACTERS_PER_TOKEN, start
    reading = length // CHARACTERS_PER_TOKEN
    started = start(settings, system=options.system, progress=progress, first_use=first_use, reading=reading)
    started.session.keeper = keeper
    keeper.origin = origin_of(settings, started.session.engine)
    state = ChatState(
        started.session,
        started.facts,
        settings,
        sampling,
        program=program_of("chat"),
        keeper=keeper,
        reader=_make_reader(options, started.session),
    )
    keeper.extra = lambda: extra_of(state.files)
    if options.session is not None:
        state.files |= begin_or_open(keeper, started.session, options.session, system=options.system)
        state.follow()
    return state


def _piped_stdin() -> bytes | None:
    """Read what is piped or redirected into us; None for a terminal, a device or nothing."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    if stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode):  # /dev/null, as under cron
        return None
    with telling_after(
        _STDIN_PATIENCE_S,
        "waiting for a document on standard input (`< /dev/null` where there is none, as in a loop of the shell)",
    ):
        return sys.stdin.buffer.read() or None


def _question(options: Chat) -> tuple[str | None, "Document | None"]:
    """Find the one question to answer (None: a chat) and the document that came through stdin."""
    from duolocal.documents import decode_document

    piped = _piped_stdin()
    document = decode_document(piped, Path("stdin")) if piped and piped.strip() else None
    if options.prompt is not None:
        if document is not None and piped is not None:
            say(f"{len(piped):,} bytes of standard input are read as a document (`< /dev/null` keeps it out)")
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


def _make_reader(options: Chat, session: "ChatSession") -> "ReadingSession | None":
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
        return user_path(chosen) / "history"
    import platformdirs

    return platformdirs.user_state_path("duolocal", appauthor=False) / "history"


def settings_of_session(options: Chat, settings: LoadSettings) -> tuple[LoadSettings, str | None]:
    """Return the settings with what `--session` was saved with where nothing was asked, and a line that says so."""
    if options.session is None:
        return settings, None
    from duolocal.sessions.folder import ContextFolder
    from duolocal.sessions.names import is_saved, session_path

    path = session_path(sessions_folder(options.sessions_folder), options.session)
    if not is_saved(path):
        return settings, None
    saved = values_in(LoadSettings, ContextFolder.open(path).fields().texts("options"))
    taken = {
        item.name: saved[item.name]
        for item in fields(LoadSettings)
        if item.name in _TAKEN & saved.keys() and getattr(settings, item.name) == item.default
    }
    if not taken:
        return settings, None
    asked = words_of(replace(LoadSettings(), **taken))
    return replace(settings, **taken), f"as session {options.session} was saved: {' '.join(asked)}"


def origin_of(settings: LoadSettings, engine: "Engine") -> "Origin":
    """Return what a session is saved with, so that it opens with it: what was asked, and what was chosen unasked."""
    from duolocal.sessions.context import Origin

    plan, dtype = engine.plan, str(engine.transformer.dtype).removeprefix("torch.")
    chosen = replace(settings, context=engine.context, kv=engine.kv, dtype=dtype)
    if settings.heads == "auto" and plan.num_streaming:  # the same ranking, cut at the same place
        chosen = replace(chosen, heads=f"{plan.num_retrieval / (plan.num_retrieval + plan.num_streaming):g}")
    elif settings.heads == "auto":  # also when the model's heads are known by then
        chosen = replace(chosen, heads="all", sink_size=plan.sink_size, recent_size=plan.recent_size)
    return Origin(settings.model, tuple(chosen.options()))


def _make_keeper(options: Chat, settings: LoadSettings, *, private: bool) -> "ContextKeeper":
    """Return what keeps the contexts of a chat. private: a document came through a pipe; it is stored nowhere unasked.

    Raises SettingsError.
    """
    from duolocal.sessions.context import Origin
    from duolocal.sessions.keeper import ContextKeeper
    from duolocal.sessions.store import DocumentStore

    at = sessions_folder(options.sessions_folder)
    limit = keep_bytes(options.keep)
    store = DocumentStore(at, limit) if limit and not private else None
    return ContextKeeper(at, Origin(settings.model), store=store)
