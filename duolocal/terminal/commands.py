"""The commands of the chat: each is one function, its help line stands beside it."""

import difflib
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from duolocal.documents.loading import summary
from duolocal.errors import SettingsError
from duolocal.sampling import Sampling
from duolocal.terminal import docs_view, sessions_chat, sources_view, transcript, views
from duolocal.terminal.clean import clean_line
from duolocal.terminal.docs_load import load_paths
from duolocal.terminal.sampling_options import change, show_value

if TYPE_CHECKING:
    from duolocal.terminal.chat import Chat

_COMMAND = re.compile(r"/([A-Za-z]+|\?)(?:\s+(.*))?", re.DOTALL)
_NEEDS_RESTART = (
    "model",
    "context",
    "kv",
    "heads",
    "sink_size",
    "recent_size",
    "chunk_size",
    "device",
    "dtype",
    "rope",
)
_ALIASES = {"exit": "quit", "q": "quit", "?": "help"}


@dataclass(frozen=True)
class Command:
    """A command: what may follow its name, one line of help, and what it does."""

    usage: str
    help: str
    run: Callable[["Chat", str], None]


COMMANDS: dict[str, Command] = {}


def _command(usage: str, help: str) -> Callable[[Callable[["Chat", str], None]], Callable[["Chat", str], None]]:
    def register(run: Callable[["Chat", str], None]) -> Callable[["Chat", str], None]:
        COMMANDS[usage.split()[0].removeprefix("/")] = Command(usage, help, run)
        return run

    return register


def help_lines() -> dict[str, str]:
    """Return command name -> its line of help, for completion."""
    return {name: command.help for name, command in COMMANDS.items()}


def words_after(command: str) -> Sequence[str]:
    """Return the words that may follow a command, for completion."""
    if command == "set":
        return [item.name for item in fields(Sampling)]
    return {"reset": ["all"], "copy": ["all"], "help": list(COMMANDS)}.get(command, [])


def parse(text: str) -> tuple[str, str] | None:
    """Split an input into (command, rest); None when it is a question.

    A first word with a second slash in it is text (a path, a comment); so is a line that starts with a space.
    """
    match = _COMMAND.fullmatch(text.rstrip())
    return (match[1].lower(), (match[2] or "").strip()) if match else None


def run(chat: "Chat", name: str, rest: str) -> None:
    """Run a command; an unknown one raises SettingsError with a suggestion."""
    command = COMMANDS.get(_ALIASES.get(name, name))
    if command is None:
        close = difflib.get_close_matches(name, [*COMMANDS, *_ALIASES], n=1, cutoff=0.5)
        hint = f"did you mean /{close[0]}?" if close else "/help lists them"
        raise SettingsError(f"unknown command /{name}: {hint} (a space before the slash sends it as text)")
    command.run(chat, rest)


def split_words(rest: str) -> list[str]:
    """Split the words after a command as a shell does; SettingsError for an open quote."""
    try:
        return shlex.split(rest)
    except ValueError:
        raise SettingsError(f"a quote is not closed in {rest!r}: close it") from None


def _no_words(name: str, rest: str) -> None:
    if rest:
        raise SettingsError(f"/{name} takes nothing after it, but there is {rest!r}: leave it out")


def paths_in(rest: str) -> list[str]:
    """Split what follows /load into paths, quotes as in a shell; one path may hold spaces without them."""
    return [rest] if os.path.exists(os.path.expanduser(rest)) else split_words(rest)


@_command("/load PATH...", "add documents: files, folders, zip archives, patterns such as docs/*.md")
def _load(chat: "Chat", rest: str) -> None:
    if not rest:
        raise SettingsError("/load needs a path: /load FILE...")
    loaded = load_paths(paths_in(rest), chat.console)
    left_out = summary(loaded.skipped)
    if left_out:
        chat.note(left_out)
    chat.add_documents(loaded.documents)


@_command("/docs", "list the documents in the context: source, pages, tokens, share")
def _docs(chat: "Chat", rest: str) -> None:
    _no_words("docs", rest)
    for name, text in chat.reader.documents.items() if chat.reader is not None else ():
        chat.note(f"{clean_line(name)}: {len(text):,} characters, read for each question")
    rows = [
        (item.name, item.num_tokens, chat.files.get(item.name))
        for item in chat.session.context_items()
        if item.kind == "document"
    ]
    chat.show(docs_view.loaded_view(rows, context=chat.facts.context, columns=chat.console.width))


@_command("/context", "show everything in the context, with token counts")
def _context(chat: "Chat", rest: str) -> None:
    _no_words("context", rest)
    items = chat.session.context_items()
    position = chat.session.engine.position
    chat.show(views.context_view(items, position, chat.facts.context, chat.console.width))


@_command("/sources [N]", "show the passages that were looked at most for the last answer")
def _sources(chat: "Chat", rest: str) -> None:
    sources_view.sources(chat, rest)


@_command("/stats", "speeds, memory by head class, head plan, KV format")
def _stats(chat: "Chat", rest: str) -> None:
    _no_words("stats", rest)
    engine = chat.session.engine
    chat.show(views.stats_view(chat.facts, engine.position, engine.memory(), chat.last_answer, chat.last_load))


@_command("/set [NAME VALUE]", "show or change the sampling settings, at once")
def _set(chat: "Chat", rest: str) -> None:
    if not rest:
        table = Table(box=None, pad_edge=False, show_header=False)
        for item in fields(Sampling):
            table.add_row(Text(item.name, "bold"), Text(clean_line(show_value(chat.sampling, item.name))))
        chat.show(table)
        chat.note("fixed until a restart: " + ", ".join(_NEEDS_RESTART))
        return
    name, _, value = rest.replace("=", " ", 1).partition(" ")
    name, value = name.lstrip("-").replace("-", "_"), value.strip()
    if name in _NEEDS_RESTART:
        words = _restart_words(chat, name, value or "VALUE")
        raise SettingsError(f"{name} is fixed while the model is loaded; restart with: {shlex.join(words)}")
    if value:
        chat.sampling = change(chat.sampling, name, value, also=_NEEDS_RESTART)
    chat.note(f"{name} = {show_value(chat.sampling, name)}")


