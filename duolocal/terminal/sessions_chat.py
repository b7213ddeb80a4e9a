"""The chat's commands over saved contexts and over turns: /save, /open, /undo, /fork, /goto, /turns."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duolocal.documents import Document, Part
from duolocal.errors import SettingsError
from duolocal.sessions.names import session_file
from duolocal.terminal import figures
from duolocal.terminal.clean import clean_line
from duolocal.terminal.sessions_view import turns_view

if TYPE_CHECKING:
    from duolocal.engine.turns import Turn
    from duolocal.sessions.keeper import ContextKeeper
    from duolocal.terminal.chat import Chat

_TRANSCRIPTS = (".md", ".txt", ".markdown")
_FIELDS = ("encoding", "num_bytes", "num_replaced", "kind", "notes", "digest")


def is_transcript(name: str) -> bool:
    """Return whether what follows /save is a file for the transcript, and not the name of a session."""
    return "/" in name or "\\" in name or name.startswith("~") or Path(name).suffix.lower() in _TRANSCRIPTS


def _keeper(chat: "Chat") -> "ContextKeeper":
    if chat.keeper is None:
        raise SettingsError("this chat keeps no sessions: start it with `duolocal chat`")
    return chat.keeper


def save(chat: "Chat", name: str, *, force: bool) -> None:
    """Save the chat's context under a name and keep it up to date from now on."""
    keeper = _keeper(chat)
    began = time.perf_counter()
    nbytes = keeper.begin(name, chat.session, overwrite=force)
    chat.note(f"saving {name}: {figures.size(nbytes)} to write")
    total = keeper.save(chat.session)
    chat.note(
        f"saved {name} ({figures.size(total)}, {figures.duration(time.perf_counter() - began)}) in "
        f"{keeper.folder}; from now on after every turn"
    )


def open_named(chat: "Chat", name: str, *, force: bool) -> None:
    """Take up a saved session in place of what is in the chat."""
    keeper = _keeper(chat)
    if keeper.name is None and chat.session.engine.position and not force:
        raise SettingsError(f"this chat is not saved: /save NAME first, or leave it behind with /open --force {name}")
    began = time.perf_counter()
    extra = keeper.open(name, chat.session)
    adopt(chat, extra)
    chat.note(opened_line(chat.session, name, time.perf_counter() - began))


def opened_line(session: Any, name: str, elapsed_s: float) -> str:
    """Say what was opened."""
    turns = sum(turn.kind == "exchange" for turn in session.tree.turns.values())
    questions = "1 question" if turns == 1 else f"{turns} questions"
    return (
        f"opened session {name}: {figures.tokens(session.engine.position)}, {questions}, nothing to read "
        f"({figures.duration(elapsed_s)}); it is saved after every turn"
    )


def adopt(chat: "Chat", extra: Mapping[str, Any]) -> None:
    """Bring what the chat knows of files and questions in line with a session that was opened."""
    chat.files = documents_of(chat.session, extra)
    chat.last_answer = chat.last_load = None
    follow(chat)


def follow(chat: "Chat") -> None:
    """Bring questions and endings in line with the turn one is at."""
    chat.questions.clear()
    chat.ends.clear()
    for turn in chat.session.tree.current.way():
        if turn.kind == "exchange":
            index = len(turn.state.messages) - 1
            chat.questions[index - 1] = turn.name
            if turn.reason not in ("", "stop"):
                chat.ends[index] = turn.reason


def begin_or_open(keeper: "ContextKeeper", session: Any, name: str, *, system: str | None) -> dict[str, Document]:
    """Open the session that --session names, or begin it; returns its documents. Raises DuoLocalError."""
    began = time.perf_counter()
    if not session_file(keeper.folder, name).exists():
        keeper.begin(name, session)
        keeper.save(session)
        keeper.notes.append(f"session {name} begins; it is saved after every turn in {keeper.folder}")
        return {}
    extra = keeper.open(name, session)
    if system is not None and system != session.system:
        raise SettingsError(
            f"session {name} has another system message: leave --system out, or begin a session of another name"
        )
    keeper.notes.append(opened_line(session, name, time.perf_counter() - began))
    return documents_of(session, extra)


def extra_of(files: Mapping[str, Document]) -> dict[str, Any]:
    """Return what a session is saved with besides itself: where the documents came from."""
    return {
        "documents": {
            name: {
                "path": str(document.path),
                "parts": [[part.label, part.start] for part in document.parts],
                **{field: getattr(document, field) for field in _FIELDS},
            }
            for name, document in files.items()
        }
    }


