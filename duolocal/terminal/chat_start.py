"""From the options of `duolocal chat` to a chat or to one answer. Light: torch is imported when all else is right."""

import os
import stat
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duolocal.commands.chat import Chat
from duolocal.commands.parsing import program_of
from duolocal.errors import DuoLocalError, SettingsError
from duolocal.paths import user_path
from duolocal.settings import FirstUse, LoadSettings, Sampling
from duolocal.startup import without_collection
from duolocal.terminal.consoles import new_console, progress_console, say, starting_notice, telling_after
from duolocal.terminal.fetching import settle_model

if TYPE_CHECKING:
    from rich.console import Console

    from duolocal.documents import Document
    from duolocal.terminal.chat_state import ChatState

_STDIN_PATIENCE_S = 1.0


def chat(options: Chat, settings: LoadSettings, sampling: Sampling, first_use: FirstUse) -> int:
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
        say(left_out)
    private, length = piped is not None, sum(len(document.text) for document in documents)
    state = _start(options, settings, sampling, first_use, progress, private=private, length=length)
    if question is None:
        return _talk(state, documents, left_out, options, settings, first_use, progress)
    from duolocal.documents.loading import beside
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

    from duolocal.chat.opening import TAKEN
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
        unasked: dict[str, Any] = {item.name: item.default for item in fields(LoadSettings) if item.name in TAKEN}
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
    """Load the model and open or begin the session; private: as of `make_keeper`; length: characters to be read."""
    with starting_notice(progress), without_collection():
        from duolocal.chat import opening
        from duolocal.chat.kept import extra_of
        from duolocal.terminal.chat_state import ChatState
        from duolocal.terminal.sessions_chat import begin_or_open
        from duolocal.terminal.start import start
    settings, taken = opening.settings_of_session(options, settings)
    settings = settle_model(settings)
    keeper = opening.make_keeper(options, settings, private=private)
    keeper.notes += [taken] if taken else []
    reading = length // opening.CHARACTERS_PER_TOKEN
    started = start(settings, system=options.system, progress=progress, first_use=first_use, reading=reading)
    started.session.keeper = keeper
    keeper.origin = opening.origin_of(settings, started.session.engine)
    state = ChatState(
        started.session,
        started.facts,
        settings,
        sampling,
        program=program_of("chat"),
        keeper=keeper,
        reader=opening.make_reader(options, started.session),
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


def history_file() -> Path:
    """Return where the chat keeps what was typed: below DUOLOCAL_CACHE, or the user's state folder."""
    chosen = os.environ.get("DUOLOCAL_CACHE")
    if chosen:
        return user_path(chosen) / "history"
    import platformdirs

    return platformdirs.user_state_path("duolocal", appauthor=False) / "history"