def _restart_words(chat: "Chat", name: str, value: str) -> list[str]:
    option = "--" + name.replace("_", "-")
    words = chat.settings.options()
    if option in words:
        words[words.index(option) + 1] = value
    else:
        words += [option, value]
    # Of a zip archive every member has the archive's path.
    names = chat.session.documents
    if chat.reader is not None:
        words, names = [*words, "--reader", "retrieve"], list(chat.reader.documents)
    paths = list(dict.fromkeys(str(chat.files[name].path) for name in names if name in chat.files))
    return [*chat.program.split(), *words, *(["--doc", *paths] if paths else [])]


@_command("/undo [N]", "take the last question and answer (or document) out of the context")
def _undo(chat: "Chat", rest: str) -> None:
    sessions_chat.undo(chat, rest)


@_command("/turns", "list the turns, also those of other lines")
def _turns(chat: "Chat", rest: str) -> None:
    _no_words("turns", rest)
    sessions_chat.turns(chat)


@_command("/goto TURN", "go to the end of a turn, or of a line; nothing is forgotten")
def _goto(chat: "Chat", rest: str) -> None:
    sessions_chat.go_to(chat, rest)


@_command("/fork [NAME]", "begin another line of the conversation here")
def _fork(chat: "Chat", rest: str) -> None:
    sessions_chat.fork(chat, rest)


@_command("/retry", "answer the last question once more")
def _retry(chat: "Chat", rest: str) -> None:
    _no_words("retry", rest)
    chat.retry()


@_command("/reset [all]", "forget the conversation; with all, the documents too")
def _reset(chat: "Chat", rest: str) -> None:
    if rest not in ("", "all"):
        raise SettingsError(f"/reset {rest} is not known: give /reset or /reset all")
    if rest:
        chat.session.reset()
        if chat.reader is not None:
            chat.reader.documents.clear()
    else:
        chat.session.forget_conversation()
    chat.forget_undone()
    documents = chat.session.documents
    kept = f"{len(documents)} documents stay" if len(documents) != 1 else "1 document stays"
    chat.note(f"the conversation is forgotten; {kept}" if documents else "the context is empty")


@_command("/system [TEXT]", "show or change the system message (none removes it)")
def _system(chat: "Chat", rest: str) -> None:
    if not rest:
        chat.note(chat.session.system or "no system message; /system TEXT sets one")
        return
    text = None if rest.lower() == "none" else rest
    chat.consume(chat.session.set_system(text), reading="reading the documents again")
    chat.questions.clear()
    chat.ends.clear()
    chat.note("system message " + ("changed" if text else "removed") + "; the conversation begins anew")


def _transcript(chat: "Chat") -> str:
    return transcript.as_markdown(
        chat.session.messages,
        model=chat.facts.model,
        documents=chat.session.documents,
        questions=chat.questions,
        ends=chat.ends,
    )


def _one_name(command: str, rest: str, wanted: str) -> tuple[str, bool]:
    """Split `[--force] NAME`."""
    words = split_words(rest)
    force = words[:1] == ["--force"]
    if force:
        words = words[1:]
    if len(words) != 1:
        raise SettingsError(f"/{command} needs one name: {wanted}")
    return words[0], force


@_command("/save [--force] NAME", "keep this chat as a session; a FILE.md gets the transcript")
def _save(chat: "Chat", rest: str) -> None:
    name, force = _one_name("save", rest, "/save NAME keeps this chat, /save chat.md writes the transcript")
    if not sessions_chat.is_transcript(name):
        sessions_chat.save(chat, name, force=force)
        return
    path = Path(name).expanduser()
    transcript.save(_transcript(chat), path, overwrite=force)
    chat.note(f"saved {path}")


@_command("/open [--force] NAME", "go on with a saved session")
def _open(chat: "Chat", rest: str) -> None:
    name, force = _one_name("open", rest, "/open NAME; `duolocal sessions list` shows what there is")
    sessions_chat.open_named(chat, name, force=force)


@_command("/copy [all]", "put the last answer (or the whole transcript) on the clipboard")
def _copy(chat: "Chat", rest: str) -> None:
    if rest not in ("", "all"):
        raise SettingsError(f"/copy {rest} is not known: give /copy or /copy all")
    answers = [message.content for message in chat.session.messages if message.role == "assistant"]
    if not answers:
        raise SettingsError("there is no answer to copy yet")
    text = _transcript(chat) if rest else answers[-1]
    sequence = transcript.clipboard_sequence(text)
    chat.console.file.write(sequence)
    chat.console.file.flush()
    chat.note(f"{len(text):,} characters sent to the terminal's clipboard (OSC 52; not every terminal takes it)")


@_command("/help", "this list")
def _help(chat: "Chat", rest: str) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=chat.console.width >= 60)
    table.add_column(overflow="fold")
    for command in COMMANDS.values():
        table.add_row(Text(command.usage), Text(command.help))
    chat.show(table)
    chat.note(
        "Several lines: Alt+Enter, a backslash at the end of a line, or ''' before and after; a paste stays one "
        "input.\nCtrl-C stops an answer or a document being read, and clears the line; twice, or Ctrl-D, leaves."
    )


@_command("/quit", "leave (/exit and Ctrl-D do the same)")
def _quit(chat: "Chat", rest: str) -> None:
    _no_words("quit", rest)
    chat.leaving = True
