"""The chat's commands over what outlives it: /save, /open, /copy."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from duolocal.chat import kept
from duolocal.documents import Document
from duolocal.errors import ContextOverflowError, SettingsError
from duolocal.paths import user_path
from duolocal.sessions.identity import OtherStartError
from duolocal.terminal import figures, transcript
from duolocal.terminal.chat_state import ChatState, CommandHost, Commands, all_or_nothing, split_words

if TYPE_CHECKING:
    from duolocal.engine.session import ChatSession
    from duolocal.sessions.keeper import ContextKeeper

COMMANDS = Commands()
_TRANSCRIPTS = (".md", ".txt", ".markdown")


def is_transcript(name: str) -> bool:
    """Return whether what follows /save is a file for the transcript, and not the name of a session."""
    return "/" in name or "\\" in name or name.startswith("~") or Path(name).suffix.lower() in _TRANSCRIPTS


def _one_name(command: str, rest: str, wanted: str) -> tuple[str, bool]:
    """Split `[--force] NAME`."""
    words = split_words(rest)
    force = words[:1] == ["--force"]
    if force:
        words = words[1:]
    if len(words) != 1:
        raise SettingsError(f"/{command} needs one name: {wanted}")
    return words[0], force


def _keeper(state: ChatState) -> "ContextKeeper":
    if state.keeper is None:
        raise SettingsError("this chat keeps no sessions: start it with `duolocal chat`")
    return state.keeper


def _transcript(state: ChatState) -> str:
    return transcript.as_markdown(
        state.session.messages,
        model=state.facts.model,
        documents=state.session.documents,
        questions=state.questions,
        ends=state.ends,
    )


@COMMANDS.add("/save [--force] NAME", "keep this chat as a session; a FILE.md gets the transcript")
def save(host: CommandHost, rest: str) -> None:
    """Save the chat under a name and keep it up to date from now on, or write its transcript."""
    name, force = _one_name("save", rest, "/save NAME keeps this chat, /save chat.md writes the transcript")
    if is_transcript(name):
        path = user_path(name)
        transcript.save(_transcript(host.state), path, overwrite=force)
        host.note(f"saved {path}")
        return
    keeper, session = _keeper(host.state), host.state.session
    began = time.perf_counter()
    nbytes = keeper.begin(name, session, overwrite=force)
    host.note(f"saving {name}: {figures.size(nbytes)} to write")
    total = keeper.save(session)
    host.note(
        f"saved {name} ({figures.size(total)}, {figures.duration(time.perf_counter() - began)}) in "
        f"{keeper.folder}; from now on after every turn"
    )


@COMMANDS.add("/open [--force] NAME", "go on with a saved session")
def open_named(host: CommandHost, rest: str) -> None:
    """Take up a saved session in place of what is in the chat."""
    name, force = _one_name("open", rest, "/open NAME; `duolocal sessions list` shows what there is")
    state, session = host.state, host.state.session
    keeper = _keeper(state)
    if keeper.name is None and session.engine.position and not force:
        raise SettingsError(f"this chat is not saved: /save NAME first, or leave it behind with /open --force {name}")
    began = time.perf_counter()
    try:
        extra = keeper.open(name, session)
    except (OtherStartError, ContextOverflowError):
        if state.reader is not None:
            raise
        host.note(f"session {name} was saved with another model or other settings: starting with its own")
        state.reopen, state.leaving = name, True
        return
    state.files = kept.documents_of(session, extra)
    state.last_answer = state.last_load = None
    state.follow()
    host.note(opened_line(keeper, session, time.perf_counter() - began))


@COMMANDS.add("/copy [all]", "put the last answer (or the whole transcript) on the clipboard", words=["all"])
def copy(host: CommandHost, rest: str) -> None:
    """Put text on the terminal's clipboard."""
    whole = all_or_nothing("copy", rest)
    answers = [message.content for message in host.state.session.messages if message.role == "assistant"]
    if not answers:
        raise SettingsError("there is no answer to copy yet")
    text = _transcript(host.state) if whole else answers[-1]
    sequence = transcript.clipboard_sequence(text)
    host.console.file.write(sequence)
    host.console.file.flush()
    host.note(f"{len(text):,} characters sent to the terminal's clipboard (OSC 52; not every terminal takes it)")


def opened_line(keeper: "ContextKeeper", session: "ChatSession", elapsed_s: float) -> str:
    """Say what was opened, and what of it was not read to the end."""
    turns = sum(turn.kind == "exchange" for turn in session.tree.turns.values())
    questions = figures.counted(turns, "question")
    stopped = keeper.num_ahead
    rest = (
        f"and {figures.tokens(stopped)} of a reading that was stopped: load the same documents, and it goes on there"
        if stopped
        else "nothing to read"
    )
    return (
        f"opened session {keeper.name}: {figures.tokens(session.engine.position)}, {questions}, {rest} "
        f"({figures.duration(elapsed_s)}); it is saved after every turn"
    )


def begin_or_open(
    keeper: "ContextKeeper", session: "ChatSession", name: str, *, system: str | None
) -> dict[str, Document]:
    """Open the session that --session names, or begin it; returns its documents. Raises DuoLocalError."""
    began = time.perf_counter()
    found = kept.begin_or_open(keeper, session, name, system=system)
    if found is not None:
        keeper.notes.append(opened_line(keeper, session, time.perf_counter() - began))
    return found or {}