def documents_of(session: Any, extra: Mapping[str, Any]) -> dict[str, Document]:
    """Return the documents of a session that was opened, by name, with what is known of their files."""
    known = extra.get("documents")
    found = {}
    for name, text in session.texts:
        about = known.get(name) if isinstance(known, dict) else None
        about = about if isinstance(about, dict) else {}
        fields: dict[str, Any] = {"encoding": "utf-8", "num_bytes": len(text.encode("utf-8", "replace"))}
        for field, kind in (
            ("encoding", str),
            ("num_bytes", int),
            ("num_replaced", int),
            ("kind", str),
            ("digest", str),
        ):
            if isinstance(about.get(field), kind):
                fields[field] = about[field]
        parts, notes = about.get("parts"), about.get("notes")
        if isinstance(parts, list) and all(map(_is_part, parts)):
            fields["parts"] = tuple(Part(label, start) for label, start in parts)
        if isinstance(notes, list) and all(isinstance(note, str) for note in notes):
            fields["notes"] = tuple(notes)
        path = about.get("path")
        found[name] = Document(name, Path(path if isinstance(path, str) and "\0" not in path else name), text, **fields)
    return found


def _is_part(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int


def not_yet_read(session: Any, documents: Sequence[Document]) -> tuple[list[Document], list[str]]:
    """Return the documents whose text is not in the context yet, and the names of the others."""
    texts = {text for _, text in session.texts}
    return (
        [document for document in documents if document.text not in texts],
        [document.name for document in documents if document.text in texts],
    )


def undo(chat: "Chat", rest: str) -> None:
    """Go back before the last turn, or the last few."""
    count = int(rest) if rest.isascii() and rest.isdigit() and len(rest) < 6 else 0 if rest else 1
    if not count:
        raise SettingsError(f"/undo takes a number of turns, not {rest!r}: /undo 2")
    before = chat.session.engine.position
    events = chat.session.go_back(count)
    if events is None:
        raise SettingsError(
            "there is nothing (more) to undo: /reset forgets the conversation, /reset all everything"
            if count == 1
            else f"there are not {count} turns to undo: /turns lists them"
        )
    chat.consume(events, reading="reading again")
    chat.forget_undone()
    count = len(chat.session.messages)
    if count and chat.session.messages[-1].role == "user":  # documents alone: the question that followed is gone
        chat.questions.pop(count - 1, None)
    now = chat.session.engine.position
    chat.note(f"undone: {figures.tokens(before - now)} freed, {now:,} in the context")


def fork(chat: "Chat", rest: str) -> None:
    """Begin another line of the conversation here."""
    tree = chat.session.tree
    before = tree.line
    name = tree.fork(rest or None)
    chat.note(f"line {clean_line(name)} begins here, after turn {tree.current.number}; /goto {before} goes back")


def go_to(chat: "Chat", rest: str) -> None:
    """Go to another turn, or to the end of another line."""
    if not rest:
        raise SettingsError("/goto needs a turn or a line: /goto 3; /turns lists them")
    tree = chat.session.tree
    turn = tree.find(rest)
    again = tree.needs_reading(turn)
    if again:
        chat.note(f"{figures.tokens(again)} on the way there are not kept any more and are read again")
    began = time.perf_counter()
    finished = chat.consume(
        chat.session.go_to(turn, line=rest if rest in tree.lines else None), reading="reading again"
    )
    follow(chat)
    took = figures.duration(time.perf_counter() - began)
    stopped = "stopped: " if finished is not None and finished.reason == "cancelled" else ""
    chat.note(
        f"{stopped}at turn {tree.current.number} of line {clean_line(tree.line)}: "
        f"{figures.tokens(chat.session.engine.position)} in the context ({took})"
    )


def turns(chat: "Chat") -> None:
    """List the turns, those of other lines dim."""
    tree = chat.session.tree
    way = set(tree.current.way())

    def row(turn: "Turn") -> tuple[int, int | None, str, str, int, str, bool, bool]:
        lines = ", ".join(name for name, end in tree.lines.items() if end is turn)
        parent = None if turn.parent is None else turn.parent.number
        current = turn is tree.current
        return turn.number, parent, turn.kind, turn.name, len(turn.token_ids), lines, turn in way, current

    chat.show(turns_view([row(turn) for turn in tree.turns.values()]))
    chat.note("/goto TURN goes there, /undo one back; dim ones are on other lines")
