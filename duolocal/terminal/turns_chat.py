"""The chat's commands over the turns of the conversation: /undo, /turns, /goto, /fork, /retry, /reset, /system."""

import time
from typing import TYPE_CHECKING

from duolocal.errors import SettingsError
from duolocal.terminal import figures
from duolocal.terminal.chat_state import CommandHost, Commands, all_or_nothing, no_words, whole_number
from duolocal.terminal.clean import clean_line
from duolocal.terminal.sessions_view import turns_view

if TYPE_CHECKING:
    from duolocal.engine.turns import Turn

COMMANDS = Commands()
_MOST_TURNS = 99_999


@COMMANDS.add("/undo [N]", "take the last question and answer (or document) out of the context")
def undo(host: CommandHost, rest: str) -> None:
    """Go back before the last turn, or the last few."""
    state, session = host.state, host.state.session
    count = whole_number(rest, default=1, most=_MOST_TURNS)
    if count is None:
        raise SettingsError(f"/undo takes a number of turns, not {rest!r}: /undo 2")
    before = session.engine.position
    events = session.go_back(count)
    if events is None:
        raise SettingsError(
            "there is nothing (more) to undo: /reset forgets the conversation, /reset all everything"
            if count == 1
            else f"there are not {count} turns to undo: /turns lists them"
        )
    host.consume(events, reading="reading again")
    state.forget_undone()
    count = len(session.messages)
    if count and session.messages[-1].role == "user":  # documents alone: the question that followed is gone
        state.questions.pop(count - 1, None)
    now = session.engine.position
    host.note(f"undone: {figures.tokens(before - now)} freed, {now:,} in the context")


@COMMANDS.add("/turns", "list the turns, also those of other lines")
def turns(host: CommandHost, rest: str) -> None:
    """List the turns, those of other lines dim."""
    no_words("turns", rest)
    tree = host.state.session.tree
    way = set(tree.current.way())

    def row(turn: "Turn") -> tuple[int, int | None, str, str, int, str, bool, bool]:
        lines = ", ".join(name for name, end in tree.lines.items() if end is turn)
        parent = None if turn.parent is None else turn.parent.number
        current = turn is tree.current
        return turn.number, parent, turn.kind, turn.name, len(turn.token_ids), lines, turn in way, current

    host.show(turns_view([row(turn) for turn in tree.turns.values()], columns=host.console.width))
    host.note("/goto TURN goes there, /undo one back; dim ones are on other lines")


@COMMANDS.add("/goto TURN", "go to the end of a turn, or of a line; nothing is forgotten")
def go_to(host: CommandHost, rest: str) -> None:
    """Go to another turn, or to the end of another line."""
    if not rest:
        raise SettingsError("/goto needs a turn or a line: /goto 3; /turns lists them")
    session, tree = host.state.session, host.state.session.tree
    turn = tree.find(rest)
    again = tree.needs_reading(turn)
    if again:
        host.note(f"{figures.tokens(again)} on the way there are not kept any more and are read again")
    began = time.perf_counter()
    finished = host.consume(session.go_to(turn, line=rest if rest in tree.lines else None), reading="reading again")
    host.state.follow()
    took = figures.duration(time.perf_counter() - began)
    stopped = "stopped: " if finished is not None and finished.reason == "cancelled" else ""
    host.note(
        f"{stopped}at turn {tree.current.number} of line {clean_line(tree.line)}: "
        f"{figures.tokens(session.engine.position)} in the context ({took})"
    )


@COMMANDS.add("/fork [NAME]", "begin another line of the conversation here")
def fork(host: CommandHost, rest: str) -> None:
    """Begin another line of the conversation here."""
    tree = host.state.session.tree
    before = tree.line
    name = tree.fork(rest or None)
    host.note(f"line {clean_line(name)} begins here, after turn {tree.current.number}; /goto {before} goes back")


@COMMANDS.add("/retry", "answer the last question once more")
def retry(host: CommandHost, rest: str) -> None:
    """Answer the last question once more."""
    no_words("retry", rest)
    state = host.state
    question = state.questions.get(len(state.session.messages) - 2, "")
    host.answer(state.session.retry(state.sampling), question)


@COMMANDS.add("/reset [all]", "forget the conversation; with all, the documents too", words=["all"])
def reset(host: CommandHost, rest: str) -> None:
    """Forget the conversation, or everything."""
    state = host.state
    if all_or_nothing("reset", rest):
        state.session.reset()
        if state.reader is not None:
            state.reader.documents.clear()
    else:
        state.session.forget_conversation()
    state.forget_undone()
    documents = state.session.documents
    kept = f"{len(documents)} documents stay" if len(documents) != 1 else "1 document stays"
    host.note(f"the conversation is forgotten; {kept}" if documents else "the context is empty")


@COMMANDS.add("/system [TEXT]", "show or change the system message (none removes it)")
def system(host: CommandHost, rest: str) -> None:
    """Show the system message, or change it."""
    session = host.state.session
    if not rest:
        host.note(session.system or "no system message; /system TEXT sets one")
        return
    text = None if rest.lower() == "none" else rest
    host.consume(session.set_system(text), reading="reading the documents again")
    host.state.forget_messages()
    host.note("system message " + ("changed" if text else "removed") + "; the conversation begins anew")
