"""The chat's commands over documents: /load, /docs, /context, /sources."""

import os
from collections.abc import Sequence

from duolocal.documents import Document
from duolocal.documents.loading import beside, summary
from duolocal.errors import DuoLocalError, SettingsError
from duolocal.sources import find_sources
from duolocal.terminal import docs_view, figures, views
from duolocal.terminal.chat_state import CommandHost, Commands, no_words, split_words, whole_number
from duolocal.terminal.clean import clean_line
from duolocal.terminal.docs_load import load_paths
from duolocal.terminal.progress import bar
from duolocal.terminal.sources_view import sources_view

COMMANDS = Commands()
_NUM_SOURCES = 3
_MOST_SOURCES = 20


@COMMANDS.add("/load PATH...", "add documents: files, folders, zip archives, patterns such as docs/*.md")
def load(host: CommandHost, rest: str) -> None:
    """Read documents from disk into the context."""
    if not rest:
        raise SettingsError("/load needs a path: /load FILE...")
    # Quotes as in a shell; one path may hold spaces without them.
    paths = [rest] if os.path.exists(os.path.expanduser(rest)) else split_words(rest)
    loaded = load_paths(paths, host.console, on_failure=lambda error: host.complain(str(error)))
    left_out = summary(loaded.skipped)
    if left_out:
        host.note(left_out)
    add_documents(host, loaded.documents)


def add_documents(host: CommandHost, documents: Sequence[Document]) -> None:
    """Read documents into the context, all or, when they do not fit, none; complain when it does not work."""
    state = host.state
    named, notes = beside(documents, {name: state.files.get(name) for name in state.documents})
    for note in notes:
        host.note(clean_line(note))
    for document in named.values():
        if document.note:
            host.note(document.note)
    if state.reader is not None:
        for name, document in named.items():
            try:
                state.reader.add(name, document.text)
            except DuoLocalError as error:
                host.complain(str(error))
                continue
            state.files[name] = document
            host.note(_read_each_time(name, document.text))
    elif named:
        _read(host, named)


def _read(host: CommandHost, named: dict[str, Document]) -> None:
    state = host.state
    names = ", ".join(map(clean_line, named)) if len(named) < 4 else f"{len(named)} documents"
    state.files |= named  # now, for what is saved while they are read
    try:
        with bar(host.console, "counting tokens", ""):
            events = state.session.add_documents([(name, document.text) for name, document in named.items()])
        finished = host.consume(events, reading=f"reading {names}")
    except DuoLocalError as error:
        host.complain(str(error))
        return
    state.last_load = finished
    sizes = {item.name: item.num_tokens for item in state.session.context_items() if item.kind == "document"}
    for name in named:
        if name in sizes:
            host.note(f"loaded {clean_line(name)}: {figures.tokens(sizes[name])}")
        else:
            host.note(f"stopped: {clean_line(name)} is not in the context")
    host.note(f"{state.facts.context - state.session.engine.position:,} tokens are free")


def _read_each_time(name: str, text: str) -> str:
    return f"{clean_line(name)}: {len(text):,} characters, read for each question"


@COMMANDS.add("/docs", "list the documents in the context: source, pages, tokens, share")
def docs(host: CommandHost, rest: str) -> None:
    """List the documents."""
    no_words("docs", rest)
    state = host.state
    for name, text in state.reader.documents.items() if state.reader is not None else ():
        host.note(_read_each_time(name, text))
    rows = [
        (item.name, item.num_tokens, state.files.get(item.name))
        for item in state.session.context_items()
        if item.kind == "document"
    ]
    host.show(docs_view.loaded_view(rows, context=state.facts.context, columns=host.console.width))


@COMMANDS.add("/context", "show everything in the context, with token counts")
def context(host: CommandHost, rest: str) -> None:
    """Show what is in the context."""
    no_words("context", rest)
    session, facts = host.state.session, host.state.facts
    host.show(views.context_view(session.context_items(), session.engine.position, facts.context, host.console.width))


@COMMANDS.add("/sources [N]", "show the passages that were looked at most for the last answer")
def sources(host: CommandHost, rest: str) -> None:
    """Show the passages looked at most for the last answer; `rest` may say how many."""
    count = whole_number(rest, default=_NUM_SOURCES, most=_MOST_SOURCES)
    if count is None:
        raise SettingsError(f"/sources takes a number from 1 to {_MOST_SOURCES}, not {rest!r}: /sources 5")
    with host.console.status("looking up what was read"):
        found = find_sources(host.state.session, count=count)
    host.show(sources_view(found, host.state.files))
